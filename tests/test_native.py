"""The C++ kernels against plain torch in int64 and float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff_engine import numerics
from qdiff_engine.ops import extension, native, statistics
from qdiff_engine.ops import native_products as products

_AVAILABLE, _REASON = extension.available()
pytestmark = pytest.mark.skipif(not _AVAILABLE, reason=_REASON)

STORAGES = [torch.int8, torch.uint8]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def integers(*shape: int, storage: torch.dtype = torch.int8) -> Tensor:
    q = torch.randint(-128, 128, shape, dtype=torch.int8)
    q = numerics.stored(q, storage)
    return q.to(memory_format=torch.channels_last) if q.dim() == 4 else q


def weights(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def assert_one_step(found: Tensor, expected: Tensor) -> None:
    """At most one step apart, in under 0.1 % of the elements (one element may always differ)."""
    steps = (numerics.signed(found).to(torch.int64) - expected).abs()
    assert steps.max() <= 1
    assert (steps > 0).sum() <= max(1, 0.001 * steps.numel())


def quantize_float64(y: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    low, high = numerics.activation_range(bits)
    return (torch.round(y.double() * numerics.inverse_scale(scale)) + zero_point).clamp(low, high).to(torch.int64)


def upsample_and_pad(q: Tensor, upsample: int, padding: tuple[int, int, int, int], value: float) -> Tensor:
    top, bottom, left, right = padding
    q = q.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    return F.pad(q, (left, right, top, bottom), value=value)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bits,zero_point", [(8, -128), (8, 3), (8, 127), (4, -8), (4, 5)])
@pytest.mark.parametrize("shape", [(1,), (17, 33), (2, 63, 1040), (3, 17, 5, 7), (1, 1, 1, 1), (2, 128, 32, 32)])
def test_quantize_is_exact(shape, bits, zero_point, storage):
    x = torch.randn(shape) * 40
    scale = 0.37 if bits == 8 else 6.1
    q = native.quantize(x, scale, zero_point, bits, storage=storage)
    assert q.dtype == storage and q.shape == x.shape
    assert torch.equal(q, numerics.stored(numerics.quantize(x, scale, zero_point, bits), storage))
    if len(shape) == 4:
        assert q.is_contiguous(memory_format=torch.channels_last)


def test_quantize_rounds_ties_to_even_and_saturates():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 1e9, -1e9, 3e38, -3e38, 0.49999997])
    expected = torch.tensor([-2, -2, 0, 0, 2, 2, 126, 127, -128, 127, -128, 0], dtype=torch.int8)
    assert torch.equal(native.quantize(x, 1.0, 0, 8), expected)
    assert torch.equal(native.quantize(x, 1.0, 1, 8), (expected.int() + 1).clamp(-128, 127).to(torch.int8).where(
        expected > -128, torch.tensor(-128, dtype=torch.int8)))  # fmt: skip


@pytest.mark.parametrize("channels", [1, 17, 64])
def test_quantize_channel_inverse_is_exact(channels):
    x, inverse = torch.randn(33, channels), torch.rand(channels) + 0.5
    q = native.quantize(x, 0.021, -7, 8, channel_inverse=inverse)
    assert torch.equal(q, numerics.quantize(x, 0.021, -7, 8, inverse))
    image = torch.randn(2, channels, 5, 3)
    q = native.quantize(image, 0.021, -7, 8, channel_inverse=inverse)
    assert torch.equal(q.permute(0, 2, 3, 1), numerics.quantize(image.permute(0, 2, 3, 1), 0.021, -7, 8, inverse))


@pytest.mark.parametrize("view", ["contiguous", "transposed", "strided", "channels_last"])
def test_quantize_any_strides(view):
    x = torch.randn(2, 34, 6, 10)
    if view == "transposed":
        x = x.transpose(2, 3)
    elif view == "strided":
        x = x[:, ::2, :, 1:]
    elif view == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    assert torch.equal(native.quantize(x, 0.02, 3, 8), numerics.quantize(x, 0.02, 3, 8))
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.equal(native.quantize(tokens, 0.02, 3, 8), numerics.quantize(tokens, 0.02, 3, 8))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "upsample,padding", [(1, (1, 1, 1, 1)), (2, (0, 0, 0, 0)), (2, (0, 1, 2, 3)), (3, (1, 0, 0, 1))]
)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 17, 3, 5), (3, 64, 33, 16)])
def test_quantize_upsamples_and_pads(shape, upsample, padding, storage):
    x = torch.randn(shape)
    q = native.quantize(x, 0.03, -9, 8, upsample=upsample, padding=padding, storage=storage)
    expected = upsample_and_pad(numerics.quantize(x, 0.03, -9, 8), upsample, padding, -9)
    assert torch.equal(q, numerics.stored(expected, storage))


def activation_float64(x: Tensor, activation: str, axis: int) -> Tensor:
    x = x.double()
    if activation == "geglu":
        value, gate = x.chunk(2, axis)
        return value * F.gelu(gate)
    return {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh")}[activation](x)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "geglu"])
@pytest.mark.parametrize("shape", [(64, 1040), (3, 34, 17, 9)])
def test_quantize_activations(shape, activation):
    x = torch.randn(shape) * 3
    axis = 1 if len(shape) == 4 else -1
    found = native.quantize(x, 0.02, -90, 8, activation=activation)
    assert_one_step(found, quantize_float64(activation_float64(x, activation, axis), 0.02, -90, 8))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_survive_extreme_values(activation):
    x = torch.tensor([-3e38, -1e4, -200.0, -90.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 90.0, 1e4])
    expected = quantize_float64(activation_float64(x, activation, -1), 0.1, 0, 8)
    assert torch.equal(native.quantize(x, 0.1, 0, 8, activation=activation).to(torch.int64), expected)


def groupnorm_float64(x, groups, weight, bias, eps, silu, pre_add=None, norm_scale=None, norm_shift=None) -> Tensor:
    def per_channel(v):
        return v.double()[(...,) + (None,) * (x.dim() - 2)]

    x = x.double()
    if pre_add is not None:
        x = x + per_channel(pre_add)
    y = F.group_norm(
        x, groups, None if weight is None else weight.double(), None if bias is None else bias.double(), eps
    )
    if norm_scale is not None:
        y = y * (1 + per_channel(norm_scale))
    if norm_shift is not None:
        y = y + per_channel(norm_shift)
    return F.silu(y) if silu else y


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape,groups", [
    ((1, 4, 1, 1), 2), ((2, 17, 3, 5), 17), ((3, 33, 7), 3), ((8, 64, 16, 16), 32), ((1, 96, 33, 17), 1),
    ((2, 6, 2, 3, 4), 3), ((5, 1040, 4, 4), 16), ((1, 128, 32, 32), 32),
])  # fmt: skip
def test_groupnorm_silu_quantize(shape, groups, silu, threads):
    x, weight, bias = torch.randn(shape) * 2 + 1, torch.randn(shape[1]), torch.randn(shape[1])
    expected = groupnorm_float64(x, groups, weight, bias, 1e-5, silu)
    found = native.groupnorm_silu_quantize(x, groups, weight, bias, 1e-5, 0.03, -11, 8, silu=silu)
    assert_one_step(found, quantize_float64(expected, 0.03, -11, 8))
    assert found.movedim(1, -1).is_contiguous()
    floats = native.groupnorm_silu_quantize(x, groups, weight, bias, 1e-5, None, silu=silu)
    torch.testing.assert_close(floats.double(), expected, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("pixels", [(1, 1), (5, 5), (48, 48)])
def test_groupnorm_survives_a_mean_far_above_the_deviation(pixels):
    x = 100 + 0.1 * torch.randn(2, 32, *pixels)
    weight, bias = torch.randn(32), torch.randn(32)
    expected = groupnorm_float64(x, 8, weight, bias, 1e-5, True)
    found = native.groupnorm_silu_quantize(x, 8, weight, bias, 1e-5, 0.03, 0, 8)
    assert_one_step(found, quantize_float64(expected, 0.03, 0, 8))
    floats = native.groupnorm_silu_quantize(x, 8, weight, bias, 1e-5, None)
    assert (floats.double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("batch", [1, 2, 3, 9])
@pytest.mark.parametrize("c1,c2,groups", [(16, 16, 4), (10, 22, 4), (33, 3, 6), (64, 32, 32)])
def test_groupnorm_two_segments_and_modulation(batch, c1, c2, groups, threads):
    x, x2 = torch.randn(batch, c1, 9, 15) * 3, torch.randn(batch, c2, 9, 15) - 2
    c = c1 + c2
    weight, bias = torch.randn(c), torch.randn(c)
    modulation = {
        "pre_add": torch.randn(batch, c),
        "norm_scale": torch.randn(batch, c),
        "norm_shift": torch.randn(batch, c),
    }
    expected = groupnorm_float64(torch.cat((x, x2), 1), groups, weight, bias, 1e-6, True, **modulation)
    found = native.groupnorm_silu_quantize(x, groups, weight, bias, 1e-6, 0.05, 2, 8, x2=x2, **modulation)
    assert_one_step(found, quantize_float64(expected, 0.05, 2, 8))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("upsample,padding", [(1, (0, 1, 0, 1)), (2, (0, 0, 0, 0)), (2, (1, 2, 3, 0))])
@pytest.mark.parametrize("batch", [1, 4])
def test_groupnorm_upsamples_and_pads(batch, upsample, padding, storage):
    x = torch.randn(batch, 24, 13, 11)
    plain = native.groupnorm_silu_quantize(x, 4, None, None, 1e-5, 0.02, -100, 8)
    found = native.groupnorm_silu_quantize(
        x, 4, None, None, 1e-5, 0.02, -100, 8, upsample=upsample, padding=padding, storage=storage
    )
    assert torch.equal(found, numerics.stored(upsample_and_pad(plain, upsample, padding, -100), storage))
    floats = native.groupnorm_silu_quantize(x, 4, None, None, 1e-5, None, upsample=upsample, padding=padding)
    plain = native.groupnorm_silu_quantize(x, 4, None, None, 1e-5, None)
    assert torch.equal(floats, upsample_and_pad(plain, upsample, padding, 0.0))


@pytest.mark.parametrize("rows,features", [(1, 1), (17, 33), (63, 1040), (4096, 320)])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_layernorm_quantize(rows, features, affine, mean):
    x = torch.randn(rows, features) * 0.1 + mean
    weight = torch.randn(features) if affine in ("both", "weight") else None
    bias = torch.randn(features) if affine in ("both", "bias") else None
    doubles = [None if v is None else v.double() for v in (weight, bias)]
    expected = F.layer_norm(x.double(), (features,), *doubles, 1e-5)
    found = native.layernorm_quantize(x, weight, bias, 1e-5, 0.03, 5, 8, storage=torch.uint8)
    assert_one_step(found, quantize_float64(expected, 0.03, 5, 8))
    floats = native.layernorm_quantize(x, weight, bias, 1e-5, None)
    assert (floats.double() - expected).abs().max() < 1e-5


def conv_int64(q, weight, stride, padding, dilation, groups) -> Tensor:
    """Sums over the taps inside the image, in float64, which holds them exactly."""
    top, bottom, left, right = padding
    padded = F.pad(numerics.signed(q).double(), (left, right, top, bottom))
    return F.conv2d(padded, weight.double(), None, stride, 0, dilation, groups).to(torch.int64)


CONVOLUTIONS = [
    # shape of q, shape of weight, stride, padding, dilation, groups
    ((2, 128, 32, 32), (128, 128, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    ((1, 17, 9, 7), (33, 17, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    ((3, 33, 8, 8), (17, 33, 3, 3), (2, 2), (0, 1, 0, 1), (1, 1), 1),
    ((2, 63, 11, 5), (1, 63, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    ((1, 1040, 4, 4), (65, 1040, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    ((2, 12, 9, 10), (18, 4, 3, 5), (1, 2), (2, 0, 1, 3), (2, 1), 3),
    ((1, 24, 6, 6), (24, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 24),
    ((1, 66, 12, 12), (130, 33, 3, 3), (1, 1), (2, 2, 2, 2), (2, 2), 2),
    ((1, 3, 17, 17), (5, 3, 7, 7), (2, 3), (3, 3, 3, 3), (1, 1), 1),
] + [
    ((2, 5, h, w), (7, 5, 3, 3), (stride, stride), (1, 1, 1, 1), (1, 1), 1)
    for h, w in [(1, 1), (1, 3), (2, 2), (3, 3)] for stride in (1, 2)
]  # fmt: skip


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_int_conv2d(case, storage, threads):
    q_shape, weight_shape, stride, padding, dilation, groups = case
    q, weight = integers(*q_shape, storage=storage), weights(*weight_shape)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    packed = products.pack_conv2d(weight, groups)
    scales = torch.rand(weight.shape[0]) * 0.01 + 0.001
    acc = products.int_conv2d(q, packed, scales, 0.02, -5, accumulators=True, **geometry)
    expected = conv_int64(q, weight, stride, padding, dilation, groups)
    assert acc.dtype == torch.int32 and torch.equal(acc.to(torch.int64), expected)

    # a padded tap is worth z: convolving q - z with zero padding is the whole zero-point correction
    bias, temb = torch.randn(weight.shape[0]), torch.randn(q.shape[0], weight.shape[0])
    residual = torch.randn(expected.shape)
    centred = numerics.signed(q).double() + 5
    top, bottom, left, right = padding
    y = F.conv2d(F.pad(centred, (left, right, top, bottom)), weight.double(), None, stride, 0, dilation, groups)
    y = y * (0.02 * scales.double()).view(-1, 1, 1) + bias.view(-1, 1, 1) + temb[:, :, None, None] + residual
    found = products.int_conv2d(q, weight, scales, 0.02, -5, bias, temb=temb, residual=residual, **geometry)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found.double() - y).abs().max() <= 1e-6 * y.abs().max()


def test_int_conv2d_reads_any_strides():
    q, weight = torch.randint(-128, 128, (2, 6, 5, 7), dtype=torch.int8), weights(4, 6, 3, 3)
    scales = torch.rand(4)
    expected = products.int_conv2d(q.to(memory_format=torch.channels_last), weight, scales, 0.1, 3, padding=1)
    assert torch.equal(products.int_conv2d(q, weight, scales, 0.1, 3, padding=1), expected)
    assert torch.equal(
        products.int_conv2d(q.transpose(2, 3).contiguous().transpose(2, 3), weight, scales, 0.1, 3, padding=1),
        expected,
    )


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows,features,channels", [
    (1, 1, 1), (17, 33, 63), (63, 1040, 33), (48, 64, 32), (49, 2, 1040), (1, 1280, 1280), (300, 320, 640),
])  # fmt: skip
def test_int_gemm(rows, features, channels, storage, threads):
    q, weight = integers(rows, features, storage=storage), weights(channels, features)
    packed, scales = products.pack_gemm(weight), torch.rand(channels) * 0.01 + 0.001
    acc = products.int_gemm(q, packed, scales, 0.02, 7, accumulators=True)
    expected = numerics.signed(q).long() @ weight.long().T
    assert torch.equal(acc.long(), expected)
    bias, residual = torch.randn(channels), torch.randn(rows, channels)
    y = (expected - 7 * weight.long().sum(1)).double() * (0.02 * scales.double()) + bias + residual
    found = products.int_gemm(q, weight, scales, 0.02, 7, bias, residual=residual)
    assert (found.double() - y).abs().max() <= 1e-6 * y.abs().max()
    assert torch.equal(
        products.int_gemm(q.view(1, rows, features), packed, scales, 0.02, 7, bias, residual=residual[None])[0],
        found,
    )


def test_int_gemm_holds_the_largest_sum():
    features = numerics.MAX_K
    q, weight = torch.full((1, features), -128, dtype=torch.int8), torch.full((1, features), 127, dtype=torch.int8)
    found = products.int_gemm(q, weight, torch.ones(1), 1.0, 127)
    assert found.item() == pytest.approx(-255 * 127 * features, rel=1e-7)
    with pytest.raises(ValueError, match="66311"):
        products.pack_gemm(torch.ones(1, features + 1, dtype=torch.int8))


@pytest.mark.parametrize("count", [1, 17, 4097, 100_003])
@pytest.mark.parametrize("bins", [1, 33, 2048])
def test_histogram(count, bins, threads):
    x = torch.randn(count) * 2
    expected = ((x.double() + 3.0) * (bins / 6.5)).floor().clamp(0, bins - 1).long().bincount(minlength=bins)
    found = statistics.histogram(x, bins, -3.0, 3.5)
    assert found.dtype == torch.int64 and torch.equal(found, expected) and found.sum() == count


def test_histogram_keeps_wild_values_in_the_table():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38, -1e38])
    assert statistics.histogram(x, 5, 0.0, 1.0).sum() == 5


@pytest.mark.parametrize("count", [1, 17, 4097, 100_003])
def test_min_max(count):
    x = torch.randn(count) + 5
    assert statistics.min_max(x) == (x.min().item(), x.max().item())
    for poison in (float("nan"), float("inf"), -float("inf")):
        poisoned = x.clone()
        poisoned[count // 2] = poison
        with pytest.raises(ValueError, match="NaN or infinite"):
            statistics.min_max(poisoned)


def test_results_do_not_depend_on_the_thread_count():
    x = torch.randn(3, 96, 40, 24)
    q, weight = integers(2, 64, 20, 20), weights(96, 64, 3, 3)
    scales = torch.rand(96)
    results = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((
                native.groupnorm_silu_quantize(x, 8, None, None, 1e-5, None),
                native.quantize(x, 0.02, 3, 8, activation="gelu"),
                products.int_conv2d(q, weight, scales, 0.02, 3, padding=1),
                statistics.histogram(x, 100, -1.0, 1.0),
            ))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_threads_are_those_of_torch(threads):
    kernels = extension.kernels()
    assert kernels.openmp or sys.platform != "linux", "every kernel would run on one thread"
    assert kernels.max_threads() == (threads if kernels.openmp else 1)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc to list loaded libraries")
def test_one_openmp_library_is_loaded():
    with open("/proc/self/maps") as maps:
        libraries = {line.split()[-1] for line in maps if "gomp" in line or "libomp" in line or "iomp" in line}
    if extension.kernels().openmp and any("torch" in library for library in libraries):
        assert len(libraries) == 1, libraries


_ISA_CHECK = """
import torch
from qdiff_engine.ops import extension, native_products
q, w = torch.randint(-128, 128, (61, 333), dtype=torch.int8), torch.randint(-127, 128, (75, 333), dtype=torch.int8)
acc = native_products.int_gemm(q, w, torch.ones(75), 1.0, 0, accumulators=True)
assert torch.equal(acc.long(), q.long() @ w.long().T)
print(extension.kernels().dot_kernel())
"""


@pytest.mark.parametrize("isa", ["avx2", "default"])
def test_int_gemm_kernels_of_older_processors(isa):
    environment = {**os.environ, "QDIFF_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", _ISA_CHECK], env=environment, check=True, timeout=120, capture_output=True, text=True
    )
    expected = isa if extension.kernels().cpu_features()["avx2"] else "default"
    assert done.stdout.split() == [expected]


def test_nothing_is_left_unwritten():
    """Fresh outputs often reuse freed memory: with NaN there, any element left unwritten shows."""
    x = torch.randn(2, 33, 17, 9)
    for _ in range(5):
        poison = [torch.full((2, 33, 17, 9), float("nan")) for _ in range(4)]
        del poison
        y = native.groupnorm_silu_quantize(x, 3, None, None, 1e-5, None)
        assert y.isfinite().all()
        q = integers(2, 33, 17, 9)
        assert products.int_conv2d(q, weights(33, 33, 3, 3), torch.ones(33), 1.0, 0, padding=1).isfinite().all()


@pytest.mark.parametrize("call,error,words", [
    (lambda: native.quantize(torch.zeros(3, dtype=torch.float64), 1.0, 0, 8), TypeError, "x must be a float32"),
    (lambda: native.quantize(torch.zeros(3), 0.0, 0, 8), ValueError, "scale"),
    (lambda: native.quantize(torch.zeros(3), float("nan"), 0, 8), ValueError, "scale"),
    (lambda: native.quantize(torch.zeros(3), 1.0, 8, 4), ValueError, "zero_point"),
    (lambda: native.quantize(torch.zeros(3), 1.0, 0, 5), ValueError, "bits"),
    (lambda: native.quantize(torch.zeros(3), 1.0, 0, 8, activation="relu"), ValueError, "activation"),
    (lambda: native.quantize(torch.zeros(3), 1.0, 0, 8, activation="geglu"), ValueError, "even"),
    (lambda: native.quantize(torch.zeros(3), 1.0, 0, 8, upsample=2), ValueError, "4-D"),
    (lambda: native.quantize(torch.zeros(3), 1.0, 0, 8, storage=torch.int16), TypeError, "storage"),
    (lambda: native.quantize(torch.zeros(3), 1.0, 0, 8, channel_inverse=torch.ones(2)), ValueError, "channel_inverse"),
    (lambda: native.groupnorm_silu_quantize(torch.zeros(1, 6, 2), 4, None, None, 1e-5, 1.0), ValueError, "groups"),
    (lambda: native.groupnorm_silu_quantize(torch.zeros(1, 6, 2), 2, torch.ones(5), None, 1, 1), ValueError, "weight"),
    (
        lambda: native.groupnorm_silu_quantize(torch.zeros(1, 6, 2), 2, None, None, 1, 1, channel_inverse=torch.ones(5)
        ), ValueError, "channel_inverse",
    ),
    (lambda: native.layernorm_quantize(torch.zeros(2, 3), None, torch.ones(2), 1e-5, 1.0), ValueError, "bias"),
    (lambda: products.int_gemm(torch.zeros(2, 3), weights(2, 3), torch.ones(2), 1.0, 0), TypeError, "q must be"),
    (lambda: products.int_gemm(integers(2, 4), weights(2, 3), torch.ones(2), 1.0, 0), ValueError, "q must be"),
    (lambda: products.int_conv2d(integers(1, 3, 2, 2), weights(2, 3, 3, 3), torch.ones(2), 1.0, 0), ValueError, "fit"),
    (lambda: statistics.histogram(torch.zeros(3), 0, 0.0, 1.0), ValueError, "bins"),
    (lambda: statistics.histogram(torch.zeros(3), 3, 1.0, 1.0), ValueError, "low"),
    (lambda: statistics.min_max(torch.zeros(0)), ValueError, "empty"),
])  # fmt: skip
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_empty_batches():
    assert native.quantize(torch.zeros(0, 4, 3, 3), 1.0, 0, 8).shape == (0, 4, 3, 3)
    assert native.groupnorm_silu_quantize(torch.zeros(0, 4, 3, 3), 2, None, None, 1e-5, 1.0).shape == (0, 4, 3, 3)
    assert products.int_gemm(integers(0, 4), weights(2, 4), torch.ones(2), 1.0, 0).shape == (0, 2)


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_malloc_is_left_alone_where_the_user_set_it(name, monkeypatch):
    monkeypatch.setattr(extension, "kernels", lambda: pytest.fail("malloc was changed"))
    monkeypatch.setenv(name, "1")
    assert extension.keep_freed_memory.__wrapped__() is False
