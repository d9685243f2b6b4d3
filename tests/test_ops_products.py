"""int_gemm and int_conv2d on every backend against `reference`: sums are equal, floats within 1e-5 of float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from comparing import (
    CHANNELS_LAST,
    NO_PADDING,
    STORAGES,
    assert_close,
    assert_equal_integers,
    assert_near,
    assert_steps,
    image,
    integers,
    present,
)
from torch import Tensor

from qdiff_engine import numerics, ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


GEMM_SHAPES = [
    (1, 1, 1),
    (1, 17, 33),
    (17, 33, 63),
    (63, 63, 17),
    (33, 1040, 1),
    (63, 1040, 1040),
    (2048, 256, 256),
    (154, 768, 320),
]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("m, k, n", GEMM_SHAPES)
def test_int_gemm_is_exact(backend: str, m: int, k: int, n: int, storage: torch.dtype) -> None:
    weight = integers(n, k, low=-127)
    packed = ops.pack_gemm(weight, torch.ones(n))
    for zero_point in (-128, 5, 127):
        q = integers(m, k)
        expected = reference.gemm_accumulators(q, weight) - zero_point * weight.to(torch.int64).sum(1)
        y = ops.int_gemm(numerics.stored(q, storage), packed, 1.0, zero_point, backend=backend)
        assert_equal_integers(y, expected)


def test_int_gemm_is_exact_at_the_extremes(backend: str) -> None:
    """All products of one sign and largest size: what saturates 16-bit pair sums."""
    sign = torch.tensor([1, -1, 1], dtype=torch.int8)
    weight = torch.full((3, 512), 127, dtype=torch.int8) * sign[:, None]
    q = torch.full((5, 512), -128, dtype=torch.int8)
    q[2:] = 127
    y = ops.int_gemm(q, ops.pack_gemm(weight, torch.ones(3)), 1.0, 3, backend=backend)
    assert_equal_integers(y, reference.gemm_accumulators(q, weight) - 3 * weight.to(torch.int64).sum(1))


@pytest.mark.parametrize("shape", [(33,), (0, 33), (7, 33), (2, 9, 33), (2, 3, 5, 33)])
@pytest.mark.parametrize("bits", [4, 8])
def test_int_gemm_epilogue(backend: str, shape: tuple[int, ...], bits: int) -> None:
    q = integers(*shape, low=-(1 << (bits - 1)), high=(1 << (bits - 1)) - 1)
    weight, weight_scale, bias = integers(17, 33, low=-127), torch.rand(17) * 0.01, torch.randn(17)
    residual, output_scale = torch.randn(*shape[:-1], 17), torch.rand(17) + 0.5
    packed, kept = ops.pack_gemm(weight, weight_scale), residual.clone()
    for options in ({}, {"residual": residual}, {"output_scale": output_scale, "residual": residual}):
        y = ops.int_gemm(q, packed, 0.037, 3, bias, backend=backend, **options)
        expected = reference.int_gemm(q, weight, weight_scale, 0.037, 3, bias, **options)
        if expected.numel():
            assert_close(y, expected)
        assert y.shape == expected.shape
    assert torch.equal(residual, kept)
    given = residual.clone()
    y = ops.int_gemm(q, packed, 0.037, 3, bias, residual=given, reuse_residual=True, backend=backend)
    expected = reference.int_gemm(q, weight, weight_scale, 0.037, 3, bias, residual=residual)
    assert y.shape == expected.shape
    if expected.numel():
        assert_close(y, expected)


@pytest.mark.parametrize("storage", STORAGES)
def test_int_gemm_finishes_its_result(backend: str, storage: torch.dtype) -> None:
    """GEGLU, a quantised result and a half-precision one, of integers and of floating activations."""
    q, weight, weight_scale, bias = (
        integers(2, 9, 33),
        integers(34, 33, low=-127),
        torch.rand(34) * 0.01,
        torch.randn(34),
    )
    packed = ops.pack_gemm(weight, weight_scale)
    plain = reference.int_gemm(q, weight, weight_scale, 0.037, 3, bias)
    for geglu in (False, True):
        expected = reference.activate(plain, "geglu" if geglu else "none")
        arguments = (numerics.stored(q, storage), packed, 0.037, 3, bias)
        y = ops.int_gemm(*arguments, geglu=geglu, backend=backend)
        assert_close(y, expected)
        half = ops.int_gemm(*arguments, geglu=geglu, out_dtype=torch.float16, backend=backend)
        assert half.dtype == torch.float16
        assert_near(half, expected, 1e-3)
        for bits, zero_point in ((8, -3), (4, 2)):
            found = ops.int_gemm(*arguments, geglu=geglu, output=(0.05, zero_point, bits), backend=backend)
            assert_steps(found, numerics.quantize(expected.float(), 0.05, zero_point, bits))
    x = torch.randn(5, 33)
    y = ops.int_gemm(x, packed, None, None, bias, geglu=True, backend=backend)
    floats = x.double() @ (weight.double() * weight_scale.double()[:, None]).t() + bias
    assert_close(y, reference.activate(floats, "geglu"))


def test_wrong_ways_to_finish_are_named(backend: str) -> None:
    packed, q = ops.pack_gemm(integers(9, 33, low=-127), torch.ones(9)), integers(2, 33)
    with pytest.raises(ValueError, match="geglu needs an even number of outputs"):
        ops.int_gemm(q, packed, 1.0, 0, geglu=True, backend=backend)
    with pytest.raises(ValueError, match="scale must be positive"):
        ops.int_gemm(q, packed, 1.0, 0, output=(0.0, 0, 8), backend=backend)
    with pytest.raises(ValueError, match="zero_point must lie in"):
        ops.int_gemm(q, packed, 1.0, 0, output=(1.0, 9, 4), backend=backend)
    with pytest.raises(ValueError, match="upsample must be at least 1"):
        ops.pack_conv2d(integers(2, 2, 1, 1), torch.ones(2), upsample=0)


def test_int_gemm_reads_a_strided_activation(backend: str) -> None:
    weight = integers(17, 33, low=-127)
    q = integers(33, 9).t()
    y = ops.int_gemm(q, ops.pack_gemm(weight, torch.ones(17)), 1.0, -7, backend=backend)
    assert_equal_integers(y, reference.gemm_accumulators(q, weight) + 7 * weight.to(torch.int64).sum(1))


def test_int_gemm_multiplies_floating_activations(backend: str) -> None:
    x, weight, weight_scale, bias = torch.randn(2, 9, 33), integers(17, 33), torch.rand(17) * 0.01, torch.randn(17)
    output_scale, residual = torch.rand(17) + 0.5, torch.randn(2, 9, 17)
    packed = ops.pack_gemm(weight, weight_scale)
    y = ops.int_gemm(x, packed, None, None, bias, residual=residual, output_scale=output_scale, backend=backend)
    dequantized = weight.double() * (weight_scale.double() * output_scale.double())[:, None]
    assert_close(y, x.double() @ dequantized.t() + bias.double() + residual.double())


class Conv(NamedTuple):
    """A convolution to test; the padding is (top, bottom, left, right)."""

    n: int
    cin: int
    h: int
    w: int
    cout: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def weight(self) -> Tensor:
        return integers(self.cout, self.cin // self.groups, *self.kernel, low=-127)

    def geometry(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("stride", "padding", "dilation", "groups")}


CONVS = [
    Conv(1, 1, 1, 1, 1),
    Conv(2, 3, 1, 2, 5),
    Conv(1, 17, 3, 2, 33),
    Conv(3, 33, 5, 7, 17),
    Conv(1, 1040, 7, 5, 63),
    Conv(2, 17, 9, 6, 33, stride=(2, 2), padding=(0, 1, 0, 1)),
    Conv(1, 5, 2, 3, 4, stride=(2, 2)),
    Conv(2, 8, 9, 9, 8, kernel=(3, 1), padding=(2, 0, 0, 0), stride=(1, 2)),
    Conv(1, 8, 4, 4, 8, kernel=(5, 5), padding=(2, 2, 2, 2)),
    Conv(1, 16, 9, 8, 8, dilation=(2, 2), padding=(2, 2, 2, 2)),
    Conv(2, 16, 6, 6, 24, groups=4),
    Conv(1, 33, 4, 6, 33, groups=33),
    Conv(1, 16, 6, 6, 32, groups=16, stride=(2, 2)),
    Conv(2, 33, 4, 5, 17, kernel=(1, 1), padding=NO_PADDING),
    Conv(1, 16, 8, 8, 8, kernel=(1, 1), padding=NO_PADDING, stride=(2, 2)),
    Conv(1, 9, 3, 3, 7, kernel=(2, 2), padding=(3, 3, 3, 3), stride=(3, 3)),
    Conv(1, 128, 32, 32, 128),
    Conv(1, 320, 16, 16, 320, stride=(2, 2), padding=(0, 1, 0, 1)),
    Conv(1, 640, 8, 8, 320, padding=NO_PADDING),
]


def conv_name(conv: Conv) -> str:
    return f"{conv.n}x{conv.cin}x{conv.h}x{conv.w}-{conv.cout}-k{conv.kernel[0]}{conv.kernel[1]}-g{conv.groups}"


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("conv", CONVS, ids=conv_name)
def test_int_conv2d_is_exact(backend: str, conv: Conv, storage: torch.dtype) -> None:
    weight, q = conv.weight(), image(conv.n, conv.cin, conv.h, conv.w)
    packed = ops.pack_conv2d(weight, torch.ones(conv.cout), **conv.geometry())
    acc = reference.conv2d_accumulators(q, weight, **conv.geometry())
    inside = reference.conv2d_accumulators(torch.ones_like(q), weight, **conv.geometry())  # weights inside the image
    for zero_point in (-128, -37, 127):
        y = ops.int_conv2d([ops.Segment(numerics.stored(q, storage), packed, 1.0, zero_point)], backend=backend)
        assert_equal_integers(y, acc - zero_point * inside)
        assert y.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("conv", CONVS, ids=conv_name)
def test_native_accumulators_are_exact(conv: Conv) -> None:
    present("native")
    from qdiff_engine.ops import native_products

    weight, q, unit = conv.weight(), image(conv.n, conv.cin, conv.h, conv.w), torch.ones(conv.cout)
    acc = native_products.int_conv2d(q, weight, unit, 1.0, 9, **conv.geometry(), accumulators=True)
    assert acc.dtype == torch.int32
    assert torch.equal(acc.to(torch.int64), reference.conv2d_accumulators(q, weight, **conv.geometry()))
    rows, columns = weight.flatten(1), q.permute(0, 2, 3, 1).reshape(-1, conv.cin)[:, : weight.shape[1]].contiguous()
    acc = native_products.int_gemm(columns, rows[:, : weight.shape[1]].contiguous(), unit, 1.0, 9, accumulators=True)
    assert torch.equal(acc.to(torch.int64), reference.gemm_accumulators(columns, rows[:, : weight.shape[1]]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("conv", [CONVS[i] for i in (2, 3, 5, 9, 10, 13)], ids=conv_name)
def test_int_conv2d_epilogue(backend: str, conv: Conv, bits: int) -> None:
    weight, weight_scale, bias = conv.weight(), torch.rand(conv.cout) * 0.01, torch.randn(conv.cout)
    q = integers(conv.n, conv.cin, conv.h, conv.w, low=-(1 << (bits - 1)), high=(1 << (bits - 1)) - 1)
    packed = ops.pack_conv2d(weight, weight_scale, **conv.geometry())
    output = (conv.n, conv.cout, *packed.output_size(conv.h, conv.w))
    terms: dict[str, Tensor] = {
        "temb": torch.randn(conv.n, conv.cout),
        "residual": torch.randn(output).contiguous(memory_format=CHANNELS_LAST),
        "output_scale": torch.rand(conv.cout) + 0.5,
    }
    for names in ((), ("temb",), ("residual",), ("output_scale",), ("temb", "residual", "output_scale")):
        options = {name: terms[name] for name in names}
        y = ops.int_conv2d([ops.Segment(q, packed, 0.037, 3, bits)], bias, backend=backend, **options)
        expected = reference.int_conv2d([(q, weight, weight_scale, 0.037, 3)], bias, **conv.geometry(), **options)
        assert_close(y, expected)


@pytest.mark.parametrize("mean", [0, 10, 40])
@pytest.mark.parametrize("bits, zero_point", [(4, -8), (4, 0), (4, 7), (8, -110), (8, 5), (8, 120)])
def test_int_conv2d_keeps_its_digits_where_sums_cancel(backend: str, bits: int, zero_point: int, mean: int) -> None:
    """Weights of one sign make the zero point's part of the sum far larger than what remains."""
    low, high = numerics.activation_range(bits)
    weight = (torch.randn(33, 160, 3, 3) * 30 + mean).round().clamp(-127, 127).to(torch.int8)
    q = (torch.randn(1, 160, 6, 6) * (high - low) / 8 + zero_point).round().clamp(low, high).to(torch.int8)
    weight_scale, bias, residual = torch.rand(33) * 0.01, torch.randn(33), torch.randn(1, 33, 6, 6)
    expected = reference.int_conv2d(
        [(q, weight, weight_scale, 0.037, zero_point)], bias, padding=(1, 1, 1, 1), residual=residual
    )
    segment = ops.Segment(q, ops.pack_conv2d(weight, weight_scale, padding=(1, 1, 1, 1)), 0.037, zero_point, bits)
    for reuse in (False, True):
        y = ops.int_conv2d([segment], bias, residual=residual.clone(), reuse_residual=reuse, backend=backend)
        assert_close(y, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
def test_a_residual_changes_only_where_that_is_allowed(backend: str, layout: torch.memory_format) -> None:
    weight, weight_scale, q = integers(33, 17, 3, 3, low=-127), torch.rand(33) * 0.01, image(2, 17, 5, 6)
    segment = ops.Segment(q, ops.pack_conv2d(weight, weight_scale, padding=(1, 1, 1, 1)), 0.037, -5)
    residual = torch.randn(2, 33, 5, 6).contiguous(memory_format=layout)
    kept = residual.clone()
    expected = reference.int_conv2d([(q, weight, weight_scale, 0.037, -5)], padding=(1, 1, 1, 1), residual=residual)
    assert_close(ops.int_conv2d([segment], residual=residual, backend=backend), expected)
    assert torch.equal(residual, kept)
    assert_close(ops.int_conv2d([segment], residual=residual, reuse_residual=True, backend=backend), expected)


@pytest.mark.parametrize("with_residual", [False, True])
def test_two_segments_have_their_own_scales(backend: str, with_residual: bool) -> None:
    conv = {"padding": (1, 1, 1, 1)}
    parts = [(17, 0.05, -30), (33, 0.002, 90)]
    given = [(image(2, c, 6, 5), integers(40, c, 3, 3, low=-127), torch.rand(40) * 0.01, s, z) for c, s, z in parts]
    segments = [ops.Segment(q, ops.pack_conv2d(w, w_scale, **conv), s, z) for q, w, w_scale, s, z in given]
    bias, temb = torch.randn(40), torch.randn(2, 40)
    residual = torch.randn(2, 40, 6, 5).contiguous(memory_format=CHANNELS_LAST) if with_residual else None
    expected = reference.int_conv2d(given, bias, temb=temb, residual=residual, **conv)
    assert_close(ops.int_conv2d(segments, bias, temb=temb, residual=residual, backend=backend), expected)


def test_one_time_embedding_serves_the_batch(backend: str) -> None:
    q, weight, unit = image(3, 17, 5, 5), integers(33, 17, 3, 3, low=-127), torch.ones(33)
    temb = torch.randn(1, 33)
    y = ops.int_conv2d([ops.Segment(q, ops.pack_conv2d(weight, unit), 0.01, 4)], temb=temb, backend=backend)
    assert_close(y, reference.int_conv2d([(q, weight, unit, 0.01, 4)], temb=temb))


def test_weights_serve_every_image_size_row_and_batch(backend: str) -> None:
    weight, unit = integers(33, 17, 3, 3, low=-127), torch.ones(33)
    packed = ops.pack_conv2d(weight, unit, padding=(1, 1, 1, 1))
    for batch, size, zero_point in ((1, 4, 3), (2, 4, -8), (2, 9, 3), (1, 1, 0), (1, 4, 3)):
        q = image(batch, 17, size, size)
        expected = reference.int_conv2d([(q, weight, unit, 1.0, zero_point)], padding=(1, 1, 1, 1))
        y = ops.int_conv2d([ops.Segment(q, packed, 1.0, zero_point)], backend=backend)
        assert_equal_integers(y, expected.to(torch.int64))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_is_kept_packed_alone(bits: int) -> None:
    """What a model on a GPU does: the plain integers are gone, for images of new sizes and with padding, too."""
    present("triton")
    low, high = numerics.weight_range(bits)
    filters, matrix = integers(9, 33, 3, 3, low=low, high=high), integers(9, 33, low=low, high=high)

    def results(keep: bool) -> list[Tensor]:
        torch.manual_seed(1)
        conv = ops.pack_conv2d(filters, torch.rand(9), padding=(1, 0, 1, 1), stride=(2, 1), bits=bits)
        gemm = ops.pack_gemm(matrix, torch.rand(9), bits)
        if keep:
            ops.keep_packed(conv), ops.keep_packed(gemm)
            assert conv.values.device.type == gemm.values.device.type == "meta"
        found = [ops.int_gemm(integers(5, 33), gemm, 0.1, 3, backend="triton")]
        for size in ((5, 6), (7, 4)):
            found.append(ops.int_conv2d([ops.Segment(image(2, 33, *size), conv, 0.1, -7)], backend="triton"))
        return found

    for kept, plain in zip(results(True), results(False), strict=True):
        assert torch.equal(kept, plain)
    grouped = ops.pack_conv2d(integers(8, 4, 3, 3), torch.rand(8), groups=2)
    ops.keep_packed(grouped)
    assert grouped.values.device.type == "cpu", "its groups are packed one by one, later"


def test_an_empty_batch_gives_an_empty_image(backend: str) -> None:
    packed = ops.pack_conv2d(integers(5, 3, 3, 3), torch.ones(5), padding=(1, 1, 1, 1))
    y = ops.int_conv2d([ops.Segment(integers(0, 3, 4, 6), packed, 1.0, 7)], backend=backend)
    assert y.dtype == torch.float32 and y.shape == (0, 5, 4, 6)


@pytest.mark.parametrize("kernel, pad", [((3, 3), (1, 1, 1, 1)), ((1, 1), NO_PADDING)])
def test_int_conv2d_reads_an_enlarged_image(backend: str, kernel: tuple[int, int], pad: tuple[int, ...]) -> None:
    """Nearest-upsampled input, and a result quantised for its reader; two segments, and floating activations."""
    parts = [(image(2, c, 3, 4), integers(9, c, *kernel, low=-127), torch.rand(9) * 0.01) for c in (17, 8)]
    packed = [ops.pack_conv2d(w, s, padding=pad, upsample=2) for _, w, s in parts]
    segments = [ops.Segment(q, p, 0.037, 5) for (q, _, _), p in zip(parts, packed, strict=True)]
    enlarged = [(reference.place(q, 2, NO_PADDING, 0), w, s, 0.037, 5) for q, w, s in parts]
    for count in (1, 2):
        expected = reference.int_conv2d(enlarged[:count], padding=pad)
        assert_close(ops.int_conv2d(segments[:count], backend=backend), expected)
        found = ops.int_conv2d(segments[:count], output=(0.1, -7, 8), backend=backend)
        assert found.is_contiguous(memory_format=CHANNELS_LAST)
        assert_steps(found, numerics.quantize(expected.float(), 0.1, -7, 8))
    x, (_, weight, scale) = torch.randn(2, 17, 3, 4), parts[0]
    expected = torch.nn.functional.conv2d(
        reference.place(x.double(), 2, pad, 0), weight.double() * scale.double()[:, None, None, None]
    )
    assert_close(ops.int_conv2d([ops.Segment(x, packed[0])], backend=backend), expected)


def test_int_conv2d_multiplies_floating_activations(backend: str) -> None:
    x, weight, weight_scale = torch.randn(2, 16, 6, 5), integers(24, 4, 3, 3, low=-127), torch.rand(24) * 0.01
    geometry: dict[str, Any] = {"padding": (0, 1, 2, 1), "stride": (2, 1), "groups": 4}
    bias, temb, residual = torch.randn(24), torch.randn(2, 24), torch.randn(2, 24, 3, 6)
    packed, output_scale = ops.pack_conv2d(weight, weight_scale, **geometry), torch.rand(24) + 0.5
    y = ops.int_conv2d(
        [ops.Segment(x, packed)], bias, temb=temb, residual=residual, output_scale=output_scale, backend=backend
    )
    dequantized = weight.double() * (weight_scale.double() * output_scale.double())[:, None, None, None]
    padded = torch.nn.functional.pad(x.double(), (2, 1, 0, 1))
    expected = torch.nn.functional.conv2d(padded, dequantized, bias.double(), (2, 1), groups=4)
    assert_close(y, expected + temb.double()[:, :, None, None] + residual.double())
    assert y.is_contiguous(memory_format=CHANNELS_LAST)
