"""Ranges from statistics: a histogram per (row, site), merged over rows, read by min/max, percentile or least error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import numerics
from ..ops import statistics

BINS = 1024
_TAIL = 1e-4  # share of values that the percentile observer leaves outside, at each end


@dataclass
class Histogram:
    """Counts of a site's values in ``BINS`` equal bins over [low, high], which always contain every value seen."""

    low: float = 0.0
    high: float = 0.0
    counts: Tensor | None = None  # float64 [BINS]

    def update(self, x: Tensor) -> None:
        """Add the values of ``x``; a range that grows spreads the old counts over the new bins.

        Raises:
            ValueError: ``x`` holds NaN or infinity.
        """
        low, high = statistics.min_max(x)
        if self.counts is None:
            self.low, self.high = min(low, 0.0), max(high, 0.0)
            self.counts = torch.zeros(BINS, dtype=torch.float64)
        elif low < self.low or high > self.high:
            self._widen(min(low, self.low), max(high, self.high))
        if self.high > self.low:
            self.counts += statistics.histogram(x, BINS, self.low, self.high).double()

    def _widen(self, low: float, high: float) -> None:
        low, high = (low * 1.1, high * 1.1)  # both contain 0: growing outward avoids widening at every batch
        assert self.counts is not None
        self.counts = rebin(self.counts[None], torch.tensor([[self.low, self.high]]), low, high)[0]
        self.low, self.high = low, high


def rebin(counts: Tensor, ranges: Tensor, low: float, high: float) -> Tensor:
    """Counts [N, BINS] over ranges [N, 2] moved onto equal bins over [low, high], each bin to its centre's place."""
    centres = bin_centres(ranges.double(), counts.shape[1])
    width = max(high - low, torch.finfo(torch.float32).tiny)
    index = ((centres - low) / width * counts.shape[1]).long().clamp(0, counts.shape[1] - 1)
    return torch.zeros_like(counts).scatter_add_(1, index, counts)


def bin_centres(ranges: Tensor, bins: int) -> Tensor:
    """[N, bins] centres of equal bins over ranges [N, 2]."""
    steps = (torch.arange(bins, dtype=ranges.dtype) + 0.5) / bins
    return ranges[:, :1] + (ranges[:, 1:] - ranges[:, :1]) * steps


def merged(counts: Tensor, ranges: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Sum statistics over neighbouring rows: counts [R, S, BINS], ranges [R, S, 2] -> the same shapes.

    ``group`` rows share one histogram over their common range; 0 means all rows, 1 none.
    """
    rows = counts.shape[0]
    group = rows if group == 0 else min(group, rows)
    if group == 1:
        return counts, ranges
    counts, ranges = counts.clone(), ranges.clone()
    for start in range(0, rows, group):
        part = slice(start, min(start + group, rows))
        low, high = ranges[part, :, 0].amin(0), ranges[part, :, 1].amax(0)
        for s in range(counts.shape[1]):
            one = rebin(counts[part, s], ranges[part, s], float(low[s]), float(high[s]))
            counts[part, s] = one.sum(0)
        ranges[part] = torch.stack([low, high], -1)
    return counts, ranges


def affine(observer: str, counts: Tensor, ranges: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) per histogram; counts [N, BINS], ranges [N, 2]."""
    if observer == "percentile":
        ranges = _percentile(counts, ranges)
    elif observer == "mse":
        ranges = _least_error(counts, ranges, bits)
    elif observer != "minmax":
        raise ValueError(f"observer must be minmax, percentile or mse, got {observer!r}")
    return numerics.affine_from_range(ranges[:, 0], ranges[:, 1], bits)


def _percentile(counts: Tensor, ranges: Tensor) -> Tensor:
    share = counts.cumsum(1) / counts.sum(1, keepdim=True).clamp(min=1)
    centres = bin_centres(ranges.double(), counts.shape[1])
    first = (share > _TAIL).int().argmax(1, keepdim=True)
    last = (share >= 1 - _TAIL).int().argmax(1, keepdim=True)
    return torch.cat([centres.gather(1, first), centres.gather(1, last)], 1)


def _least_error(counts: Tensor, ranges: Tensor, bits: int) -> Tensor:
    """The range, inside the observed one, whose quantisation of the histogram has the least squared error.

    The two ends are searched in turn on a geometric grid, then on a fine one around the best; the full range is
    among the candidates, so the result is never worse than min/max on these statistics.
    """
    ranges = ranges.double()
    centres = bin_centres(ranges, counts.shape[1])
    shrink = torch.ones_like(ranges)
    best = _error(centres, counts, ranges, bits)
    coarse = torch.logspace(-1.5, 0, 25, dtype=torch.float64)
    fine = torch.linspace(0.88, 1.12, 9, dtype=torch.float64)
    for grid, absolute in ((coarse, True), (coarse, True), (fine, False), (fine, False)):
        for end in (1, 0):
            start = shrink[:, end].clone()
            for factor in grid:
                candidate = shrink.clone()
                candidate[:, end] = (factor if absolute else start * factor).clamp(max=1.0)
                error = _error(centres, counts, ranges * candidate, bits)
                better = error < best
                best = torch.where(better, error, best)
                shrink[better] = candidate[better]
    return ranges * shrink


def _error(centres: Tensor, weight: Tensor, ranges: Tensor, bits: int) -> Tensor:
    """Squared error of quantising bin centres [N, B] with the affine of each range, weighted by the counts."""
    low, high = numerics.activation_range(bits)
    scale, zero_point = numerics.affine_from_range(ranges[:, 0], ranges[:, 1], bits)
    s, z = scale[:, None], zero_point[:, None].float()
    x = centres.float()
    restored = (torch.round(x / s).add_(z).clamp_(low, high).sub_(z)).mul_(s)
    return (restored.sub_(x).square_().mul_(weight.float())).sum(1).double()
