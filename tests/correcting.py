"""A small integer model, its noise as measured, and corrections of it, each made once in a test process."""

from __future__ import annotations

import functools
from typing import Any

import networks
from networks import CASES, SAMPLES

import qdiff_engine as qe
from qdiff_engine.tables import Noise

NAME, SEED = "unet2d", 7
SHAPE = CASES[NAME].shape
MODES = ("A4", "A8", "A16")


@functools.cache
def model(recipe: str = "w4a8") -> qe.IntegerUNet:
    return networks.integer_model(NAME, recipe)


def measure(**changes: Any) -> Noise:
    settings: dict[str, Any] = {"shape": SHAPE, "samples": SAMPLES, "seed": SEED, **changes}
    return qe.measure_noise(settings.pop("model", model()), networks.network(NAME), networks.ddim(), **settings)


@functools.cache
def noise() -> Noise:
    """Of all three modes."""
    return measure(calibration=networks.calibration(NAME))


def correct(method: str, **changes: Any) -> qe.IntegerUNet:
    settings: dict[str, Any] = {"shape": SHAPE, "seed": SEED, "noise": noise(), "method": method, **changes}
    scheduler = settings.pop("scheduler", networks.ddim())
    return qe.correct(settings.pop("model", model()), networks.network(NAME), scheduler, **settings)
