"""The activations' quantisation inside a block whose samples belong to different rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from ..tables import Table
from .step_sizes import StepSizes


class RowQuantizer:
    """The activation hook that fake-quantises every sample by its own row; `graph.interpret.row_quantizer` for many.

    Args:
        rows: int64 [n], the row of every sample of the batch.
        drop: (probability, generator) with which an element stays floating, as QDrop does; None quantises all.
        steps: scales and zero points that take the place of the table's for the quantisers that they know.
    """

    def __init__(
        self,
        table: Table,
        rows: Tensor,
        drop: tuple[float, torch.Generator] | None = None,
        steps: StepSizes | None = None,
    ) -> None:
        self.table, self.rows, self.drop, self.steps = table, rows, drop, steps
        self.sites = {site: i for i, site in enumerate(table.sites)}

    def __call__(self, site: str, x: Tensor) -> Tensor:
        bits = self.table.bits[self.rows, self.sites[site]]
        if bool((bits == 16).all()):
            return x
        quantized = quantize_rows(x, *(t.to(x.device) for t in (*self._affine(site), bits)))
        if self.drop is None:
            return quantized
        probability, generator = self.drop
        floating = torch.rand(x.shape, generator=generator) < probability
        return torch.where(floating.to(x.device), x, quantized)

    def _affine(self, site: str) -> tuple[Tensor, Tensor]:
        if self.steps is not None and site in self.steps.sites:
            return self.steps.affine(site, self.rows)
        at = self.sites[site]
        return self.table.scale[self.rows, at], self.table.zero_point[self.rows, at]


def quantize_rows(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor) -> Tensor:
    """s[j] (clamp(round(x[j] * (1 / s[j])) + z[j]) - z[j]) for each sample j, straight-through inside the range.

    Rounds as `numerics.quantize` does. Samples with 16 bits stay as they are.

    Args:
        x: [n * k, ...], k values along the first axis for each sample; scale, zero_point, bits: [n].
    """
    low, high = numerics.activation_limits(bits)
    s, z, low, high, floating = (_each(t, x) for t in (scale, zero_point, low, high, bits == 16))
    scaled = x * s.reciprocal()
    rounded = scaled + (torch.round(scaled) - scaled).detach()
    quantized = (torch.minimum(torch.maximum(rounded + z, low), high) - z) * s
    return torch.where(floating, x, quantized)


def _each(values: Tensor, x: Tensor) -> Tensor:
    """[n] values, one per sample, along the first axis of ``x`` [n * k, ...]."""
    return values.repeat_interleave(len(x) // len(values)).reshape(-1, *[1] * (x.dim() - 1))
