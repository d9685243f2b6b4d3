"""The Triton products, int_gemm and int_conv2d, against the float64 reference: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparing import CHANNELS_LAST, DEVICE, assert_near, integers, on_device, quantization
from qdiff_kernels.int_conv2d import Geometry, Segment, int_conv2d, pack_order
from qdiff_kernels.int_conv2d_box import Box, box_of, tiles_of_boxes
from qdiff_kernels.int_gemm import int_gemm, is_wide
from qdiff_kernels.packing import BLOCK, pack, pack_rows, packed_width, unpack_rows
from qdiff_kernels.tiles import (
    DESCRIPTOR_TILES,
    INTEGER_TILES,
    SHARED_MEMORY,
    TILES,
    Launch,
    Tile,
    architecture,
    choose,
    paired,
)
from torch import Tensor

from qdiff_engine import numerics, reference

pytestmark = pytest.mark.usefixtures("kernels")

SMALL = Tile(32, 32, 64, 4, 1)
GEMM_SHAPES = [(1, 1, 1), (17, 33, 63), (33, 17, 1040), (64, 320, 320), (2, 1280, 130)]  # M, N, K


def weights(n: int, k: int, bits: int) -> tuple[Tensor, Tensor]:
    low, high = numerics.weight_range(bits)
    return integers(n, k, low=low, high=high), torch.rand(n) * 0.01 + 1e-4


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("m, n, k", GEMM_SHAPES)
def test_int_gemm_is_exact(m: int, n: int, k: int, bits: int) -> None:
    """Unit scales leave the accumulator: equal to the reference, integer by integer, in one part and in three."""
    weight, _ = weights(n, k, bits)
    packed = on_device(pack(weight, torch.ones(n), bits))
    for zero_point in (-128, 5, 127):
        q = integers(m, k)
        expected = reference.gemm_accumulators(q, weight) - zero_point * weight.to(torch.int64).sum(1)
        assert int(expected.abs().max()) < 1 << 24  # float32 holds it
        for splits in (1, 3):
            y = int_gemm(
                q.to(DEVICE), packed, quantization(1.0, zero_point), out_dtype=torch.float32,
                launch=Launch(SMALL, splits),
            )  # fmt: skip
            assert torch.equal(y.cpu().to(torch.int64), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_int_gemm_at_the_extremes(bits: int) -> None:
    """All products of one sign and largest size, beyond what float32 holds exactly: the sum itself, requantised."""
    low, high = numerics.weight_range(bits)
    weight = torch.full((3, 4096), high, dtype=torch.int8)
    weight[1] = low
    q = torch.full((5, 4096), -128, dtype=torch.int8)
    q[2:] = 127
    expected = reference.int_gemm(q, weight, torch.ones(3), 1e-3, 127)
    y = int_gemm(
        q.to(DEVICE), on_device(pack(weight, torch.ones(3), bits)), quantization(1e-3, 127), out_dtype=torch.float32
    )
    assert_near(y, expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_int_gemm_epilogue(bits: int, splits: int, dtype: torch.dtype) -> None:
    m, n, k = 34, 33, 130
    q, (weight, scale) = integers(m, k), weights(n, k, bits)
    bias, temb, residual = torch.randn(n), torch.randn(2, n), torch.randn(m, n).to(dtype)
    expected = reference.int_gemm(q, weight, scale, 0.037, 5, bias, residual=residual)
    expected = expected + temb.double().repeat_interleave(m // 2, 0)
    options = {"temb": on_device(temb), "residual": on_device(residual), "launch": Launch(SMALL, splits)}
    packed, activation = on_device(pack(weight, scale, bits)), quantization(0.037, 5)
    y = int_gemm(q.to(DEVICE), packed, activation, on_device(bias), out_dtype=dtype, **options)
    assert y.dtype == dtype
    assert_near(y, expected, 1e-6 if dtype == torch.float32 else 1e-3)
    integers_out = int_gemm(
        q.to(DEVICE), packed, activation, on_device(bias), out_quantization=quantization(0.05, -3), **options
    )
    steps = integers_out.cpu().int() - numerics.quantize(expected.float(), 0.05, -3, 8).int()
    assert int(steps.abs().max()) <= 1 and int(steps.abs().sum()) <= 2


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("quantised", [True, False])
def test_int_gemm_geglu(bits: int, quantised: bool) -> None:
    m, n, k = 17, 40, 96
    q, (weight, scale) = integers(m, k), weights(2 * n, k, bits)
    bias = torch.randn(2 * n)
    value, gate = reference.int_gemm(q, weight, scale, 0.037, 5, bias).chunk(2, dim=-1)
    expected = value * F.gelu(gate)
    out = {"out_quantization": quantization(0.05, -3)} if quantised else {"out_dtype": torch.float32}
    packed = on_device(pack(weight, scale, bits))
    y = int_gemm(q.to(DEVICE), packed, quantization(0.037, 5), on_device(bias), geglu=True, **out)
    if not quantised:
        assert_near(y, expected)
        return
    steps = y.cpu().int() - numerics.quantize(expected.float(), 0.05, -3, 8).int()
    assert int(steps.abs().max()) <= 1 and int(steps.abs().sum()) <= 2


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_int_gemm_multiplies_floating_activations(bits: int, dtype: torch.dtype) -> None:
    x, (weight, scale) = torch.randn(3, 11, 130).to(dtype), weights(33, 130, bits)
    bias = torch.randn(33)
    expected = x.double() @ (weight.double() * scale.double()[:, None]).t() + bias
    y = int_gemm(x.to(DEVICE), on_device(pack(weight, scale, bits)), None, on_device(bias), out_dtype=torch.float32)
    assert y.shape == (3, 11, 33)
    assert_near(y, expected, 1e-5)


def test_int_gemm_reads_strided_rows_and_empty_ones() -> None:
    weight, scale = weights(9, 33, 8)
    packed, activation = on_device(pack(weight, scale, 8)), quantization(0.1, 2)
    q = integers(7, 50)
    y = int_gemm(q.to(DEVICE)[:, 4:37], packed, activation, out_dtype=torch.float32)
    assert_near(y, reference.int_gemm(q[:, 4:37], weight, scale, 0.1, 2))
    assert int_gemm(q[:0, :33].to(DEVICE), packed, activation).shape == (0, 9)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("m, n, k", GEMM_SHAPES)
def test_int_gemm_of_packed_activations_is_exact(m: int, n: int, k: int, bits: int) -> None:
    """The same bits as from the same integers, one to a byte."""
    packed = on_device(pack(*weights(n, k, bits), bits))
    q = integers(m, k, low=-8, high=7)
    for zero_point in (-8, 5):
        activation = quantization(0.25, zero_point)
        for launch in (Launch(SMALL, 3), None):
            options: dict[str, Any] = {"out_dtype": torch.float32, "launch": launch}
            y = int_gemm(pack_rows(q).to(DEVICE), packed, activation, **options)
            assert torch.equal(y, int_gemm(q.to(DEVICE), packed, activation, **options))


def test_int_gemm_of_packed_activations_at_the_extremes() -> None:
    q = torch.tensor([-8, 7], dtype=torch.int8)[:, None].expand(2, 65793).contiguous()
    for bits in (4, 8):
        low, high = numerics.weight_range(bits)
        weight = torch.tensor([low, high], dtype=torch.int8)[:, None].expand(2, 65793).contiguous()
        packed = on_device(pack(weight, torch.ones(2), bits))
        for zero_point in (-8, 7):
            expected = reference.int_gemm(q, weight, torch.ones(2), 1e-3, zero_point)
            y = int_gemm(pack_rows(q).to(DEVICE), packed, quantization(1e-3, zero_point), out_dtype=torch.float32)
            assert_near(y, expected)


@pytest.mark.parametrize("x_bits", [8, 4])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("m, n, k", [(17, 33, 48), (33, 130, 400)])
def test_int_gemm_reads_through_descriptors(m: int, n: int, k: int, bits: int, x_bits: int) -> None:
    """The same bits as through pointers, past the ends of both operands, in parts, with two accumulators.

    Scales are powers of two and the residual is whole: nothing is rounded, whether a multiplication and an addition are
    compiled to one instruction, as in some tiles, or to two.
    """
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")
    q = integers(m, k, low=-8, high=7)
    x = (pack_rows(q) if x_bits == 4 else q).to(DEVICE)
    scale = torch.exp2(torch.randint(-4, 4, (2 * n,)).float())
    packed, activation = on_device(pack(weights(2 * n, k, bits)[0], scale, bits)), quantization(0.25, -5)
    for options in ({}, {"geglu": True}, {"residual": integers(m, 2 * n).float().to(DEVICE)}):
        for splits in (1,) if "geglu" in options else (1, 3):
            results = [
                int_gemm(x, packed, activation, out_dtype=torch.float32, launch=Launch(tile, splits, read), **options)
                for tile, read in ((SMALL, False), (SMALL, True), (SMALL._replace(block_k=128, block_n=256), True))
            ]
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("n", [1, 40, 64, 130])
def test_int_gemm_writes_packed_integers(n: int, geglu: bool) -> None:
    rows = 2 * n if geglu else n
    packed, q = on_device(pack(*weights(rows, 96, 8), 8)), integers(17, 96).to(DEVICE)
    options: dict[str, Any] = {"geglu": geglu, "out_quantization": quantization(0.5, -3), "out_bits": 4}
    for splits in (1,) if geglu else (1, 2):
        options["launch"] = Launch(SMALL, splits)
        plain = int_gemm(q, packed, quantization(0.037, 5), **options)
        y = int_gemm(q, packed, quantization(0.037, 5), out_packed=True, **options)
        assert y.dtype == torch.uint8 and y.shape == (17, packed_width(n))
        assert torch.equal(unpack_rows(y, n), plain)
        assert bool(((plain > -8) & (plain < 7)).any()), "nothing but saturated values"


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {},
    "aligned": {"channels": 64, "out": 33},
    "two blocks a tap": {"channels": 128, "size": (3, 2)},
    "few channels": {"channels": 3, "out": 5},
    "few outputs": {"channels": 64, "out": 4},
    "stride": {"stride": (2, 2), "padding": (0, 1, 0, 1), "size": (6, 8)},
    "pointwise": {"kernel": (1, 1), "padding": (0, 0, 0, 0), "channels": 33},
    "tiny image": {"size": (1, 2)},
    "dilated": {"dilation": (2, 2), "padding": (2, 2, 2, 2)},
    "unequal": {"kernel": (3, 1), "padding": (1, 1, 0, 0), "stride": (1, 2)},
    "upsampled": {"upsample": 2, "channels": 64, "size": (3, 4)},
    "wide border": {"kernel": (4, 4), "stride": (2, 2), "padding": (3, 3, 3, 3)},
}


class Case:
    """Random operands of a convolution, and what the reference makes of them."""

    def __init__(self, bits: int, second: int = 0, **changes: Any) -> None:
        options = {"channels": 17, "out": 9, "size": (5, 7), "kernel": (3, 3), "stride": (1, 1), **changes}
        options = {"padding": (1, 1, 1, 1), "dilation": (1, 1), "upsample": 1, **options}
        (h, w), n = options["size"], options["out"]
        self.geometry = Geometry(*(options[name] for name in ("kernel", "stride", "padding", "dilation", "upsample")))
        self.placement = {"stride": self.geometry.stride, "padding": self.geometry.padding}
        self.placement["dilation"] = self.geometry.dilation
        self.segments, self.operands = [], []
        for channels, scale, zero_point in ((options["channels"], 0.037, 5), (second, 0.011, -9)):
            if not channels:
                continue
            image = integers(2, channels, h, w).contiguous(memory_format=CHANNELS_LAST)
            weight, weight_scale = weights(n, channels * self.taps, bits)
            weight = weight.reshape(n, channels, *self.geometry.kernel)
            u = self.geometry.upsample
            classes = numerics.border_classes(weight, (u * h, u * w), *self.placement.values())
            self.class_index = classes.index.flatten().to(torch.int32).to(DEVICE)
            packed = on_device(pack(pack_order(weight), weight_scale, bits, classes.sums))
            self.segments.append(Segment(image.to(DEVICE), packed, quantization(scale, zero_point)))
            upsampled = reference.place(image, u, (0, 0, 0, 0), 0)
            self.operands.append((upsampled, weight, weight_scale, scale, zero_point))
        self.shape = (2, n, *self.geometry.output_size(h, w))

    @property
    def taps(self) -> int:
        return self.geometry.kernel[0] * self.geometry.kernel[1]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_int_conv2d_is_exact(name: str, bits: int) -> None:
    """Unit scales leave the accumulator minus the zero point's share, equal to the reference at every border."""
    case = Case(bits, **CONVOLUTIONS[name])
    q, weight, weight_scale, _, zero_point = case.operands[0]
    expected = reference.int_conv2d([(q, weight, torch.ones_like(weight_scale), 1.0, zero_point)], **case.placement)
    ones = torch.ones_like(weight_scale)
    sums = numerics.border_classes(weight, tuple(q.shape[2:]), *case.placement.values()).sums
    segment = case.segments[0]._replace(
        weight=on_device(pack(pack_order(weight), ones, bits, sums)), quantization=quantization(1.0, zero_point)
    )
    for splits in (1, 3):
        y = int_conv2d(
            [segment], case.geometry, case.class_index, out_dtype=torch.float32, launch=Launch(SMALL, splits)
        )
        assert y.shape == case.shape and y.is_contiguous(memory_format=CHANNELS_LAST)
        assert torch.equal(y.cpu().double(), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("second", [0, 64, 20])
@pytest.mark.parametrize("shared", [False, True])
def test_int_conv2d_epilogue(bits: int, second: int, shared: bool) -> None:
    case = Case(bits, second, channels=64)
    n = case.shape[1]
    bias, temb, residual = torch.randn(n), torch.randn(1 if shared else 2, n), torch.randn(case.shape)
    expected = reference.int_conv2d(case.operands, bias, **case.placement, temb=temb.expand(2, n), residual=residual)
    terms = {"temb": on_device(temb), "residual": on_device(residual)}
    for splits in (1, 2):
        launch = Launch(SMALL, splits)
        y = int_conv2d(
            case.segments, case.geometry, case.class_index, on_device(bias), **terms, out_dtype=torch.float32,
            launch=launch,
        )  # fmt: skip
        assert_near(y, expected)
        q = int_conv2d(
            case.segments, case.geometry, case.class_index, on_device(bias), **terms,
            out_quantization=quantization(0.1, 3), out_bits=4, launch=launch,
        )  # fmt: skip
        steps = q.cpu().int() - numerics.quantize(expected.float(), 0.1, 3, 4).int()
        assert int(steps.abs().max()) <= 1 and int(steps.abs().sum()) <= 2


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("second", [0, 64])
@pytest.mark.parametrize("name", ["stride", "upsampled", "wide border"])
def test_int_conv2d_of_packed_activations_is_exact(name: str, second: int, bits: int) -> None:
    """The same bits as from the same integers, one to a byte; the first segment packed, the second packed or not."""
    case = Case(bits, second, **{**CONVOLUTIONS[name], "channels": 128})
    plain = [segment._replace(x=segment.x >> 4) for segment in case.segments]
    packed = [segment._replace(x=packed_image(segment.x)) for segment in plain]
    for launch in (Launch(SMALL, 3), None):
        options: dict[str, Any] = {"out_dtype": torch.float32, "launch": launch}
        expected = int_conv2d(plain, case.geometry, case.class_index, **options)
        for segments in (packed, [packed[0], *plain[1:]]):
            assert torch.equal(int_conv2d(segments, case.geometry, case.class_index, **options), expected)


def packed_image(x: Tensor) -> Tensor:
    return pack_rows(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("x_bits", [8, 4])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["two blocks a tap", "dilated", "tall", "1x1, padded", "tiny image"])
def test_int_conv2d_reads_boxes_through_descriptors(name: str, bits: int, x_bits: int) -> None:
    """The same bits as through pointers, past every edge of the image and of the batch, in parts and in one."""
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")
    tall = {"kernel": (3, 1), "padding": (2, 0, 0, 0), "size": (9, 2), "out": 33}
    changes = {"tall": tall, "1x1, padded": {"kernel": (1, 1)}}.get(name) or CONVOLUTIONS[name]
    case = Case(bits, **{**changes, "channels": 128})
    segment = case.segments[0]._replace(x=case.segments[0].x >> 4)
    given = (case.geometry, case.class_index, on_device(torch.randn(case.shape[1])))
    terms = {"temb": on_device(torch.randn(2, case.shape[1])), "residual": on_device(torch.randn(case.shape))}
    options: dict[str, Any] = {"out_dtype": torch.float32, **terms}
    expected = int_conv2d([segment], *given, **options, launch=Launch(SMALL, 1))
    if x_bits == 4:
        segment = segment._replace(x=packed_image(segment.x))
    for tile, splits in ((SMALL, 1), (SMALL._replace(block_k=128, block_n=128), 1), (SMALL, 3)):
        y = int_conv2d([segment], *given, **options, launch=Launch(tile, splits, True))
        assert torch.equal(y, expected)


def test_boxes_cover_images_in_the_fewest_tiles() -> None:
    assert box_of(128, 2, 64, 64) == Box(1, 8, 16) and box_of(128, 4, 8, 8) == Box(2, 8, 8)
    assert box_of(64, 16, 4, 4) == Box(4, 4, 4) and box_of(128, 1, 96, 20) == Box(1, 32, 4)
    for images, height, width in ((1, 1, 1), (3, 5, 7), (2, 33, 17)):
        box = box_of(128, images, height, width)
        assert box.images * box.rows * box.columns == 128
        assert tiles_of_boxes(box, images, height, width) * 128 >= images * height * width


@pytest.mark.parametrize("splits", [1, 2])
def test_int_conv2d_writes_packed_integers(splits: int) -> None:
    case = Case(8, channels=64, out=70)
    given = (case.segments, case.geometry, case.class_index)
    options: dict[str, Any] = {
        "out_quantization": quantization(0.9, -3),
        "out_bits": 4,
        "launch": Launch(SMALL, splits),
    }
    plain, y = int_conv2d(*given, **options), int_conv2d(*given, out_packed=True, **options)
    assert y.shape == (2, packed_width(70), 5, 7) and y.is_contiguous(memory_format=CHANNELS_LAST)
    assert torch.equal(unpack_rows(y.movedim(1, -1), 70).movedim(-1, 1), plain)
    assert len(plain.unique()) == 16


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("channels", [64, 4])
def test_int_conv2d_multiplies_floating_activations(bits: int, channels: int) -> None:
    case = Case(bits, channels=channels)
    _, weight, scale, _, _ = case.operands[0]
    x = torch.randn(2, channels, 5, 7)
    expected = F.conv2d(x.double(), weight.double() * scale.double()[:, None, None, None], padding=1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        segment = Segment(x.to(DEVICE, dtype), case.segments[0].weight, None)
        y = int_conv2d([segment], case.geometry, case.class_index, out_dtype=torch.float32)
        assert_near(y, expected, tolerance)


def test_int4_weights_stay_packed() -> None:
    weight, scale = weights(5, 130, 4)
    packed = pack(weight, scale, 4)
    assert packed.values.dtype == torch.uint8 and packed.values.shape == (5, 3 * BLOCK // 2)
    low, high = packed.values & 0xF, packed.values >> 4
    unpacked = torch.stack([low, high], 1).reshape(5, 2, 3, BLOCK // 2).transpose(1, 2).reshape(5, 3 * BLOCK)
    signed = ((unpacked ^ 8).to(torch.int8) - 8)[:, :130]
    assert torch.equal(signed, weight) and torch.equal(unpack_rows(packed.values, 130), weight)
    assert torch.equal(packed.sums, 16 * weight.sum(1, dtype=torch.int32)[None])


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda w, q: int_gemm(torch.zeros(2, 33, dtype=torch.int8), w, None), TypeError, "x must be int8"),
        (lambda w, q: int_gemm(torch.zeros(2, 33), w, q), TypeError, "x must be int8"),
        (lambda w, q: int_gemm(torch.zeros(2, 32, dtype=torch.int8), w, q), ValueError, "K = 33"),
        (lambda w, q: int_gemm(torch.zeros(2, 33, dtype=torch.int8), w, q, torch.zeros(3)), ValueError, "bias must"),
        (
            lambda w, q: int_gemm(torch.zeros(4, 33, dtype=torch.int8), w, q, temb=torch.zeros(3, 9)),
            ValueError,
            "temb must",
        ),
        (
            lambda w, q: int_gemm(torch.zeros(4, 33, dtype=torch.int8), w, q, residual=torch.zeros(4, 8)),
            ValueError,
            "residual must",
        ),
        (lambda w, q: int_gemm(torch.zeros(4, 33, dtype=torch.int8), w, q, geglu=True), ValueError, "geglu"),
        (lambda w, q: int_gemm(torch.zeros(2, 33, dtype=torch.uint8), w, q), ValueError, "K = 33 features in 32 bytes"),
        (
            lambda w, q: int_gemm(torch.zeros(2, 33, dtype=torch.int8), w, q, out_quantization=q, out_packed=True),
            ValueError,
            "out_packed needs.*got out_bits=8",
        ),
        (
            lambda w, q: int_conv2d([Segment(torch.zeros(1, 16, 4, 4, dtype=torch.uint8), w, q)], Geometry((1, 1))),
            ValueError,
            "whole blocks of 64 channels, got 32",
        ),
        (
            lambda w, q: int_gemm(torch.zeros(2, 33, dtype=torch.int8), w, q, launch=Launch(SMALL, 1, True)),
            ValueError,
            "descriptors need integer rows aligned to 16 bytes",
        ),
        (
            lambda w, q: int_gemm(torch.zeros(2, 33), w, None, launch=Launch(SMALL, 1, True)),
            ValueError,
            "descriptors need integer rows.*got torch.float32",
        ),
        (
            lambda w, q: int_conv2d(
                [Segment(torch.zeros(1, 33, 4, 4, dtype=torch.int8), w, q)],
                Geometry((1, 1), (2, 2)),
                launch=Launch(SMALL, 1, True),
            ),
            ValueError,
            r"descriptors need one integer segment.*got \[33\] channels",
        ),  # fmt: skip
        (
            lambda w, q: int_gemm(torch.zeros(4, 33, dtype=torch.int8), w, q, statistics=torch.zeros(3, 2, 9)),
            ValueError,
            r"statistics must be dense float32 \[chunks, 2, 9\] of 4 rows",
        ),
        (
            lambda w, q: int_gemm(
                torch.zeros(4, 33, dtype=torch.int8), w, q, out_quantization=q, statistics=torch.zeros(2, 2, 9)
            ),
            ValueError,
            "statistics need a floating output",
        ),
        (lambda w, q: pack(torch.zeros(2, 3), torch.ones(2), 8), TypeError, "values must be int8"),
        (lambda w, q: pack(torch.full((2, 3), 9, dtype=torch.int8), torch.ones(2), 4), ValueError, r"\[-8, 7\]"),
        (lambda w, q: pack(torch.zeros(2, 3, dtype=torch.int8), torch.ones(2), 3), ValueError, "bits must be 4 or 8"),
        (lambda w, q: int_conv2d([], Geometry((1, 1))), ValueError, "segments must be one or two"),
        (
            lambda w, q: int_conv2d([Segment(torch.zeros(1, 32, 4, 4, dtype=torch.int8), w, q)], Geometry((1, 1))),
            ValueError,
            "weight must be",
        ),
        (
            lambda w, q: int_conv2d(
                [Segment(torch.zeros(1, 33, 4, 4, dtype=torch.int8), w._replace(sums=w.sums.repeat(9, 1)), q)],
                Geometry((1, 1)),
            ),
            ValueError,
            "class_index must",
        ),
    ],
)
def test_wrong_operands_are_named(call: Any, error: type[Exception], words: str) -> None:
    weight, scale = weights(9, 33, 8)
    with pytest.raises(error, match=words):
        call(pack(weight, scale, 8), torch.tensor([0.1, 10.0, 0.0]))


def test_the_tile_choice_is_a_pure_function() -> None:
    assert choose(90, 8192, 5120, 640) == Launch(TILES[90][0], 1)
    assert choose(90, 8192, 4, 2880).tile.block_n == 16
    small = choose(90, 128, 1280, 11520)
    assert small.tile == TILES[90][-1] and small.splits > 1
    assert choose(90, 512, 320, 2880, k_multiple=320).tile.block_k == 64
    assert choose(86, 8192, 5120, 640, multiprocessors=20).tile == TILES[86][0]
    wide = Tile(128, 256, 128, 8, 4)
    assert choose(90, 8192, 5120, 640, alignment=64) == Launch(wide, 1, True)
    assert (
        choose(90, 8192, 5120, 640, alignment=8) == Launch(wide, 1, False) == choose(90, 8192, 5120, 640, alignment=24)
    )
    assert choose(90, 8192, 5120, 640, alignment=8, statistics=True).tile == TILES[90][0]
    assert choose(90, 8192, 5120, 640, alignment=64, statistics=True) == Launch(wide, 1, True)
    assert not choose(90, 8192, 4, 640, alignment=64).descriptors
    assert not any(choose(arch, 8192, 5120, 640, alignment=64).descriptors for arch in (80, 86, 89))
    assert all(choose(arch, 8192, 5120, 640, alignment=64).descriptors for arch in (100, 120))
    small = choose(90, 128, 1280, 5120, alignment=16)
    assert small.tile == DESCRIPTOR_TILES[90][-1] and small.splits > 1 and small.descriptors
    for arch in TILES:
        for m, n, k in [(1, 1, 1), (128, 1280, 11520), (32768, 320, 2880), (2, 1280, 64)]:
            tile, splits, _ = choose(arch, m, n, k)
            assert 1 <= splits <= 16 and (splits == 1 or k // tile.block_k >= 4 * splits)
        for tile in (*TILES[arch], *INTEGER_TILES.get(arch, ()), *DESCRIPTOR_TILES.get(arch, ())):
            assert tile.stages * (tile.block_m + tile.block_n) * tile.block_k <= SHARED_MEMORY[arch]
            assert paired(tile).block_n <= 64


def test_offsets_have_64_bits_where_32_are_too_few() -> None:
    largest = torch.empty(1, device="meta").expand(1 << 16, 1 << 15)
    assert not is_wide(None, torch.empty(1 << 16, (1 << 15), device="meta"), largest)
    assert is_wide(None, torch.empty((1 << 16) + 1, 1 << 15, device="meta"))


@pytest.mark.parametrize("splits", [1, 2])
def test_64_bit_offsets_give_the_same_bits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(8, channels=64)
    q, weight = integers(33, 130).to(DEVICE), on_device(pack(*weights(17, 130, 4), 4))
    residual, temb = torch.randn(33, 17).to(DEVICE), torch.randn(3, 17).to(DEVICE)
    results = []
    for wide in (False, True):
        for module in ("int_gemm", "int_conv2d"):
            monkeypatch.setattr(f"qdiff_kernels.{module}.is_wide", lambda *_, wide=wide: wide)
        launch = Launch(SMALL, splits)
        results.append(int_gemm(q, weight, quantization(0.1, 3), residual=residual, temb=temb, launch=launch))
        results.append(int_conv2d(case.segments, case.geometry, case.class_index, launch=launch))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_architectures_are_served_by_their_own_table_or_an_older_one() -> None:
    assert [architecture(c) for c in [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 3), (12, 0), (12, 1)]] == [
        80, 86, 86, 89, 90, 100, 120, 120,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="at least 8.0, got 7.5"):
        architecture((7, 5))
