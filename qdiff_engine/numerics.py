"""The one definition of the engine's integer arithmetic; every backend equals it.

Activations (per tensor, asymmetric, ``bits`` b in {4, 8}):
    q = clamp(round_half_even(x * inv_s) + z, -2^(b-1), 2^(b-1) - 1),   inv_s = float32(1 / s),   x ~ s (q - z)
Weights (per output channel, symmetric): int8 in [-127, 127], int4 in [-8, 7],   w ~ s_w q_w.
A linear layer may have a scale for every group along K, too:   w[n, k] ~ s_w[n, k // K'] q_w[n, k].

A quantised activation is held as ``int8`` (q itself) or as ``uint8`` (q + 128, what x86 integer units read).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OFFSET = 128  # uint8 activations hold q + OFFSET
MAX_K = (2**31 - 1) // (255 * 127)  # taps an int32 accumulator holds without overflow: 66311


def activation_range(bits: int) -> tuple[int, int]:
    """Smallest and largest activation integer of ``bits`` (4 or 8) bits."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def activation_limits(bits: Tensor) -> tuple[Tensor, Tensor]:
    """`activation_range` of each of ``bits`` (4 or 8; 16 gives the range of int16), float32."""
    half = torch.pow(2.0, bits.float() - 1)
    return -half, half - 1


def weight_range(bits: int) -> tuple[int, int]:
    """Smallest and largest weight integer: int8 is kept symmetric at +-127, int4 uses [-8, 7]."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    return (-127, 127) if bits == 8 else (-8, 7)


def inverse_scale(scale: float) -> float:
    """float32(1 / s): the factor that quantisation multiplies with, rounded once."""
    return float(torch.tensor(1.0 / scale, dtype=torch.float32))


def quantize(x: Tensor, scale: float, zero_point: int, bits: int, channel_inverse: Tensor | None = None) -> Tensor:
    """q = clamp(round_half_even(x * inv) + z) as int8, inv = float32(inv_s * inv_c[k]) along the last axis.

    Args:
        x: float tensor; multiplied in float32 whatever its dtype.
        scale: positive activation scale s.
        zero_point: z, within the range of ``bits``.
        bits: 4 or 8.
        channel_inverse: optional float32 [K], 1/c of channel equalisation, along the last axis of ``x``.
    """
    low, high = activation_range(bits)
    inverse: Tensor | float = inverse_scale(scale)
    if channel_inverse is not None:
        inverse = torch.tensor(inverse, dtype=torch.float32, device=x.device) * channel_inverse
    return (torch.round(x.float() * inverse) + zero_point).clamp_(low, high).to(torch.int8)


def dequantize(q: Tensor, scale: float, zero_point: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """x = s (q - z); ``q`` int8, or uint8 holding q + 128."""
    return (signed(q).to(dtype) - zero_point) * scale


def signed(q: Tensor) -> Tensor:
    """The integers themselves as int8, whichever of the two storage forms ``q`` has."""
    return (q ^ OFFSET).view(torch.int8) if q.dtype == torch.uint8 else q


def stored(q: Tensor, dtype: torch.dtype) -> Tensor:
    """The integers in the storage form ``dtype``, int8 or uint8 offset by 128, whichever of the two ``q`` has."""
    if q.dtype == dtype:
        return q
    return q.view(torch.uint8) ^ OFFSET if dtype == torch.uint8 else signed(q)  # adding 128 flips the highest bit


def affine_from_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) that map [low, high], widened to contain 0, onto the integers.

    A range of width 0 gets scale 1 and zero point 0. Elementwise over tensors of any shape.
    """
    q_low, q_high = activation_range(bits)
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    tiny = torch.finfo(torch.float32).tiny * (q_high - q_low)
    width = high - low
    scale = torch.where(width > tiny, width / (q_high - q_low), torch.ones_like(width)).float()
    zero_point = (q_low - torch.round(low / scale.double())).clamp(q_low, q_high).to(torch.int32)
    return scale, torch.where(width > tiny, zero_point, torch.zeros_like(zero_point))


