"""What the network received, drawn evenly from a calibration's trajectories: the data that reconstruction learns on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..calibration.calibration import Calibration, Trajectory
from ..graph.interpret import flatten_conditioning
from ..sampling import Conditioning, Guidance, conditioning_for

_CHUNK = 16  # samples that the network evaluates at once


@dataclass(frozen=True)
class LearningSet:
    """N inputs of the network, those of one row next to each other.

    Args:
        inputs: the graph's inputs by name, each with N along its first axis.
        rows: int64 [N], the calibrated row of every sample, ascending.
    """

    inputs: dict[str, Tensor]
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """(row, samples) of at most 16 samples; a chunk has one row."""
        start = 0
        for row, count in zip(*torch.unique_consecutive(self.rows, return_counts=True), strict=True):
            for first in range(start, start + int(count), _CHUNK):
                yield int(row), slice(first, min(first + _CHUNK, start + int(count)))
            start += int(count)


def learning_set(calibration: Calibration, count: int) -> LearningSet:
    """About ``count`` (x, t, conditioning), evenly from all steps; at most all there are.

    With guidance half of them have the unconditional branch's conditioning, and a sample that is drawn again has the
    other one: the network sees both.
    """
    path, guidance = calibration.trajectory, calibration.guidance
    steps, available = len(path.timesteps), len(path.samples[0])
    chosen = range(steps) if count >= steps else [i * steps // count for i in range(count)]
    each = min(max(1, round(count / steps)), available)
    pairs = sorted(_pairs(calibration, chosen, available, each))
    given = _conditioning_of(guidance, pairs, available)
    latents = torch.stack([path.samples[pair.step][pair.sample] for pair in pairs])
    inputs = {"sample": latents, "timestep": _times(path, pairs)}
    return LearningSet({**inputs, **given}, torch.tensor([pair.row for pair in pairs]))


class _Pair(NamedTuple):
    """One input of the network; ``unconditional``: that of the other branch, where there is guidance."""

    row: int
    step: int
    sample: int
    unconditional: bool


def _pairs(calibration: Calibration, steps: Sequence[int], available: int, each: int) -> Iterator[_Pair]:
    """Consecutive steps draw consecutive samples, so that every run is heard."""
    row_of = {timestep: row for row, timestep in enumerate(calibration.timesteps)}
    for drawn in range(len(steps) * each):
        again, sample = divmod(drawn, available)
        step = steps[drawn // each]
        yield _Pair(row_of[calibration.trajectory.timesteps[step]], step, sample, (sample + again) % 2 == 1)


def _times(path: Trajectory, pairs: list[_Pair]) -> Tensor:
    values = [path.timesteps[pair.step] for pair in pairs]
    whole = all(float(value).is_integer() for value in values)
    return torch.tensor([int(v) for v in values]) if whole else torch.tensor(values, dtype=torch.float32)


def _conditioning_of(guidance: Guidance, pairs: list[_Pair], available: int) -> dict[str, Tensor]:
    """The graph's conditioning inputs of every pair."""
    samples = torch.tensor([pair.sample for pair in pairs])

    def given(conditioning: Conditioning) -> dict[str, Tensor]:
        return flatten_conditioning(conditioning_for(conditioning, range(available)))

    conditional = {name: value[samples] for name, value in given(guidance.conditioning).items()}
    if guidance.scale is None:
        return conditional
    without, other = given(guidance.unconditional), torch.tensor([pair.unconditional for pair in pairs])
    for name, value in conditional.items():
        value[other] = without[name][samples[other]]
    return conditional
