"""Sampling loops: noise by seed alone, guidance, conditioning, stochastic steps, resumption, refused arguments."""

from __future__ import annotations

from typing import Any

import networks
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from networks import normal
from torch import Tensor, nn

import qdiff_engine as qe
from qdiff_engine.sampling import Guidance, Step, conditioning_for, denoise, initial_noise, prepared, sample

SHAPE = (5, 2, 4, 4)


def toy(x: Tensor, timestep: Tensor, shift: Tensor | None = None) -> Tensor:
    """A "network" whose samples do not mix, exact for every batch size."""
    assert timestep.shape == (len(x),) and timestep.dtype == torch.int64
    scale = 0.5 + timestep[:, None, None, None].float() / 2000
    return x * scale + (0 if shift is None else shift[:, :, None, None])


def schedulers(**changes: Any) -> dict[str, Any]:
    config = {"num_train_timesteps": 1000, "clip_sample": False, **changes}
    return {"ddim": DDIMScheduler(**config), "ddpm": DDPMScheduler(**config)}


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loop_is_the_schedulers_own(kind: str, prediction_type: str) -> None:
    """Images equal those of a loop written out with diffusers, for every kind of prediction."""
    scheduler = schedulers(prediction_type=prediction_type)[kind]
    images = sample(toy, scheduler, SHAPE, steps=5, seed=3)
    own = schedulers(prediction_type=prediction_type)[kind]
    own.set_timesteps(5)
    x = initial_noise(SHAPE, 3)
    generators = [torch.Generator().manual_seed(3 * 1_000_003 + j + 1) for j in range(5)]
    for t in own.timesteps:
        x = own.step(toy(x, t.repeat(5)), t, x, generator=generators).prev_sample
    assert torch.equal(images, x)
    assert scheduler.num_inference_steps is None  # the caller's scheduler was not touched


def test_noise_of_a_sample_does_not_depend_on_the_others() -> None:
    noise = initial_noise((6, 2, 4, 4), 7)
    assert torch.equal(noise[:2], initial_noise((2, 2, 4, 4), 7))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, initial_noise((6, 2, 4, 4), 8))
    assert 0.8 < float(noise.std()) < 1.2


@pytest.mark.parametrize(("kind", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 0.0)])
def test_batch_size_does_not_change_images(kind: str, eta: float) -> None:
    scheduler = schedulers()[kind]
    images = [sample(toy, scheduler, SHAPE, steps=4, seed=1, eta=eta, batch=batch) for batch in (1, 2, 5, 16)]
    for other in images[1:]:
        assert torch.equal(images[0], other)
    fewer = sample(toy, scheduler, (2, *SHAPE[1:]), steps=4, seed=1, eta=eta)
    assert torch.equal(images[0][:2], fewer)


def test_batch_size_does_not_change_an_integer_models_images() -> None:
    model = networks.rebuilt(networks.integer_model("class"), backend="native")
    labels = {"class_labels": torch.tensor([1, 4, 9])}
    images = [
        sample(model, networks.ddim(), (5, 3, 16, 16), steps=3, seed=2, eta=0.5, conditioning=labels, batch=batch)
        for batch in (1, 2, 5)
    ]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert torch.equal(images[0], qe.sample(model, networks.ddim(), (5, 3, 16, 16), 3, 2, eta=0.5, conditioning=labels))


