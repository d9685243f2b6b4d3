"""Corrections at work: no operator more, equal to the formula, only where their key fits; pipelines; command line."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from comparing import available
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler
from networks import CASES, STEPS, normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qdiff_engine as qe
from qdiff_engine import ops
from qdiff_engine.cli import main
from qdiff_engine.sampling import initial_noise
from qdiff_engine.tables import Correction

NAME = "unet2d"
SHAPE = CASES[NAME].shape


def sampler(kind: str, **changes: Any) -> Any:
    config = {"num_train_timesteps": 1000, "clip_sample": False, **changes}
    return DDIMScheduler(**config) if kind == "ddim" else DDPMScheduler(**config)


@functools.cache
def corrected(kind: str = "ddim", eta: float = 0.0, method: str = "ner+ibc+ivc+vsc", recipe: str = "w4a8") -> Any:
    """A model with every correction that a sampler can take."""
    unet, scheduler = networks.network(NAME), sampler(kind)
    calibration = qe.calibrate(unet, scheduler, shape=SHAPE, steps=STEPS, samples=2, eta=eta)
    model = qe.quantize(unet, calibration, qe.Recipe.named(recipe))
    noise = qe.measure_noise(model, unet, scheduler, SHAPE, samples=2)
    return qe.correct(model, unet, scheduler, noise, method, shape=SHAPE)


def draw(model: Any, scheduler: Any, steps: int = STEPS, **keywords: Any) -> Tensor:
    return qe.sample(model, scheduler, (2, *SHAPE), steps=steps, seed=3, **keywords)


class Counting(TorchDispatchMode):
    """Names of the torch operators that touch more than a channel vector."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(tensor.numel() > 4 * SHAPE[0] for tensor in networks.tensors([args, kwargs or {}])):
            self.names.append(str(func))
        return result


def operator_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the engine's operators, added as they are called by models that are made from here on."""
    calls: list[str] = []
    resolve = ops.resolve

    def counting(operator: str, *place: Any) -> Any:
        kernel = resolve(operator, *place)

        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(operator)
            return kernel(*args, **kwargs)

        return run

    monkeypatch.setattr(ops, "resolve", counting)
    return calls


