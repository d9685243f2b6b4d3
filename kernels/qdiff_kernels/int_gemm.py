"""int_gemm: y[m, n] = s s_w[n] (acc[m, n] - z wsum[n]) + bias[n] + temb[b, n] + residual[m, n], acc = sum_k q w.

Activations int8 (8 or 4 bits wide) or floating (mode A16); weights int8, or int4 packed in memory and unpacked in
registers. With GEGLU the weight's first half makes values and its second gates, and one program computes both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import ASSEMBLY, gelu
from .epilogue import _reduce_kernel, scaled, stored, with_terms
from .packing import KernelWeight
from .tiles import GROUP_M, INTERPRETED, Launch, architecture, choose, paired


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
    """acc + x [M, K] weight [N, K]^T, in int32, or in float32 with the weight's integers in x's dtype."""
    if FLOATING:
        acc = tl.dot(x, weight.to(x.dtype).T, acc, input_precision="ieee")
    else:
        acc = tl.dot(x, weight.T, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def product(
    x, weight, acc, first, last, K, K_PADDED, BITS: tl.constexpr, FLOATING: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc plus the blocks first .. last of K.

    x: pointers [M, 1] to rows of K; weight: pointers [N, 1] to rows of K' int8 values, or K' / 2 packed bytes.
    """
    if BITS == 8:
        k = tl.arange(0, BLOCK_K)
        for block in range(first, last):
            at = block * BLOCK_K + k
            if EVEN_K:
                a = tl.load(x + at[None, :])
                b = tl.load(weight + at[None, :])
            else:
                a = tl.load(x + at[None, :], mask=at[None, :] < K, other=0)
                b = tl.load(weight + at[None, :], mask=at[None, :] < K_PADDED, other=0)
            acc = multiplied(a, b, acc, FLOATING)
    else:
        HALF: tl.constexpr = BLOCK_K // 2
        byte = tl.arange(0, HALF)
        k = byte // 32 * 64 + byte % 32
        for block in range(first, last):
            at = block * BLOCK_K + k
            if EVEN_K:
                a_low = tl.load(x + at[None, :])
                a_high = tl.load(x + 32 + at[None, :])
                packed = tl.load(weight + (block * HALF + byte)[None, :])
            else:
                a_low = tl.load(x + at[None, :], mask=at[None, :] < K, other=0)
                a_high = tl.load(x + 32 + at[None, :], mask=at[None, :] + 32 < K, other=0)
                packed = tl.load(
                    weight + (block * HALF + byte)[None, :],
                    mask=(block * HALF + byte)[None, :] < K_PADDED // 2,
                    other=0,
                )
            low, high = unpacked(packed, ASM)
            acc = multiplied(a_low, low, acc, FLOATING)
            acc = multiplied(a_high, high, acc, FLOATING)
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


@triton.jit
def _int_gemm_kernel(
    x,
    weight,
    weight_scale,
    weight_sum,
    quantization,
    bias,
    temb,
    residual,
    out,
    out_quantization,
    workspace,
    M,
    N,
    K,
    K_PADDED,
    stride_xm,
    pixels,
    BITS: tl.constexpr,
    OUT_BITS: tl.constexpr,
    GEGLU: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ASM: tl.constexpr,
):
    FLOATING: tl.constexpr = quantization is None
    ACC: tl.constexpr = tl.float32 if FLOATING else tl.int32
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # indices past the end wrap around: their results are not stored, and nothing needs a mask
    x_rows = x + (rows % M).to(tl.int64)[:, None] * stride_xm
    weight_bytes = K_PADDED if BITS == 8 else K_PADDED // 2
    weight_rows = weight + (columns % N).to(tl.int64)[:, None] * weight_bytes
    blocks = tl.cdiv(K, BLOCK_K)
    first = split * blocks // SPLITS
    last = (split + 1) * blocks // SPLITS
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    acc = product(x_rows, weight_rows, acc, first, last, K, K_PADDED, BITS, FLOATING, EVEN_K, BLOCK_K, ASM)
    at_rows = rows[:, None]
    at_columns = columns[None, :]
    inside = (at_rows < M) & (at_columns < N)
    if SPLITS > 1:
        tl.store(workspace + (split.to(tl.int64) * M + at_rows) * N + at_columns, acc, mask=inside)
    else:
        at_rows = tl.where(at_rows < M, at_rows, 0)
        y = scaled(acc, at_rows, at_columns, inside, N, quantization, weight_scale, weight_sum, None, pixels)
        if GEGLU:
            gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
            gates = weight + (columns % N + N).to(tl.int64)[:, None] * weight_bytes
            gate = product(x_rows, gates, gate, first, last, K, K_PADDED, BITS, FLOATING, EVEN_K, BLOCK_K, ASM)
            g = scaled(
                gate, at_rows, at_columns, inside, N, quantization, weight_scale + N, weight_sum + N, None, pixels
            )
            if bias is not None:
                y += tl.load(bias + at_columns, mask=at_columns < N, other=0.0).to(tl.float32)
                g += tl.load(bias + N + at_columns, mask=at_columns < N, other=0.0).to(tl.float32)
            y *= gelu(g)
        else:
            y = with_terms(y, at_rows, at_columns, inside, N, bias, temb, residual, pixels)
        stored(y, at_rows, at_columns, inside, N, out, out_quantization, OUT_BITS, ASM)


