"""What an accumulator becomes, shared by `int_gemm` and `int_conv2d`.

y[m, n] = (acc[m, n] - z wsum[class(m), n]) (s s_w[n]) + bias[n] + temb[b(m), n] + residual[m, n]
"""

from __future__ import annotations

import triton
import triton.language as tl

from .accumulate import offsets
from .arithmetic import paired_nibbles, quantize_value


@triton.jit
def scaled(
    acc, rows, columns, inside, N, quantization, weight_scale, weight_sum, class_index, pixels, X_BITS: tl.constexpr
):
    """(acc - z wsum[class(m), n]) (s s_w[n]) of int32 acc; acc s_w[n] of float32 acc (mode A16: quantization is None).

    X_BITS 4: the activations were multiplied 16 times as large, which is taken out again here.
    rows [M, 1], columns [1, N]: indices; inside [M, N]: those within the output.
    class_index: int32 [pixels], the border class of every output pixel, or None: all of class 0.
    """
    factor = tl.load(weight_scale + columns, mask=columns < N, other=0.0)
    if quantization is None:
        y = acc * factor
    else:
        scale = tl.load(quantization)
        zero_point = tl.load(quantization + 2).to(tl.int32)
        if X_BITS == 4:
            scale *= 0.0625
            zero_point *= 16
        if class_index is None:
            zero_sum = tl.load(weight_sum + columns, mask=columns < N, other=0)
        else:
            border_class = tl.load(class_index + rows % pixels)
            zero_sum = tl.load(weight_sum + border_class * N + columns, mask=inside, other=0)
        y = (acc - zero_point * zero_sum).to(tl.float32) * (scale * factor)
    return y


