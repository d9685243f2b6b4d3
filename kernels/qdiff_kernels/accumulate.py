"""How quantised operands become an accumulator: the loops over K of `int_gemm` and `int_conv2d`.

Weights, and activations of mode A4, may be packed two to a byte (`packing`). A kernel keeps each nibble in the high
half of an int8, 16 times its value; the epilogue takes the factor out again, exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpacked(packed, ASM: tl.constexpr):
    """(low, high) nibbles of uint8 values as int8, 16 times their value."""
    if ASM:
        low = tl.inline_asm_elementwise(
            "shl.b32 $0, $1, 4; and.b32 $0, $0, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
        high = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
        return low, high
    return ((packed & 0xF) << 4).to(tl.int8, bitcast=True), (packed & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def multiplied(x, weight, acc, FLOATING: tl.constexpr):
    """acc + x [M, K] weight [N, K]^T, in int32, or in float32 with the weight's integers in x's dtype.

    float32 is multiplied as three TensorFloat-32 products of high and low parts; the weight's integers fit into one.
    """
    if FLOATING:
        acc = tl.dot(x, weight.to(x.dtype).T, acc, input_precision="tf32x3")
    else:
        acc = tl.dot(x, weight.T, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def offsets(indices, WIDE: tl.constexpr):
    """Indices as the type that offsets into memory are computed in: 64 bits only where a tensor needs them."""
    return indices.to(tl.int64) if WIDE else indices


@triton.jit
def low_column(byte):
    """The column whose value a packed row's byte holds in its low nibble; the high one holds the column 32 further."""
    return byte // 32 * 64 + byte % 32


