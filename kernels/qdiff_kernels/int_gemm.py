"""int_gemm: y[m, n] = s s_w[n] (acc[m, n] - z wsum[n]) + bias[n] + temb[b, n] + residual[m, n], acc = sum_k q w.

With groups along K, y[m, n] = sum over g of s s_w[n, g] (acc[m, n, g] - z wsum[n, g]) + ...: floats add up the groups.

Activations int8 (8 or 4 bits wide), 4 bits packed, or floating (mode A16); weights int8 or 4 bits packed; registers
unpack them. With GEGLU the weight's first half makes values and its second gates, and one program computes both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .accumulate import block_of_descriptors, block_product, offsets, tile_of
from .arithmetic import ASSEMBLY, gelu
from .epilogue import _reduce_kernel, finished, scaled, stored
from .operands import check_activations, chunk_of, is_wide, output_form, x_bits
from .packing import BLOCK, KernelWeight, packed_width
from .tiles import (
    DESCRIPTOR_ALIGNMENT,
    FLOAT32,
    FLOAT32_PACKING,
    GROUP_M,
    INTERPRETED,
    Launch,
    Tile,
    architecture,
    choose,
    grouped,
    paired,
)


@triton.jit
def _tile_product(
    x, weight, quantization, weight_scale, weight_sum, first_row, first_column, weight_row, M, N, K, K_PADDED,
    stride_xm, stride_group, first, last, BITS: tl.constexpr, X_BITS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    EVEN_K: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The accumulators of a tile over the blocks first .. last of K; or over the groups first .. last, scaled.

    weight_row: the weight's row for column 0 of the output: 0, or N for gates.
    GROUP_BLOCKS: blocks of a group (0: there are no groups), whose scales and sums are ``stride_group`` apart.
    """
    FLOATING: tl.constexpr = quantization is None
    SIZE: tl.constexpr = GROUP_BLOCKS if GROUP_BLOCKS > 0 else 1
    columns = first_column + tl.arange(0, BLOCK_N)
    if not DESCRIPTORS:
        # indices past the end wrap around: their results are not stored, and nothing needs a mask
        x_rows = x + offsets((first_row + tl.arange(0, BLOCK_M)) % M, WIDE)[:, None] * stride_xm
        weight_bytes = K_PADDED if BITS == 8 else K_PADDED // 2
        weight_rows = weight + offsets(columns % N + weight_row, WIDE)[:, None] * weight_bytes
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32 if FLOATING else tl.int32)
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for part in range(first, last):
        for block in tl.static_range(SIZE):  # unrolled: one loop, in which loads run ahead of products
            if DESCRIPTORS:
                acc = block_of_descriptors(
                    x, weight, first_row, weight_row + first_column, acc, part * SIZE + block, BITS, X_BITS, BLOCK_K,
                    ASM,
                )  # fmt: skip
            else:
                acc = block_product(
                    x_rows, weight_rows, acc, part * SIZE + block, K, K_PADDED, BITS, X_BITS, FLOATING, EVEN_K,
                    BLOCK_K, ASM,
                )  # fmt: skip
        if GROUP_BLOCKS > 0:
            at = part * stride_group + weight_row
            y += scaled(
                acc, None, columns[None, :], None, N, quantization, weight_scale + at, weight_sum + at, None, None,
                X_BITS,
            )  # fmt: skip
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32 if FLOATING else tl.int32)
    return y if GROUP_BLOCKS > 0 else acc


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
    statistics,
    workspace,
    M,
    N,
    K,
    K_PADDED,
    stride_xm,
    pixels,
    BITS: tl.constexpr,
    X_BITS: tl.constexpr,
    OUT_BITS: tl.constexpr,
    OUT_PACKED: tl.constexpr,
    GEGLU: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    EVEN_K: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ASM: tl.constexpr,
):
    SCALED: tl.constexpr = GROUP_BLOCKS > 0
    stride_group = 2 * N if GEGLU else N
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    parts = tl.cdiv(K, BLOCK_K * GROUP_BLOCKS if SCALED else BLOCK_K)
    first = split * parts // SPLITS
    last = (split + 1) * parts // SPLITS
    acc = _tile_product(
        x, weight, quantization, weight_scale, weight_sum, tile_m * BLOCK_M, tile_n * BLOCK_N, 0, M, N, K, K_PADDED,
        stride_xm, stride_group, first, last, BITS, X_BITS, GROUP_BLOCKS, EVEN_K, DESCRIPTORS, WIDE, BLOCK_M, BLOCK_N,
        BLOCK_K, ASM,
    )  # fmt: skip
    at_rows = offsets(rows, WIDE)[:, None]
    at_columns = columns[None, :]
    in_range = at_rows < M
    inside = in_range & (at_columns < N)
    if SPLITS > 1:
        tl.store(workspace + (split * M + at_rows) * N + at_columns, acc, mask=inside)
    else:
        at_rows = tl.where(in_range, at_rows, 0)
        if GEGLU:
            y = acc
            if not SCALED:
                y = scaled(
                    acc, at_rows, at_columns, inside, N, quantization, weight_scale, weight_sum, None, pixels, X_BITS
                )
            g = _tile_product(
                x, weight, quantization, weight_scale, weight_sum, tile_m * BLOCK_M, tile_n * BLOCK_N, N, M, N, K,
                K_PADDED, stride_xm, stride_group, first, last, BITS, X_BITS, GROUP_BLOCKS, EVEN_K, DESCRIPTORS, WIDE,
                BLOCK_M, BLOCK_N, BLOCK_K, ASM,
            )  # fmt: skip
            if not SCALED:
                g = scaled(
                    g, at_rows, at_columns, inside, N, quantization, weight_scale + N, weight_sum + N, None, pixels,
                    X_BITS,
                )  # fmt: skip
            if bias is not None:
                y += tl.load(bias + at_columns, mask=at_columns < N, other=0.0).to(tl.float32)
                g += tl.load(bias + N + at_columns, mask=at_columns < N, other=0.0).to(tl.float32)
            y *= gelu(g)
            stored(y, at_rows, in_range, tile_n * BLOCK_N, N, out, out_quantization, OUT_BITS, OUT_PACKED, ASM)
        else:
            finished(
                acc, at_rows, in_range, tile_n * BLOCK_N, N, quantization, weight_scale, weight_sum, None, pixels, bias,
                temb, residual, pixels, out, out_quantization, statistics, tile_m * BLOCK_M, M, X_BITS, OUT_BITS,
                OUT_PACKED, CHUNK, ASM, SCALED,
            )  # fmt: skip


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
    out_packed: bool = False,
    statistics: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """y[m, n] = s s_w[n] (acc[m, n] - z wsum[n]) + bias[n] + temb[m // (M / B), n] + residual[m, n].

    With ``geglu``, N is half of the weight's rows, and y = (row n) * gelu(row n + N).

    Args:
        x: int8 [..., K] with adjacent features, uint8 [..., packed_width(K)] (4 bits packed), or floating (mode A16).
        weight: from `packing.pack`; int4 stays packed.
        quantization: float32 [3] on the device, (s, 1 / s, z) of x; None in mode A16.
        bias: [N], or [2 N] with ``geglu``. temb: [B, N], B dividing M. residual: [..., N].
        out_dtype: float16, bfloat16 or float32.
        out_quantization: float32 [3], quantises y to ``out_bits`` bits (int8) instead; with ``out_packed`` to 4 packed
            ones, uint8 [..., packed_width(N)].
        statistics: float32 [*, 2, N] to write the mean and squared deviations of every M / * rows of y to.
        launch: tile, splits and how operands are read; chosen from `tiles` by default.
    """
    k, width = weight.k, x.shape[-1]
    n = weight.rows // 2 if geglu else weight.rows
    m = x.numel() // max(1, width)
    _check(x, weight, quantization, bias, temb, residual, geglu, (*x.shape[:-1], n), m, n)
    out_width, dtype = output_form(n, out_dtype, out_quantization, out_bits, out_packed)
    chunk = chunk_of(statistics, m, n, x.device, out_quantization is None and not geglu)
    matrix = x.reshape(m, width) if x.stride(-1) == 1 else x.contiguous().reshape(m, width)
    out = torch.empty((m, out_width), dtype=dtype, device=x.device)
    if out.numel():
        alignment = row_alignment(matrix, weight.values)
        launch = launch or chosen_launch(x, m, n, k, out_packed, alignment=alignment, statistics=chunk > 0)
        tile, splits = (paired(launch.tile), 1) if geglu else launch[:2]
        tile = grouped(tile, weight.group) if weight.group else tile
        tile = tile._replace(block_n=max(tile.block_n, BLOCK)) if out_packed else tile
        assert tile.block_m >= chunk, "no tile is lower than a chunk"
        splits = min(splits, triton.cdiv(k, weight.group or tile.block_k))
        accumulator = torch.float32 if quantization is None or weight.group else torch.int32
        workspace = torch.empty((splits, m, n), dtype=accumulator, device=x.device) if splits > 1 else None
        padded = weight.values.shape[1] * (1 if weight.bits == 8 else 2)
        pixels = m if temb is None else m // len(temb)
        bias, temb = (term if term is None else term.contiguous() for term in (bias, temb))
        residual = residual if residual is None else residual.reshape(m, n).contiguous()
        operands = (matrix, weight.values)
        if launch.descriptors:
            operands = described(matrix, weight.values, tile, x_bits(x), weight.bits)
        grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n), splits)
        _int_gemm_kernel[grid](
            *operands, weight.scale, weight.sums, quantization, bias, temb, residual, out,
            out_quantization, statistics, workspace, m, n, k, padded, matrix.stride(0), pixels, BITS=weight.bits,
            X_BITS=x_bits(x), OUT_BITS=out_bits, OUT_PACKED=out_packed, GEGLU=geglu,
            GROUP_BLOCKS=weight.group // tile.block_k, EVEN_K=k % tile.block_k == 0,
            CHUNK=chunk, SPLITS=splits, DESCRIPTORS=launch.descriptors,
            WIDE=is_wide(matrix, weight.values, residual, out, workspace), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k, GROUP_M=GROUP_M, ASM=ASSEMBLY, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if workspace is not None:
            reduced(
                workspace, weight, None, quantization, bias, temb, residual, out, out_quantization, out_bits,
                out_packed, m, pixels, x_bits(x), statistics, chunk,
            )  # fmt: skip
    return out.reshape(*x.shape[:-1], out_width)


def row_alignment(x: Tensor, weight: Tensor) -> int:
    """Bytes that divide the address of every row of integer activations and of the weight; 0 for floating ones."""
    if x.is_floating_point():
        return 0
    return math.gcd(x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0))


