"""What is compiled: every tile of the table for its own architecture, and one launch of each kernel for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import triton
from compiler import Variant
from qdiff_kernels.tiles import NARROW, TILES, Tile, paired

_MATRICES = dict.fromkeys(("weight_scale", "quantization", "bias"), "*fp32") | {
    "x": "*i8", "weight": "*i8", "weight_sum": "*i32", "residual": "*fp16", "out": "*fp16",
    "M": "i32", "N": "i32", "K_PADDED": "i32", "pixels": "i32",
}  # fmt: skip
_PIXELS = dict.fromkeys(
    ("H", "W", "C", "C2", "K_PADDED2", "OUT_W", "image_pixels", "stride_h", "stride_w", "pad_top", "pad_left",
     "dilation_h", "dilation_w"), "i32",
)  # fmt: skip
_BOTH_SEGMENTS = ("x", "weight", "weight_scale", "weight_sum", "class_index", "quantization")


def matrix_instruction(arch: int, floating: bool) -> str:
    """The instruction that a product must use: of the warp group on Hopper, the tensor memory on Blackwell's sm_100."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if arch == 90:
        return r"wgmma\.mma_async.*f32\.f16\.f16" if floating else r"wgmma\.mma_async.*s32\.s8\.s8"
    if arch == 100 and (floating or version >= (3, 8)):
        return r"tcgen05\.mma.*kind::" + ("f16" if floating else "i8")
    return r"mma\.sync.*f32\.f16\.f16\.f32" if floating else r"mma\.sync.*m16n8k32.*s8\.s8"


def _types(types: dict[str, str], bits: int, floating: bool, splits: int) -> dict[str, str]:
    types = dict(types)
    if bits == 4:
        types["weight"] = "*u8"
    if floating:
        types["x"] = "*fp16"
        del types["quantization"]
    if splits > 1:
        types["workspace"] = "*fp32" if floating else "*i32"
    return types


def _blocks(tile: Tile, bits: int, splits: int) -> dict[str, int | bool]:
    return {
        "BITS": bits, "OUT_BITS": 8, "SPLITS": splits, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k, "GROUP_M": 8, "ASM": True,
    }  # fmt: skip


def gemm(
    name: str, arch: int, tile: Tile, bits: int = 8, floating: bool = False, geglu: bool = False, splits: int = 1
) -> Variant:
    """A launch of `int_gemm`; with GEGLU its result is quantised, as the next product wants it."""
    types = _types({**_MATRICES, "K": "i32", "stride_xm": "i32"}, bits, floating, splits)
    if geglu:
        del types["residual"]
        types |= {"out": "*i8", "out_quantization": "*fp32"}
        tile = paired(tile)
    constants = {**_blocks(tile, bits, splits), "GEGLU": geglu, "EVEN_K": True}
    return Variant(
        f"int_gemm-{name}-{tile.block_m}x{tile.block_n}x{tile.block_k}", "qdiff_kernels.int_gemm:_int_gemm_kernel",
        arch, types, constants, ("N", "K", "K_PADDED", "stride_xm"), tile.warps, tile.stages,
        matrix_instruction(arch, floating),
    )  # fmt: skip


def conv(
    name: str, arch: int, tile: Tile, bits: int = 8, floating: bool = False, kernel: int = 3, two: bool = False,
    splits: int = 1, aligned: bool = True, upsample: int = 1,
) -> Variant:  # fmt: skip
    """A launch of `int_conv2d`, padded: with border classes."""
    types = _types({**_MATRICES, **_PIXELS, "class_index": "*i32"}, bits, floating, splits)
    if two:
        types |= {f"{argument}2": types[argument] for argument in _BOTH_SEGMENTS if argument in types}
        tile = paired(tile)
    constants = {
        **_blocks(tile, bits, splits), "R": kernel, "S": kernel, "UPSAMPLE": upsample, "BITS2": bits,
        "ALIGNED": aligned, "ALIGNED2": aligned,
    }  # fmt: skip
    divisible = ("N", "C", "C2", "K_PADDED", "K_PADDED2") if aligned else ("N", "K_PADDED")
    return Variant(
        f"int_conv2d-{name}-{tile.block_m}x{tile.block_n}x{tile.block_k}",
        "qdiff_kernels.int_conv2d:_int_conv2d_kernel", arch, types, constants, divisible, tile.warps, tile.stages,
        matrix_instruction(arch, floating),
    )  # fmt: skip


def products() -> Iterator[Variant]:
    """Every tile of every architecture in the two main precisions, and each other kind of launch once for each."""
    for arch, tiles in TILES.items():
        for tile in tiles:
            yield gemm("w8a8", arch, tile)
            yield gemm("w4a8", arch, tile, bits=4)
            yield conv("w8a8", arch, tile)
            yield conv("w4a8", arch, tile, bits=4)
        tile = tiles[0]
        yield gemm("w8a16", arch, tile, floating=True)
        yield gemm("w4a16", arch, tile, bits=4, floating=True)
        yield gemm("geglu", arch, tile, geglu=True)
        yield gemm("split", arch, tiles[-1], splits=4)
        yield conv("w8a16", arch, tile, floating=True)
        yield conv("two-segments", arch, tile, kernel=1, two=True)
        yield conv("split", arch, tiles[-1], splits=4)
        yield conv("upsampled", arch, tiles[-1], upsample=2)
        yield conv("few-channels-in", arch, tiles[-1]._replace(block_k=64), aligned=False, floating=True)
        yield conv("few-channels-out", arch, NARROW)
        yield Variant(
            "reduce", "qdiff_kernels.epilogue:_reduce_kernel", arch,
            {"workspace": "*i32", "weight_scale": "*fp32", "weight_sum": "*i32", "quantization": "*fp32",
             "bias": "*fp32", "residual": "*fp16", "out": "*fp16", "M": "i32", "N": "i32", "image_pixels": "i32",
             "pixels": "i32"},
            {"SPLITS": 4, "OUT_BITS": 8, "BLOCK_M": 32, "BLOCK_N": 64, "ASM": True}, ("N",),
        )  # fmt: skip
