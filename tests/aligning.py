"""Calibrations, models and gradients that the tests of alignment share."""

from __future__ import annotations

import dataclasses
from typing import Any

import networks
import torch
from networks import CASES, SAMPLES, STEPS, ddim, normal, relative
from torch import Tensor

from qdiff_engine.alignment.learnt import Learnt, Simulation
from qdiff_engine.alignment.path import Moment
from qdiff_engine.alignment.path import Path as FloatPath
from qdiff_engine.alignment.rounding import Originals
from qdiff_engine.calibration.calibration import Calibration, calibrate
from qdiff_engine.quantization import quantize
from qdiff_engine.recipe import Recipe
from qdiff_engine.runtime.model import IntegerUNet

NAME = "guided"
FILES = ("config.json", "graph.json", "model.safetensors")
GUIDED = {
    "guidance_scale": 2.5,
    "unconditional": {"image": normal(2, 3, 16, 16, seed=5), "y": torch.tensor([0, 2])},
    "conditioning": CASES[NAME].conditioning,
}


def calibrated(steps: int = STEPS, name: str = NAME, scheduler: Any = None, **keywords: Any) -> Calibration:
    case = CASES[name]
    keywords = {"conditioning": case.conditioning, **keywords}
    scheduler = ddim() if scheduler is None else scheduler
    return calibrate(networks.network(name), scheduler, shape=case.shape, steps=steps, samples=SAMPLES, **keywords)


def quantised(calibration: Calibration, name: str = NAME, recipe: str = "w4a4", **changes: Any) -> IntegerUNet:
    return quantize(networks.network(name), calibration, Recipe.named(recipe, **changes))


def in_float64(
    model: IntegerUNet, path: FloatPath, originals: Originals | None = None
) -> tuple[Learnt, Simulation, list[Moment]]:
    learnt = Learnt(model, dtype=torch.float64, originals=originals)
    with torch.no_grad():  # away from the start, where p = d = 0
        for i, (_, parameter) in enumerate(learnt.named()):
            parameter += 0.05 * normal(*parameter.shape, seed=i).double()
    moments = [dataclasses.replace(m, latents=m.latents.double()) for m in path.moments[0]]
    return learnt, Simulation(model, learnt), moments


def through_autograd(
    simulation: Simulation, path: FloatPath, start: Moment, count: int, target: Tensor, stop: bool
) -> None:
    """The oracle: one graph over all steps, with x' = x + (step(sg(x)) - sg(x)), or without stopping anything."""
    moment = start
    for _ in range(count):
        x = moment.latents
        held = dataclasses.replace(moment, latents=x.detach() if stop else x)
        timestep = path.steps.timesteps[moment.index]
        e = path.guidance.prediction(simulation, path.steps.received(held), timestep, moment.samples)
        after = path.steps.advance(held, e)
        moment = dataclasses.replace(after, latents=x + (after.latents - held.latents) if stop else after.latents)
    (moment.latents - target).square().mean().backward()


def taken(learnt: Learnt) -> dict[str, Tensor]:
    """Every gradient, and a clean slate."""
    found = {name: p.grad.clone() for name, p in learnt.named() if p.grad is not None}
    for _, parameter in learnt.named():
        parameter.grad = None
    return found


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert actual.keys() == expected.keys() and actual
    flat = [torch.cat([g[name].flatten() for name in sorted(g)]) for g in (actual, expected)]
    return relative(flat[0], flat[1])
