"""Step sizes and zero points of a block's quantisers, learnt together with the rounding of its weights.

Source: Esser et al., Learned Step Size Quantization (ICLR 2020), with the scale in logarithms and a zero point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import numerics
from ..graph.ir import Node
from ..tables import Table, row_groups

_LIMIT = 3.0  # of |log| of a scale's change: 20 times


class StepSizes:
    """s = s0 exp(p), z = round(z0 + d) for each quantiser and group of rows; p and d start at 0 and are learnt.

    Args:
        table: s0 and z0, equal in all rows of a group.
        nodes: those of the block; what the prompt alone feeds has one group of all rows.
        rows: how many neighbouring rows share a range, as `Recipe.row_group` says.
    """

    def __init__(self, table: Table, nodes: Sequence[Node], rows: int) -> None:
        own = [node for node in nodes if "site" in node.kwargs]
        self.start, self.sites = table, {node.kwargs["site"]: i for i, node in enumerate(own)}
        self.columns = [table.sites.index(site) for site in self.sites]
        groups = torch.tensor(row_groups(table.modes, rows))
        shared = torch.tensor([node.section == "prompt" for node in own], dtype=torch.bool)
        self.group = torch.where(shared, 0, groups[:, None])  # [R, s]
        self.log_scale, self.shift = (torch.zeros(int(groups.max()) + 1, len(own)) for _ in range(2))

    def affine(self, site: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero point) [n] of a quantiser in ``rows``, int64 [n]; the zero point is rounded straight-through."""
        at, column = self.sites[site], self.columns[self.sites[site]]
        group = self.group[rows, at]
        zero_point = self.start.zero_point[rows, column] + self.shift[group, at]
        rounded = zero_point + (torch.round(zero_point) - zero_point).detach()
        return self.start.scale[rows, column] * torch.exp(self.log_scale[group, at]), rounded

    @torch.no_grad()
    def keep_representable(self) -> None:
        """Bring scales back within a factor of their start, and zero points within the range of their bits."""
        self.log_scale.clamp_(-_LIMIT, _LIMIT)
        bits, start = (values[:, self.columns] for values in (self.start.bits, self.start.zero_point))
        low, high = (limit - start for limit in numerics.activation_limits(bits))
        least, most = (
            torch.zeros_like(self.shift).scatter(0, self.group, values) for values in (low, high)
        )  # equal in all rows of a group; a group without rows is never read
        torch.clamp(self.shift, least, most, out=self.shift)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """{"SITE.step_size": float32 [R], "SITE.zero_point": int32 [R]}, for a checkpoint and for `learnt_table`."""
        rows = torch.arange(len(self.start.timesteps))
        found: dict[str, Tensor] = {}
        for site in self.sites:
            scale, zero_point = self.affine(site, rows)
            found |= {f"{site}.step_size": scale, f"{site}.zero_point": zero_point.to(torch.int32)}
        return found


def learnt_table(table: Table, tensors: Mapping[str, Tensor]) -> Table:
    """``table`` with the scales and zero points among ``tensors``; what floats stays as it is."""
    scale, zero_point = table.scale.clone(), table.zero_point.clone()
    for column, site in enumerate(table.sites):
        if f"{site}.step_size" in tensors:
            scale[:, column], zero_point[:, column] = (
                tensors[f"{site}.{name}"] for name in ("step_size", "zero_point")
            )
    floating = table.bits == 16
    return dataclasses.replace(
        table,
        scale=torch.where(floating, table.scale, scale),
        zero_point=torch.where(floating, table.zero_point, zero_point),
    )
