"""One sampling run that plans are tried on: the same noise for all of them, each row at the mode a plan names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..plan_requests import MODE_BITS
from ..sampling import Guidance, Step, denoise, home, predict

_PIXEL_CHANNELS = (1, 3)


@dataclass(frozen=True)
class Sampler:
    """The deployment sampler and the noise that every trial starts from; ``noise`` [n, C, H, W]."""

    scheduler: Any
    noise: Tensor
    steps: int
    seed: int = 0
    eta: float = 0.0
    guidance: Guidance = Guidance()
    batch: int = 16

    @torch.no_grad()
    def run(self, model: Any, recorded: Mapping[int, Tensor] | None = None, on_step: Any = None) -> Tensor:
        """Final latents of ``model``; predictions in ``recorded``, by step, are taken as they are."""
        return denoise(
            model,
            self.scheduler,
            self.noise,
            steps=self.steps,
            seed=self.seed,
            eta=self.eta,
            guidance=self.guidance,
            batch=self.batch,
            recorded=recorded,
            on_step=on_step,
        )

    def path(self, model: Any) -> tuple[Tensor, list[Step]]:
        """(final latents, every step) of ``model``."""
        steps: list[Step] = []
        return self.run(model, on_step=steps.append), steps


class Planned:
    """A network whose every row runs at its own mode.

    Args:
        models: one per mode, each at that mode in all rows.
        row: the row that serves a timestep; ``modes``: one per row.
    """

    def __init__(self, models: Mapping[str, Any], row: Callable[[float], int], modes: Sequence[str]) -> None:
        self.models, self.row, self.modes = models, row, tuple(modes)
        self.device = home(next(iter(models.values())))

    def forward(self, sample: Tensor, timestep: Tensor, **conditioning: Any) -> Tensor:
        """The prediction of the row's mode."""
        mode = self.modes[self.row(float(timestep.reshape(-1)[0]))]
        return predict(self.models[mode], sample, timestep, conditioning)

    __call__ = forward


def final_errors(images: Tensor, reference: Tensor) -> Tensor:
    """float64 [n]: mean squared difference of every final image; of 1 or 3 channels, clamped to [-1, 1]."""
    x, y = images.double(), reference.double()
    if x.shape[1] in _PIXEL_CHANNELS:
        x, y = x.clamp(-1, 1), y.clamp(-1, 1)
    return (x - y).square().flatten(1).mean(1)


def by_bits(models: Mapping[str, Any]) -> list[str]:
    """The modes of ``models``, fewest bits first."""
    return sorted(models, key=MODE_BITS.__getitem__)
