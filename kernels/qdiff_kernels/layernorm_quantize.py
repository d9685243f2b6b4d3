"""layernorm_quantize: q[m, k] = quantize((x[m, k] - mean[m]) / sqrt(var[m] + eps) * weight[k] + bias[k]).

A program holds whole rows in registers, so x is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import ASSEMBLY, quantize_value
from .quantize import check_eps, check_floating, check_vector, result_dtype

MAX_FEATURES = 32768  # of one row, in the registers of 32 warps


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
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASM: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = tl.arange(0, BLOCK_K)[None, :]
    within = (row < M) & (column < K)
    at = row.to(tl.int64) * K + column
    value = tl.load(x + at, mask=within, other=0.0).to(tl.float32)
    deviation = tl.where(within, value - (tl.sum(value, axis=1) / K)[:, None], 0.0)
    # what rounding left of the mean: large beside the deviations where the mean is
    rest = tl.sum(deviation, axis=1) / K
    variance = tl.maximum(tl.sum(deviation * deviation, axis=1) / K - rest * rest, 0.0)
    y = (deviation - rest[:, None]) * (1.0 / tl.sqrt(variance + eps))[:, None]
    if weight is not None:
        y *= tl.load(weight + column, mask=column < K, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=column < K, other=0.0).to(tl.float32)
    if quantization is None:
        tl.store(out + at, y.to(out.dtype.element_ty), mask=within)
    else:
        zero_point = tl.load(quantization + 2).to(tl.int32)
        tl.store(out + at, quantize_value(y, tl.load(quantization + 1), zero_point, BITS, ASM), mask=within)


def layernorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    quantization: Tensor | None,
    bits: int = 8,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """q[..., k] = quantize((x[..., k] - mean) / sqrt(var + eps) * weight[k] + bias[k]) over the last axis.

    Args:
        x: float16, bfloat16 or float32 [..., K], K <= 32768.
        weight, bias: floating [K], or None.
        quantization: float32 [3] on the device, (s, 1 / s, z); None: the normalised value itself.
        bits: 4 or 8.
        out_dtype: of the result without a quantization; x's by default.

    Returns:
        int8 or floating [..., K], contiguous.

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
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel():
        m = out.numel() // k
        block_m, block_k, warps = block_of_rows(m, k)
        _layernorm_quantize_kernel[(triton.cdiv(m, block_m),)](
            x.contiguous(), weight, bias, quantization, out, m, k, eps, BITS=bits, BLOCK_M=block_m, BLOCK_K=block_k,
            ASM=ASSEMBLY, num_warps=warps,
        )  # fmt: skip
    return out


def block_of_rows(m: int, k: int) -> tuple[int, int, int]:
    """(rows, features, warps) of one program: whole rows, about 2048 elements, 16 or 32 of them to a thread."""
    block_k = max(triton.next_power_of_2(k), 32)
    block_m = min(max(2048 // block_k, 1), max(triton.next_power_of_2(m), 512 // block_k, 1))
    return block_m, block_k, min(max(block_m * block_k // 512, 1), 32)
