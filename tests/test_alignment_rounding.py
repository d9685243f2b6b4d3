"""Rounding that alignment learns along: its gradient, what stays as it was, what the integers gain."""

from __future__ import annotations

import dataclasses
from typing import Any

import networks
import pytest
import torch
from aligning import calibrated, distance, in_float64, quantised, taken, through_autograd
from networks import SAMPLES, relative

import qdiff_engine as qe
from qdiff_engine.alignment.agreement import layer_agreement
from qdiff_engine.alignment.alignment import end_errors, originals
from qdiff_engine.alignment.gradient import accumulate_gradient
from qdiff_engine.alignment.learnt import Learnt, Simulation
from qdiff_engine.alignment.memory import held_by
from qdiff_engine.alignment.path import float_path
from qdiff_engine.alignment.training import AlignmentSettings
from qdiff_engine.cli.learning import align_settings
from qdiff_engine.memory import SavedBytes
from qdiff_engine.runtime.model import IntegerUNet

NAME, ITERATIONS = "sd", 120


@pytest.fixture(scope="module")
def model() -> IntegerUNet:
    return quantised(networks.calibration(NAME), NAME)


@pytest.fixture(scope="module")
def learnt(model: IntegerUNet) -> IntegerUNet:
    """With the rounding learnt."""
    settings = AlignmentSettings(group=2, iterations=ITERATIONS, batch=2, rounding=True)
    return qe.align(model, networks.calibration(NAME), settings)


@pytest.mark.parametrize("count", [1, 2])
def test_gradient_is_autograds_through_stopped_steps(count: int) -> None:
    """To 1e-6 in float64, that of the choices included; with one step it is the exact gradient, with two it is not."""
    calibration = calibrated()
    path, model = float_path(calibration, batch=2), quantised(calibration)
    learnt, simulation, moments = in_float64(model, path, originals(model, calibration))
    start, target = moments[1], moments[1 + count].latents
    accumulate_gradient(simulation, path.steps, path.guidance, start, count, target)
    actual = taken(learnt)
    through_autograd(simulation, path, start, count, target, stop=True)
    assert distance(actual, taken(learnt)) < 1e-6
    through_autograd(simulation, path, start, count, target, stop=False)
    exact = taken(learnt)
    choices = [name for name in exact if name.startswith("rounding.")]
    assert len(choices) == sum(map(len, model.weights.values()))
    assert all(float(exact[name].abs().max()) > 0 for name in choices)
    of_choices = [{name: gradient[name] for name in choices} for gradient in (actual, exact)]
    assert (distance(*of_choices) < 1e-6) == (count == 1)


def test_memory_does_not_grow_with_the_group() -> None:
    calibration = calibrated(steps=6)
    path, model = float_path(calibration, batch=2), quantised(calibration)
    _, simulation, moments = in_float64(model, path, originals(model, calibration))
    held, saved = list(held_by(simulation)), []
    for count in (2, 5):
        with SavedBytes(held).counting() as counted:
            accumulate_gradient(simulation, path.steps, path.guidance, moments[0], count, moments[count].latents)
        saved.append(counted.peak)
    assert saved[0] == saved[1] > 0


def test_learning_nothing_changes_nothing(model: IntegerUNet) -> None:
    """At the start the network is the one that learns no rounding, bit for bit, and so are integers and biases."""
    calibration = networks.calibration(NAME)
    plain, choosing = Learnt(model), Learnt(model, originals=originals(model, calibration))
    step, given = networks.trajectory(NAME)[1], networks.conditioning(NAME, SAMPLES)
    timestep = torch.full((SAMPLES,), float(step.timestep))
    with torch.no_grad():
        expected, actual = (Simulation(model, one)(step.sample, timestep, **given) for one in (plain, choosing))
    assert torch.equal(actual, expected)
    assert choosing.rounding is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as where learning runs in mixed precision
        for layer in model.weights:
            shift = choosing.rounding.shift(layer, 0)
            assert shift is not None and not bool(shift.any())
    for name, parts in choosing.weights().items():
        for new, old in zip(parts, model.weights[name], strict=True):
            assert torch.equal(new.values, old.values) and torch.equal(new.scale, old.scale)
    for name, value in choosing.constants(model).items():
        assert torch.equal(value, model.constants[name])


def test_what_is_chosen_is_a_neighbour(model: IntegerUNet, learnt: IntegerUNet) -> None:
    """The model's integer or the next one towards the float weight; biases keep the layers' mean outputs."""
    known = originals(model, networks.calibration(NAME))
    moved = 0
    for node in model.graph.nodes:
        if node.op not in ("int_conv2d", "int_gemm"):
            continue
        layer, shift = node.kwargs["layer"], 0.0
        for i, (old, new) in enumerate(zip(model.weights[layer], learnt.weights[layer], strict=True)):
            change = (new.values - old.values).double()
            towards = torch.sign(known.weights[layer][i].double() - old.dequantize(torch.float64))
            assert bool(((change == 0) | (change == towards)).all())
            moved += int((change != 0).sum())
            factor = (new.scale / old.scale).double().reshape(-1, *[1] * (old.values.dim() - 1))
            mean = known.inputs[layer][i].mean.double()
            shift = shift + ((old.dequantize(torch.float64) * factor - new.dequantize(torch.float64)).flatten(1) @ mean)
        key = node.kwargs["bias"].key
        assert relative(learnt.constants[key].double(), model.constants[key].double() + shift) < 1e-5
    assert moved > 100


def test_integers_gain_from_it_and_are_the_simulation(model: IntegerUNet, learnt: IntegerUNet) -> None:
    calibration = networks.calibration(NAME)
    plain = qe.align(model, calibration, AlignmentSettings(group=2, iterations=ITERATIONS, batch=2))
    before, without, with_it = (sum(end_errors(m, calibration, 2)) for m in (model, plain, learnt))
    print(f"error at the groups' ends {before:.4f}, aligned {without:.4f}, with rounding {with_it:.4f}")
    assert with_it < 0.9 * without < 0.9 * before
    step, given = networks.trajectory(NAME)[1], networks.conditioning(NAME, SAMPLES)
    rows = layer_agreement(learnt, networks.flat_inputs(learnt, step.sample, step.timestep, given))
    assert max(row.error for row in rows) < 1e-5 and max(row.furthest for row in rows) <= 1


def test_the_command_line_asks_for_it() -> None:
    given: dict[str, Any] = {"iterations": None, "batch": None, "recompute": False, "pairs": "every", "seed": 3}
    expected = AlignmentSettings(group=2, seed=3, rounding=True)
    assert align_settings("accuquant:2", rounding=True, **given) == expected
    assert align_settings("accuquant:2", rounding=False, **given) == dataclasses.replace(expected, rounding=False)
    with pytest.raises(ValueError, match="--align-rounding says how --align learns; give --align accuquant:M, too"):
        align_settings("none", rounding=True, **given)
    with pytest.raises(ValueError, match="rounding_rate must be a finite number of at least 0, got -1"):
        qe.align(
            quantised(networks.calibration(NAME), NAME),
            networks.calibration(NAME),
            dataclasses.replace(expected, rounding_rate=-1),
        )
