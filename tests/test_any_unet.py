"""Differently built UNets are captured, quantised, saved, loaded without their class, and run at any batch size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import networks
import pytest
import safetensors.torch
import torch
from networks import CASES, SAMPLES, normal, relative
from torch import Tensor, nn

from qdiff_engine.calibration.calibration import calibrate
from qdiff_engine.graph.interpret import flatten_conditioning, simulate
from qdiff_engine.quantization import quantize
from qdiff_engine.recipe import Recipe
from qdiff_engine.runtime.model import load
from qdiff_engine.sampling import Guidance, Step, conditioning_for, denoise, initial_noise, predict, sample

ROOT = Path(__file__).resolve().parent.parent
TIMESTEP = 500

_RUN_WITHOUT_DIFFUSERS = """
import sys
sys.modules["diffusers"] = None  # any import of it fails
import torch, safetensors.torch
from qdiff_engine import load
torch.set_num_threads(int(sys.argv[1]))
for folder in sys.argv[2:]:
    given = safetensors.torch.load_file(f"{folder}.in")
    output = load(folder)(given.pop("sample"), 500, return_dict=False, **given)[0]
    safetensors.torch.save_file({"output": output.contiguous()}, f"{folder}.out")
assert not any(name.startswith("diffusers.") for name in sys.modules)
"""


def one(value: Any, index: int) -> Any:
    """Sample ``index`` of nested conditioning."""
    return {k: one(v, index) for k, v in value.items()} if isinstance(value, dict) else value[index : index + 1]


def head(value: Any, count: int) -> Any:
    """The first ``count`` samples of nested conditioning."""
    return {k: head(v, count) for k, v in value.items()} if isinstance(value, dict) else value[:count]


def swap(value: Any) -> Any:
    """The two samples of nested conditioning, exchanged."""
    return {k: swap(v) for k, v in value.items()} if isinstance(value, dict) else value[[1, 0]]


def run(model: Any, x: Tensor, timestep: float, given: dict[str, Any]) -> Tensor:
    return model(x, timestep, return_dict=False, **given)[0]


@pytest.mark.parametrize("name", CASES)
def test_w8a8_is_close_to_float(name: str) -> None:
    """< 7 % relative L2 in every calibrated row, on the trajectory's own latents."""
    model, given = networks.integer_model(name), networks.conditioning(name, SAMPLES)
    errors = [
        relative(run(model, step.sample, step.timestep, given), step.prediction) for step in networks.trajectory(name)
    ]
    print(f"{name}: {', '.join(f'{100 * error:.2f} %' for error in errors)}")
    assert max(errors) < 0.07


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bit_equal(name: str, tmp_path: Path) -> None:
    model = networks.integer_model(name)
    model.save_pretrained(tmp_path / "artifact")
    loaded = load(tmp_path / "artifact")
    assert str(loaded.graph) == str(model.graph)
    x, given = normal(3, *CASES[name].shape), networks.conditioning(name, 3)
    for timestep in (0, 1, TIMESTEP, 999):
        assert torch.equal(run(loaded, x, timestep, given), run(model, x, timestep, given))


def test_runs_without_the_original_class(tmp_path: Path) -> None:
    """Another process, in which diffusers cannot be imported, computes the same bits."""
    expected = {}
    for name in CASES:
        folder, given = str(tmp_path / name), networks.conditioning(name, 3)
        networks.integer_model(name).save_pretrained(folder)
        x = normal(3, *CASES[name].shape)
        expected[folder] = run(networks.integer_model(name), x, TIMESTEP, given)
        if "added_cond_kwargs" in given:  # the graph's names are accepted too, and safetensors has no nesting
            given = flatten_conditioning(given)
        safetensors.torch.save_file({"sample": x, **given}, f"{folder}.in")
    command = [sys.executable, "-c", _RUN_WITHOUT_DIFFUSERS, str(torch.get_num_threads()), *expected]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for folder, output in expected.items():
        assert torch.equal(safetensors.torch.load_file(f"{folder}.out")["output"], output), folder