@triton.jit
def halves_multiplied(
    x, x_high, weight, weight_high, acc, BITS: tl.constexpr, X_BITS: tl.constexpr, FLOATING: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """acc plus two runs of K; an operand with 4 bits is the packed bytes of both runs."""
    if X_BITS == 4:
        x, x_high = unpacked(x, ASM)
    if BITS == 4:
        weight, weight_high = unpacked(weight, ASM)
    acc = multiplied(x, weight, acc, FLOATING)
    return multiplied(x_high, weight_high, acc, FLOATING)


@triton.jit
def loaded(row, column, width, WHOLE: tl.constexpr):
    """The values at ``column`` of rows of ``width``, 0 past their end; WHOLE: there is nothing past it."""
    if WHOLE:
        return tl.load(row + column)
    else:
        return tl.load(row + column, mask=column < width, other=0)


@triton.jit
def block_product(
    x, weight, acc, block, K, K_PADDED, BITS: tl.constexpr, X_BITS: tl.constexpr, FLOATING: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc plus one block of K.

    x: pointers [M, 1] to rows of K values, or K' / 2 packed bytes; weight: pointers [N, 1] to rows of K' or K' / 2.
    """
    if BITS == 8 and X_BITS == 8:
        at = (block * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        acc = multiplied(loaded(x, at, K, EVEN_K), loaded(weight, at, K_PADDED, EVEN_K), acc, FLOATING)
    else:
        HALF: tl.constexpr = BLOCK_K // 2
        byte = tl.arange(0, HALF)
        at = (block * BLOCK_K + low_column(byte))[None, :]
        at_byte = (block * HALF + byte)[None, :]
        if X_BITS == 4:
            a = loaded(x, at_byte, K_PADDED // 2, EVEN_K)
            a_high = a
        else:
            a = loaded(x, at, K, EVEN_K)
            a_high = loaded(x, at + 32, K, EVEN_K)
        if BITS == 4:
            b = loaded(weight, at_byte, K_PADDED // 2, EVEN_K)
            b_high = b
        else:
            b = loaded(weight, at, K_PADDED, EVEN_K)
            b_high = loaded(weight, at + 32, K_PADDED, EVEN_K)
        acc = halves_multiplied(a, a_high, b, b_high, acc, BITS, X_BITS, FLOATING, ASM)
    return acc


@triton.jit
def in_order(packed, ASM: tl.constexpr):
    """int8 [N, 2 B], 16 times the values of packed bytes [N, B], in the order of K."""
    low, high = unpacked(packed, ASM)
    N: tl.constexpr = packed.shape[0]
    B: tl.constexpr = packed.shape[1]
    both = tl.join(low.reshape(N, B // 32, 32), high.reshape(N, B // 32, 32))
    return both.permute(0, 1, 3, 2).reshape(N, 2 * B)


@triton.jit
def block_of_descriptors(
    x, weight, row, column, acc, block, BITS: tl.constexpr, X_BITS: tl.constexpr, BLOCK_K: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """acc plus one block of K, read through tensor descriptors: the tile at ``row`` and ``column``.

    What lies outside a tensor reads as 0; packed rows are bytes.
    """
    a = x.load([row, block * (BLOCK_K // 2 if X_BITS == 4 else BLOCK_K)])
    b = weight.load([column, block * (BLOCK_K // 2 if BITS == 4 else BLOCK_K)])
    if X_BITS == 4:
        a = in_order(a, ASM)
    if BITS == 4:
        b = in_order(b, ASM)
    return multiplied(a, b, acc, False)


@triton.jit
def tap(x, image, top, left, r, s, H, W, width, dilation_h, dilation_w, UPSAMPLE: tl.constexpr):
    """(pointers to the first of a pixel's ``width`` values at tap (r, s) of every output pixel, whether it exists)."""
    ih = top + r * dilation_h
    iw = left + s * dilation_w
    inside = (ih >= 0) & (ih < H * UPSAMPLE) & (iw >= 0) & (iw < W * UPSAMPLE)
    ih = tl.where(inside, ih // UPSAMPLE, 0)
    iw = tl.where(inside, iw // UPSAMPLE, 0)
    return x + ((image * H + ih) * W + iw) * width, inside


@triton.jit
def taps_loaded(
    x, image, top, left, at, H, W, width, dilation_h, dilation_w, R: tl.constexpr, S: tl.constexpr,
    UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """What every output pixel sees at ``at`` [1, K] of the axis (r, s, c), each with its own tap; 0 outside."""
    index = at // width
    pixel, inside = tap(x, image, top, left, index // S, index % S, H, W, width, dilation_h, dilation_w, UPSAMPLE)
    return tl.load(pixel + (at - index * width), mask=inside & (index < R * S), other=0)


@triton.jit
def convolved(
    x, weight, acc, image, top, left, first, last, H, W, C, dilation_h, dilation_w, K_PADDED,
    R: tl.constexpr, S: tl.constexpr, UPSAMPLE: tl.constexpr, BITS: tl.constexpr, X_BITS: tl.constexpr,
    FLOATING: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc plus the blocks first .. last of K. image, top, left: [M, 1], an output pixel's sample and its first tap.

    ALIGNED: BLOCK_K divides C, so that a block lies within one tap; else every element of K finds its own tap. A pixel
    of packed activations has C / 2 bytes.
    """
    HALF: tl.constexpr = BLOCK_K // 2
    HALVES: tl.constexpr = BITS == 4 or X_BITS == 4
    lane = tl.arange(0, HALF if HALVES else BLOCK_K)
    column = low_column(lane) if HALVES else lane
    x_lane = lane if X_BITS == 4 else column
    x_step: tl.constexpr = HALF if X_BITS == 4 else BLOCK_K
    weight_lane = lane if BITS == 4 else column
    weight_step: tl.constexpr = HALF if BITS == 4 else BLOCK_K
    width = C // 2 if X_BITS == 4 else C
    row = K_PADDED // 2 if BITS == 4 else K_PADDED
    for block in range(first, last):
        at_weight = (block * weight_step + weight_lane)[None, :]
        b = loaded(weight, at_weight, row, ALIGNED)
        b_high = b
        if HALVES and BITS == 8:
            b_high = loaded(weight, at_weight + 32, row, ALIGNED)
        if ALIGNED:
            start = block * x_step
            index = start // width
            pixel, inside = tap(
                x, image, top, left, index // S, index % S, H, W, width, dilation_h, dilation_w, UPSAMPLE
            )
            pixel += start - index * width + x_lane[None, :]
            a = tl.load(pixel, mask=inside, other=0)
            a_high = a
            if HALVES and X_BITS == 8:
                a_high = tl.load(pixel + 32, mask=inside, other=0)
        else:
            at = (block * x_step + x_lane)[None, :]
            a = taps_loaded(x, image, top, left, at, H, W, width, dilation_h, dilation_w, R, S, UPSAMPLE)
            a_high = a
            if HALVES and X_BITS == 8:
                a_high = taps_loaded(x, image, top, left, at + 32, H, W, width, dilation_h, dilation_w, R, S, UPSAMPLE)
        if HALVES:
            acc = halves_multiplied(a, a_high, b, b_high, acc, BITS, X_BITS, FLOATING, ASM)
        else:
            acc = multiplied(a, b, acc, FLOATING)
    return acc


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of the tile that program ``pid`` computes: GROUP_M rows of tiles at a time, which share weights."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return group * GROUP_M + within % height, within // height