@pytest.mark.parametrize(("kind", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
@pytest.mark.parametrize("backend", ["onednn", "native", "torch"])
def test_corrections_cost_no_operator(kind: str, eta: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's operators of every step, and torch's on whole images, are the same calls on and off."""
    available(backend)
    calls = operator_calls(monkeypatch)
    source = corrected(kind, eta)
    model = networks.rebuilt(source, backend)
    model.correction = source.correction
    draw(model, sampler(kind), eta=eta)  # weights are packed, constants cached
    counts, per_image, per_loop = [], [], []
    for on in (True, False):
        calls.clear()
        with Counting() as loop:
            draw(model, sampler(kind), eta=eta, correction=on, strict=on)
        counts.append(list(calls))
        per_loop.append([name for name in loop.names if name.startswith(("aten.add", "aten.mul"))])
        with Counting() as counter, model.correcting(on):
            model(normal(2, *SHAPE), model.table.timesteps[0])
        per_image.append(counter.names)
    assert counts[0] == counts[1] and counts[0].count("denoise_step") == STEPS
    assert counts[0].count("int_conv2d") > 10 * STEPS
    assert per_image[0] == per_image[1] and per_loop[0] == per_loop[1]


@pytest.mark.parametrize(("kind", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
@pytest.mark.parametrize("backend", ["native", "torch", "onednn"])
def test_folded_corrections_equal_the_formula(kind: str, eta: float, backend: str) -> None:
    available(backend)
    source = corrected(kind, eta, "mmse")
    model = networks.rebuilt(source, backend)
    for timestep in model.table.timesteps:
        assert_folded(model, timestep)


def assert_folded(model: Any, timestep: float) -> None:
    """The corrected prediction is a e + b in float64."""
    x, row = normal(2, *SHAPE, seed=5), model.table.timesteps.index(timestep)
    with model.correcting(False):
        plain = model(x, timestep).sample.double()
    a, b = (t[row].double()[:, None, None] for t in (model.table.output_scale, model.table.output_shift))
    expected, actual = a * plain + b, model(x, timestep).sample
    assert not torch.equal(actual.double(), plain)
    assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_triton_launches_no_kernel_more(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call without corrections, then one with them: the same operators and kernels; a sampler's step likewise."""
    from qdiff_kernels.denoise_step import _denoise_step_kernel

    calls, launches, kind = operator_calls(monkeypatch), [], type(_denoise_step_kernel)
    launch = kind.run
    monkeypatch.setattr(kind, "run", lambda self, *a, **k: launches.append(self.__name__) or launch(self, *a, **k))
    model = networks.rebuilt(corrected(method="mmse"), "triton")
    calls.clear()
    assert_folded(model, model.table.timesteps[0])
    for made in (calls, launches):
        assert made[: len(made) // 2] == made[len(made) // 2 :]
    assert len(launches) > calls.count("int_conv2d") > 20

    launches.clear()
    x, prediction, bias = normal(2, *SHAPE), normal(2, *SHAPE, seed=1), normal(*SHAPE, seed=2)
    constants = torch.tensor([0.9, 0.4, -0.3, 0.0, 0.6, 0.8, 1.0, 1.0])
    given = (x, prediction, None, None, constants)
    steps = [ops.denoise_step(*given, input_bias=b, backend="triton") for b in (None, bias)]
    assert launches == ["_denoise_step_kernel"] * 2 and not torch.equal(*steps)


def test_a_mixed_plan_corrects_each_row_by_its_mode() -> None:
    """Noise of three modes: the table's a and b are those of the row's own mode, and the run uses them."""
    from qdiff_engine.correction.measurement import moments
    from qdiff_engine.correction.output import mmse

    unet, modes = networks.network(NAME), ("A4", "A8", "A16", "A4")
    calibration = networks.calibration(NAME)
    model = qe.quantize(unet, calibration, qe.Recipe.named("w4a8", plan=modes))
    noise = qe.measure_noise(model, unet, networks.ddim(), SHAPE, samples=2, calibration=calibration)
    mixed = qe.correct(model, unet, networks.ddim(), noise, "mmse", shape=SHAPE)
    each = {mode: mmse(moments(noise, mode)) for mode in set(modes)}
    x = normal(1, *SHAPE)
    for row, mode in enumerate(modes):
        a, b = each[mode].a[row].float(), each[mode].b[row].float()
        assert torch.equal(mixed.table.output_scale[row], a) and torch.equal(mixed.table.output_shift[row], b)
        timestep = mixed.table.timesteps[row]
        expected = a[:, None, None] * model(x, timestep).sample + b[:, None, None]
        assert torch.allclose(mixed(x, timestep).sample, expected, rtol=1e-5, atol=1e-5)
    assert mixed.correction.key["modes"] == list(modes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": 3}, "steps 3, not 4"),
        ({"eta": 0.5}, "eta 0.5, not 0.0"),
        ({"scheduler": sampler("ddpm")}, "scheduler class DDPMScheduler, not DDIMScheduler"),
        ({"scheduler": sampler("ddim", clip_sample=True)}, "scheduler clip_sample True, not False"),
        ({"scheduler": sampler("ddim", prediction_type="v_prediction")}, "prediction_type v_prediction, not epsilon"),
        ({"guidance_scale": 2.0, "unconditional": {}}, "guidance_scale 2.0, not None"),
    ],
)
def test_another_setting_turns_corrections_off_with_one_warning(changes: dict[str, Any], reason: str) -> None:
    model = corrected()
    arguments = {"scheduler": sampler("ddim"), **changes}
    with pytest.warns(UserWarning, match="are for another setting") as caught:
        images = draw(model, **arguments)
    mine = [w for w in caught if "corrections" in str(w.message)]
    assert len(mine) == 1 and reason in str(mine[0].message) and "they are off" in str(mine[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(images, draw(model, correction=False, **arguments))
    with pytest.raises(ValueError, match="corrections .* are for another setting"):
        draw(model, strict=True, **arguments)
    assert model.corrects, "and on again for what fits"


def test_other_precisions_turn_corrections_off() -> None:
    """The noise of one plan says nothing about another; an artifact put together by hand is noticed."""
    source = corrected()
    table = dataclasses.replace(source.table, modes=("A4",) * STEPS)
    model = networks.rebuilt(source, table=table)
    model.correction = source.correction
    with pytest.raises(ValueError, match="other precisions"):
        draw(model, sampler("ddim"), strict=True)
    model = networks.rebuilt(source, key={**source.key, "model_hash": "0" * 64})
    model.correction = source.correction
    with pytest.raises(ValueError, match="another network"):
        draw(model, sampler("ddim"), strict=True)


def test_a_fitting_key_says_nothing() -> None:
    model = corrected()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on, off = (draw(model, sampler("ddim"), correction=on, strict=True) for on in (True, False))
        plain = draw(networks.rebuilt(model, table=identity(model.table)), sampler("ddim"))
    assert not torch.equal(on, off) and torch.equal(off, plain)
    report = [
        qe.compare(model, networks.network(NAME), sampler("ddim"), SHAPE, STEPS, 2, 3, correction=c)
        for c in (True, False)
    ]
    assert torch.equal(report[0].images, on) and torch.equal(report[1].images, off)
    with pytest.warns(UserWarning, match="are for another setting"):
        qe.compare(model, networks.network(NAME), sampler("ddim"), SHAPE, 3, 1)


def identity(table: Any) -> Any:
    ones, zeros = torch.ones_like(table.output_scale), torch.zeros_like(table.output_shift)
    return dataclasses.replace(table, output_scale=ones, output_shift=zeros)


def pipeline_images(pipe: Any, **keywords: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(j) for j in range(2)]
    array = pipe(batch_size=2, generator=generator, num_inference_steps=STEPS, output_type="np", **keywords).images
    return torch.from_numpy(array)


def pipeline(kind: str, model: Any) -> Any:
    kinds = {"ddim": DDIMPipeline, "ddpm": DDPMPipeline}
    pipe = kinds[kind](unet=copy.deepcopy(networks.network(NAME)), scheduler=sampler(kind))
    pipe.unet = model
    return pipe


@pytest.mark.parametrize(("kind", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_a_corrected_scheduler_is_the_fused_loop(kind: str, eta: float) -> None:
    """A loop written with diffusers gives the images of `qe.sample`, with every correction.

    In mode A16: g folded into the coefficients or multiplied afterwards differs in last bits, which flip no rounding.
    """
    model = corrected(kind, eta, recipe="w4a16")
    scheduler = qe.corrected_scheduler(sampler(kind), model)
    assert isinstance(scheduler, type(sampler(kind)))
    scheduler.set_timesteps(STEPS)
    x = initial_noise((2, *SHAPE), 3)
    generator = [torch.Generator().manual_seed(3 * 1_000_003 + j + 1) for j in range(2)]
    given: dict[str, Any] = {"generator": generator} | ({"eta": eta} if kind == "ddim" else {})
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x, **given).prev_sample
    expected = draw(model, sampler(kind), eta=eta, strict=True)
    assert float((x - expected).norm() / expected.norm()) < 1e-5
    assert not torch.equal(expected, draw(model, sampler(kind), eta=eta, correction=False))


@pytest.mark.parametrize(("kind", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_pipelines_take_it(kind: str, eta: float) -> None:
    model = corrected(kind, eta)
    pipe = pipeline(kind, model)
    keywords = {"eta": eta} if kind == "ddim" else {}
    with model.correcting(False):
        plain = pipeline_images(pipe, **keywords)
    output_only = pipeline_images(pipe, **keywords)
    pipe.scheduler = qe.corrected_scheduler(pipe.scheduler, model, strict=True)
    whole = pipeline_images(pipe, **keywords)
    assert not torch.equal(plain, output_only) and not torch.equal(output_only, whole)
    assert torch.equal(whole, pipeline_images(pipe, **keywords))


def test_steps_of_a_pipeline_that_do_not_fit() -> None:
    model = corrected()
    scheduler = qe.corrected_scheduler(sampler("ddim"), model)
    with pytest.warns(UserWarning, match="steps 3, not 4.*they are off"):
        scheduler.set_timesteps(3)
    assert not model.corrects
    plain = sampler("ddim")
    plain.set_timesteps(3)
    x, e, t = normal(2, *SHAPE), normal(2, *SHAPE, seed=2), int(plain.timesteps[1])
    assert torch.equal(scheduler.step(e, t, x).prev_sample, plain.step(e, t, x).prev_sample)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(3)  # told once
        scheduler.set_timesteps(STEPS)
    assert model.corrects
    with pytest.warns(UserWarning, match="eta 1.0, not 0.0"):
        scheduler.step(e, int(scheduler.timesteps[0]), x, eta=1.0)
    assert not model.corrects
    scheduler.set_timesteps(STEPS)
    with pytest.warns(UserWarning, match="use_clipped_model_output"):
        scheduler.step(e, int(scheduler.timesteps[0]), x, use_clipped_model_output=True)
    model.corrects = True
    for wrong in ({"guidance_scale": 5.0}, {}):
        other = sampler("ddim") if wrong else sampler("ddpm")
        with pytest.raises(ValueError, match="another setting"):
            qe.corrected_scheduler(other, model, strict=True, **wrong).set_timesteps(STEPS)
        assert model.corrects


def test_what_a_corrected_scheduler_returns() -> None:
    model = corrected()
    scheduler, plain = qe.corrected_scheduler(sampler("ddim"), model), sampler("ddim")
    for one in (scheduler, plain):
        one.set_timesteps(STEPS)
    assert inspect.signature(scheduler.step) == inspect.signature(plain.step)
    x, e, t = normal(2, *SHAPE), normal(2, *SHAPE, seed=2), int(plain.timesteps[1])
    bias, gain = model.correction.input_bias[1], float(model.correction.input_scale[1])
    assert gain != 1
    expected = plain.step(e, t, x)
    output, values = scheduler.step(e, t, x), scheduler.step(e, t, x, return_dict=False)
    assert type(output) is type(expected) and torch.equal(output.prev_sample, gain * expected.prev_sample + bias)
    assert torch.equal(output.pred_original_sample, expected.pred_original_sample)
    assert torch.equal(values[0], output.prev_sample) and output[0] is output.prev_sample
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(STEPS)
    assert torch.equal(fresh.step(e, t, x).prev_sample, expected.prev_sample), "without a model it is the plain one"


def test_another_sampler_keeps_the_output_correction_where_its_key_fits() -> None:
    unet, scheduler = networks.network(NAME), EulerDiscreteScheduler(timestep_spacing="leading")
    calibration = qe.calibrate(unet, scheduler, shape=SHAPE, steps=3, samples=2)
    model = qe.quantize(unet, calibration, qe.Recipe.named("w4a8"))
    noise = qe.measure_noise(model, unet, scheduler, SHAPE, samples=2)
    model = qe.correct(model, unet, scheduler, noise, "mmse", shape=SHAPE)
    fitting = qe.corrected_scheduler(scheduler, model, strict=True)
    fitting.set_timesteps(3)
    assert model.corrects
    with pytest.warns(UserWarning, match="scheduler class EulerDiscreteScheduler, not DDIMScheduler"):
        qe.corrected_scheduler(scheduler, corrected()).set_timesteps(STEPS)
    assert not corrected().corrects
    corrected().corrects = True


def test_wrong_schedulers() -> None:
    with pytest.raises(ValueError, match="model has no corrections"):
        qe.corrected_scheduler(sampler("ddim"), networks.integer_model(NAME))
    with pytest.raises(TypeError, match="scheduler must be a diffusers scheduler, got object"):
        qe.corrected_scheduler(object(), corrected())


def test_the_scheduler_of_the_caller_stays_as_it_is() -> None:
    mine = sampler("ddim")
    assert type(qe.corrected_scheduler(qe.corrected_scheduler(mine, corrected()), corrected())).__mro__[1] is type(mine)
    other = qe.corrected_scheduler(mine, corrected())
    other.set_timesteps(STEPS)
    assert type(mine) is DDIMScheduler and mine.num_inference_steps is None


def test_a_corrected_scheduler_saves_as_the_plain_one(tmp_path: Path) -> None:
    scheduler = qe.corrected_scheduler(sampler("ddim"), corrected())
    scheduler.save_pretrained(tmp_path)
    again = DDIMScheduler.from_pretrained(tmp_path)
    assert type(again) is DDIMScheduler and again.config.clip_sample is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = [draw(corrected(), s, strict=True) for s in (scheduler, sampler("ddim"))]
    assert torch.equal(*images), "qe.sample corrects once, whichever of the two it is given"


def test_with_table_leaves_the_first_model_alone() -> None:
    """Two models over the same packed weights: neither sees the other's table, switch or caches."""
    model, x = networks.rebuilt(networks.integer_model("class", "w4a8")), normal(2, 3, 16, 16)
    given = networks.conditioning("class", 2)
    before = model(x, 250, **given).sample
    table = dataclasses.replace(model.table, output_shift=model.table.output_shift + 1)
    other = model.with_table(table)
    assert torch.allclose(other(x, 250, **given).sample, before + 1, atol=1e-5)
    assert torch.equal(model(x, 250, **given).sample, before)
    other.corrects = False
    assert model.corrects and torch.equal(other(x, 250, **given).sample, before)
    with pytest.raises(ValueError, match="sites of this model's table"):
        model.with_table(networks.integer_model("sd").table)


def run(*arguments: Any) -> int:
    return main([str(a) for a in arguments])


def test_the_command_line_corrects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    art = tmp_path / "art"
    tiny = ("--steps", 3, "--samples", 2, "--observer", "minmax", "--correct", "ner+ibc", "--correct-samples", 2)
    assert run("calibrate", "demo", "--recipe", "w4a8", *tiny, "--out", art, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data) == {"artifact", "seconds", "layers_quantized", "layers_float", "plan", "align", "agreement"}
    assert not (tmp_path / "art.partial").exists()
    model = qe.load(art)
    assert model.recipe.correct == "ner+ibc" and isinstance(model.correction, Correction)
    assert model.correction.key["samples"] == 2 and model.noise is not None
    reports = {}
    for name, options in (("on", ()), ("off", ("--correction", "off")), ("other", ("--steps", 2))):
        assert run("compare", art, "--reference", "demo", "--n", 2, *options, "--json") == 0
        out, error = capsys.readouterr()
        reports[name] = json.loads(out)["latent_error"]
        warned = [line for line in error.splitlines() if "corrections" in line]
        assert len(warned) == (1 if name == "other" else 0)
        assert all(line.startswith("qdiff: warning: the model's corrections (ner+ibc)") for line in warned)
    assert reports["on"] != reports["off"]
    files = {}
    for switch in ("on", "off"):
        files[switch] = tmp_path / f"{switch}.safetensors"
        assert run("sample", art, "--n", 1, "--out", files[switch], "--correction", switch, "--json") == 0
    assert files["on"].read_bytes() != files["off"].read_bytes()
    capsys.readouterr()
    assert run("inspect", art, "--json") == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["correct"] == "ner+ibc"


def test_the_command_line_refuses_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("calibrate", "demo", "--correct", "ptqd+nothing", "--out", tmp_path / "art") == 1
    assert "correct must be none, ptqd, mmse or ner" in capsys.readouterr().err
    assert run("compare", "art", "--reference", "demo", "--correction", "maybe") == 2
    assert "--correction" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