@pytest.mark.parametrize("name", CASES)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    """On the engine's own kernels, bit for bit: any batch size from one artifact.

    With one thread, for PyTorch's float transposed convolution splits its sums among threads by the batch.
    """
    model = networks.rebuilt(networks.integer_model(name), backend="native")
    with networks.threads(1):
        for batch in (1, 3, 8, 64):
            x, given = normal(batch, *CASES[name].shape), networks.conditioning(name, batch)
            together = run(model, x, TIMESTEP, given)
            assert together.shape == x.shape and bool(torch.isfinite(together).all())
            for j in {0, batch // 2, batch - 1}:
                assert torch.equal(run(model, x[j : j + 1], TIMESTEP, one(given, j)), together[j : j + 1])


@pytest.mark.parametrize("name", CASES)
def test_batches_on_the_fastest_backend(name: str) -> None:
    """oneDNN picks a kernel by shape, and each rounds its float epilogue in its own order: last bits, then a flipped
    rounding, which spreads. What a batch changes stays below what quantisation itself changes."""
    model = networks.integer_model(name)
    step = networks.trajectory(name)[1]
    x, given = step.sample.repeat(16, 1, 1, 1), networks.conditioning(name, 4 * 16)
    error = relative(
        run(model, step.sample, step.timestep, networks.conditioning(name, SAMPLES)),
        step.prediction,
    )
    for batch in (1, 3, 8, 64):
        output = run(model, x[:batch], step.timestep, {k: head(v, batch) for k, v in given.items()})
        expected = step.prediction.repeat(16, 1, 1, 1)[:batch]
        assert relative(output, expected) < 0.07
        for j in {0, batch // 2, batch - 1}:
            alone = run(model, x[j : j + 1], step.timestep, one(given, j))
            assert relative(alone, output[j : j + 1]) < error


@pytest.mark.parametrize("name", ["class", "sd", "sdxl", "guided"])
def test_conditioning_is_heard(name: str) -> None:
    """Other conditioning gives another output, as far away as in the float network; the caches do not mix them up."""
    model, x = networks.integer_model(name), normal(2, *CASES[name].shape)
    given = networks.conditioning(name, 2)
    swapped = {k: swap(v) for k, v in given.items()}
    timestep = int(networks.trajectory(name)[1].timestep)
    outputs = [run(model, x, timestep, c) for c in (given, swapped, given)]
    assert torch.equal(outputs[0], outputs[2])
    with torch.no_grad():
        times = torch.full((2,), timestep)
        floats = [predict(networks.network(name), x, times, c) for c in (given, swapped)]
    moved, expected = outputs[1] - outputs[0], floats[1] - floats[0]
    assert float(expected.norm()) > 0 and relative(moved, expected) < 0.5


def test_guided_calibration_and_sampling() -> None:
    """Classifier-free guidance: both branches are calibrated, and the guided prediction stays close."""
    case, unet, scheduler = CASES["sd"], networks.network("sd"), networks.ddim()
    words: dict[str, Any] = {"guidance_scale": 3.0, "conditioning": case.conditioning}
    words["unconditional"] = {"encoder_hidden_states": normal(1, 7, 24, seed=9)}
    calibration = calibrate(unet, scheduler, shape=case.shape, steps=3, samples=2, **words)
    assert calibration.key["guidance_scale"] == 3.0
    model = quantize(unet, calibration, Recipe.named("w8a8"))
    guidance = Guidance(3.0, words["unconditional"], case.conditioning)
    steps: list[Step] = []
    with torch.no_grad():
        noise = initial_noise((2, *case.shape), 0)
        denoise(unet, scheduler, noise, steps=3, guidance=guidance, on_step=steps.append)
    for step in steps:
        for branch in (case.conditioning, conditioning_for(words["unconditional"], range(2))):
            with torch.no_grad():
                expected = run(unet, step.sample, step.timestep, branch)
            assert relative(run(model, step.sample, step.timestep, branch), expected) < 0.07
    model = networks.rebuilt(model, backend="native")
    images = sample(model, scheduler, (3, *case.shape), steps=3, **words)
    assert torch.equal(images, sample(model, scheduler, (3, *case.shape), steps=3, batch=1, **words))


def test_the_bundled_network(demo_unet: nn.Module, demo_scheduler: Any, tmp_path: Path) -> None:
    """< 3 % in every calibrated row, at t = 0 with a plan that keeps its activations floating; bit-equal once saved.

    At t = 0 the noise to be predicted is a hundredth of the image: 8 bits show in the prediction, not in the image.
    """
    calibration, last = networks.bundled_calibration(), 0.0
    model = quantize(demo_unet, calibration, Recipe.named("w8a8"))
    planned = quantize(demo_unet, calibration, Recipe.named("w8a8", plan=("A8",) * 9 + ("A16",)))
    steps: list[Step] = []
    with torch.no_grad():
        denoise(demo_unet, demo_scheduler, initial_noise((4, 1, 32, 32), 0), steps=10, on_step=steps.append)

    def distances(integers: Any) -> dict[float, float]:
        return {s.timestep: relative(run(integers, s.sample, s.timestep, {}), s.prediction) for s in steps}

    errors, with_plan = distances(model), distances(planned)
    print(f"bundled: {', '.join(f't={t:g}: {100 * error:.2f} %' for t, error in errors.items())}")
    print(f"bundled, A16 at t=0: {100 * with_plan[last]:.2f} % there")
    assert max(with_plan.values()) < 0.03
    assert max(error for t, error in errors.items() if t != last) < 0.03
    noise_level = float((1 - demo_scheduler.alphas_cumprod[0]).sqrt())
    prediction, latents = steps[-1].prediction, steps[-1].sample
    assert errors[last] * noise_level * float(prediction.norm() / latents.norm()) < 0.003
    step = steps[5]
    inputs = networks.flat_inputs(model, step.sample, step.timestep, {})
    simulated = simulate(model.graph, model.constants, model.weights, model.table, inputs)
    distance = relative(run(model, step.sample, step.timestep, {}), simulated)
    print(f"bundled: engine to simulation {distance:.2e}, to float {errors[step.timestep]:.2e}")
    assert distance < relative(simulated, step.prediction)
    model.save_pretrained(tmp_path / "artifact")
    loaded, x = load(tmp_path / "artifact"), normal(3, 1, 32, 32)
    together = run(model, x, TIMESTEP, {})
    assert torch.equal(run(loaded, x, TIMESTEP, {}), together)
    assert torch.equal(run(loaded, x[1:2], TIMESTEP, {}), together[1:2])
