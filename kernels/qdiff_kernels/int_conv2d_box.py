"""int_conv2d with strides of 1, its input read as boxes of pixels through tensor descriptors: no address per pixel.

A tile's output pixels form a box [BOX_I, BOX_H, BOX_W] of images, rows and columns, and so do the pixels that a tap
reads for them, moved by the tap. What lies outside the image reads as 0: the border classes' weight sums know of it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .accumulate import in_order, multiplied, offsets, tile_of
from .epilogue import finished
from .tiles import Tile


class Box(NamedTuple):
    """The output pixels of one tile: powers of two whose product is the tile's block_m."""

    images: int
    rows: int
    columns: int


@functools.cache
def box_of(pixels: int, images: int, height: int, width: int) -> Box:
    """The box of ``pixels`` output pixels that needs the fewest tiles; among equals one image's, then the squarest."""
    candidates = []
    columns = 1
    while columns <= pixels:
        rows = 1
        while rows * columns <= pixels:
            box = Box(pixels // (rows * columns), rows, columns)
            candidates.append((tiles_of_boxes(box, images, height, width), box.images, abs(rows - columns), box))
            rows *= 2
        columns *= 2
    return min(candidates)[-1]


def tiles_of_boxes(box: Box, images: int, height: int, width: int) -> int:
    """How many boxes cover the output pixels of ``images``."""
    return -(-images // box.images) * -(-height // box.rows) * -(-width // box.columns)


def holds_chunks(box: Box, chunk: int, height: int, width: int) -> bool:
    """Whether every ``chunk`` output pixels of a tile, in order, lie in one image, and the tiles in order of images."""
    whole = not height % box.rows and not width % box.columns and not box.rows * box.columns % chunk
    return whole and (box.images == 1 or (box.rows, box.columns) == (height, width))


@triton.jit
def _int_conv2d_box_kernel(
    x,
    weight,
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
    workspace,
    images,
    N,
    C,
    out_h,
    out_w,
    pixels,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    R: tl.constexpr,
    S: tl.constexpr,
    BITS: tl.constexpr,
    X_BITS: tl.constexpr,
    OUT_BITS: tl.constexpr,
    OUT_PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    BOX_I: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ASM: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BOX_I * BOX_H * BOX_W
    boxes_h = tl.cdiv(out_h, BOX_H)
    boxes_w = tl.cdiv(out_w, BOX_W)
    boxes = tl.cdiv(images, BOX_I) * boxes_h * boxes_w
    tile_m, tile_n = tile_of(tl.program_id(0), boxes * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    first_w = tile_m % boxes_w * BOX_W
    line = tile_m // boxes_w
    first_h = line % boxes_h * BOX_H
    first_image = line // boxes_h * BOX_I

    steps = C // BLOCK_K
    blocks = R * S * steps
    x_step: tl.constexpr = BLOCK_K // 2 if X_BITS == 4 else BLOCK_K
    weight_step: tl.constexpr = BLOCK_K // 2 if BITS == 4 else BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for block in range(split * blocks // SPLITS, (split + 1) * blocks // SPLITS):
        index = block // steps
        row = first_h - pad_top + index // S * dilation_h
        column = first_w - pad_left + index % S * dilation_w
        a = x.load([first_image, row, column, (block - index * steps) * x_step]).reshape(BLOCK_M, x_step)
        b = weight.load([tile_n * BLOCK_N, block * weight_step])
        if X_BITS == 4:
            a = in_order(a, ASM)
        if BITS == 4:
            b = in_order(b, ASM)
        acc = multiplied(a, b, acc, False)

    lane = tl.arange(0, BLOCK_M)[:, None]
    image = first_image + lane // (BOX_H * BOX_W)
    row = first_h + lane // BOX_W % BOX_H
    column = first_w + lane % BOX_W
    in_range = (image < images) & (row < out_h) & (column < out_w)
    at = tl.where(in_range, (offsets(image, WIDE) * out_h + row) * out_w + column, 0)
    if SPLITS > 1:
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        to = workspace + (split * (images * out_h * out_w) + at) * N + columns
        tl.store(to, acc, mask=in_range & (columns < N))
    else:
        finished(
            acc, at, in_range, tile_n * BLOCK_N, N, quantization, weight_scale, weight_sum, class_index, out_h * out_w,
            bias, temb, residual, pixels, out, out_quantization, statistics, tile_m * BLOCK_M, images * out_h * out_w,
            X_BITS, OUT_BITS, OUT_PACKED, CHUNK, ASM,
        )  # fmt: skip


def described_image(
    x: Tensor, weight: Tensor, box: Box, tile: Tile, x_bits: int, bits: int
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Descriptors of an image [N, C, H, W] (channels_last, C bytes to a pixel) and of a weight [Cout, K bytes]."""
    n, c, h, w = x.shape
    return (
        TensorDescriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], [*box, tile.block_k * x_bits // 8]),
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k * bits // 8]),
    )
