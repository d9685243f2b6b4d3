"""A GroupNorm's statistics as one affine map per sample and channel: y = (x + offset[c]) * factor[c] + constant[c].

Means and squared deviations of every channel over chunks of pixels, then their merger. Nothing is added atomically, and
the chunks depend on the shape alone, so two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize import block_shape
from .tiles import MAX_CHUNK

MIN_CHUNK = 16  # pixels, of statistics written beside an output
MAX_CHUNKS = 64  # of one image: what the merging kernel reads is then small beside x


@triton.jit
def segment_of(x, x2, block, channels1, channels2, BLOCK_C: tl.constexpr):
    """(x or x2, its channels, its first channel in their concatenation, the block within it) of a block of channels."""
    if x2 is None:
        return x, channels1, 0, block
    else:  # without it, Triton compiles these lines for x2 = None too
        blocks1 = tl.cdiv(channels1, BLOCK_C)
        second = block >= blocks1
        source = tl.where(second, x2, x)
        channels = tl.where(second, channels2, channels1)
        return source, channels, tl.where(second, channels1, 0), tl.where(second, block - blocks1, block)


@triton.jit
def term(values, row, stride, channel, inside):
    """values[row * stride + channel] in float64, 0 outside and where values is None."""
    if values is None:
        return tl.zeros(channel.shape, dtype=tl.float64)
    else:
        return tl.load(values + row * stride + channel, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def summed(values):
    """The sum of a [K, C] block, as [1, 1]."""
    return tl.sum(tl.sum(values, axis=1, keep_dims=True), axis=0, keep_dims=True)


@triton.jit
def _statistics_kernel(
    x,
    x2,
    statistics,
    pixels,
    channels1,
    channels2,
    tiles,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and sum of squared deviations [N, chunks, 2, C] of every channel over chunks of tiles * BLOCK_P pixels."""
    source, channels, first_channel, block = segment_of(x, x2, tl.program_id(0), channels1, channels2, BLOCK_C)
    chunk = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    within = channel[None, :] < channels
    first = chunk * tiles * BLOCK_P
    last = tl.minimum(first + tiles * BLOCK_P, pixels)
    pixel = (first + tl.arange(0, BLOCK_P))[:, None]
    at = source + (n * pixels + pixel) * channels + channel[None, :]
    value = tl.load(at, mask=within & (pixel < last), other=0.0).to(tl.float32)
    # sums around the mean of the first tile: they do not cancel where the mean is far above the deviation
    shift = tl.sum(value, axis=0) / tl.minimum(last - first, BLOCK_P)
    deviation = tl.where(pixel < last, value - shift[None, :], 0.0)
    total = deviation
    squares = deviation * deviation
    for _ in range(1, tiles):
        pixel += BLOCK_P
        at += BLOCK_P * channels
        value = tl.load(at, mask=within & (pixel < last), other=0.0).to(tl.float32)
        deviation = tl.where(pixel < last, value - shift[None, :], 0.0)
        total += deviation
        squares += deviation * deviation
    rest = tl.sum(total, axis=0)
    count = last - first
    all_channels = channels1 + channels2
    to = statistics + (n * tl.num_programs(1) + chunk) * 2 * all_channels + first_channel + channel
    tl.store(to, shift + rest / count, mask=channel < channels)
    squared = tl.maximum(tl.sum(squares, axis=0) - rest * rest / count, 0.0)
    tl.store(to + all_channels, squared, mask=channel < channels)


