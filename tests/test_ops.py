"""Every operator on every backend against `reference`: integers are equal, floats within 1e-5 of the float64 result."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from qdiff_engine import numerics, ops, reference
from qdiff_engine.ops import operands, triton_kernels

STORAGES = [torch.int8, torch.uint8]
CHANNELS_LAST = torch.channels_last


@pytest.fixture(params=["triton", "onednn", "native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that multiplies integers."""
    return _present(request.param)


@pytest.fixture(params=["triton", "native", "torch"])
def quantizer(request: pytest.FixtureRequest) -> str:
    """A backend that quantises."""
    return _present(request.param)


def _present(name: str) -> str:
    status = ops.backends()[name]
    if not status["available"]:
        pytest.skip(f"{name}: {status['reason']}")
    return name


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty comes filled with NaN or the largest integer, so that an output never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def integers(*shape: int, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def image(n: int, c: int, h: int, w: int) -> Tensor:
    return integers(n, c, h, w).contiguous(memory_format=CHANNELS_LAST)


def assert_equal_integers(y: Tensor, expected: Tensor) -> None:
    """y float32 holds exactly the int64 ``expected``, which float32 can hold."""
    assert int(expected.abs().max()) < 2**24
    assert y.dtype == torch.float32 and y.shape == expected.shape
    assert torch.equal(y.to(torch.int64), expected)


def assert_close(y: Tensor, expected: Tensor) -> None:
    """1e-5 of the largest float64 value, everywhere."""
    assert y.dtype == torch.float32 and y.shape == expected.shape
    assert float((y.double() - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def assert_steps(q: Tensor, expected: Tensor, storage: torch.dtype = torch.int8) -> None:
    """At most one step apart, in fewer than 0.1 % of the elements."""
    assert q.dtype == storage and q.shape == expected.shape
    difference = (numerics.signed(q).int() - expected.int()).abs()
    assert int(difference.max()) <= 1
    assert int(difference.sum()) < max(1.0, 1e-3 * difference.numel())


# ---- int_gemm

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
        assert ops.int_gemm(*arguments, geglu=geglu, out_dtype=torch.float16, backend=backend).dtype == torch.float16
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


# ---- int_conv2d


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


NONE = (0, 0, 0, 0)
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
    Conv(2, 33, 4, 5, 17, kernel=(1, 1), padding=NONE),
    Conv(1, 16, 8, 8, 8, kernel=(1, 1), padding=NONE, stride=(2, 2)),
    Conv(1, 9, 3, 3, 7, kernel=(2, 2), padding=(3, 3, 3, 3), stride=(3, 3)),
    Conv(1, 128, 32, 32, 128),
    Conv(1, 320, 16, 16, 320, stride=(2, 2), padding=(0, 1, 0, 1)),
    Conv(1, 640, 8, 8, 320, padding=NONE),
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
    _present("native")
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


def test_an_empty_batch_gives_an_empty_image(backend: str) -> None:
    packed = ops.pack_conv2d(integers(5, 3, 3, 3), torch.ones(5), padding=(1, 1, 1, 1))
    y = ops.int_conv2d([ops.Segment(integers(0, 3, 4, 6), packed, 1.0, 7)], backend=backend)
    assert y.dtype == torch.float32 and y.shape == (0, 5, 4, 6)


@pytest.mark.parametrize("kernel, pad", [((3, 3), (1, 1, 1, 1)), ((1, 1), NONE)])
def test_int_conv2d_reads_an_enlarged_image(backend: str, kernel: tuple[int, int], pad: tuple[int, ...]) -> None:
    """Nearest-upsampled input, and a result quantised for its reader; two segments, and floating activations."""
    parts = [(image(2, c, 3, 4), integers(9, c, *kernel, low=-127), torch.rand(9) * 0.01) for c in (17, 8)]
    packed = [ops.pack_conv2d(w, s, padding=pad, upsample=2) for _, w, s in parts]
    segments = [ops.Segment(q, p, 0.037, 5) for (q, _, _), p in zip(parts, packed, strict=True)]
    enlarged = [(reference.place(q, 2, NONE, 0), w, s, 0.037, 5) for q, w, s in parts]
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


# ---- quantize and the fused norms


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bits, scale, zero_point", [(8, 0.021, -9), (8, 0.004, 127), (4, 0.3, -3)])
@pytest.mark.parametrize("shape", [(1,), (33, 1040), (2, 7, 63), (1, 1, 1, 1), (2, 17, 5, 3), (2, 128, 16, 16)])
def test_quantize_equals_the_definition(
    quantizer: str, shape: tuple[int, ...], bits: int, scale: float, zero_point: int, storage: torch.dtype
) -> None:
    x = torch.randn(shape)
    inverse = torch.rand(shape[1] if len(shape) == 4 else shape[-1]) + 0.5
    for channel_inverse in (None, inverse):
        q = ops.quantize(
            x, scale, zero_point, bits, channel_inverse=channel_inverse, storage=storage, backend=quantizer
        )
        expected = reference.quantize(x, scale, zero_point, bits, channel_inverse=channel_inverse)
        assert q.dtype == storage and torch.equal(numerics.signed(q), expected)
        assert q.is_contiguous(memory_format=CHANNELS_LAST if len(shape) == 4 else torch.contiguous_format)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("upsample, padding", [(2, NONE), (1, (0, 1, 0, 1)), (2, (1, 1, 1, 1)), (3, (2, 0, 1, 3))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
def test_quantize_upsamples_and_pads_with_the_zero_point(
    quantizer: str,
    layout: torch.memory_format,
    upsample: int,
    padding: tuple[int, int, int, int],
    storage: torch.dtype,
) -> None:
    x = torch.randn(2, 17, 5, 3).contiguous(memory_format=layout)
    options: dict[str, Any] = {"upsample": upsample, "padding": padding}
    q = ops.quantize(x, 0.02, 33, 8, storage=storage, backend=quantizer, **options)
    assert q.dtype == storage and q.is_contiguous(memory_format=CHANNELS_LAST)
    assert torch.equal(numerics.signed(q), reference.quantize(x, 0.02, 33, 8, **options))


@pytest.mark.parametrize("activation", operands.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 9, 1040), (2, 34, 6, 5), (1, 2)])
def test_quantize_after_an_activation(quantizer: str, activation: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * 3
    q = ops.quantize(x, 0.031, -60, 8, activation=activation, backend=quantizer)
    assert_steps(q, reference.quantize(x, 0.031, -60, 8, activation=activation))


NORMS = [
    ((1, 1, 1, 1), 1),
    ((2, 33, 5, 7), 3),
    ((2, 63, 3, 1), 21),
    ((1, 17, 33), 17),
    ((2, 1040, 3, 5), 16),
    ((3, 32, 17), 8),
    ((2, 128, 32, 32), 32),
    ((1, 320, 16, 16), 32),
]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape, groups", NORMS)
def test_groupnorm_silu_quantize(quantizer: str, shape: tuple[int, ...], groups: int, silu: bool) -> None:
    x, weight, bias = torch.randn(shape) * 2 + 3, torch.randn(shape[1]), torch.randn(shape[1])
    for storage in STORAGES:
        arguments = (x, groups, weight, bias, 1e-5)
        q = ops.groupnorm_silu_quantize(*arguments, 0.02, -20, 8, silu=silu, storage=storage, backend=quantizer)
        assert_steps(q, reference.groupnorm_silu_quantize(*arguments, 0.02, -20, 8, silu=silu), storage)
        assert q.movedim(1, -1).is_contiguous()
    y = ops.groupnorm_silu_quantize(*arguments, None, 0, 8, silu=silu, backend=quantizer)
    assert_close(y, reference.groupnorm_silu_quantize(*arguments, None, 0, 8, silu=silu))
    assert y.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("padding, upsample", [(NONE, 1), ((1, 1, 1, 1), 1), ((0, 1, 0, 1), 2)])
def test_groupnorm_of_a_skip_concatenation_with_all_its_terms(
    quantizer: str, padding: tuple[int, int, int, int], upsample: int
) -> None:
    x, x2 = torch.randn(2, 17, 5, 6), torch.randn(2, 16, 5, 6) * 4 + 1  # groups of 11: the second one straddles
    weight, bias = torch.randn(33), torch.randn(33)
    options: dict[str, Any] = {name: torch.randn(2, 33) for name in ("pre_add", "norm_scale", "norm_shift")}
    options |= {"x2": x2, "padding": padding, "upsample": upsample}
    for scale, factors in ((0.03, None), (None, None), (0.03, torch.rand(33) + 0.5), (None, torch.rand(33) + 0.5)):
        options["channel_inverse"] = factors
        arguments = (x, 3, weight, bias, 1e-6, scale, 7, 8)
        expected = reference.groupnorm_silu_quantize(*arguments, **options)
        result = ops.groupnorm_silu_quantize(*arguments, **options, backend=quantizer)
        (assert_steps if scale else assert_close)(result, expected)
        assert result.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("size, padding", [((5, 6), NONE), ((5, 6), (1, 1, 1, 1)), ((16, 20), NONE)])
def test_groupnorm_quantises_its_inputs_too(quantizer: str, size: tuple[int, int], padding: Any, storage: Any) -> None:
    x, x2 = torch.randn(3, 17, *size), torch.randn(3, 16, *size) * 4 + 1
    outputs = [torch.empty(part.shape, dtype=storage).contiguous(memory_format=CHANNELS_LAST) for part in (x, x2)]
    copies = [ops.QuantizedCopy(outputs[0], 0.05, -3, 8), ops.QuantizedCopy(outputs[1], 0.9, 2, 4)]
    options: dict[str, Any] = {"x2": x2, "padding": padding, "storage": storage, "backend": quantizer}
    arguments = (x, 3, None, None, 1e-6, 0.03, 7, 8)
    q = ops.groupnorm_silu_quantize(*arguments, **options, copies=copies)
    assert torch.equal(q, ops.groupnorm_silu_quantize(*arguments, **options))
    for part, copy in zip((x, x2), copies, strict=True):
        expected = numerics.quantize(part, copy.scale, copy.zero_point, copy.bits)
        assert torch.equal(numerics.signed(copy.out), expected)
    alone = ops.QuantizedCopy(torch.zeros_like(outputs[1]), 0.9, 2, 4)
    ops.groupnorm_silu_quantize(*arguments, **options, copies=[None, alone])
    assert torch.equal(alone.out, outputs[1])


def test_groupnorm_refuses_copies_that_do_not_fit(quantizer: str) -> None:
    x = torch.randn(2, 8, 4, 4)
    out = torch.empty(2, 8, 4, 4, dtype=torch.int8).contiguous(memory_format=CHANNELS_LAST)
    good = ops.QuantizedCopy(out, 0.1, 0, 8)
    for copies, message in [
        ([good, good], "copies must have an entry"),
        ([good._replace(out=out[:1])], "copies must be torch.int8"),
        ([good._replace(out=out.view(torch.uint8))], "copies must be torch.int8"),
        ([good._replace(scale=0.0)], "scale must be positive"),
        ([good._replace(bits=4, zero_point=9)], "zero_point must"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.groupnorm_silu_quantize(x, 2, None, None, 1e-5, 0.3, 0, 8, copies=copies, backend=quantizer)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape, groups", [((1, 1, 1, 1), 1), ((1, 17, 33), 17), ((2, 1040, 3, 5), 16)])
def test_groupnorm_divides_its_channels(quantizer: str, shape: tuple[int, ...], groups: int, silu: bool) -> None:
    x, inverse = torch.randn(shape) * 2 + 3, 8 * torch.rand(shape[1]) + 0.1
    arguments = (x, groups, torch.randn(shape[1]), torch.randn(shape[1]), 1e-5)
    for storage, zero_point, bits in ((torch.int8, -20, 8), (torch.uint8, 3, 4)):
        given: dict[str, Any] = {"silu": silu, "channel_inverse": inverse}
        q = ops.groupnorm_silu_quantize(*arguments, 0.1, zero_point, bits, **given, storage=storage, backend=quantizer)
        assert_steps(q, reference.groupnorm_silu_quantize(*arguments, 0.1, zero_point, bits, **given), storage)
        given["channel_inverse"] = torch.ones(shape[1])
        q = ops.groupnorm_silu_quantize(*arguments, 0.1, zero_point, bits, **given, storage=storage, backend=quantizer)
        given["channel_inverse"] = None
        plain = ops.groupnorm_silu_quantize(
            *arguments, 0.1, zero_point, bits, **given, storage=storage, backend=quantizer
        )
        assert torch.equal(q, plain)


def test_groupnorm_refuses_factors_that_do_not_fit(quantizer: str) -> None:
    x = torch.randn(2, 8, 4, 4)
    with pytest.raises(ValueError, match="channel_inverse"):
        wrong = torch.ones(7)
        ops.groupnorm_silu_quantize(x, 2, None, None, 1e-5, 0.3, 0, 8, channel_inverse=wrong, backend=quantizer)


def test_groupnorm_without_affine(quantizer: str) -> None:
    x = torch.randn(2, 32, 4, 4)
    q = ops.groupnorm_silu_quantize(x, 4, None, None, 1e-5, 0.3, 0, 4, backend=quantizer)
    assert_steps(q, reference.groupnorm_silu_quantize(x, 4, None, None, 1e-5, 0.3, 0, 4))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(1, 17), (33, 63), (2, 9, 1040), (2, 256, 320)])
def test_layernorm_quantize(quantizer: str, shape: tuple[int, ...], storage: torch.dtype) -> None:
    x, weight, bias = torch.randn(shape) * 2 + 3, torch.randn(shape[-1]), torch.randn(shape[-1])
    for affine in ((weight, bias), (None, None)):
        q = ops.layernorm_quantize(x, *affine, 1e-5, 0.02, 11, 8, storage=storage, backend=quantizer)
        assert_steps(q, reference.layernorm_quantize(x, *affine, 1e-5, 0.02, 11, 8), storage)
        y = ops.layernorm_quantize(x, *affine, 1e-5, None, 0, 8, backend=quantizer)
        assert_close(y, reference.layernorm_quantize(x, *affine, 1e-5, None, 0, 8))


@pytest.mark.parametrize("shape", [(33, 63), (2, 256, 320)])
def test_layernorm_takes_factors_in_its_affine(quantizer: str, shape: tuple[int, ...]) -> None:
    """With weight / c and bias / c it quantises as the definition does with inv_s / c, which has no argument here."""
    x, inverse = torch.randn(shape) * 2 + 3, 8 * torch.rand(shape[-1]) + 0.1
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1])
    y = reference.layernorm_quantize(x, weight, bias, 1e-5, None, 0, 8).float()
    q = ops.layernorm_quantize(x, weight * inverse, bias * inverse, 1e-5, 0.1, 11, 8, backend=quantizer)
    assert_steps(q, numerics.quantize(y, 0.1, 11, 8, inverse))


# ---- which backend runs


def test_packed_activations_give_the_same_bits() -> None:
    """4-bit integers two to a byte, from every operator that writes them into both that read them."""
    _present("triton")
    given: dict[str, Any] = {"backend": "triton"}
    x, rows, bias, site = torch.randn(2, 128, 5, 6), torch.randn(3, 7, 130), torch.randn(130), (0.3, -3, 4)
    padding = (1, 1, 1, 1)
    whole = ops.pack_conv2d(integers(9, 128, 3, 3), torch.rand(9), padding=padding)
    grouped = ops.pack_conv2d(integers(8, 64, 3, 3), torch.rand(8), groups=2)
    linear = ops.pack_gemm(integers(9, 130, low=-8, high=7), torch.rand(9), 4)
    results = []
    for storage in (torch.int8, triton_kernels.PACKED):
        images = (
            ops.quantize(x, *site, storage=storage, **given),
            ops.groupnorm_silu_quantize(x, 8, None, None, 1e-5, *site, padding=padding, storage=storage, **given),
        )
        q = ops.layernorm_quantize(rows, None, bias, 1e-5, *site, storage=storage, **given)
        assert {q.dtype, *(image.dtype for image in images)} == {storage}
        segments = [ops.Segment(image, weight, *site[:2]) for image in images for weight in (whole, grouped)]
        results.append([ops.int_conv2d([segment], **given) for segment in segments])
        results[-1].append(ops.int_gemm(q, linear, *site[:2], **given))
    for plain, packed in zip(*results, strict=True):
        assert torch.equal(plain, packed)
    with pytest.raises(ValueError, match="q must hold 130 features in 96 bytes, got"):
        ops.int_gemm(q[..., :64], linear, *site[:2], **given)
    with pytest.raises(ValueError, match="storage torch.int4 needs 4-bit integers, got 8 bits"):
        ops.quantize(x, 0.3, -3, 8, storage=triton_kernels.PACKED, **given)


def test_the_first_available_backend_is_chosen() -> None:
    states = ops.backends()
    assert list(states) == ["onednn", "native", "torch", "triton", "cuda"]
    first = next(name for name in states if states[name]["available"])
    assert ops.chosen("int_gemm") == ops.chosen("int_conv2d") == first
    assert ops.storage() == (torch.uint8 if first == "onednn" else torch.int8)
    assert ops.resolve("int_gemm", torch.device("cpu"), first) is ops.resolve("int_gemm")


@pytest.mark.parametrize(
    "operator, backend, message",
    [
        ("int_gemm", "cuda", "not part of this version"),
        ("quantize", "onednn", "onednn"),
        ("int_gemm", "vulkan", "backend must be one of onednn, native, torch"),
        ("softmax", None, "operator must be one of quantize"),
    ],
)
def test_a_missing_backend_raises_with_the_reason(operator: str, backend: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.resolve(operator, "cpu", backend)


WITHOUT_VNNI = """
import torch
from qdiff_engine import ops, reference
state = ops.backends()["onednn"]
assert not state["available"] and "saturate" in state["reason"], state
assert ops.chosen("int_gemm") in ("native", "torch") and ops.chosen("int_conv2d") in ("native", "torch")
try:
    ops.resolve("int_gemm", backend="onednn")
    raise AssertionError("oneDNN was taken")
except ops.BackendError as error:
    assert "saturate" in str(error)
q, weight = torch.full((2, 16, 5, 5), 127, dtype=torch.int8), torch.full((8, 16, 3, 3), 127, dtype=torch.int8)
q[1], unit = torch.randint(-128, 128, (16, 5, 5)).to(torch.int8), torch.ones(8)
packed = ops.pack_conv2d(weight, unit, padding=(1, 1, 1, 1))
expected = reference.int_conv2d([(q, weight, unit, 1.0, -128)], padding=(1, 1, 1, 1))
for backend in (None, "torch"):
    y = ops.int_conv2d([ops.Segment(q, packed, 1.0, -128)], backend=backend)
    assert torch.equal(y.double(), expected)
    y = ops.int_gemm(q[:, :, 0, 0], ops.pack_gemm(weight[:, :, 0, 0], unit), 1.0, -128, backend=backend)
    assert torch.equal(y.double(), reference.int_gemm(q[:, :, 0, 0], weight[:, :, 0, 0], unit, 1.0, -128))
"""


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's u8 x s8 saturation is an x86 matter"
)
@pytest.mark.parametrize("isa", ["AVX512_CORE", "AVX2"])
def test_without_vnni_onednn_is_refused_and_results_stay_exact(isa: str) -> None:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_VNNI], env=environment, cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_two_most_recent_entries_stay() -> None:
    cache: dict[Any, int] = {}
    made = []

    def get(key: int) -> int:
        return operands.recent(cache, key, lambda: made.append(key) or key * 10)

    assert [get(key) for key in (1, 2, 1, 3, 1, 2)] == [10, 20, 10, 30, 10, 20]
    assert made == [1, 2, 3, 2] and list(cache) == [1, 2]


# ---- wrong arguments


def _gemm() -> ops.GemmWeight:
    return ops.pack_gemm(integers(5, 7), torch.ones(5))


def _segment(**geometry: Any) -> ops.Segment:
    return ops.Segment(integers(1, 3, 4, 4), ops.pack_conv2d(integers(5, 3, 3, 3), torch.ones(5), **geometry), 1.0, 0)


WRONG: list[tuple[Callable[[str], Any], str]] = [
    (lambda b: ops.int_gemm(integers(2, 8), _gemm(), 1.0, 0, backend=b), r"q must be \[..., 7\].*got \[2, 8\]"),
    (lambda b: ops.int_gemm(integers(2, 7).int(), _gemm(), 1.0, 0, backend=b), "q must be int8, uint8 or floating"),
    (lambda b: ops.int_gemm(integers(2, 7), integers(5, 7), 1.0, 0, backend=b), "weight must come from pack_gemm"),
    (lambda b: ops.int_gemm(integers(2, 7), _gemm(), None, None, backend=b), "scale and zero_point are needed"),
    (
        lambda b: ops.int_gemm(integers(2, 7), _gemm(), 1.0, 0, torch.ones(4), backend=b),
        r"bias must be float(32|ing) \[5\]",
    ),
    (lambda b: ops.int_gemm(integers(2, 7), _gemm(), 1.0, 0, residual=torch.ones(5), backend=b), "residual must be"),
    (lambda b: ops.int_conv2d([], backend=b), "at least one Segment"),
    (lambda b: ops.int_conv2d([_segment(dilation=(3, 3))], backend=b), "smaller than the kernel"),
    (lambda b: ops.int_conv2d([_segment(), _segment(stride=(2, 2))], backend=b), "one output shape"),
    (lambda b: ops.int_conv2d([_segment()], temb=torch.ones(2, 5), backend=b), r"temb must be float(32|ing) \[1, 5\]"),
    (lambda b: ops.int_conv2d([_segment()], output_scale=torch.ones(1), backend=b), "output_scale must be float32"),
    (lambda b: ops.pack_gemm(torch.ones(5, 7), torch.ones(5)), r"weight must be int8 \[N, K\]"),
    (lambda b: ops.pack_gemm(integers(5, 7), torch.ones(4)), r"weight_scale must be float32 \[5\]"),
    (lambda b: ops.pack_gemm(integers(1, numerics.MAX_K + 1), torch.ones(1)), "an int32 accumulator holds 66311"),
    (lambda b: _segment(padding=(1, 1)), "padding must be a tuple of 4"),
    (lambda b: _segment(groups=2), "groups must divide Cout = 5"),
]


@pytest.mark.parametrize("call, message", WRONG)
def test_wrong_operands_are_named(backend: str, call: Callable[[str], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(backend)


@pytest.mark.parametrize(
    "error, options",
    [
        (ValueError, {"scale": 0.0}),
        (ValueError, {"zero_point": 128}),
        (ValueError, {"bits": 5}),
        (ValueError, {"upsample": 0}),
        (ValueError, {"padding": (1, 1)}),
        (ValueError, {"activation": "relu6"}),
        (TypeError, {"storage": torch.int32}),
        (TypeError, {"x": integers(1, 2, 3, 4)}),
        (ValueError, {"x": torch.ones(3, 3), "upsample": 2}),
        (ValueError, {"x": torch.ones(3, 3), "activation": "geglu"}),
    ],
)
def test_wrong_quantizers_are_named(quantizer: str, error: type[Exception], options: dict[str, Any]) -> None:
    arguments = {"x": torch.ones(1, 2, 3, 4), "scale": 0.1, "zero_point": 0, "bits": 8} | options
    with pytest.raises(error, match="got"):
        ops.quantize(**arguments, backend=quantizer)


# ---- denoise_step


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_denoise_step(name: str, prediction_type: str, clipped: bool) -> None:
    """The sampler's update on every backend; the kernel's own tests cover layouts and precisions."""
    x, cond, uncond, noise = (torch.randn(2, 4, 5, 7) for _ in range(4))
    constants = torch.tensor([0.9, 0.4, -0.3, 0.2, 0.6, 0.8, 1.0, 7.5])
    terms = {key: torch.randn(4) for key in ("a", "b", "input_bias")}
    options: dict[str, Any] = {"prediction_type": prediction_type, "clipped": clipped}
    for more in ({}, {"guidance": 1.5, **terms}):
        expected = reference.denoise_step(x, cond, uncond, noise, constants, **options, **more)
        assert_close(
            ops.denoise_step(x, cond, uncond, noise, constants, **options, **more, backend=_present(name)), expected
        )
    y = ops.denoise_step(x.half(), cond.half(), None, None, constants, **options, backend=_present(name))
    assert y.dtype == torch.float16
    for wrong, words in (({"prediction_type": "noise"}, "prediction_type"), ({"a": torch.ones(3)}, "a must be")):
        with pytest.raises(ValueError, match=words):
            ops.denoise_step(x, cond, None, None, constants, **wrong, backend=_present(name))
    with pytest.raises(ValueError, match="uncond must be"):
        ops.denoise_step(x, cond, uncond[:1], None, constants, backend=_present(name))
