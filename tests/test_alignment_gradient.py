"""AccuQuant's gradient against autograd through stop-gradients, the memory it takes, and the sampler's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from aligning import GUIDED, calibrated, distance, in_float64, quantised, taken, through_autograd
from networks import SAMPLES, STEPS, ddim, normal, relative

import qdiff_engine as qe
from qdiff_engine.alignment.alignment import end_errors
from qdiff_engine.alignment.gradient import accumulate_gradient, rollout
from qdiff_engine.alignment.learnt import Learnt, Simulation
from qdiff_engine.alignment.memory import estimated, held_by
from qdiff_engine.alignment.path import FloatNetwork, FusedSteps, Moment, float_path, fused_step
from qdiff_engine.alignment.training import AlignmentSettings
from qdiff_engine.graph.interpret import fake_quantize
from qdiff_engine.memory import SavedBytes
from qdiff_engine.samplers import Stepper
from qdiff_engine.sampling import denoise

SAMPLERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "ddim": (ddim, {}),
    "clipped": (lambda: ddim(clip_sample=True), {}),
    "eta": (ddim, {"eta": 0.7}),
    "v": (lambda: ddim(prediction_type="v_prediction"), {}),
    "guided": (ddim, GUIDED),
    "ddpm": (lambda: diffusers.DDPMScheduler(clip_sample=True), {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gradient_is_autograds_through_stopped_steps(sampler: str, count: int) -> None:
    """To 1e-6 in float64; with one step it is the exact gradient, with more it is not."""
    make, keywords = SAMPLERS[sampler]
    calibration = calibrated(steps=6, scheduler=make(), **keywords)
    path, model = float_path(calibration, batch=2), quantised(calibration)
    learnt, simulation, moments = in_float64(model, path)
    start, target = moments[1], moments[1 + count].latents
    loss = accumulate_gradient(simulation, path.steps, path.guidance, start, count, target)
    actual = taken(learnt)
    through_autograd(simulation, path, start, count, target, stop=True)
    assert distance(actual, taken(learnt)) < 1e-6
    through_autograd(simulation, path, start, count, target, stop=False)
    exact = taken(learnt)
    assert (distance(actual, exact) < 1e-6) == (count == 1)
    end = rollout(simulation, path.steps, path.guidance, start, count)[-1].latents
    assert loss == pytest.approx(float((end - target).square().mean()), rel=1e-12)
    assert {name.split(".")[0] for name in actual} == {"scale", "zero_point", "weight"}


def test_memory_does_not_grow_with_the_group() -> None:
    """Bytes alive for backward are the same for 2, 5, 10 and 25 steps; exact back-propagation's grow with them."""
    calibration = calibrated(steps=26)
    path, model = float_path(calibration, batch=2), quantised(calibration)
    learnt, simulation, moments = in_float64(model, path)
    replayed, exact = [], []
    held = list(held_by(simulation))
    for count in (2, 5, 10, 25):
        with SavedBytes(held).counting() as saved:
            accumulate_gradient(simulation, path.steps, path.guidance, moments[0], count, moments[count].latents)
        assert saved.now == 0
        replayed.append(saved.peak)
        if count <= 10:
            with SavedBytes(held).counting() as saved:
                through_autograd(simulation, path, moments[0], count, moments[count].latents, stop=False)
            exact.append(saved.peak)
    assert len(set(replayed)) == 1 and replayed[0] > 0
    per_step = (exact[1] - exact[0]) / 3
    assert per_step > 0.5 * replayed[0]  # linear: one more call's activations for every step more
    assert exact[2] - exact[1] == pytest.approx(5 * per_step, rel=0.02)


