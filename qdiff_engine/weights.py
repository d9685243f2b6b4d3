"""Quantised weights: the integers, their scales, and the two-to-a-byte form in which 4-bit weights are stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import numerics

_CHUNK = 2**22


def scale_groups(shape: Sequence[int], group: int) -> int:
    """How many scales each output of a weight of ``shape`` has: one for every ``group`` inputs of a linear layer.

    1 for convolutions, with 0, and where ``group`` does not divide K.
    """
    return shape[1] // group if group and len(shape) == 2 and shape[1] % group == 0 else 1


@dataclass(frozen=True)
class QuantizedWeight:
    """w[n, ...] ~ scale[n] * values[n, ...], or scale[n, k // K'] * values[n, k] with groups of K' along K.

    Args:
        values: int8 [Cout, Cin / groups, R, S] (convolution) or [N, K] (linear), within the range of ``bits``.
        scale: float32 [Cout], positive; or [N, K / K'] of a linear layer with groups.
        bits: 4 or 8.
    """

    values: Tensor
    scale: Tensor
    bits: int

    def __post_init__(self) -> None:
        low, high = numerics.weight_range(self.bits)
        if self.values.dtype != torch.int8 or self.values.dim() not in (2, 4) or self.values.numel() == 0:
            raise ValueError(
                f"values must be a non-empty int8 tensor of 2 or 4 dimensions, "
                f"got {self.values.dtype} {list(self.values.shape)}"
            )
        if self.scale.dtype != torch.float32 or not numerics.fits_weight(self.scale, self.values):
            raise ValueError(
                f"scale must be float32 [{self.values.shape[0]}], or with a column for each of several equal groups "
                f"of a linear layer's K, got {self.scale.dtype} {list(self.scale.shape)}"
            )
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            raise ValueError("scale must be positive and finite everywhere")
        if int(self.values.min()) < low or int(self.values.max()) > high:
            raise ValueError(f"values must lie in [{low}, {high}] for {self.bits}-bit weights")
        if self.values[0].numel() > numerics.MAX_K:
            raise ValueError(f"K must be at most {numerics.MAX_K}, got {self.values[0].numel()}")

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same integers on ``device``."""
        return dataclasses.replace(self, values=self.values.to(device), scale=self.scale.to(device))

    def rescaled(self, factor: Tensor) -> QuantizedWeight:
        """The same integers with the scales of output n multiplied by ``factor`` [Cout]."""
        return dataclasses.replace(self, scale=self.scale * factor.reshape(-1, *[1] * (self.scale.dim() - 1)))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w = scale * values in the weight's own shape."""
        values, scales = numerics.by_scale(self.values, self.scale)
        return (values.to(dtype) * scales.to(dtype)).reshape(self.values.shape)

    def stored(self) -> Tensor:
        """[Cout, K] with K in (r, s, c) order: int8, or uint8 [Cout, ceil(K / 2)] for 4 bits."""
        values = self.values.permute(0, 2, 3, 1) if self.values.dim() == 4 else self.values
        values = values.reshape(values.shape[0], -1).contiguous()
        return numerics.pack_int4(values) if self.bits == 4 else values

    @classmethod
    def from_stored(cls, stored: Tensor, scale: Tensor, bits: int, shape: tuple[int, ...]) -> QuantizedWeight:
        """Inverse of `stored`; ``shape`` is the weight's own shape.

        Raises:
            ValueError: dtype or size do not fit ``bits`` and ``shape``, or a value is out of range.
        """
        if len(shape) not in (2, 4) or min(shape) < 1:
            raise ValueError(f"shape must hold 2 or 4 positive sizes, got {list(shape)}")
        rows, k = shape[0], math.prod(shape[1:])
        dtype, width = (torch.uint8, (k + 1) // 2) if bits == 4 else (torch.int8, k)
        if stored.dtype != dtype or tuple(stored.shape) != (rows, width):
            raise ValueError(
                f"stored weights must be {dtype} [{rows}, {width}], got {stored.dtype} {list(stored.shape)}"
            )
        if bits == 4 and k % 2 and bool((stored[:, -1] > 0xF).any()):
            raise ValueError("stored weights must be padded with 0 where K is odd")
        values = torch.empty(shape, dtype=torch.int8)
        target = values.permute(0, 2, 3, 1) if len(shape) == 4 else values
        step = max(1, _CHUNK // k)
        for start in range(0, rows, step):  # in pieces: unpacking takes several times its result
            part = stored[start : start + step]
            part = numerics.unpack_int4(part, k) if bits == 4 else part
            target[start : start + step] = part.reshape(-1, *target.shape[1:])
        return cls(values, scale, bits)
