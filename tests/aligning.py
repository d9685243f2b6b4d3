"""Calibrations and models that the tests of alignment share."""

from __future__ import annotations

from typing import Any

import networks
import torch
from networks import CASES, SAMPLES, STEPS, ddim, normal

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
