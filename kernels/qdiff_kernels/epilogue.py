"""What an accumulator becomes, shared by `int_gemm` and `int_conv2d`.

y[m, n] = (acc[m, n] - z wsum[class(m), n]) (s s_w[n]) + bias[n] + temb[b(m), n] + residual[m, n]
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import quantize_value


@triton.jit
def scaled(acc, rows, columns, inside, N, quantization, weight_scale, weight_sum, class_index, pixels):
    """(acc - z wsum[class(m), n]) (s s_w[n]) of int32 acc; acc s_w[n] of float32 acc (mode A16: quantization is None).

    rows [M, 1], columns [1, N]: indices; inside [M, N]: those within the output.
    class_index: int32 [pixels], the border class of every output pixel, or None: all of class 0.
    """
    factor = tl.load(weight_scale + columns, mask=columns < N, other=0.0)
    if quantization is None:
        y = acc * factor
    else:
        scale = tl.load(quantization)
        zero_point = tl.load(quantization + 2).to(tl.int32)
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
        y += tl.load(residual + rows.to(tl.int64) * N + columns, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def stored(y, rows, columns, inside, N, out, out_quantization, OUT_BITS: tl.constexpr, ASM: tl.constexpr):
    """Writes y [M, N] in the output's dtype, or quantised with ``out_quantization``."""
    to = out + rows.to(tl.int64) * N + columns
    if out_quantization is None:
        tl.store(to, y.to(out.dtype.element_ty), mask=inside)
    else:
        inverse = tl.load(out_quantization + 1)
        zero_point = tl.load(out_quantization + 2).to(tl.int32)
        tl.store(to, quantize_value(y, inverse, zero_point, OUT_BITS, ASM), mask=inside)


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
    M,
    N,
    image_pixels,
    pixels,
    SPLITS: tl.constexpr,
    OUT_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sums the partial accumulators [SPLITS, M, N] of a product split along K, always in the same order."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (rows < M) & (columns < N)
    rows = tl.where(rows < M, rows, 0)
    acc = tl.load(workspace + rows.to(tl.int64) * N + columns, mask=inside, other=0)
    for split in range(1, SPLITS):
        acc += tl.load(workspace + (split * M + rows).to(tl.int64) * N + columns, mask=inside, other=0)
    y = scaled(acc, rows, columns, inside, N, quantization, weight_scale, weight_sum, class_index, image_pixels)
    y = with_terms(y, rows, columns, inside, N, bias, temb, residual, pixels)
    stored(y, rows, columns, inside, N, out, out_quantization, OUT_BITS, ASM)
