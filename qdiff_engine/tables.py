"""Per-row constants: which calibrated row serves a timestep, and each quantiser's scale and zero point there."""

from __future__ import annotations

import bisect
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import numerics
from .plan_requests import MODE_BITS as MODE_BITS

MODES = tuple(MODE_BITS)
NOISE_SUMS = 15  # of e^i (e_hat - e)^j, i + j <= 4


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

    def corrects(self, rows: int | slice = slice(None)) -> bool:
        """Whether the prediction of any of ``rows`` is changed: a is not 1, or b is not 0."""
        return bool((self.output_scale[rows] != 1).any()) or bool((self.output_shift[rows] != 0).any())

    def uncorrected(self) -> Table:
        """The table with every prediction left as it is: a = 1, b = 0."""
        ones, zeros = torch.ones_like(self.output_scale), torch.zeros_like(self.output_shift)
        return dataclasses.replace(self, output_scale=ones, output_shift=zeros)


def row_groups(modes: tuple[str, ...], rows: int) -> list[int]:
    """Group of every row, from 1: neighbours by ``rows`` (0 means all) that run in the same mode share a range."""
    keys = [(0 if rows == 0 else r // rows, mode) for r, mode in enumerate(modes)]
    distinct = list(dict.fromkeys(keys))
    return [distinct.index(key) + 1 for key in keys]


def with_learnt(table: Table, learnt: Table | None) -> Table:
    """``table`` with the step sizes of ``learnt`` wherever both have the same bits; other precisions keep their own."""
    if learnt is None:
        return table
    same = table.bits == learnt.bits
    return dataclasses.replace(
        table,
        scale=torch.where(same, learnt.scale, table.scale),
        zero_point=torch.where(same, learnt.zero_point, table.zero_point),
    )


@dataclass(frozen=True)
class Correction:
    """What a corrected model gives its sampler, by row: g[r] x' + B[r], with the noise of x' scaled by s'[r] / s[r].

    The output's affine map is in the `Table`; ``method`` and ``key`` speak of it, too.

    Args:
        method: "ptqd", "mmse+ibc", ...: what was estimated, see `Recipe`.
        key: what it is valid for: checkpoint hash, sampler, steps, eta, guidance, prediction type, bits.
        timesteps: of the rows, descending, as in the table.
        input_bias: float32 [R, C] or [R, C, *spatial], B; zero where no bias is corrected.
        sigma_scale: float32 [R], s' / s in [0, 1]; one where no noise is calibrated.
        input_scale: float32 [R], g > 0; one where no variance of the latents is corrected.

    Raises:
        ValueError: a tensor of the wrong shape or dtype, or with a value outside its range.
    """

    method: str
    key: dict[str, Any]
    timesteps: tuple[float, ...]
    input_bias: Tensor
    sigma_scale: Tensor
    input_scale: Tensor
    has_input_bias: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = len(self.timesteps)
        for name, ranks in (("input_bias", range(2, 6)), ("sigma_scale", (1,)), ("input_scale", (1,))):
            value: Tensor = getattr(self, name)
            if value.dtype != torch.float32 or value.dim() not in ranks or len(value) != rows:
                raise ValueError(f"{name} must be float32 with {rows} rows, got {value.dtype} {list(value.shape)}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite")
        if bool((self.sigma_scale < 0).any()) or bool((self.sigma_scale > 1).any()):
            raise ValueError("sigma_scale must lie in [0, 1]")
        if bool((self.input_scale <= 0).any()):
            raise ValueError("input_scale must be positive")
        object.__setattr__(self, "has_input_bias", bool((self.input_bias != 0).any()))

    @property
    def only_output(self) -> bool:
        """Whether the sampler's step stays as it is."""
        return not self.has_input_bias and bool((self.sigma_scale == 1).all() and (self.input_scale == 1).all())

    def row(self, timestep: float) -> int:
        """Index of the row nearest to ``timestep``."""
        return min(range(len(self.timesteps)), key=lambda r: abs(self.timesteps[r] - timestep))


@dataclass(frozen=True)
class Noise:
    """What `measure_noise` found: sums over e and e_hat - e for every mode and row, see `correction.moments.Moments`.

    Args:
        key: what was measured: checkpoint hash, sampler, steps, eta, guidance, prediction type, bits, samples, seed.
        timesteps: of the rows, descending, as in the table.
        modes: the measured activation modes, the first axis of the sums.
        sums: float64 [M, R, C, 15]; a row that was not measured in a mode has count 0.
        alpha_bar: float64 [R], the schedule's cumulative product at every row; signal to noise of the latents is
            alpha_bar / (1 - alpha_bar).

    Raises:
        ValueError: a tensor of the wrong shape or dtype, or with a value outside its range.
    """

    key: dict[str, Any]
    timesteps: tuple[float, ...]
    modes: tuple[str, ...]
    sums: Tensor
    alpha_bar: Tensor

    def __post_init__(self) -> None:
        rows = len(self.timesteps)
        if not self.modes or len(set(self.modes)) != len(self.modes) or not set(self.modes) <= set(MODES):
            raise ValueError(f"modes must be some of {', '.join(MODES)}, got {self.modes}")
        shape = (len(self.modes), rows)
        found = tuple(self.sums.shape)
        if self.sums.dtype != torch.float64 or len(found) != 4 or (*found[:2], found[3]) != (*shape, NOISE_SUMS):
            raise ValueError(f"sums must be float64 [{shape[0]}, {rows}, C, {NOISE_SUMS}], got {list(found)}")
        if self.alpha_bar.dtype != torch.float64 or tuple(self.alpha_bar.shape) != (rows,):
            raise ValueError(f"alpha_bar must be float64 [{rows}], got {list(self.alpha_bar.shape)}")
        if not bool(torch.isfinite(self.sums).all()) or bool((self.sums[..., 0] < 0).any()):
            raise ValueError("sums must be finite, and counts at least 0")
        if not bool(((self.alpha_bar >= 0) & (self.alpha_bar <= 1)).all()):
            raise ValueError("alpha_bar must lie in [0, 1]")
