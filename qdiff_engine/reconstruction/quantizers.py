"""The activations' quantisation inside a block whose samples belong to different rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph.interpret import quantize_rows
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
