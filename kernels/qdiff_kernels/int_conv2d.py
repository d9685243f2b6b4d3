"""int_conv2d: y = sum over segments of s s_w (acc - z wsum[class]) + bias + temb + residual, as implicit GEMM on NHWC.

Row m of the product is output pixel m of the batch, its K axis runs over (r, s, c) in the order of the packed weight.
Taps outside the image load 0, and the border class of the pixel says which weight sum the zero point multiplies. The
input may be read upsampled (nearest), and a skip concatenation in two segments, each with its own quantisation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .accumulate import convolved, offsets, tile_of
from .arithmetic import ASSEMBLY
from .epilogue import finished, scaled, stored, summarised, with_terms
from .int_conv2d_box import _int_conv2d_box_kernel, box_of, described_image, holds_chunks, tiles_of_boxes
from .int_gemm import chosen_launch, int_gemm, reduced
from .operands import check_activations, chunk_of, is_wide, output_form, x_bits
from .packing import BLOCK, KernelWeight
from .tiles import DESCRIPTOR_ALIGNMENT, GROUP_M, Launch, paired


class Segment(NamedTuple):
    """One stretch of the K axis: an image with its quantisation and its weights."""

    x: Tensor  # int8 or floating [N, C, H, W], or uint8 [N, C / 2, H, W] (4 bits packed); channels_last
    weight: KernelWeight  # [Cout, R S C] in the order (r, s, c)
    quantization: Tensor | None  # float32 [3], (s, 1 / s, z); None in mode A16

    @property
    def channels(self) -> int:
        """Of the image: twice the bytes of a pixel where it is packed."""
        return self.x.shape[1] * (2 if self.x.dtype == torch.uint8 else 1)


class Geometry(NamedTuple):
    """What a convolution does to the pixels of its (upsampled) input."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right
    dilation: tuple[int, int] = (1, 1)
    upsample: int = 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of ``height`` x ``width`` pixels."""
        top, bottom, left, right = self.padding
        sizes = []
        for size, pad, r, step, d in zip(
            (height, width), (top + bottom, left + right), self.kernel, self.stride, self.dilation, strict=True
        ):
            sizes.append((size * self.upsample + pad - d * (r - 1) - 1) // step + 1)
        return sizes[0], sizes[1]


def pack_order(values: Tensor) -> Tensor:
    """int8 [Cout, C, R, S] -> [Cout, R S C], the K axis of this operator, for `packing.pack`."""
    return values.permute(0, 2, 3, 1).reshape(len(values), -1).contiguous()


@triton.jit
def _int_conv2d_kernel(
    x,
    weight,
    weight_scale,
    weight_sum,
    class_index,
    quantization,
    x2,
    weight2,
    weight_scale2,
    weight_sum2,
    class_index2,
    quantization2,
    bias,
    temb,
    residual,
    out,
    out_quantization,
    statistics,
    workspace,
    M,
    N,
    H,
    W,
    C,
    C2,
    K_PADDED,
    K_PADDED2,
    OUT_W,
    pixels,
    image_pixels,
    stride_h,
    stride_w,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    R: tl.constexpr,
    S: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BITS: tl.constexpr,
    BITS2: tl.constexpr,
    X_BITS: tl.constexpr,
    X_BITS2: tl.constexpr,
    OUT_BITS: tl.constexpr,
    OUT_PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED2: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
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
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = rows < M
    rows = tl.where(in_range, rows, 0)
    image = rows // image_pixels
    pixel = rows - image * image_pixels
    out_row = pixel // OUT_W
    top = out_row * stride_h - pad_top
    left = (pixel - out_row * OUT_W) * stride_w - pad_left
    image = offsets(image, WIDE)
    rows = offsets(rows, WIDE)

    wrapped = offsets(columns % N, WIDE)[:, None]
    blocks = tl.cdiv(R * S * C, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    acc = convolved(
        x, weight + wrapped * (K_PADDED if BITS == 8 else K_PADDED // 2), acc, image, top, left,
        split * blocks // SPLITS, (split + 1) * blocks // SPLITS, H, W, C, dilation_h, dilation_w, K_PADDED,
        R, S, UPSAMPLE, BITS, X_BITS, FLOATING, ALIGNED, BLOCK_K, ASM,
    )  # fmt: skip
    at_columns = columns[None, :]
    inside = in_range & (at_columns < N)
    if SPLITS > 1:
        tl.store(workspace + (split * M + rows) * N + at_columns, acc, mask=inside)
    elif x2 is None:
        finished(
            acc, rows, in_range, tile_n * BLOCK_N, N, quantization, weight_scale, weight_sum, class_index, image_pixels,
            bias, temb, residual, pixels, out, out_quantization, statistics, tile_m * BLOCK_M, M, X_BITS, OUT_BITS,
            OUT_PACKED, CHUNK, ASM,
        )  # fmt: skip
    else:
        y = scaled(
            acc, rows, at_columns, inside, N, quantization, weight_scale, weight_sum, class_index, image_pixels, X_BITS
        )
        acc2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        acc2 = convolved(
            x2, weight2 + wrapped * (K_PADDED2 if BITS2 == 8 else K_PADDED2 // 2), acc2, image, top, left,
            0, tl.cdiv(R * S * C2, BLOCK_K), H, W, C2, dilation_h, dilation_w, K_PADDED2,
            R, S, UPSAMPLE, BITS2, X_BITS2, FLOATING, ALIGNED2, BLOCK_K, ASM,
        )  # fmt: skip
        y += scaled(
            acc2, rows, at_columns, inside, N, quantization2, weight_scale2, weight_sum2, class_index2, image_pixels,
            X_BITS2,
        )  # fmt: skip
        y = with_terms(y, rows, at_columns, inside, N, bias, temb, residual, pixels)
        summarised(y, tile_m * BLOCK_M, tile_n * BLOCK_N, M, N, out, statistics, CHUNK)
        stored(y, rows, in_range, tile_n * BLOCK_N, N, out, out_quantization, OUT_BITS, OUT_PACKED, ASM)


def int_conv2d(
    segments: Sequence[Segment],
    geometry: Geometry,
    class_index: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    temb: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    out_quantization: Tensor | None = None,
    out_bits: int = 8,
    out_packed: bool = False,
    statistics: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """y = sum over segments of s s_w (acc - z wsum[class]) + bias + temb + residual, per output channel.

    Args:
        segments: one, or two of the same image size for a skip concatenation.
        geometry: kernel size, stride, padding, dilation and upsampling.
        class_index: int32 [OH OW], row of every segment's ``weight.sums`` that an output pixel uses; None: row 0.
        bias: [Cout]. temb: [N, Cout], or [1, Cout] for the whole batch. residual: [N, Cout, OH, OW].
        out_dtype: float16, bfloat16 or float32.
        out_quantization: float32 [3], quantises y to ``out_bits`` bits (int8) instead; with ``out_packed`` to 4 packed
            ones, uint8 [N, packed_width(Cout), OH, OW].
        statistics: from `group_statistics.statistics_for`; written for the GroupNorm that reads y next.
        launch: tile, splits and how images are read; chosen from `tiles` by default.

    Returns:
        [N, Cout, OH, OW], channels_last.
    """
    x = segments[0].x if segments else None
    if x is None or len(segments) > 2:
        raise ValueError(f"segments must be one or two, got {len(segments)}")
    batch, _, height, width = x.shape
    out_height, out_width = geometry.output_size(height, width)
    n, image_pixels = segments[0].weight.rows, out_height * out_width
    m = batch * image_pixels
    _check(segments, geometry, class_index, bias, temb, residual, (batch, n, out_height, out_width))
    width_of_n, dtype = output_form(n, out_dtype, out_quantization, out_bits, out_packed)
    out = torch.empty(
        (batch, width_of_n, out_height, out_width), dtype=dtype, device=x.device, memory_format=torch.channels_last
    )
    chunk = chunk_of(statistics, m, n, x.device, out_quantization is None)
    if statistics is not None and image_pixels % chunk:
        raise ValueError(f"statistics must have chunks within an image of {image_pixels} pixels, got {chunk}")
    if not out.numel():
        return out
    if _is_gemm(segments, geometry):
        x, weight, quantization = segments[0]
        rows, term = x.permute(0, 2, 3, 1), None if residual is None else residual.permute(0, 2, 3, 1)
        y = int_gemm(
            rows, weight, quantization, bias, temb=temb, residual=term, out_dtype=out_dtype,
            out_quantization=out_quantization, out_bits=out_bits, out_packed=out_packed, statistics=statistics,
            launch=launch,
        )  # fmt: skip
        return y.permute(0, 3, 1, 2)
    images = [s.x.contiguous(memory_format=torch.channels_last) for s in segments]
    channels = [segment.channels for segment in segments]
    (r, s), (stride_h, stride_w), (dilation_h, dilation_w) = geometry.kernel, geometry.stride, geometry.dilation
    alignment = _box_alignment(images[0], segments, geometry)
    chosen = functools.partial(
        chosen_launch, x, m, n, r * s * channels[0], out_packed, k_multiple=channels[0], statistics=chunk > 0
    )
    launch = launch or chosen(alignment=alignment)
    box = box_of(launch.tile.block_m, batch, out_height, out_width)
    if launch.descriptors and chunk and not holds_chunks(box, chunk, out_height, out_width):
        launch = chosen(alignment=1)
    if launch.descriptors and (alignment % DESCRIPTOR_ALIGNMENT or not alignment or channels[0] % launch.tile.block_k):
        needed = "one integer segment, strides of 1, and whole blocks of channels"
        raise ValueError(f"descriptors need {needed}, got {channels} channels, {geometry}, {launch.tile}")
    tile, splits = launch[:2] if len(segments) == 1 else (paired(launch.tile), 1)
    tile = tile._replace(block_n=max(tile.block_n, BLOCK)) if out_packed else tile
    assert tile.block_m >= chunk, "no tile is lower than a chunk"
    splits = min(splits, triton.cdiv(r * s * channels[0], tile.block_k))
    accumulator = torch.float32 if segments[0].quantization is None else torch.int32
    workspace = torch.empty((splits, m, n), dtype=accumulator, device=x.device) if splits > 1 else None
    pixels = m if temb is not None and len(temb) == 1 else image_pixels
    bias, temb = (term if term is None else term.contiguous() for term in (bias, temb))
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    first, second = segments[0], (segments[1] if len(segments) == 2 else None)
    has_classes = [class_index if len(segment.weight.sums) > 1 else None for segment in segments]
    padded = [s.weight.values.shape[1] * (1 if s.weight.bits == 8 else 2) for s in segments]
    wide = is_wide(*images, *(s.weight.values for s in segments), residual, out, workspace)
    blocks_n = triton.cdiv(n, tile.block_n)
    if launch.descriptors:
        operands = described_image(images[0], first.weight.values, box, tile, x_bits(images[0]), first.weight.bits)
        _int_conv2d_box_kernel[tiles_of_boxes(box, batch, out_height, out_width) * blocks_n, splits](
            *operands, first.weight.scale, first.weight.sums, has_classes[0], first.quantization, bias, temb, residual,
            out, out_quantization, statistics, workspace, batch, n, channels[0], out_height, out_width, pixels,
            geometry.padding[0], geometry.padding[2], dilation_h, dilation_w, R=r, S=s, BITS=first.weight.bits,
            X_BITS=x_bits(images[0]), OUT_BITS=out_bits, OUT_PACKED=out_packed, CHUNK=chunk, SPLITS=splits, WIDE=wide,
            BOX_I=box.images, BOX_H=box.rows, BOX_W=box.columns, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            GROUP_M=GROUP_M, ASM=ASSEMBLY, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    else:
        _int_conv2d_kernel[triton.cdiv(m, tile.block_m) * blocks_n, splits](
            images[0], first.weight.values, first.weight.scale, first.weight.sums, has_classes[0], first.quantization,
            *((None,) * 6 if second is None else (
                images[1], second.weight.values, second.weight.scale, second.weight.sums, has_classes[1],
                second.quantization,
            )),
            bias, temb, residual, out, out_quantization, statistics, workspace, m, n, height, width, channels[0],
            channels[-1], padded[0], padded[-1], out_width, pixels, image_pixels, stride_h, stride_w,
            geometry.padding[0], geometry.padding[2], dilation_h, dilation_w, R=r, S=s, UPSAMPLE=geometry.upsample,
            BITS=first.weight.bits, BITS2=(second or first).weight.bits, X_BITS=x_bits(images[0]),
            X_BITS2=x_bits(images[-1]), OUT_BITS=out_bits, OUT_PACKED=out_packed,
            ALIGNED=channels[0] % tile.block_k == 0, ALIGNED2=channels[-1] % tile.block_k == 0, CHUNK=chunk,
            SPLITS=splits, WIDE=wide, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=GROUP_M,
            ASM=ASSEMBLY, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if workspace is not None:
        reduced(
            workspace, first.weight, has_classes[0], first.quantization, bias, temb, residual, out, out_quantization,
            out_bits, out_packed, image_pixels, pixels, x_bits(images[0]), statistics, chunk,
        )  # fmt: skip
    return out


def _is_gemm(segments: Sequence[Segment], geometry: Geometry) -> bool:
    """Whether every output pixel reads just its own input pixel: `int_gemm` then has neither taps nor borders."""
    return len(segments) == 1 and geometry._replace(dilation=(1, 1)) == Geometry((1, 1))


def _box_alignment(image: Tensor, segments: Sequence[Segment], geometry: Geometry) -> int:
    """Bytes that divide the address of every pixel and row of weights; 1 where no box of pixels fits, 0 for floats."""
    if segments[0].quantization is None:
        return 0
    if len(segments) > 1 or geometry.stride != (1, 1) or geometry.upsample > 1 or segments[0].channels % BLOCK:
        return 1
    weight = segments[0].weight.values
    return math.gcd(image.data_ptr(), image.shape[1], weight.data_ptr(), weight.stride(0))


def _check(
    segments: Sequence[Segment],
    geometry: Geometry,
    class_index: Tensor | None,
    bias: Tensor | None,
    temb: Tensor | None,
    residual: Tensor | None,
    shape: tuple[int, int, int, int],
) -> None:
    batch, n, out_height, out_width = shape
    x = segments[0].x
    for i, segment in enumerate(segments):
        floating = segment.quantization is None
        check_activations(f"segments[{i}].x", segment.x, segment.quantization)
        if segment.x.dim() != 4 or (segment.x.shape[0], *segment.x.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(f"segments[{i}].x must be [N, C, H, W] alike, got {list(segment.x.shape)}")
        if segment.x.dtype == torch.uint8 and segment.channels % BLOCK:
            raise ValueError(f"segments[{i}].x must have whole blocks of {BLOCK} channels, got {segment.channels}")
        taps = geometry.kernel[0] * geometry.kernel[1] * segment.channels
        if segment.weight.k != taps or segment.weight.rows != n or segment.weight.group:
            found = f"{[segment.weight.rows, segment.weight.k]}, groups of {segment.weight.group}"
            raise ValueError(f"segments[{i}].weight must be [{n}, {taps}] without groups, got {found}")
        if floating != (segments[0].quantization is None):
            raise ValueError("segments must all be quantised or all be floating")
        classes = len(segment.weight.sums)
        if classes > 1 and (class_index is None or tuple(class_index.shape) != (out_height * out_width,)):
            given = None if class_index is None else list(class_index.shape)
            raise ValueError(f"class_index must be [{out_height * out_width}] for {classes} classes, got {given}")
    if out_height < 1 or out_width < 1:
        raise ValueError(f"the kernel {geometry.kernel} must fit the padded image, got output {shape}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must have shape [{n}], got {list(bias.shape)}")
    if temb is not None and tuple(temb.shape) not in ((batch, n), (1, n)):
        raise ValueError(f"temb must be [{batch} or 1, {n}], got {list(temb.shape)}")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual must have shape {list(shape)}, got {list(residual.shape)}")
