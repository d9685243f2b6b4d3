"""The learning loop of alignment: random groups and batches, Adam with a cosine to zero, resumable after a kill."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration.checkpoint import Checkpoint
from ..reconstruction.placement import mixed_precision
from .gradient import accumulate_gradient
from .learnt import Learnt, Simulation
from .path import Moment, Path

SAVE_EVERY = 25  # iterations
_BETAS, _EPS = (0.9, 0.999), 1e-8
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class AlignmentSettings:
    """How alignment learns.

    Args:
        group: M, consecutive steps whose end is compared.
        iterations: optimiser steps, each on one group and one batch, so that time grows with both; 0 learns nothing.
        batch: samples per network call (twice as many rows with guidance).
        scale_rate, zero_point_rate, weight_rate, rounding_rate: Adam's first step of log activation scales, of zero
            points (in integers), of log weight scales, and of choices between two integers, which are 1 apart; a cosine
            takes them to zero.
        pairs: which (x_t, t) of the calibration it learns on, see `calibration.selection`; "every" by default. A group
            learns from the samples that are selected at any of its steps, and not at all where there are none.
        rounding: learn, too, which of its two neighbouring integers each weight becomes; otherwise the integers stay.
        seed: of the order of groups and batches, and of the selection.
        recompute: compute a call's activations again in its backward pass instead of keeping them: less memory, more
            time, the same bits.
    """

    group: int = 5
    iterations: int = 200
    batch: int = 4
    scale_rate: float = 2e-2
    zero_point_rate: float = 1e-1
    weight_rate: float = 3e-3
    rounding_rate: float = 1e-2
    pairs: str = "every"
    rounding: bool = False
    seed: int = 0
    recompute: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Progress:
    """One finished iteration; ``loss`` is the mean of L over the last iterations.

    ``advanced``: iterations since the last report, those of an earlier run included.
    """

    iteration: int
    iterations: int
    loss: float
    seconds_left: float
    advanced: int = 1


def group_starts(steps: int, group: int) -> list[tuple[int, int]]:
    """(first step, number of steps) of consecutive groups; the last may be shorter."""
    return [(start, min(group, steps - start)) for start in range(0, steps, group)]


@dataclass(frozen=True)
class Batch:
    """What one iteration learns on: ``count`` steps from ``start``, and the float path's latents after them."""

    start: Moment
    count: int
    target: Tensor


def batches(path: Path, group: int, pairs: Sequence[tuple[int, int]] | None = None) -> list[Batch]:
    """Every group with every batch of the path's samples, or with those that ``pairs`` (step, sample) name in it."""
    groups = group_starts(path.length, group)
    if pairs is None:
        return [
            Batch(moments[start], count, moments[start + count].latents)
            for moments in path.moments
            for start, count in groups
        ]
    size, found = len(path.moments[0][0].samples), []
    for start, count in groups:
        chosen = sorted({sample for step, sample in pairs if start <= step < start + count})
        for first in range(0, len(chosen), size):
            some = chosen[first : first + size]
            found.append(Batch(path.gathered(start, some), count, path.gathered(start + count, some).latents))
    return found


class Trainer:
    """Learns on float paths; everything that an iteration depends on is its index and what is learnt so far."""

    def __init__(
        self,
        simulation: Simulation,
        path: Path,
        settings: AlignmentSettings,
        checkpoint: Checkpoint | None = None,
        pairs: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.simulation, self.path, self.settings, self.checkpoint = simulation, path, settings, checkpoint
        self.learnt: Learnt = simulation.learnt
        self.batches = batches(path, settings.group, pairs)
        rates = {
            "scale": settings.scale_rate,
            "zero_point": settings.zero_point_rate,
            "weight": settings.weight_rate,
            "rounding": settings.rounding_rate,
        }
        self.parameters = dict(self.learnt.named())
        by_kind = [
            {"params": [p for name, p in self.parameters.items() if name.startswith(f"{kind}.")], "rate": rate}
            for kind, rate in rates.items()
        ]
        self.optimiser = torch.optim.Adam(by_kind, lr=0.0, betas=_BETAS, eps=_EPS)

    def run(self, on_iteration: Callable[[Progress], None] | None = None) -> None:
        """All iterations that an earlier run has not done."""
        first = self._resume()
        began = time.monotonic()
        average = 0.0
        for iteration in range(first, self.settings.iterations):
            loss = self._iterate(iteration)
            done = iteration + 1
            if self.checkpoint is not None and (done % SAVE_EVERY == 0 or done == self.settings.iterations):
                self._save(done)
            weight = 1 / min(iteration - first + 1, 50)
            average += weight * (loss - average)
            left = (time.monotonic() - began) / (done - first) * (self.settings.iterations - done)
            if on_iteration is not None:
                advanced = done if iteration == first else 1
                on_iteration(Progress(done, self.settings.iterations, average, left, advanced))

    def _iterate(self, iteration: int) -> float:
        """One optimiser step on one group and batch; its loss."""
        batch = self._drawn(iteration)
        place = (self.learnt.device, self.learnt.dtype)
        start, target = batch.start.on(*place), batch.target.to(*place)
        self.optimiser.zero_grad(set_to_none=True)  # what has no gradient does not move
        with torch.enable_grad(), mixed_precision():
            loss = accumulate_gradient(self.simulation, self.path.steps, self.path.guidance, start, batch.count, target)
        if not math.isfinite(loss):
            raise ValueError(f"alignment diverged at iteration {iteration}: lower its learning rates")
        cosine = 0.5 * (1 + math.cos(math.pi * iteration / self.settings.iterations))
        for kind in self.optimiser.param_groups:
            kind["lr"] = kind["rate"] * cosine
        self.optimiser.step()
        self.learnt.keep_representable()
        return loss

    def _drawn(self, iteration: int) -> Batch:
        """Every batch once, in an order of its own, again and again."""
        count = len(self.batches)
        generator = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + iteration // count) % 2**63)
        return self.batches[int(torch.randperm(count, generator=generator)[iteration % count])]

    def _save(self, done: int) -> None:
        assert self.checkpoint is not None
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"{name}/value"] = parameter.detach()
            state: dict[str, Any] = self.optimiser.state.get(parameter, {})
            tensors |= {f"{name}/{moment}": state[moment] for moment in _MOMENTS if moment in state}
        self.checkpoint.save(done, tensors)
        self.checkpoint.discard_before(done)

    @torch.no_grad()
    def _resume(self) -> int:
        """Take up the newest state on disk; the number of iterations that it has behind it."""
        found = None if self.checkpoint is None else self.checkpoint.newest()
        if found is None:
            return 0
        done, tensors = found
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"{name}/value"])
            state = {moment: tensors[f"{name}/{moment}"] for moment in _MOMENTS if f"{name}/{moment}" in tensors}
            if state:
                step = {"step": state.pop("step")}  # Adam keeps it on the CPU
                self.optimiser.state[parameter] = {**step, **{k: v.to(parameter) for k, v in state.items()}}
        return done
