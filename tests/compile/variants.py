"""What is compiled: every tile of the table for its own architecture, and one launch of each kernel for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import triton
from compiler import Variant
from qdiff_kernels.group_statistics import MERGED_BLOCKS
from qdiff_kernels.int_conv2d_box import Box, box_of
from qdiff_kernels.tiles import (
    DESCRIPTOR_TILES,
    FLOAT32,
    FLOAT32_PACKING,
    INTEGER_TILES,
    NARROW,
    TILES,
    Tile,
    grouped,
    paired,
)

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


def _types(
    types: dict[str, str], bits: int, x_bits: int, floating: bool, splits: int, chunk: int, packed_out: bool = False
) -> dict[str, str]:
    types = dict(types)
    if packed_out:
        types |= {"out": "*u8", "out_quantization": "*fp32"}
    if bits == 4:
        types["weight"] = "*u8"
    if x_bits == 4:
        types["x"] = "*u8"
    if floating:
        types["x"] = "*fp16"
        del types["quantization"]
    if chunk:
        types["statistics"] = "*fp32"
    if splits > 1:
        types["workspace"] = "*fp32" if floating else "*i32"
    return types


def _blocks(
    tile: Tile, bits: int, x_bits: int, splits: int, chunk: int, packed_out: bool = False
) -> dict[str, int | bool]:
    out_bits = 4 if packed_out else x_bits
    return {
        "BITS": bits, "X_BITS": x_bits, "OUT_BITS": out_bits, "OUT_PACKED": out_bits == 4, "SPLITS": splits,
        "CHUNK": chunk, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": 8,
        "ASM": True,
    }  # fmt: skip


def gemm(
    name: str, arch: int, tile: Tile, bits: int = 8, x_bits: int = 8, floating: bool = False, geglu: bool = False,
    splits: int = 1, descriptors: bool = False, wide: bool = False, group: int = 0,
    chunk: int = 0, packed_out: bool = False,
) -> Variant:  # fmt: skip
    """A launch of `int_gemm`; with GEGLU its result is quantised, as the next product wants it.

    group: how many of K share a scale.
    """
    types = _types({**_MATRICES, "K": "i32", "stride_xm": "i32"}, bits, x_bits, floating, splits, chunk, packed_out)
    if geglu:
        del types["residual"]
        types |= {"out": "*i8" if x_bits == 8 else "*u8", "out_quantization": "*fp32"}
        tile = paired(tile)
    if group:
        tile = grouped(tile, group)
        types |= {"workspace": "*fp32"} if splits > 1 else {}
    if descriptors:
        for argument, rows, width in (("x", tile.block_m, x_bits), ("weight", tile.block_n, bits)):
            types[argument] = f"tensordesc<{types[argument][1:]}[{rows},{tile.block_k * width // 8}]>"
    constants = {
        **_blocks(tile, bits, x_bits, splits, chunk, packed_out),
        "GEGLU": geglu,
        "GROUP_BLOCKS": group // tile.block_k,
        "EVEN_K": True,
        "DESCRIPTORS": descriptors,
        "WIDE": wide,
    }
    return Variant(
        f"int_gemm-{name}-{tile.block_m}x{tile.block_n}x{tile.block_k}", "qdiff_kernels.int_gemm:_int_gemm_kernel",
        arch, types, constants, ("N", "K", "K_PADDED", "stride_xm"), tile.warps, tile.stages,
        matrix_instruction(arch, floating),
    )  # fmt: skip


def conv(
    name: str, arch: int, tile: Tile, bits: int = 8, x_bits: int = 8, floating: bool = False, kernel: int = 3,
    two: bool = False, splits: int = 1, aligned: bool = True, upsample: int = 1, wide: bool = False, chunk: int = 0,
    packed_out: bool = False,
) -> Variant:  # fmt: skip
    """A launch of `int_conv2d`, padded: with border classes."""
    everything = {**_MATRICES, **_PIXELS, "class_index": "*i32"}
    types = _types(everything, bits, x_bits, floating, splits, chunk, packed_out)
    if two:
        types |= {f"{argument}2": types[argument] for argument in _BOTH_SEGMENTS if argument in types}
        tile = paired(tile)
    constants = {
        **_blocks(tile, bits, x_bits, splits, chunk, packed_out), "R": kernel, "S": kernel, "UPSAMPLE": upsample,
        "BITS2": bits, "X_BITS2": x_bits, "WIDE": wide, "ALIGNED": aligned, "ALIGNED2": aligned,
    }  # fmt: skip
    divisible = ("N", "C", "C2", "K_PADDED", "K_PADDED2") if aligned else ("N", "K_PADDED")
    return Variant(
        f"int_conv2d-{name}-{tile.block_m}x{tile.block_n}x{tile.block_k}",
        "qdiff_kernels.int_conv2d:_int_conv2d_kernel", arch, types, constants, divisible, tile.warps, tile.stages,
        matrix_instruction(arch, floating),
    )  # fmt: skip


def box(
    name: str, arch: int, tile: Tile, bits: int = 8, x_bits: int = 8, kernel: int = 3, splits: int = 1,
    shape: Box | None = None, chunk: int = 0,
) -> Variant:  # fmt: skip
    """A launch of `int_conv2d` that reads its padded image through a descriptor."""
    types = _types({**_MATRICES, "class_index": "*i32"}, bits, x_bits, False, splits, chunk, x_bits == 4 and not chunk)
    types |= dict.fromkeys(("images", "C", "out_h", "out_w", "pad_top", "pad_left", "dilation_h", "dilation_w"), "i32")
    shape = shape or box_of(tile.block_m, 2, 64, 64)
    for argument, block, width in (("x", shape, x_bits), ("weight", (tile.block_n,), bits)):
        sizes = ",".join(map(str, (*block, tile.block_k * width // 8)))
        types[argument] = f"tensordesc<{types[argument][1:]}[{sizes}]>"
    constants = {
        **_blocks(tile, bits, x_bits, splits, chunk), "R": kernel, "S": kernel, "WIDE": False, "BOX_I": shape.images,
        "BOX_H": shape.rows, "BOX_W": shape.columns,
    }  # fmt: skip
    return Variant(
        f"int_conv2d_box-{name}-{tile.block_m}x{tile.block_n}x{tile.block_k}",
        "qdiff_kernels.int_conv2d_box:_int_conv2d_box_kernel", arch, types, constants, ("N", "C"), tile.warps,
        tile.stages, matrix_instruction(arch, False),
    )  # fmt: skip


def in_float32(variant: Variant) -> Variant:
    """The same launch for float32 activations, multiplied in two parts of TensorFloat-32."""
    images = {name: "*fp32" for name in variant.types if name in ("x", "x2")}
    return dataclasses.replace(variant, types={**variant.types, **images}, expects=r"mma.*tf32")


def _largest(tiles: Sequence[Tile]) -> Tile:
    return max(tiles, key=lambda tile: tile.block_m * tile.block_n)


def products() -> Iterator[Variant]:
    """Every tile of every architecture in the two main precisions, and each other kind of launch once for each.

    What takes registers beside the accumulator (packed activations, statistics) is tried on the largest tile.
    """
    for arch, tiles in TILES.items():
        integer, descriptor = (*tiles, *INTEGER_TILES.get(arch, ())), DESCRIPTOR_TILES.get(arch, ())
        for bits in (8, 4):
            for tile in integer:
                yield gemm(f"w{bits}a8", arch, tile, bits=bits)
                yield conv(f"w{bits}a8", arch, tile, bits=bits)
            for tile in descriptor:
                yield gemm(f"w{bits}a8-descriptors", arch, tile, bits=bits, descriptors=True)
                yield box(f"w{bits}a8", arch, tile, bits=bits)
        tile = _largest(integer)
        for product in (gemm, conv):
            yield product("w4a4-packed", arch, tile, bits=4, x_bits=4)
            yield product("w8a4-packed", arch, tile, x_bits=4)
            yield product("w4a8-statistics", arch, _largest(tiles), bits=4, chunk=64)
            yield product("w4a4-statistics", arch, _largest(tiles), bits=4, x_bits=4, chunk=64)
            yield product("w4a4-packs", arch, tile, bits=4, x_bits=4, packed_out=True)
        if descriptor:
            tile = _largest(descriptor)
            yield gemm("w4a4-descriptors", arch, tile, bits=4, x_bits=4, descriptors=True)
            yield gemm("w4a4-descriptors-packs", arch, tile, bits=4, x_bits=4, descriptors=True, packed_out=True)
            yield gemm("w4a8-descriptors-statistics", arch, tile, bits=4, descriptors=True, chunk=64)
            yield gemm("geglu-descriptors", arch, tile, geglu=True, descriptors=True)
            yield gemm("split-descriptors", arch, tile, splits=4, descriptors=True)
            yield gemm("w4a8-group-descriptors", arch, tile, bits=4, group=128, descriptors=True)
            yield gemm("group-geglu-descriptors", arch, tile, bits=4, geglu=True, group=128, descriptors=True)
            yield gemm("w4a4-group-descriptors", arch, tile, bits=4, x_bits=4, group=64, descriptors=True)
            yield box("w4a4", arch, tile, bits=4, x_bits=4)
            yield box("w4a8-statistics", arch, tile, bits=4, chunk=64)
            yield box("w4a4-statistics", arch, tile, bits=4, x_bits=4, chunk=64)
            yield box("64-channels", arch, tile._replace(block_k=64))
            yield box("small-images", arch, tile, shape=box_of(tile.block_m, 64, 4, 4))
            yield box("split", arch, tile, splits=4)
        tile = tiles[0]
        yield conv("two-segments-statistics", arch, tile, kernel=1, two=True, chunk=64)
        yield conv("w8a16-statistics", arch, tile, floating=True, chunk=64)
        yield conv("w8a16-packs", arch, tile, floating=True, packed_out=True)
        yield gemm("wide", arch, tile, wide=True)
        yield conv("wide", arch, tile, wide=True)
        yield gemm("w8a16", arch, tile, floating=True)
        yield gemm("w4a16", arch, tile, bits=4, floating=True)
        yield gemm("geglu", arch, tile, geglu=True)
        yield gemm("geglu-packed", arch, tile, bits=4, x_bits=4, geglu=True)
        for variant in (
            gemm("w8a32", arch, FLOAT32, floating=True),
            gemm("w4a32", arch, FLOAT32, bits=4, floating=True),
            gemm("w4a32-group", arch, FLOAT32, bits=4, floating=True, group=64),
            gemm("w8a32-geglu", arch, FLOAT32, floating=True, geglu=True),
            conv("w8a32", arch, FLOAT32, floating=True),
            conv("w4a32-two-segments", arch, FLOAT32, bits=4, floating=True, kernel=1, two=True),
            conv("w8a32-statistics", arch, FLOAT32, floating=True, chunk=64),
            conv("w8a32-packs", arch, FLOAT32_PACKING, floating=True, packed_out=True),
            conv("w8a32-few-channels-in", arch, FLOAT32, aligned=False, floating=True),
        ):
            yield in_float32(variant)
        yield gemm("geglu-w8a16", arch, tile, floating=True, geglu=True)
        yield gemm("split", arch, tiles[-1], splits=4)
        yield gemm("w8a8-group", arch, tile, group=128)
        yield gemm("w4a8-group", arch, tile, bits=4, group=64)
        yield gemm("w4a8-group-statistics", arch, tile, bits=4, group=128, chunk=64)
        yield gemm("w4a4-group", arch, tile, bits=4, x_bits=4, group=128)
        yield gemm("w4a16-group", arch, tile, bits=4, floating=True, group=128)
        yield gemm("group-geglu", arch, tile, bits=4, geglu=True, group=64)
        yield gemm("group-split", arch, tiles[-1], bits=4, group=64, splits=4)
        yield conv("w8a16", arch, tile, floating=True)
        yield conv("two-segments", arch, tile, kernel=1, two=True)
        yield conv("two-segments-packed", arch, tile, bits=4, x_bits=4, kernel=1, two=True)
        yield conv("split", arch, tiles[-1], splits=4)
        yield conv("upsampled", arch, tiles[-1], upsample=2)
        yield conv("few-channels-in", arch, tiles[-1]._replace(block_k=64), aligned=False, floating=True)
        yield conv("few-channels-out", arch, NARROW)
        one_row = gemm("one-row", arch, tiles[-1], splits=4)  # Triton turns an integer argument of 1 into a constant
        del one_row.types["M"]
        one_row.constants["M"] = 1
        yield one_row
        for rows, chunk, scaled in ((None, 0, False), (None, 64, False), (1, 0, False), (None, 0, True)):
            kind = f"{rows or 'many'}{'-statistics' if chunk else ''}{'-groups' if scaled else ''}"
            sizes = ({} if rows else {"M": "i32"}) | ({"statistics": "*fp32"} if chunk else {})
            sizes |= {"workspace": "*fp32" if scaled else "*i32"}
            yield Variant(
                f"reduce-{kind}", "qdiff_kernels.epilogue:_reduce_kernel", arch,
                {**sizes, "weight_scale": "*fp32", "weight_sum": "*i32", "quantization": "*fp32", "bias": "*fp32",
                 "residual": "*fp16", "out": "*fp16", "N": "i32", "image_pixels": "i32", "pixels": "i32"},
                {"M": rows, "SPLITS": 4, "X_BITS": 8, "OUT_BITS": 8, "OUT_PACKED": False, "WIDE": False,
                 "CHUNK": chunk, "BLOCK_M": max(chunk, 32), "BLOCK_N": 64, "ASM": True, "SCALED": scaled}, ("N",),
            )  # fmt: skip


_SIZES = dict.fromkeys(
    ("pixels", "features", "height", "width", "out_height", "out_width", "top", "left", "tiles", "channels",
     "channels1", "channels2", "chunk_pixels", "chunks", "size", "stride_pre_add", "stride_scale", "stride_shift",
     "stride_bc", "M", "K", "elements"), "i32",
)  # fmt: skip
_STRIDES = {f"stride_{tensor}{axis}": "i32" for tensor in "xeuzo" for axis in "nc"}
_VECTORS = dict.fromkeys(("weight", "bias", "pre_add", "norm_scale", "norm_shift"), "*fp16")
_FLOATS = dict.fromkeys(
    ("quantization", "channel_inverse", "statistics", "coefficients", "constants", "factor", "shift", "input_bias"),
    "*fp32",
)
_LATENTS = dict.fromkeys(("cond", "uncond", "noise"), "*fp16")
_DIVISIBLE = ("pixels", "features", "channels", "channels1", "channels2", "M", "K", "elements")


def _elementwise(
    name: str, kernel: str, arch: int, constants: dict[str, object], absent: tuple[str, ...] = (), out: str = "*i8",
    warps: int = 4,
) -> Variant:  # fmt: skip
    """A kernel that multiplies no matrices: of all the arguments there are, those in ``absent`` are None."""
    everything = {**_SIZES, **_STRIDES, **_VECTORS, **_FLOATS, **_LATENTS, "x": "*fp16", "x2": "*fp16", "out": out}
    everything |= dict.fromkeys(("eps", "share_high", "share_low"), "fp32")
    types = {argument: kind for argument, kind in everything.items() if argument not in {*absent, *constants}}
    return Variant(
        name,
        f"qdiff_kernels.{kernel}",
        arch,
        types,
        {"BITS": 8, "PACKED": False, "ASM": True, **constants},
        _DIVISIBLE,
        warps,
    )


def others() -> Iterator[Variant]:
    """Quantisers, norms and the sampler step, as real layers launch them, for every architecture."""
    block: dict[str, object] = {"BLOCK_P": 32, "BLOCK_C": 64}
    plain = {**block, "UPSAMPLE": 1, "PLACED": False}
    placed = {**block, "UPSAMPLE": 2, "PLACED": True}
    for arch in TILES:
        for activation in ("none", "silu", "gelu", "gelu_tanh", "geglu"):
            constants = {**plain, "ACTIVATION": activation}
            yield _elementwise(f"quantize-{activation}", "quantize:_quantize_kernel", arch, constants)
        yield _elementwise(
            "quantize-placed", "quantize:_quantize_kernel", arch, {**placed, "ACTIVATION": "none", "BITS": 4},
            ("channel_inverse",),
        )  # fmt: skip
        four: dict[str, object] = {"BITS": 4, "PACKED": True}
        yield _elementwise(
            "quantize-packed", "quantize:_quantize_kernel", arch, {**plain, **four, "ACTIVATION": "none"}, out="*u8"
        )
        yield _elementwise("groupnorm-statistics", "group_statistics:_statistics_kernel", arch, block)
        for block_c, (block_k, warps) in MERGED_BLOCKS.items():
            yield _elementwise(
                f"groupnorm-coefficients-{block_c}", "group_statistics:_coefficients_kernel", arch,
                {"BLOCK_K": block_k, "BLOCK_C": block_c}, warps=warps,
            )  # fmt: skip
        apply = "groupnorm_silu_quantize:_apply_kernel"
        whole, factors = {**plain, "SILU": True}, ("channel_inverse",)
        yield _elementwise("groupnorm-apply", apply, arch, whole, factors)
        yield _elementwise(
            "groupnorm-apply-placed", apply, arch, {**placed, "SILU": True, "channels2": 0}, ("x2", *factors)
        )
        yield _elementwise(
            "groupnorm-apply-float", apply, arch, {**plain, "SILU": False}, ("quantization", *factors), "*fp16"
        )
        yield _elementwise("groupnorm-apply-packed", apply, arch, {**whole, **four}, factors, "*u8")
        yield _elementwise("groupnorm-apply-factors", apply, arch, {**whole, **four}, out="*u8")
        layernorm = "layernorm_quantize:_layernorm_quantize_kernel"
        yield _elementwise("layernorm", layernorm, arch, {"BLOCK_M": 1, "BLOCK_K": 2048})
        yield _elementwise("layernorm-packed", layernorm, arch, {"BLOCK_M": 1, "BLOCK_K": 2048, **four}, out="*u8")
        yield _elementwise("layernorm-narrow", layernorm, arch, {"BLOCK_M": 8, "BLOCK_K": 512}, ("weight", "bias"))
        for prediction in ("epsilon", "v_prediction", "sample"):
            constants = {"PREDICTION": prediction, "CLIPPED": True, "BLOCK": 512}
            constants |= {f"stride_{tensor}p": 1 for tensor in "xeuzob"}
            yield _elementwise(
                f"denoise-{prediction}", "denoise_step:_denoise_step_kernel", arch, constants, (), "*fp16"
            )