def test_stochastic_steps_use_the_seed() -> None:
    scheduler = schedulers()["ddim"]
    noise = initial_noise(SHAPE, 0)
    runs = [denoise(toy, scheduler, noise, steps=4, seed=seed, eta=1.0) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    quiet = [denoise(toy, scheduler, noise, steps=4, seed=seed, eta=0.0) for seed in (0, 1)]
    assert torch.equal(quiet[0], quiet[1])


def test_steps_report_what_the_network_received() -> None:
    received: list[tuple[Tensor, Tensor]] = []

    def spying(x: Tensor, timestep: Tensor) -> Tensor:
        received.append((x.clone(), timestep.clone()))
        return toy(x, timestep)

    steps: list[Step] = []
    images = sample(spying, schedulers()["ddim"], SHAPE, steps=4, batch=5, on_step=steps.append)
    assert [s.timestep for s in steps] == [750.0, 500.0, 250.0, 0.0]
    assert [(s.index, s.count) for s in steps] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    for step, (x, timestep) in zip(steps, received, strict=True):
        assert torch.equal(step.sample, x) and bool((timestep == step.timestep).all())
        assert torch.equal(step.prediction, toy(x, timestep))
    assert torch.equal(steps[-1].previous, images)


def test_recorded_predictions_are_not_computed_again() -> None:
    """An interrupted run goes on where it stopped, noise included."""
    scheduler, noise, steps = schedulers()["ddpm"], initial_noise(SHAPE, 0), []
    whole = denoise(toy, scheduler, noise, steps=4, on_step=steps.append)
    calls = []

    def counting(x: Tensor, timestep: Tensor) -> Tensor:
        calls.append(float(timestep[0]))
        return toy(x, timestep)

    recorded = {i: steps[i].prediction for i in (0, 1)}
    assert torch.equal(denoise(counting, scheduler, noise, steps=4, recorded=recorded), whole)
    assert calls == [250.0, 0.0]


def test_conditioning_is_cycled_over_the_samples() -> None:
    tensors = {"a": torch.tensor([10, 20, 30]), "nested": {"b": normal(2, 3)}}
    given = conditioning_for(tensors, range(2, 6))
    assert given["a"].tolist() == [30, 10, 20, 30]
    assert torch.equal(given["nested"]["b"], tensors["nested"]["b"][[0, 1, 0, 1]])
    asked = conditioning_for(lambda j: {"a": torch.tensor([j]), "nested": {"b": normal(1, 3, seed=j)}}, range(2, 4))
    assert asked["a"].tolist() == [2, 3] and torch.equal(asked["nested"]["b"][1:], normal(1, 3, seed=3))
    assert conditioning_for(None, range(3)) == {}


def test_callable_and_tensor_conditioning_agree() -> None:
    shift = normal(5, 2)
    scheduler = schedulers()["ddim"]
    by_tensor = sample(toy, scheduler, SHAPE, steps=3, conditioning={"shift": shift}, batch=2)
    by_call = sample(toy, scheduler, SHAPE, steps=3, conditioning=lambda j: {"shift": shift[j : j + 1]}, batch=3)
    assert torch.equal(by_tensor, by_call)
    assert not torch.equal(by_tensor, sample(toy, scheduler, SHAPE, steps=3))


def test_guidance_combines_both_branches() -> None:
    """e = e_u + scale (e_c - e_u), in one call of twice the batch."""
    conditional, unconditional = normal(5, 2), normal(1, 2, seed=4)
    guidance = Guidance(2.5, {"shift": unconditional}, {"shift": conditional})
    batches = []

    def spying(x: Tensor, timestep: Tensor, shift: Tensor) -> Tensor:
        batches.append(len(x))
        return toy(x, timestep, shift)

    x = normal(5, 2, 4, 4)
    actual = guidance.prediction(spying, x, 300.0, range(5))
    time = torch.full((5,), 300)
    without, with_ = toy(x, time, unconditional.expand(5, 2)), toy(x, time, conditional)
    assert torch.equal(actual, without + 2.5 * (with_ - without)) and batches == [10]


def test_a_loop_hands_over_the_same_prompt_at_every_step() -> None:
    """The same tensors, by which a model on a GPU knows the keys and values that it has already made of them."""
    heard: list[Tensor] = []

    def spying(x: Tensor, timestep: Tensor, shift: Tensor) -> Tensor:
        heard.append(shift)
        return toy(x, timestep, shift)

    sides = {"conditioning": {"shift": normal(4, 2)}, "unconditional": {"shift": normal(1, 2, seed=4)}}
    images = sample(spying, schedulers()["ddim"], SHAPE, steps=3, batch=2, guidance_scale=2.0, **sides)
    calls = len(heard) // 3
    assert calls > 1 and all(heard[i] is heard[i % calls] for i in range(len(heard)))
    assert torch.equal(images, sample(toy, schedulers()["ddim"], SHAPE, steps=3, guidance_scale=2.0, **sides))


def test_modules_of_every_return_type() -> None:
    class Output(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
            y = toy(x, timestep)
            return {"tensor": y, "tuple": (y,), "object": type("Output", (), {"sample": y}) if return_dict else (y,)}[
                self.kind
            ]

    expected = sample(toy, schedulers()["ddim"], SHAPE, steps=2)
    for kind in ("tensor", "tuple", "object"):
        assert torch.equal(sample(Output(kind), schedulers()["ddim"], SHAPE, steps=2), expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps must be an integer, got float"),
        ({"steps": 1001}, ValueError, "steps must be at most the scheduler's 1000 training timesteps"),
        ({"batch": 0}, ValueError, "batch must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"eta": 1.5}, ValueError, r"eta must lie in \[0, 1\]"),
        ({"shape": (2, 4, 4)}, ValueError, r"shape must be \(n, C, H, W\)"),
        ({"shape": (0, 2, 4, 4)}, ValueError, r"shape\[0\] must be at least 1"),
        ({"shape": (1, 2.0, 4, 4)}, TypeError, r"shape\[1\] must be an integer"),
        ({"scheduler": object()}, TypeError, "scheduler must be a diffusers scheduler, got object"),
        ({"scheduler": DDPMScheduler(), "eta": 0.5}, ValueError, "got DDPMScheduler"),
        ({"scheduler": DDIMScheduler(thresholding=True)}, ValueError, "dynamic thresholding"),
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale needs unconditional"),
        ({"guidance_scale": "2", "unconditional": {}}, TypeError, "guidance_scale must be a number"),
        ({"conditioning": 3}, TypeError, "conditioning must map names to tensors"),
        ({"conditioning": {"shift": 3.0}}, TypeError, r"conditioning\['shift'\] must be a tensor"),
        ({"conditioning": {"shift": torch.full((1, 2), torch.nan)}}, ValueError, "holds NaN"),
        (
            {"guidance_scale": 2.0, "unconditional": {}, "conditioning": {"shift": torch.ones(1, 2)}},
            ValueError,
            "unconditional must have the keys of conditioning",
        ),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"scheduler": DDIMScheduler(), "shape": SHAPE, "steps": 3, **changes}
    with pytest.raises(error, match=message):
        sample(toy, **arguments)


def test_nan_is_refused() -> None:
    scheduler = schedulers()["ddim"]
    with pytest.raises(ValueError, match=r"predicted NaN or infinity at step 1 \(timestep 500\)"):
        sample(lambda x, timestep: x / (timestep[0] != 500), scheduler, SHAPE, steps=4)
    noise = initial_noise(SHAPE, 0)
    noise[1, 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="latents hold NaN"):
        denoise(toy, scheduler, noise, steps=2)


def test_prepared_leaves_the_scheduler_alone() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(7)
    mine = prepared(scheduler, 3)
    assert len(mine.timesteps) == 3 and len(scheduler.timesteps) == 7


def test_running_out_of_memory_names_the_batch() -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise MemoryError

    for batch, mend in ((3, r"lower batch \(--batch\)"), (1, "batch is 1 already: use a device with more memory")):
        with pytest.raises(OSError, match=f"not enough memory to run {batch} samples at a time; {mend}"):
            qe.sample(full, networks.ddim(), (4, 2, 8, 8), steps=2, batch=batch)