@triton.jit
def with_terms(y, rows, columns, inside, N, bias, temb, residual, pixels):
    """y + bias[n] + temb[m // pixels, n] + residual[m, n] in float32; each of them or None."""
    if bias is not None:
        y += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    if temb is not None:
        y += tl.load(temb + (rows // pixels) * N + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + rows * N + columns, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def summarised(y, first_row, first_column, M, N, out, statistics, CHUNK: tl.constexpr):
    """Writes the mean and the sum of squared deviations of every CHUNK rows of y, as ``out`` will hold it: [M, 2, N].

    The rows from ``first_row`` on, of which CHUNK divides the number: what `group_statistics` would read again.
    """
    if statistics is not None:
        COUNT: tl.constexpr = y.shape[0] // CHUNK
        value = y.to(out.dtype.element_ty).to(tl.float32).reshape(COUNT, CHUNK, y.shape[1])
        mean = tl.sum(value, axis=1) / CHUNK
        deviation = value - tl.expand_dims(mean, 1)
        squares = tl.sum(deviation * deviation, axis=1)
        chunk = first_row // CHUNK + tl.arange(0, COUNT)[:, None]
        column = first_column + tl.arange(0, y.shape[1])[None, :]
        inside = (chunk * CHUNK < M) & (column < N)
        to = statistics + chunk * 2 * N + column
        tl.store(to, mean, mask=inside)
        tl.store(to + N, squares, mask=inside)


@triton.jit
def stored(
    y, rows, in_range, first_column, N, out, out_quantization, OUT_BITS: tl.constexpr, OUT_PACKED: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Writes y [M, N] in the output's dtype, or quantised with ``out_quantization``, and then maybe two to a byte.

    rows, in_range [M, 1]: indices, int64 where offsets need it, and which of them exist; first_column: of the tile,
    whose width divides it.
    """
    columns = first_column + tl.arange(0, y.shape[1])[None, :]
    inside = in_range & (columns < N)
    if out_quantization is None:
        tl.store(out + rows * N + columns, y.to(out.dtype.element_ty), mask=inside)
    else:
        inverse = tl.load(out_quantization + 1)
        zero_point = tl.load(out_quantization + 2).to(tl.int32)
        q = quantize_value(y, inverse, zero_point, OUT_BITS, ASM)
        if OUT_PACKED:
            low, high = tl.split(q.reshape(y.shape[0], y.shape[1] // 64, 2, 32).permute(0, 1, 3, 2))
            row_bytes = tl.cdiv(N, 64) * 32
            byte = first_column // 2 + tl.arange(0, y.shape[1] // 2)[None, :]
            packed = paired_nibbles(low, high, ASM).reshape(y.shape[0], y.shape[1] // 2)
            tl.store(out + rows * row_bytes + byte, packed, mask=in_range & (byte < row_bytes))
        else:
            tl.store(out + rows * N + columns, q, mask=inside)


@triton.jit
def finished(
    acc, rows, in_range, first_column, N, quantization, weight_scale, weight_sum, class_index, image_pixels, bias, temb,
    residual, pixels, out, out_quantization, statistics, first_row, M, X_BITS: tl.constexpr, OUT_BITS: tl.constexpr,
    OUT_PACKED: tl.constexpr, CHUNK: tl.constexpr, ASM: tl.constexpr, SCALED: tl.constexpr = False,
):  # fmt: skip
    """Scales a tile's accumulators, unless they are SCALED, adds the terms and stores the result; wide tiles in halves.

    One half's addresses and floats are gone before the other's are needed: together they would spill registers.
    """
    if acc.shape[1] > 64:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1))
        finished(
            left, rows, in_range, first_column, N, quantization, weight_scale, weight_sum, class_index, image_pixels,
            bias, temb, residual, pixels, out, out_quantization, statistics, first_row, M, X_BITS, OUT_BITS, OUT_PACKED,
            CHUNK, ASM, SCALED,
        )  # fmt: skip
        finished(
            right, rows, in_range, first_column + HALF, N, quantization, weight_scale, weight_sum, class_index,
            image_pixels, bias, temb, residual, pixels, out, out_quantization, statistics, first_row, M, X_BITS,
            OUT_BITS, OUT_PACKED, CHUNK, ASM, SCALED,
        )  # fmt: skip
    else:
        columns = first_column + tl.arange(0, acc.shape[1])[None, :]
        inside = in_range & (columns < N)
        y = acc
        if not SCALED:
            y = scaled(
                acc, rows, columns, inside, N, quantization, weight_scale, weight_sum, class_index, image_pixels, X_BITS
            )
        y = with_terms(y, rows, columns, inside, N, bias, temb, residual, pixels)
        summarised(y, first_row, first_column, M, N, out, statistics, CHUNK)
        stored(y, rows, in_range, first_column, N, out, out_quantization, OUT_BITS, OUT_PACKED, ASM)


@triton.jit
def _reduce_kernel(
    workspace,
    weight_scale,
    weight_sum,
    class_index,
    quantization,
    bias,
    temb,
    residual,
    out,
    out_quantization,
    statistics,
    M,
    N,
    image_pixels,
    pixels,
    SPLITS: tl.constexpr,
    X_BITS: tl.constexpr,
    OUT_BITS: tl.constexpr,
    OUT_PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASM: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Sums the partial accumulators [SPLITS, M, N] of a product split along K, always in the same order.

    SCALED: they are floating point, each group's accumulators times its scales.
    """
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    in_range = rows < M
    inside = in_range & (columns < N)
    rows = offsets(tl.where(in_range, rows, 0), WIDE)
    acc = tl.load(workspace + rows * N + columns, mask=inside, other=0)
    for split in range(1, SPLITS):
        acc += tl.load(workspace + (split * M + rows) * N + columns, mask=inside, other=0)
    y = acc
    if not SCALED:
        y = scaled(
            acc, rows, columns, inside, N, quantization, weight_scale, weight_sum, class_index, image_pixels, X_BITS
        )
    y = with_terms(y, rows, columns, inside, N, bias, temb, residual, pixels)
    summarised(y, tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N, M, N, out, statistics, CHUNK)
    stored(
        y, rows, in_range, tl.program_id(1) * BLOCK_N, N, out, out_quantization, OUT_BITS, OUT_PACKED, ASM
    )  # fmt: skip
