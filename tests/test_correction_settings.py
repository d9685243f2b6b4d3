"""Corrections in each setting they are for (guidance, v and sample predictions), and off in every other."""

from __future__ import annotations

import warnings
from typing import Any

import networks
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from networks import CASES, STEPS, normal
from torch import Tensor

import qdiff_engine as qe
from qdiff_engine.correction.measurement import moments
from qdiff_engine.quantization import equalised, make_table
from qdiff_engine.sampling import Guidance, Step, initial_noise

LABELS = {"class_labels": torch.tensor([3, 7])}
GUIDED: dict[str, Any] = {
    "guidance_scale": 3.0, "conditioning": LABELS, "unconditional": {"class_labels": torch.tensor([0])},
}  # fmt: skip


def sampler(**changes: Any) -> Any:
    return DDIMScheduler(num_train_timesteps=1000, clip_sample=False, **changes)


def corrected(name: str, method: str, given: dict[str, Any], **changes: Any) -> Any:
    """(the plain model, the corrected one) of a network under one sampler."""
    unet, shape, scheduler = networks.network(name), CASES[name].shape, sampler(**changes)
    calibration = qe.calibrate(unet, scheduler, shape=shape, steps=STEPS, samples=2, **given)
    model = qe.quantize(unet, calibration, qe.Recipe.named("w4a16"))  # no flipped rounding magnifies a last bit
    noise = qe.measure_noise(model, unet, scheduler, shape, samples=2, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few samples
        return model, qe.correct(model, unet, scheduler, noise, method, shape=shape, **given)


@pytest.mark.parametrize(
    ("name", "given", "changes"),
    [
        ("class", GUIDED, {}),
        ("unet2d", {}, {"prediction_type": "v_prediction"}),
        ("unet2d", {}, {"prediction_type": "sample"}),
    ],
)
def test_a_corrected_loop_is_the_formula_in_float64(name: str, given: dict[str, Any], changes: dict[str, Any]) -> None:
    """e' = a (e_u + w (e_c - e_u)) + b, then the sampler's own step, then g x' + B, each from what it received."""
    plain, model = corrected(name, "mmse+ibc+ivc", given, **changes)
    steps: list[Step] = []
    shape, scheduler = (2, *CASES[name].shape), sampler(**changes)
    settings = {**given, "steps": STEPS, "seed": 3}
    sampled = qe.sample(model, scheduler, shape, strict=True, on_step=steps.append, **settings)
    guidance = Guidance(given.get("guidance_scale"), given.get("unconditional"), given.get("conditioning"))
    scheduler.set_timesteps(STEPS)
    assert torch.equal(steps[0].sample, initial_noise(shape, 3)) and torch.equal(steps[-1].previous, sampled)
    for step in steps:
        row = model.table.row(step.timestep)
        a, b = (t[row].double()[:, None, None] for t in (model.table.output_scale, model.table.output_shift))
        e = a * guidance.prediction(plain, step.sample, step.timestep, range(2)).double() + b
        assert networks.relative(step.prediction, e) < 1e-5 and bool((a != 1).any())
        own = scheduler.step(e, int(step.timestep), step.sample.double(), eta=0.0).prev_sample
        expected = float(model.correction.input_scale[row]) * own + model.correction.input_bias[row].double()
        assert networks.relative(step.previous, expected) < 1e-5


def test_at_other_timesteps_a_pipelines_corrections_are_off() -> None:
    """A plain scheduler tells the model nothing but the timestep; one that was not calibrated was not measured."""
    plain, model = corrected("unet2d", "mmse", {})
    x, calibrated = normal(2, 3, 16, 16), model.table.timesteps[1]
    assert not torch.equal(model(x, calibrated).sample, plain(x, calibrated).sample)
    with pytest.warns(UserWarning, match=r"corrections \(mmse\) are for the calibrated timesteps, not for 333; they"):
        between = model(x, 333).sample
    assert torch.equal(between, plain(x, 333).sample)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        assert torch.equal(model(x, 250.5).sample, plain(x, 250.5).sample)
        with model.correcting(False):
            model(x, 333)


def test_eta_is_learnt_from_the_steps() -> None:
    """Off from the second prediction of a run with another eta on; a run does not depend on the one before."""
    _, model = corrected("unet2d", "mmse+ibc", {})
    scheduler = qe.corrected_scheduler(sampler(), model)
    x, e = normal(2, 3, 16, 16), normal(2, 3, 16, 16, seed=2)

    def run(eta: float) -> list[bool]:
        scheduler.set_timesteps(STEPS)
        found = []
        for t in scheduler.timesteps:
            found.append(model.corrects)
            scheduler.step(e, int(t), x, eta=eta)
        return found

    assert run(0.0) == [True] * STEPS
    with pytest.warns(UserWarning, match="eta 0.5, not 0.0; they are off"):
        assert run(0.5) == [True, *[False] * (STEPS - 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(0.5) == [True, *[False] * (STEPS - 1)]
        assert run(0.0) == [True] * STEPS


@pytest.mark.parametrize("wrong", [{"eta": 0.5}, {"use_clipped_model_output": True}])
def test_what_a_strict_scheduler_refuses_changes_nothing(wrong: dict[str, Any]) -> None:
    _, model = corrected("unet2d", "mmse+ibc", {})
    scheduler = qe.corrected_scheduler(sampler(), model, strict=True)
    x, e = normal(2, 3, 16, 16), normal(2, 3, 16, 16, seed=2)
    scheduler.set_timesteps(STEPS)
    first = int(scheduler.timesteps[0])
    expected = scheduler.step(e, first, x).prev_sample
    for _ in range(2):
        with pytest.raises(ValueError, match="for another setting"):
            scheduler.step(e, first, x, **wrong)
        assert model.corrects and torch.equal(scheduler.step(e, first, x).prev_sample, expected)
    with pytest.raises(ValueError, match=f"steps 2, not {STEPS}"):
        scheduler.set_timesteps(2)
    assert model.corrects
    scheduler.set_timesteps(STEPS)
    assert torch.equal(scheduler.step(e, first, x).prev_sample, expected)


def test_timesteps_of_ones_own_are_not_the_corrected_ones() -> None:
    """diffusers keeps the number of steps that was set before, so that the rest of the key would fit."""
    unet, shape, kind = networks.network("unet2d"), CASES["unet2d"].shape, DDPMScheduler()
    calibration = qe.calibrate(unet, kind, shape=shape, steps=STEPS, samples=2)
    model = qe.quantize(unet, calibration, qe.Recipe.named("w4a8"))
    noise = qe.measure_noise(model, unet, kind, shape, samples=2)
    model = qe.correct(model, unet, kind, noise, "mmse", shape=shape)
    scheduler = qe.corrected_scheduler(kind, model)
    scheduler.set_timesteps(STEPS)
    assert model.corrects
    with pytest.warns(UserWarning, match="timesteps other than the corrected ones; they are off"):
        scheduler.set_timesteps(timesteps=[800, 400, 1])
    assert not model.corrects


def test_the_key_is_that_of_what_was_measured() -> None:
    """Without rollouts, the samples and the seed of the measurement, whatever `correct` was given for its own."""
    unet, shape = networks.network("unet2d"), CASES["unet2d"].shape
    model = networks.integer_model("unet2d", "w4a8")
    noise = qe.measure_noise(model, unet, networks.ddim(), shape, samples=3, seed=7)
    key = qe.correct(model, unet, networks.ddim(), noise, "mmse", shape=shape).correction.key
    assert (key["samples"], key["seed"], key["weights"]) == (3, 7, noise.key["weights"])


def test_an_equalised_model_is_measured_with_equalised_ranges() -> None:
    """The calibration says what the layers receive; an equalised model's receive something else."""
    unet, shape, calibration = networks.network("unet2d"), CASES["unet2d"].shape, networks.calibration("unet2d")
    model = qe.quantize(unet, calibration, qe.Recipe.named("w4a8", equalise="on"))
    divided = equalised(calibration, model.recipe)

    def sums(given: Any) -> Tensor:
        settings: dict[str, Any] = {"samples": 2, "modes": ["A4"], "calibration": given}
        return moments(qe.measure_noise(model, unet, networks.ddim(), shape, **settings), "A4").sums

    ranges = [make_table(given, model.recipe).scale for given in (calibration, divided)]
    assert not torch.equal(*ranges), "the search found something to divide"
    assert torch.equal(sums(calibration), sums(divided))
