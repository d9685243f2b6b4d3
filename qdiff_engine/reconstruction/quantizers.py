"""The activations' quantisation inside a block whose samples belong to different rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from ..tables import Table


class RowQuantizer:
    """The activation hook that fake-quantises every sample by its own row; `graph.interpret.row_quantizer` for many.

    Args:
        rows: int64 [n], the row of every sample of the batch.
        drop: (probability, generator) with which an element stays floating, as QDrop does; None quantises all.
    """

    def __init__(self, table: Table, rows: Tensor, drop: tuple[float, torch.Generator] | None = None) -> None:
        self.table, self.rows, self.drop = table, rows, drop
        self.sites = {site: i for i, site in enumerate(table.sites)}

    def __call__(self, site: str, x: Tensor) -> Tensor:
        bits = self.table.bits[self.rows, self.sites[site]]
        if bool((bits == 16).all()):
            return x
        scale, zero_point = (t[self.rows, self.sites[site]] for t in (self.table.scale, self.table.zero_point))
        quantized = quantize_rows(x, scale, zero_point, bits)
        if self.drop is None:
            return quantized
        probability, generator = self.drop
        return torch.where(torch.rand(x.shape, generator=generator) < probability, x, quantized)


def quantize_rows(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor) -> Tensor:
    """s[j] (clamp(round(x[j] * (1 / s[j])) + z[j]) - z[j]) for each sample j, straight-through inside the range.

    Rounds as `numerics.quantize` does. Samples with 16 bits stay as they are.

    Args:
        x: [n * k, ...], k values along the first axis for each sample; scale, zero_point, bits: [n].
    """
    low, high = (_limits(bits, end) for end in (0, 1))
    s, z, low, high, floating = (_each(t, x) for t in (scale, zero_point, low, high, bits == 16))
    scaled = x * s.reciprocal()
    rounded = scaled + (torch.round(scaled) - scaled).detach()
    quantized = (torch.minimum(torch.maximum(rounded + z, low), high) - z) * s
    return torch.where(floating, x, quantized)


def _limits(bits: Tensor, end: int) -> Tensor:
    """Smallest or largest activation integer per sample."""
    values = [float(numerics.activation_range(8 if b == 16 else b)[end]) for b in bits.tolist()]
    return torch.tensor(values)


def _each(values: Tensor, x: Tensor) -> Tensor:
    """[n] values, one per sample, along the first axis of ``x`` [n * k, ...]."""
    return values.repeat_interleave(len(x) // len(values)).reshape(-1, *[1] * (x.dim() - 1))