def test_fake_quantize_has_the_gradients_of_lsq() -> None:
    """dy/ds = round(x/s) - x/s inside and the end minus z outside; dy/dz = -s outside; dy/dx = 1 inside. By hand."""
    x = torch.tensor([0.26, -0.9, 3.0, -3.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    zero_point = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y = fake_quantize(x, scale, zero_point, 4)
    assert y.tolist() == [0.25, -1.0, 1.25, -2.5]  # q = 1 + 2, -4 + 2, 7, -8
    weight = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    (y * weight).sum().backward()
    assert x.grad is not None and scale.grad is not None and zero_point.grad is not None
    assert x.grad.tolist() == [1.0, 10.0, 0.0, 0.0]
    expected = (1 - 1.04) + 10 * (-4 + 3.6) + 100 * (7 - 2) + 1000 * (-8 - 2)
    assert float(scale.grad) == pytest.approx(expected, rel=1e-12)
    assert float(zero_point.grad) == pytest.approx(-0.25 * 1100, rel=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_steps_are_the_samplers(kind: str, prediction_type: str) -> None:
    """The differentiable step walks the deployment sampler's trajectory, its noise included."""
    scheduler: Any = diffusers.DDPMScheduler if kind == "ddpm" else ddim
    scheduler = scheduler(clip_sample=True, prediction_type=prediction_type)
    eta = 0.5 if kind == "ddim" else 0.0
    predictions = [normal(3, 2, 4, 4, seed=i) for i in range(6)]
    visited: list[Any] = []
    denoise(
        None,
        scheduler,
        normal(3, 2, 4, 4, seed=9),
        steps=6,
        seed=3,
        eta=eta,
        recorded=dict(enumerate(predictions)),
        on_step=visited.append,
    )
    steps = FusedSteps(Stepper(scheduler, 6, eta, 3, 3), (3, 2, 4, 4))
    for samples in (range(3), range(1, 3)):
        part = slice(samples.start, samples.stop)
        moment = Moment(0, visited[0].sample[part], samples)
        for step, prediction in zip(visited, predictions, strict=True):
            moment = steps.advance(moment, prediction[part])
            assert relative(moment.latents, step.previous[part]) < 1e-6
        assert moment.index == 6


@pytest.mark.parametrize(
    "name", ["EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_other_samplers_replay_their_state(name: str) -> None:
    """Ancestral noise, a history of predictions, two calls a step: every replay of a step gives the same latents."""
    calibration = calibrated(scheduler=getattr(diffusers, name)())
    path = float_path(calibration, batch=3)
    assert [len(moments) for moments in path.moments] == [len(path.steps.timesteps) + 1] * 2
    for moments, some in zip(path.moments, (slice(0, 3), slice(3, 4)), strict=True):
        for moment, received in zip(moments, calibration.trajectory.samples, strict=False):
            if name != "EulerAncestralDiscreteScheduler":  # its noise is alignment's own
                assert relative(path.steps.received(moment), received[some]) < 1e-5
    errors = end_errors(FloatNetwork(calibration), calibration, group=2)
    assert max(errors) < 1e-5  # the float network stays on its own path
    aligned = qe.align(quantised(calibration), calibration, AlignmentSettings(group=2, iterations=4, batch=2))
    assert not torch.equal(aligned.table.scale, quantised(calibration).table.scale)


@pytest.mark.parametrize("first", ["A4", "A16"])
def test_memory_estimate_is_what_a_call_saves(first: str) -> None:
    """From calls with one and two samples: within 2 % of what three guided samples really keep, in any mode."""
    calibration = calibrated(**GUIDED)
    plan = (first, *("A4",) * (len(calibration.timesteps) - 1))
    path, model = float_path(calibration, batch=3), quantised(calibration, plan=plan)
    simulation = Simulation(model, Learnt(model))
    moments = path.moments[0]
    with SavedBytes(held_by(simulation)).counting() as saved:
        accumulate_gradient(simulation, path.steps, path.guidance, moments[0], 2, moments[2].latents)
    assert estimated(simulation, path, 3).saved == pytest.approx(saved.peak, rel=0.02)


@pytest.mark.parametrize(("name", "keywords", "share"), [("guided", GUIDED, 1.0), ("unet2d", {}, 0.6)])
def test_recomputed_activations_take_less_memory_to_the_same_gradient(
    name: str, keywords: dict[str, Any], share: float
) -> None:
    """Bit for bit; the memory of a network of many blocks, for one of two has little to give up."""
    calibration = calibrated(name=name, **keywords)
    path, model = float_path(calibration, batch=3), quantised(calibration, name)
    moments, gradients, peaks = path.moments[0], [], []
    for recompute in (False, True):
        learnt = Learnt(model)
        simulation = Simulation(model, learnt, recompute)
        accumulate_gradient(simulation, path.steps, path.guidance, moments[0], 2, moments[2].latents)
        gradients.append(taken(learnt))
        peaks.append(estimated(simulation, path, 3).saved)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert peaks[1] < share * peaks[0]


def test_memory_counts_what_is_there() -> None:
    """The noise of a sampler that adds some, and no more samples than were calibrated on."""
    calibration = calibrated(eta=1.0)
    path, model = float_path(calibration, batch=8), quantised(calibration)
    simulation = Simulation(model, Learnt(model))
    all_there, more = (estimated(simulation, path, batch) for batch in (SAMPLES, 100))
    assert all_there == more
    latents = 4 * len(path.moments[0][0].latents.flatten())
    noisy = sum(noise is not None for noise in path.steps.noise)
    assert noisy >= STEPS - 1 and more.path == latents * (STEPS + 1 + noisy)


def test_fused_step_is_affine_where_nothing_clips() -> None:
    """x' = cx x + ce e + ..., the factor of e being the sampler's own output coefficient, with its sign."""
    rows = Stepper(ddim(), 10, 0.0, 0, 1).coefficients
    assert rows is not None
    for row in rows:
        x, e = normal(1, 1, 2, 2).double(), normal(1, 1, 2, 2, seed=2).double().requires_grad_()
        fused_step(row, x, e, None).sum().backward()
        assert e.grad is not None
        assert e.grad.flatten().tolist() == pytest.approx([row.output_coefficient] * 4, rel=1e-9, abs=1e-12)
        assert row.output_coefficient < 0