def int_gemm(
    x: Tensor,
    weight: KernelWeight,
    quantization: Tensor | None,
    bias: Tensor | None = None,
    *,
    temb: Tensor | None = None,
    residual: Tensor | None = None,
    geglu: bool = False,
    out_dtype: torch.dtype = torch.float16,
    out_quantization: Tensor | None = None,
    out_bits: int = 8,
    launch: Launch | None = None,
) -> Tensor:
    """y[m, n] = s s_w[n] (acc[m, n] - z wsum[n]) + bias[n] + temb[m // (M / B), n] + residual[m, n].

    With ``geglu``, N is half of the weight's rows, and y = (row n) * gelu(row n + N).

    Args:
        x: int8 [..., K] with adjacent features, or floating (mode A16).
        weight: from `packing.pack`; int4 stays packed.
        quantization: float32 [3] on the device, (s, 1 / s, z) of x; None in mode A16.
        bias: [N], or [2 N] with ``geglu``. temb: [B, N], B dividing M. residual: [..., N].
        out_dtype: float16, bfloat16 or float32.
        out_quantization: float32 [3], quantises y to ``out_bits`` bits (int8) instead.
        launch: tile and splits; chosen from `tiles` by default.
    """
    k = x.shape[-1]
    n = len(weight.scale) // 2 if geglu else len(weight.scale)
    m = x.numel() // max(1, k)
    _check(x, weight, quantization, bias, temb, residual, geglu, (*x.shape[:-1], n), m, n)
    matrix = x.reshape(m, k) if x.stride(-1) == 1 else x.contiguous().reshape(m, k)
    out = torch.empty((m, n), dtype=torch.int8 if out_quantization is not None else out_dtype, device=x.device)
    if out.numel():
        launch = launch or chosen_launch(x, m, n, k)
        tile, splits = launch if not geglu else Launch(paired(launch.tile), 1)
        splits = min(splits, triton.cdiv(k, tile.block_k))
        accumulator = torch.int32 if quantization is not None else torch.float32
        workspace = torch.empty((splits, m, n), dtype=accumulator, device=x.device) if splits > 1 else None
        padded = weight.values.shape[1] * (1 if weight.bits == 8 else 2)
        pixels = m if temb is None else m // len(temb)
        bias, temb = (term if term is None else term.contiguous() for term in (bias, temb))
        residual = residual if residual is None else residual.reshape(m, n).contiguous()
        grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n), splits)
        _int_gemm_kernel[grid](
            matrix, weight.values, weight.scale, weight.sums, quantization, bias, temb, residual, out,
            out_quantization, workspace, m, n, k, padded, matrix.stride(0), pixels, BITS=weight.bits,
            OUT_BITS=out_bits, GEGLU=geglu, EVEN_K=k % tile.block_k == 0, SPLITS=splits, BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=GROUP_M, ASM=ASSEMBLY, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
        if workspace is not None:
            reduced(
                workspace, weight, None, quantization, bias, temb, residual, out, out_quantization, out_bits, m, pixels
            )
    return out.reshape(*x.shape[:-1], n)


def chosen_launch(x: Tensor, m: int, n: int, k: int, k_multiple: int = 0) -> Launch:
    """The tile table's choice for the device of ``x``; a small tile in the interpreter."""
    if not ASSEMBLY:
        return Launch(INTERPRETED, 1)
    device = torch.cuda.get_device_properties(x.device)
    arch = architecture((device.major, device.minor))
    return choose(arch, m, n, k, device.multi_processor_count, k_multiple=k_multiple)


def reduced(
    workspace: Tensor,
    weight: KernelWeight,
    class_index: Tensor | None,
    quantization: Tensor | None,
    bias: Tensor | None,
    temb: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    out_quantization: Tensor | None,
    out_bits: int,
    image_pixels: int,
    pixels: int,
) -> None:
    """Sums the partial accumulators of a split product and finishes them into ``out``, whose memory is [M, N].

    image_pixels: rows per image, of which class_index tells the border class; pixels: rows per row of temb.
    """
    splits, m, n = workspace.shape
    grid = (triton.cdiv(m, 32), triton.cdiv(n, 64))
    _reduce_kernel[grid](
        workspace, weight.scale, weight.sums, class_index, quantization, bias, temb, residual, out, out_quantization,
        m, n, image_pixels, pixels, SPLITS=splits, OUT_BITS=out_bits, BLOCK_M=32, BLOCK_N=64, ASM=ASSEMBLY,
    )  # fmt: skip


def _check(
    x: Tensor,
    weight: KernelWeight,
    quantization: Tensor | None,
    bias: Tensor | None,
    temb: Tensor | None,
    residual: Tensor | None,
    geglu: bool,
    shape: tuple[int, ...],
    m: int,
    n: int,
) -> None:
    if x.is_floating_point() != (quantization is None) or (quantization is not None and x.dtype != torch.int8):
        raise TypeError(f"x must be int8 with a quantization, or floating without one, got {x.dtype}")
    if x.shape[-1] != weight.k:
        raise ValueError(f"x must have K = {weight.k} features, got {list(x.shape)}")
    if geglu and (len(weight.scale) % 2 or temb is not None or residual is not None):
        raise ValueError("geglu needs an even number of outputs and takes neither temb nor residual")
    rows = 2 * n if geglu else n
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias must have shape [{rows}], got {list(bias.shape)}")
    if temb is not None and (temb.dim() != 2 or temb.shape[1] != n or not len(temb) or m % len(temb)):
        raise ValueError(f"temb must be [B, {n}] with B dividing {m}, got {list(temb.shape)}")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual must have shape {list(shape)}, got {list(residual.shape)}")
