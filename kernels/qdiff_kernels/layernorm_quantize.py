"""layernorm_quantize: q[m, k] = quantize((x[m, k] - mean[m]) / sqrt(var[m] + eps) * weight[k] + bias[k]).

A program holds whole rows in registers, so x is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .accumulate import low_column
from .arithmetic import ASSEMBLY, paired_nibbles, quantize_value
from .packing import packed_width
from .quantize import check_eps, check_floating, check_packed, check_vector, result_dtype

MAX_FEATURES = 32768  # of one row, in the registers of 32 warps


@triton.jit
def row_values(x, row, column, M, K):
    """x[column] of the rows that exist, in float32; 0 elsewhere."""
    return tl.load(x + column, mask=(row < M) & (column < K), other=0.0).to(tl.float32)


@triton.jit
def scaled_row(y, weight, bias, column, K):
    """y weight[column] + bias[column], each of them or None."""
    if weight is not None:
        y *= tl.load(weight + column, mask=column < K, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=column < K, other=0.0).to(tl.float32)
    return y


@triton.jit
def _layernorm_quantize_kernel(
    x,
    weight,
    bias,
    quantization,
    out,
    M,
    K,
    eps,
    BITS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASM: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    # columns are features, or packed bytes of two features each: two blocks of values then, low and high
    lane = tl.arange(0, BLOCK_K // 2 if PACKED else BLOCK_K)[None, :]
    column = low_column(lane) if PACKED else lane
    at = row.to(tl.int64) * K
    value = row_values(x + at, row, column, M, K)
    total = tl.sum(value, axis=1)
    if PACKED:
        value_high = row_values(x + at, row, column + 32, M, K)
        total += tl.sum(value_high, axis=1)
    mean = (total / K)[:, None]
    deviation = tl.where((row < M) & (column < K), value - mean, 0.0)
    total = tl.sum(deviation, axis=1)
    squares = tl.sum(deviation * deviation, axis=1)
    if PACKED:
        deviation_high = tl.where((row < M) & (column + 32 < K), value_high - mean, 0.0)
        total += tl.sum(deviation_high, axis=1)
        squares += tl.sum(deviation_high * deviation_high, axis=1)
    # what rounding left of the mean: large beside the deviations where the mean is
    rest = total / K
    variance = tl.maximum(squares / K - rest * rest, 0.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[:, None]  # one factor of a whole row: rounded once, not more
    y = scaled_row((deviation - rest[:, None]) * inverse, weight, bias, column, K)
    if quantization is None:
        tl.store(out + at + column, y.to(out.dtype.element_ty), mask=(row < M) & (column < K))
    else:
        inverse_scale = tl.load(quantization + 1)
        zero_point = tl.load(quantization + 2).to(tl.int32)
        q = quantize_value(y, inverse_scale, zero_point, BITS, ASM)
        if PACKED:
            y = scaled_row((deviation_high - rest[:, None]) * inverse, weight, bias, column + 32, K)
            q = paired_nibbles(q, quantize_value(y, inverse_scale, zero_point, BITS, ASM), ASM)
            row_bytes = tl.cdiv(K, 64) * 32
            tl.store(out + row.to(tl.int64) * row_bytes + lane, q, mask=(row < M) & (lane < row_bytes))
        else:
            tl.store(out + at + column, q, mask=(row < M) & (column < K))


def layernorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    quantization: Tensor | None,
    bits: int = 8,
    *,
    out_dtype: torch.dtype | None = None,
    packed: bool = False,
) -> Tensor:
    """q[..., k] = quantize((x[..., k] - mean) / sqrt(var + eps) * weight[k] + bias[k]) over the last axis.

    Args:
        x: float16, bfloat16 or float32 [..., K], K <= 32768.
        weight, bias: floating [K], or None.
        quantization: float32 [3] on the device, (s, 1 / s, z); None: the normalised value itself.
        bits: 4 or 8.
        out_dtype: of the result without a quantization; x's by default.
        packed: two values of 4 bits to a byte (`packing`).

    Returns:
        int8 or floating [..., K], contiguous; packed: uint8 [..., packed_width(K)].

    Raises:
        TypeError, ValueError: an argument's type or shape; the message names it.
    """
    check_floating("x", x)
    if not x.dim() or not 0 < x.shape[-1] <= MAX_FEATURES:
        raise ValueError(f"x must be [..., K] with 1 <= K <= {MAX_FEATURES}, got {list(x.shape)}")
    k = x.shape[-1]
    check_vector("weight", weight, k, x.device)
    check_vector("bias", bias, k, x.device)
    check_eps(eps)
    dtype = result_dtype(x, quantization, bits, out_dtype)
    check_packed(packed, None if quantization is None else bits)
    width = packed_width(k) if packed else k
    out = torch.empty((*x.shape[:-1], width), dtype=torch.uint8 if packed else dtype, device=x.device)
    if out.numel():
        m = out.numel() // width
        block_m, block_k, warps = block_of_rows(m, 2 * width if packed else k)
        _layernorm_quantize_kernel[(triton.cdiv(m, block_m),)](
            x.contiguous(), weight, bias, quantization, out, m, k, eps, BITS=bits, PACKED=packed, BLOCK_M=block_m,
            BLOCK_K=block_k, ASM=ASSEMBLY, num_warps=warps,
        )  # fmt: skip
    return out


def block_of_rows(m: int, k: int) -> tuple[int, int, int]:
    """(rows, features, warps) of one program: whole rows, about 2048 elements, 16 or 32 of them to a thread."""
    block_k = max(triton.next_power_of_2(k), 32)
    block_m = min(max(2048 // block_k, 1), max(triton.next_power_of_2(m), 512 // block_k, 1))
    return block_m, block_k, min(max(block_m * block_k // 512, 1), 32)
