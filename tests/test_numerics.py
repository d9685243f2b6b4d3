"""The engine's arithmetic: rounding, storage, int4 packing, ranges and border classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_engine import numerics

finite = st.floats(-(2.0**100), 2.0**100, width=32)


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


@given(st.integers(1, 40), st.integers(0, 70), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_int4_values_survive_packing(n: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    values = integers(-8, 7, n, k)
    packed = numerics.pack_int4(values)
    assert packed.shape == (n, (k + 1) // 2)
    assert torch.equal(numerics.unpack_int4(packed, k), values)


def test_int4_low_nibble_holds_the_even_column() -> None:
    assert numerics.pack_int4(torch.tensor([[-8, 7, 3]], dtype=torch.int8)).tolist() == [[0x78, 0x03]]


def test_all_256_integers_survive_both_storage_forms() -> None:
    q = torch.arange(-128, 128).to(torch.int8)
    offset = numerics.stored(q, torch.uint8)
    assert torch.equal(offset.to(torch.int64), q.to(torch.int64) + 128)
    assert torch.equal(numerics.stored(offset, torch.uint8), offset)
    for form in (q, offset):
        assert torch.equal(numerics.signed(form), q)
        assert torch.equal(numerics.stored(form, torch.int8), q)


@pytest.mark.parametrize("bits", [4, 8])
@given(a=finite, b=finite)
@settings(max_examples=200, deadline=None)
def test_a_range_contains_zero_and_both_its_ends(bits: int, a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero_point = numerics.affine_from_range(torch.tensor(low), torch.tensor(high), bits)
    q_low, q_high = numerics.activation_range(bits)
    s, z = float(scale), int(zero_point)
    assert s > 0 and torch.isfinite(scale) and q_low <= z <= q_high
    if s != 1.0:  # a range too narrow for a float32 scale gets scale 1
        # zero sits exactly on z; each end is at most half a step outside the representable interval
        half = 0.5001 * s
        assert s * (q_low - z) <= min(low, 0.0) + half and s * (q_high - z) >= max(high, 0.0) - half


def test_rounding_is_half_to_even_before_the_zero_point_is_added() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 300.0, -300.0])
    assert numerics.quantize(x, 1.0, 1, 8).tolist() == [-1, -1, 1, 1, 3, 3, 127, -128]
    assert numerics.quantize(x, 1.0, -3, 4).tolist() == [-5, -5, -3, -3, -1, -1, 7, -8]


@given(st.floats(2.0**-20, 2.0**10, width=32), st.integers(-128, 127), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_dequantising_is_within_half_a_step(scale: float, zero_point: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = (torch.rand(100) * 255 - 128 - zero_point) * scale  # inside the representable interval
    error = (numerics.dequantize(numerics.quantize(x, scale, zero_point, 8), scale, zero_point) - x).abs()
    assert float(error.max()) <= scale * (0.5 + 1e-4)


def test_channel_equalisation_multiplies_once_in_float32() -> None:
    x, inverse = torch.randn(50, 33) * 3, torch.rand(33) + 0.5
    factor = (torch.tensor(1 / 0.037, dtype=torch.float32) * inverse).float()
    expected = torch.round(x * factor).add(5).clamp(-128, 127).to(torch.int8)
    assert torch.equal(numerics.quantize(x, 0.037, 5, 8, inverse), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_stay_in_range(bits: int) -> None:
    weight = torch.randn(17, 3, 3, 3)
    low, high = numerics.weight_range(bits)
    scale = weight.abs().amax((1, 2, 3)) / high
    q = numerics.quantize_weight(weight, scale, bits)
    assert int(q.min()) >= low and int(q.max()) <= high
    assert ((q * scale.reshape(-1, 1, 1, 1) - weight).abs() <= 0.5001 * scale.reshape(-1, 1, 1, 1)).all()


@given(
    image=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_border_classes_equal_a_convolution_of_ones(image, kernel, stride, padding, dilation, seed) -> None:
    top, bottom, left, right = padding
    fits_vertically = image[0] + top + bottom > dilation[0] * (kernel[0] - 1)
    fits_horizontally = image[1] + left + right > dilation[1] * (kernel[1] - 1)
    if not (fits_vertically and fits_horizontally):
        return
    torch.manual_seed(seed)
    weight = integers(-127, 127, 5, 3, *kernel)
    classes = numerics.border_classes(weight, image, stride, padding, dilation)
    ones = F.pad(torch.ones(1, 3, *image, dtype=torch.float64), (left, right, top, bottom))
    expected = F.conv2d(ones, weight.double(), None, stride, 0, dilation)[0]
    assert torch.equal(classes.sums[classes.index].permute(2, 0, 1).double(), expected)


def test_a_padded_3x3_has_9_classes_and_the_downsampler_4() -> None:
    weight = integers(-127, 127, 2, 2, 3, 3)
    assert len(numerics.border_classes(weight, (8, 8), (1, 1), (1, 1, 1, 1)).sums) == 9
    assert len(numerics.border_classes(weight, (8, 8), (2, 2), (0, 1, 0, 1)).sums) == 4


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda: numerics.activation_range(5), ValueError),
        (lambda: numerics.weight_range(2), ValueError),
        (lambda: numerics.pack_int4(torch.zeros(2, 2)), TypeError),
        (lambda: numerics.unpack_int4(torch.zeros(2, 2, dtype=torch.uint8), 5), TypeError),
    ],
)
def test_wrong_arguments_are_named(call, error) -> None:
    with pytest.raises(error, match="got"):
        call()
