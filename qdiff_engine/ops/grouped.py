"""Weights with a scale for every group along K, for kernels that know one scale per output."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .operands import GemmWeight, pack_gemm

_KEY = "groups"  # of the groups' own weights among the prepared forms


def group_by_group(int_gemm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``int_gemm`` for weights in groups, too: one product for each, which the next one takes as its residual."""

    @functools.wraps(int_gemm)
    def products(
        q: Tensor,
        weight: GemmWeight,
        scale: float | None,
        zero_point: int | None,
        bias: Tensor | None = None,
        *,
        output_scale: Tensor | None = None,
        **terms: Any,  # the residual, and whether its memory may be overwritten
    ) -> Tensor:
        groups = weight.scale_groups if isinstance(weight, GemmWeight) else 1
        if groups == 1 or q.is_floating_point() or q.shape[-1:] != weight.values.shape[1:]:  # which is refused there
            return int_gemm(q, weight, scale, zero_point, bias, **terms, output_scale=output_scale)
        for part, of_group in zip(q.chunk(groups, -1), _parts(weight), strict=True):
            y = int_gemm(part.contiguous(), of_group, scale, zero_point, bias, **terms, output_scale=output_scale)
            bias, terms = None, {"residual": y, "reuse_residual": True}
        return y

    return products


def _parts(weight: GemmWeight) -> list[GemmWeight]:
    """The weights of every group, packed once."""
    if _KEY not in weight.prepared:
        columns = zip(weight.values.chunk(weight.scale_groups, 1), weight.scale.unbind(1), strict=True)
        weight.prepared[_KEY] = [pack_gemm(v, s.contiguous(), weight.bits) for v, s in columns]
    return weight.prepared[_KEY]