def by_scale(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, scale) in shapes that multiply: [N, ...] and [N, 1, ...], or with groups [N, G, K / G] and [N, G, 1].

    scale: [N]; or [N, G] for a ``weight`` [N, K], a column for each of G groups along K.
    """
    if scale.dim() == 1:
        return weight, scale.reshape(-1, *[1] * (weight.dim() - 1))
    return weight.unflatten(1, (scale.shape[1], -1)), scale[:, :, None]


def fits_weight(scale: Tensor, weight: Tensor) -> bool:
    """Whether ``scale`` has a form that `by_scale` takes: [N], or [N, G] with G > 1 that divides K."""
    if scale.dim() == 1:
        return scale.shape == weight.shape[:1]
    grouped = scale.dim() == weight.dim() == 2 and scale.shape[0] == weight.shape[0] and scale.shape[1] > 1
    return grouped and weight.shape[1] % scale.shape[1] == 0


def quantize_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """q_w = clamp(round_half_even(w / s_w)) as int8; ``weight`` [N, ...], ``scale`` [N], or [N, G] by groups of K."""
    low, high = weight_range(bits)
    values, scales = by_scale(weight, scale)
    return torch.round(values / scales).clamp_(low, high).to(torch.int8).reshape(weight.shape)


def pack_int4(values: Tensor) -> Tensor:
    """Two int4 values a byte: byte j holds k = 2j in its low nibble and k = 2j + 1 in its high one.

    ``values`` int8 [N, K] in [-8, 7] -> uint8 [N, ceil(K / 2)]; an odd K is padded with 0.
    """
    if values.dtype != torch.int8 or values.dim() != 2:
        raise TypeError(f"values must be int8 [N, K], got {values.dtype} {list(values.shape)}")
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    nibbles = values.view(torch.uint8) & 0xF
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """Inverse of `pack_int4`: uint8 [N, ceil(k / 2)] -> int8 [N, k]."""
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != (k + 1) // 2:
        raise TypeError(f"packed must be uint8 [N, {(k + 1) // 2}], got {packed.dtype} {list(packed.shape)}")
    pairs = packed.contiguous().view(torch.int8)  # shifts of signed bytes extend the sign
    return torch.stack(((pairs << 4) >> 4, pairs >> 4), dim=-1).flatten(1)[:, :k].contiguous()


def conv_output_size(size: int, kernel: int, stride: int, pad_low: int, pad_high: int, dilation: int) -> int:
    """Output length of a convolution along one axis."""
    return (size + pad_low + pad_high - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True)
class BorderClasses:
    """Which taps lie inside the image, grouped: outputs with the same set share a row of ``sums``."""

    index: Tensor  # int64 [OH, OW], class of every output pixel
    sums: Tensor  # int32 [classes, Cout], sum of the weight integers over the taps inside the image


def _axis_classes(size: int, out: int, kernel: int, stride: int, pad: int, dilation: int) -> tuple[list, Tensor]:
    """Distinct [first, last) tap intervals inside the image along one axis, and the interval of every output."""
    intervals: list[tuple[int, int]] = []
    index = []
    for o in range(out):
        first = max(0, math.ceil((pad - o * stride) / dilation))
        last = min(kernel, math.ceil((size + pad - o * stride) / dilation))
        interval = (first, max(first, last))
        if interval not in intervals:
            intervals.append(interval)
        index.append(intervals.index(interval))
    return intervals, torch.tensor(index)


def border_classes(
    weight: Tensor,
    image: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
) -> BorderClasses:
    """Border-class weight sums of a convolution: wsum[class, n] = sum of q_w[n] over the taps inside the image.

    Args:
        weight: int8 [Cout, Cin / groups, R, S]; or its sums over the input channels, int32 [Cout, 1, R, S].
        image: input height and width.
        stride, dilation: per axis (vertical, horizontal).
        padding: (top, bottom, left, right).
    """
    _, _, r, s = weight.shape
    (h, w), (top, bottom, left, right) = image, padding
    oh = conv_output_size(h, r, stride[0], top, bottom, dilation[0])
    ow = conv_output_size(w, s, stride[1], left, right, dilation[1])
    rows, row_index = _axis_classes(h, oh, r, stride[0], top, dilation[0])
    cols, col_index = _axis_classes(w, ow, s, stride[1], left, dilation[1])
    taps = weight.to(torch.int64).sum(1)  # [Cout, R, S]
    sums = torch.stack([taps[:, a:b, c:d].sum((1, 2)) for a, b in rows for c, d in cols])
    return BorderClasses(row_index[:, None] * len(cols) + col_index[None, :], sums.to(torch.int32))
