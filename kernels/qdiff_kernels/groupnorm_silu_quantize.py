"""groupnorm_silu_quantize: q = quantize(silu((x + pre_add - mean_g) / sqrt(var_g + eps) * weight + bias) / c).

`group_statistics` turns the norm into one affine map per sample and channel; here is the pass that applies it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .accumulate import low_column
from .arithmetic import ASSEMBLY, paired_nibbles, quantize_value
from .arithmetic import silu as silu_of
from .group_statistics import affine_of, segment_of, widths
from .packing import BLOCK
from .quantize import (
    Padding,
    block_shape,
    check_device,
    check_eps,
    check_floating,
    check_packed,
    check_placement,
    check_vector,
    placed_size,
    result_dtype,
    source_pixels,
)


@triton.jit
def affine_at(coefficients, channel, channels, all_channels):
    """Offset, factor and constant of the channels [1, C] that are below ``channels``."""
    known = channel < channels
    offset = tl.load(coefficients + channel, mask=known, other=0.0)
    factor = tl.load(coefficients + all_channels + channel, mask=known, other=0.0)
    return offset, factor, tl.load(coefficients + 2 * all_channels + channel, mask=known, other=0.0)


@triton.jit
def normalised(x, inside, affine, SILU: tl.constexpr, PLACED: tl.constexpr):
    """silu((x + offset) * factor + constant) at pointers [P, C]; 0 outside."""
    y = (tl.load(x, mask=inside, other=0.0).to(tl.float32) + affine[0]) * affine[1] + affine[2]
    if SILU:
        y = silu_of(y)
    if PLACED:
        y = tl.where(inside, y, 0.0)  # which quantises to z, what the border holds
    return y


@triton.jit
def _apply_kernel(
    x,
    x2,
    coefficients,
    quantization,
    channel_inverse,
    out,
    pixels,
    channels1,
    channels2,
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    tiles,
    SILU: tl.constexpr,
    BITS: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    PLACED: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ASM: tl.constexpr,
):
    # columns are channels, or packed bytes of two channels each
    SHARE: tl.constexpr = 2 if PACKED else 1
    source, columns, first_column, block = segment_of(
        x, x2, tl.program_id(0), channels1 // SHARE, channels2 // SHARE, BLOCK_C
    )
    n = tl.program_id(2).to(tl.int64)
    column = (block * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    channel = low_column(column) if PACKED else column
    channels = columns * SHARE
    all_channels = channels1 + channels2
    all_columns = all_channels // SHARE
    coefficients += n * 3 * all_channels + first_column * SHARE
    affine = affine_at(coefficients, channel, channels, all_channels)
    affine_high = affine
    if PACKED:
        affine_high = affine_at(coefficients, channel + 32, channels, all_channels)
    if channel_inverse is not None:
        channel_inverse += first_column * SHARE
        factor = tl.load(channel_inverse + channel, mask=channel < channels, other=0.0)
        if PACKED:
            factor_high = tl.load(channel_inverse + channel + 32, mask=channel + 32 < channels, other=0.0)
    out_pixels = out_height * out_width
    # the coefficients are six times as many bytes as the fp16 values of one tile's thread: several tiles share them
    for tile in range(tiles):
        pixel = ((tl.program_id(1) * tiles + tile) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
        from_pixel, inside = source_pixels(pixel, height, width, out_height, out_width, top, left, UPSAMPLE, PLACED)
        within = (pixel < out_pixels) & (column < columns)
        inside &= within
        at = source + (n * pixels + from_pixel) * channels + channel
        y = normalised(at, inside, affine, SILU, PLACED)
        to = out + (n * out_pixels + pixel) * all_columns + first_column + column
        if quantization is None:
            if channel_inverse is not None:
                y *= factor
            tl.store(to, y.to(out.dtype.element_ty), mask=within)
        else:
            inverse = tl.load(quantization + 1)
            inverse_high = inverse
            if channel_inverse is not None:
                if PACKED:
                    inverse_high = inverse * factor_high
                inverse = inverse * factor
            zero_point = tl.load(quantization + 2).to(tl.int32)
            q = quantize_value(y, inverse, zero_point, BITS, ASM)
            if PACKED:
                y = normalised(at + 32, inside, affine_high, SILU, PLACED)
                q = paired_nibbles(q, quantize_value(y, inverse_high, zero_point, BITS, ASM), ASM)
            tl.store(to, q, mask=within)


def groupnorm_silu_quantize(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    quantization: Tensor | None,
    bits: int = 8,
    *,
    silu: bool = True,
    x2: Tensor | None = None,
    pre_add: Tensor | None = None,
    norm_scale: Tensor | None = None,
    norm_shift: Tensor | None = None,
    channel_inverse: Tensor | None = None,
    upsample: int = 1,
    padding: Padding = (0, 0, 0, 0),
    out_dtype: torch.dtype | None = None,
    packed: bool = False,
    statistics: Tensor | None = None,
) -> Tensor:
    """q[n, c] = quantize(silu(group_norm(cat(x, x2) + pre_add) * (1 + norm_scale) + norm_shift)[n, c] * inv_c[c]).

    Args:
        x: float16, bfloat16 or float32 [N, C1, *spatial].
        groups: normalisation groups over all channels C = C1 + C2; they may straddle x and x2.
        weight, bias: floating [C], or None.
        quantization: float32 [3] on the device, (s, 1 / s, z); None: the value itself, padded with 0.
        bits: 4 or 8.
        x2: further channels [N, C2, *spatial] of x's dtype.
        pre_add, norm_scale, norm_shift: floating [C] or [N, C].
        channel_inverse: float32 [C], inv_c = 1 / c of channel equalisation, multiplied with 1 / s first.
        upsample: integer factor of nearest-neighbour upsampling, 4-D only.
        padding: (top, bottom, left, right) pixels of value z (or 0) around the (upsampled) image, 4-D only.
        out_dtype: of the result without a quantization; x's by default.

    Returns:
        int8 or floating [N, C, *spatial'], channels innermost in memory.

    Raises:
        TypeError, ValueError: an argument's type or shape; the message names it.
    """
    check_floating("x", x)
    if x.dim() < 3 or not x.shape[1]:
        raise ValueError(f"x must be [N, C, *spatial], got {list(x.shape)}")
    n, spatial = len(x), x.shape[2:]
    if x2 is not None:
        if x2.dtype != x.dtype:
            raise TypeError(f"x2 must be {x.dtype} like x, got {x2.dtype}")
        if x2.dim() != x.dim() or len(x2) != n or x2.shape[2:] != spatial or not x2.shape[1]:
            raise ValueError(f"x2 must be [{n}, C2, *{list(spatial)}] like x, got {list(x2.shape)}")
        check_device("x2", x2, x.device)
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels, got {groups!r}")
    check_eps(eps)
    check_placement(x, upsample, padding)
    check_vector("weight", weight, channels, x.device)
    check_vector("bias", bias, channels, x.device)
    check_vector("channel_inverse", channel_inverse, channels, x.device, (torch.float32,))
    pre_add, norm_scale, norm_shift = (
        _per_sample(name, values, n, channels, x.device)
        for name, values in (("pre_add", pre_add), ("norm_scale", norm_scale), ("norm_shift", norm_shift))
    )
    dtype = result_dtype(x, quantization, bits, out_dtype)
    check_packed(packed, None if quantization is None else bits)
    if packed and (x.shape[1] % BLOCK or channels % BLOCK):
        raise ValueError(f"packed needs multiples of {BLOCK} channels, got {x.shape[1]} and {channels - x.shape[1]}")
    share = 2 if packed else 1
    pixels = spatial.numel()
    height, width = spatial if len(spatial) == 2 else (1, pixels)
    out_height, out_width = placed_size(height, width, upsample, padding)
    shape = (out_height, out_width) if len(spatial) == 2 else spatial
    if not pixels:
        raise ValueError(f"x must have pixels, got {list(x.shape)}")
    check_statistics(statistics, n, pixels, channels, x.device)
    out = torch.empty((n, *shape, channels // share), dtype=torch.uint8 if packed else dtype, device=x.device)
    if n:
        rows = x.movedim(1, -1).reshape(n, pixels, -1).contiguous()
        rows2 = None if x2 is None else x2.movedim(1, -1).reshape(n, pixels, -1).contiguous()
        affine = affine_of(
            rows, rows2, groups, weight, bias, eps, pre_add, norm_scale, norm_shift, statistics
        )  # fmt: skip
        columns = [width // share for width in widths(rows, rows2)]
        block_p, block_c = block_shape(out_height * out_width, *columns)
        blocks = sum(triton.cdiv(size, block_c) for size in columns)
        tiles = tiles_per_program(triton.cdiv(out_height * out_width, block_p), blocks * n)
        _apply_kernel[(blocks, triton.cdiv(out_height * out_width, block_p * tiles), n)](
            rows, rows2, affine, quantization, channel_inverse, out, pixels, x.shape[1], channels - x.shape[1],
            height, width, out_height, out_width, padding[0], padding[2], tiles, SILU=silu, BITS=bits,
            UPSAMPLE=upsample, PLACED=upsample > 1 or any(padding), PACKED=packed, BLOCK_P=block_p, BLOCK_C=block_c,
            ASM=ASSEMBLY,
        )  # fmt: skip
    return out.movedim(-1, 1)


def check_statistics(statistics: Tensor | None, n: int, pixels: int, channels: int, device: torch.device) -> None:
    """Raises ValueError unless statistics is None or dense float32 [n, chunks, 2, channels], chunks dividing pixels."""
    if statistics is None:
        return
    shape = list(statistics.shape)
    dense = statistics.dtype == torch.float32 and statistics.is_contiguous() and statistics.device == device
    if not dense or len(shape) != 4 or [n, 2, channels] != [shape[0], *shape[2:]] or not shape[1] or pixels % shape[1]:
        wanted = f"float32 [{n}, chunks, 2, {channels}] on {device}, chunks dividing {pixels} pixels"
        raise ValueError(f"statistics must be dense {wanted}, got {statistics.dtype} {shape} on {statistics.device}")


def _per_sample(name: str, values: Tensor | None, n: int, channels: int, device: torch.device) -> Tensor | None:
    """values [C] or [N, C] as [N, C] with adjacent channels; rows may share memory."""
    if values is None:
        return None
    check_floating(name, values)
    check_device(name, values, device)
    if tuple(values.shape) not in ((channels,), (n, channels)):
        raise ValueError(f"{name} must be [{channels}] or [{n}, {channels}], got {list(values.shape)}")
    dense = values if values.stride(-1) == 1 else values.contiguous()
    return dense.expand(n, channels)


def tiles_per_program(tiles: int, images: int) -> int:
    """How many of an image's tiles one program takes: up to 8, as long as 1024 programs remain."""
    return min(8, max(1, tiles * images // 1024), tiles)
