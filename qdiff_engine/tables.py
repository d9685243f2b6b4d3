"""Per-row constants: which calibrated row serves a timestep, and each quantiser's scale and zero point there."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import numerics
from .plan_requests import MODE_BITS as MODE_BITS

MODES = tuple(MODE_BITS)


@dataclass(frozen=True)
class Table:
    """Scales and zero points of every quantiser (``site``) in every calibrated row.

    ``bits[r, s]`` is 4, 8 or 16; 16 means that the site's activations stay in floating point in that row.
    ``output_scale``/``output_shift`` hold the affine correction e' = a e + b of the model output, folded into
    the last layer's epilogue; the identity when nothing is corrected.
    """

    timesteps: tuple[float, ...]  # descending, the value the UNet receives
    modes: tuple[str, ...]  # activation precision of every row: "A4", "A8" or "A16"
    sites: tuple[str, ...]
    scale: Tensor  # float32 [R, S]
    zero_point: Tensor  # int32 [R, S]
    bits: Tensor  # uint8 [R, S]
    output_scale: Tensor  # float32 [R, C]
    output_shift: Tensor  # float32 [R, C]
    _midpoints: list[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows, sites = len(self.timesteps), len(self.sites)
        if rows < 1:
            raise ValueError("timesteps must hold at least one calibrated row, got none")
        if any(not math.isfinite(t) for t in self.timesteps):
            raise ValueError("timesteps must be finite")
        if list(self.timesteps) != sorted(set(self.timesteps), reverse=True):
            raise ValueError("timesteps must be strictly descending")
        if len(self.modes) != rows or not set(self.modes) <= set(MODES):
            raise ValueError(f"modes must name one of {', '.join(MODES)} for each of the {rows} rows")
        if len(set(self.sites)) != sites:
            raise ValueError("sites must be distinct")
        for name, dtype in (("scale", torch.float32), ("zero_point", torch.int32), ("bits", torch.uint8)):
            value = getattr(self, name)
            if value.dtype != dtype or tuple(value.shape) != (rows, sites):
                raise ValueError(f"{name} must be {dtype} [{rows}, {sites}], got {value.dtype} {list(value.shape)}")
        for name in ("output_scale", "output_shift"):
            value = getattr(self, name)
            if value.dtype != torch.float32 or value.dim() != 2 or value.shape[0] != rows:
                raise ValueError(f"{name} must be float32 [{rows}, C], got {value.dtype} {list(value.shape)}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite")
        if self.output_scale.shape != self.output_shift.shape:
            raise ValueError(
                f"output_shift must have the shape of output_scale {list(self.output_scale.shape)}, "
                f"got {list(self.output_shift.shape)}"
            )
        self._check_values()
        ascending = self.timesteps[::-1]
        midpoints = [(a + b) / 2 for a, b in zip(ascending, ascending[1:], strict=False)]
        object.__setattr__(self, "_midpoints", midpoints)

    def _check_values(self) -> None:
        if not set(self.bits.unique().tolist()) <= {4, 8, 16}:
            raise ValueError(f"bits must be 4, 8 or 16, got {sorted(set(self.bits.unique().tolist()))}")
        tiny = torch.finfo(torch.float32).tiny  # below it, 1 / scale overflows
        if not bool((torch.isfinite(self.scale) & (self.scale >= tiny)).all()):
            raise ValueError(f"scale must be finite and at least {tiny:.3g} everywhere")
        for bits in (4, 8):
            low, high = numerics.activation_range(bits)
            used = self.zero_point[self.bits == bits]
            if used.numel() and (int(used.min()) < low or int(used.max()) > high):
                raise ValueError(f"zero_point must lie in [{low}, {high}] where bits = {bits}")

    def row(self, timestep: float) -> int:
        """Index of the calibrated row nearest to ``timestep``; halfway goes to the smaller timestep."""
        return len(self.timesteps) - 1 - bisect.bisect_left(self._midpoints, timestep)
