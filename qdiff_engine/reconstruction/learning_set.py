"""What the network received, drawn evenly from a calibration's trajectories: the data that reconstruction learns on."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..calibration.calibration import Calibration, Trajectory
from ..calibration.selection import selected_pairs
from ..graph.interpret import flatten_conditioning
from ..pair_requests import parse_selection
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


def learning_set(calibration: Calibration, count: int, pairs: str = "every") -> LearningSet:
    """About ``count`` (x, t, conditioning), evenly from all steps and at most all there are; or as many as selected.

    With guidance half of them have the unconditional branch's conditioning, and a sample that is drawn again has the
    other one, as far as that is possible: the network sees both.

    Args:
        pairs: "every", or a selection by `calibration.selection`, of which ``count`` takes the place of the number.
    """
    path, selection = calibration.trajectory, parse_selection(pairs)
    available = len(path.samples[0])
    if selection.kind == "every":
        drawn = _evenly(len(path.timesteps), available, count)
    else:
        asked = dataclasses.replace(selection, count=count)
        drawn = selected_pairs(calibration, asked, int(calibration.key["seed"]))
    found = sorted(_branched(calibration, drawn))
    latents = torch.stack([path.samples[pair.step][pair.sample] for pair in found])
    given = _conditioning_of(calibration.guidance, found, available)
    return LearningSet(
        {"sample": latents, "timestep": _times(path, found), **given}, torch.tensor([pair.row for pair in found])
    )


class _Pair(NamedTuple):
    """One input of the network; ``unconditional``: that of the other branch, where there is guidance."""

    row: int
    step: int
    sample: int
    unconditional: bool


def _evenly(steps: int, available: int, count: int) -> list[tuple[int, int]]:
    """(step, sample) of about ``count`` pairs; consecutive steps draw consecutive samples, and every run is heard."""
    chosen = range(steps) if count >= steps else [i * steps // count for i in range(count)]
    each = min(max(1, round(count / steps)), available)
    return [(chosen[i // each], i % available) for i in range(len(chosen) * each)]


def _branched(calibration: Calibration, drawn: Sequence[tuple[int, int]]) -> Iterator[_Pair]:
    """Every pair with its row; a sample's draws take turns between the branches, every other one's begin with none."""
    row_of = {timestep: row for row, timestep in enumerate(calibration.timesteps)}
    again: Counter[int] = Counter()
    for step, sample in drawn:
        yield _Pair(row_of[calibration.trajectory.timesteps[step]], step, sample, (sample + again[sample]) % 2 == 1)
        again[sample] += 1


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