@triton.jit
def _coefficients_kernel(
    statistics,
    weight,
    bias,
    pre_add,
    norm_scale,
    norm_shift,
    coefficients,
    pixels,
    chunk_pixels,
    chunks,
    channels,
    size,
    stride_pre_add,
    stride_scale,
    stride_shift,
    share_high,
    share_low,
    eps,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Offset, factor and constant [N, 3, C] of one sample's group of ``size`` channels, merged in float64.

    share_high + share_low: 1 / (pixels size) in two float32, which is what a kernel's arguments can be.
    """
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * size
    statistics += n * chunks * 2 * channels
    lane = tl.arange(0, BLOCK_C)[None, :]
    row = tl.arange(0, BLOCK_K)[:, None]
    # float64 division and square root are calls, around which registers would be spilled: neither is needed
    share = (tl.zeros((1, 1), dtype=tl.float64) + share_high) + share_low
    total = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float64)
    for c in range(0, size, BLOCK_C):
        channel = first + c + lane
        known = c + lane < size
        added = term(pre_add, n, stride_pre_add, channel, known)
        for k in range(0, chunks, BLOCK_K):
            chunk = k + row
            inside = (chunk < chunks) & known
            mean = term(statistics, chunk, 2 * channels, channel, inside)
            count = tl.minimum(chunk_pixels, pixels - chunk * chunk_pixels).to(tl.float64)
            total += tl.where(inside, count * (mean + added), 0.0)
    mean = summed(total) * share
    total = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float64)
    for c in range(0, size, BLOCK_C):
        channel = first + c + lane
        known = c + lane < size
        offset = term(pre_add, n, stride_pre_add, channel, known) - mean
        for k in range(0, chunks, BLOCK_K):
            chunk = k + row
            inside = (chunk < chunks) & known
            between = term(statistics, chunk, 2 * channels, channel, inside) + offset
            squares = term(statistics + channels, chunk, 2 * channels, channel, inside)
            count = tl.minimum(chunk_pixels, pixels - chunk * chunk_pixels).to(tl.float64)
            total += tl.where(inside, squares + count * between * between, 0.0)
    variance = summed(total) * share + eps
    inverse = tl.rsqrt(variance.to(tl.float32)).to(tl.float64)
    inverse *= 1.5 - 0.5 * variance * inverse * inverse  # one Newton step: 1e-7 -> 1e-14
    for c in range(0, size, BLOCK_C):
        channel = first + c + lane
        known = c + lane < size
        offset = term(pre_add, n, stride_pre_add, channel, known) - mean
        scale = term(norm_scale, n, stride_scale, channel, known) + 1.0
        factor = inverse * scale
        if weight is not None:
            factor *= term(weight, 0, 0, channel, known)
        rounded = offset.to(tl.float32)
        constant = (offset - rounded.to(tl.float64)) * factor + term(bias, 0, 0, channel, known) * scale
        constant += term(norm_shift, n, stride_shift, channel, known)
        to = coefficients + n * 3 * channels + channel
        tl.store(to, rounded, mask=known)
        tl.store(to + channels, factor.to(tl.float32), mask=known)
        tl.store(to + 2 * channels, constant.to(tl.float32), mask=known)


def affine_of(
    x: Tensor,
    x2: Tensor | None,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pre_add: Tensor | None,
    norm_scale: Tensor | None,
    norm_shift: Tensor | None,
    statistics: Tensor | None = None,
) -> Tensor:
    """y = (x + [n, 0, c]) * [n, 1, c] + [n, 2, c] is group_norm(cat(x, x2) + pre_add) * (1 + norm_scale) + norm_shift.

    Args:
        x, x2: contiguous [N, pixels, C1] and [N, pixels, C2] (or None), not empty.
        weight, bias: [C], or None.
        pre_add, norm_scale, norm_shift: [N, C] with adjacent channels, or None.
        statistics: of cat(x, x2), float32 [N, chunks, 2, C] over chunks of equally many pixels; read from x by default.

    Returns:
        float32 [N, 3, C].
    """
    n, pixels, channels1 = x.shape
    channels2 = 0 if x2 is None else x2.shape[2]
    channels = channels1 + channels2
    if statistics is None:
        statistics, chunk_pixels = _read_statistics(x, x2)
    else:
        chunk_pixels = pixels // statistics.shape[1]
    chunks = statistics.shape[1]
    coefficients = torch.empty((n, 3, channels), dtype=torch.float32, device=x.device)
    block_k, block_c, warps = merged_block(chunks, channels // groups)
    strides = [0 if values is None else values.stride(0) for values in (pre_add, norm_scale, norm_shift)]
    share = 1.0 / (pixels * (channels // groups))
    share_high = torch.tensor(share, dtype=torch.float32).item()
    _coefficients_kernel[(groups, n)](
        statistics, weight, bias, pre_add, norm_scale, norm_shift, coefficients, pixels, chunk_pixels, chunks,
        channels, channels // groups, *strides, share_high, share - share_high, eps, BLOCK_K=block_k, BLOCK_C=block_c,
        num_warps=warps,
    )  # fmt: skip
    return coefficients


def _read_statistics(x: Tensor, x2: Tensor | None) -> tuple[Tensor, int]:
    """(statistics [N, chunks, 2, C] of cat(x, x2), pixels to a chunk; the last chunk may have fewer)."""
    n, pixels, channels1 = x.shape
    channels2 = 0 if x2 is None else x2.shape[2]
    block_p, block_c = block_shape(pixels, *widths(x, x2))
    tiles = tiles_of(pixels, block_p)
    chunks = triton.cdiv(pixels, tiles * block_p)
    statistics = torch.empty((n, chunks, 2, channels1 + channels2), dtype=torch.float32, device=x.device)
    grid = (sum(triton.cdiv(width, block_c) for width in widths(x, x2)), chunks, n)
    _statistics_kernel[grid](
        x, x2, statistics, pixels, channels1, channels2, tiles, BLOCK_P=block_p, BLOCK_C=block_c
    )  # fmt: skip
    return statistics, tiles * block_p


def statistics_for(images: int, channels: int, pixels: int, device: torch.device) -> Tensor | None:
    """Memory for the statistics that `int_conv2d` writes beside its output, or None where it is better to read that.

    A chunk is the largest power of two of pixels that divides an image, at most 64; below 16 there would be too many
    of them. Chunks depend on the image's size alone, so statistics of a skip concatenation's parts can be joined along
    their channels.
    """
    chunk = min(pixels & -pixels, MAX_CHUNK)
    if chunk < MIN_CHUNK:
        return None
    return torch.empty((images, pixels // chunk, 2, channels), dtype=torch.float32, device=device)


def widths(x: Tensor, x2: Tensor | None) -> tuple[int, ...]:
    """The channels of x, and of x2 where it is there."""
    return (x.shape[-1],) if x2 is None else (x.shape[-1], x2.shape[-1])


def tiles_of(pixels: int, block_p: int) -> int:
    """How many tiles of ``block_p`` pixels make a chunk: at least 64 pixels in it, at most MAX_CHUNKS in an image."""
    return triton.cdiv(min(max(64, triton.cdiv(pixels, MAX_CHUNKS)), pixels), block_p)


# channels read at a time -> (chunks, warps): what compiles without a spilled register on every architecture
MERGED_BLOCKS = {16: (32, 2), 32: (16, 4), 64: (8, 4), 128: (8, 4)}


def merged_block(chunks: int, size: int) -> tuple[int, int, int]:
    """(chunks, channels, warps) of the merging kernel for groups of ``size`` channels."""
    block_c = min(max(triton.next_power_of_2(size), min(MERGED_BLOCKS)), max(MERGED_BLOCKS))
    block_k, warps = MERGED_BLOCKS[block_c]
    return min(triton.next_power_of_2(chunks), block_k), block_c, warps