def described(
    x: Tensor, weight: Tensor, tile: Tile, x_bits: int, bits: int
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Descriptors of both operands, through which a program reads blocks of a tile.

    Raises:
        ValueError: the activations are floating, or rows not aligned as descriptors need them.
    """
    alignment = row_alignment(x, weight)
    if not alignment or alignment % DESCRIPTOR_ALIGNMENT:
        wanted = f"integer rows aligned to {DESCRIPTOR_ALIGNMENT} bytes"
        raise ValueError(f"descriptors need {wanted}, got {x.dtype} {list(x.shape)} strided {x.stride()}")
    return (
        TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k * x_bits // 8]),
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k * bits // 8]),
    )


def chosen_launch(x: Tensor, m: int, n: int, k: int, packs: bool = False, **terms: Any) -> Launch:
    """The tile table's choice for the device of ``x`` (see `tiles.choose`); one tile for all in the interpreter.

    packs: the result is written two values to a byte.
    """
    if not ASSEMBLY:
        return Launch(INTERPRETED, 1)
    if x.dtype == torch.float32:
        return Launch(FLOAT32_PACKING if packs else FLOAT32, 1)
    device = torch.cuda.get_device_properties(x.device)
    arch = architecture((device.major, device.minor))
    return choose(arch, m, n, k, device.multi_processor_count, **terms)


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
    out_packed: bool,
    image_pixels: int,
    pixels: int,
    bits: int,
    statistics: Tensor | None,
    chunk: int,
) -> None:
    """Sums the partial accumulators of a split product and finishes them into ``out``, whose memory is [M, N].

    image_pixels: rows per image, of which class_index tells the border class; pixels: rows per row of temb; bits: 4
    where the activations were packed.
    """
    splits, m, n = workspace.shape
    block_m = max(32, chunk)
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, 64))
    _reduce_kernel[grid](
        workspace, weight.scale, weight.sums, class_index, quantization, bias, temb, residual, out, out_quantization,
        statistics, m, n, image_pixels, pixels, SPLITS=splits, X_BITS=bits, OUT_BITS=out_bits, OUT_PACKED=out_packed,
        CHUNK=chunk, WIDE=is_wide(out, residual, workspace), BLOCK_M=block_m,
        BLOCK_N=64, ASM=ASSEMBLY, SCALED=weight.group > 0,
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
    check_activations("x", x, quantization)
    width = packed_width(weight.k) if x.dtype == torch.uint8 else weight.k
    if x.shape[-1] != width:
        form = "" if width == weight.k else f" in {width} bytes"
        raise ValueError(f"x must have K = {weight.k} features{form}, got {list(x.shape)}")
    if geglu and (weight.rows % 2 or temb is not None or residual is not None):
        raise ValueError("geglu needs an even number of outputs and takes neither temb nor residual")
    rows = 2 * n if geglu else n
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias must have shape [{rows}], got {list(bias.shape)}")
    if temb is not None and (temb.dim() != 2 or temb.shape[1] != n or not len(temb) or m % len(temb)):
        raise ValueError(f"temb must be [B, {n}] with B dividing {m}, got {list(temb.shape)}")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual must have shape {list(shape)}, got {list(residual.shape)}")
