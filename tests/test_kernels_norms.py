"""The Triton kernels that quantise, alone and behind a norm, against `reference`.

They run in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparing import (
    CHANNELS_LAST,
    DEVICE,
    NO_PADDING,
    assert_as_close_as_torch,
    on_device,
    quantization,
    surrounded,
)
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from qdiff_kernels.group_statistics import MAX_CHUNKS, affine_of, merged_block, statistics_for, tiles_of
from qdiff_kernels.groupnorm_silu_quantize import groupnorm_silu_quantize, tiles_per_program
from qdiff_kernels.int_conv2d import Geometry, Segment, int_conv2d
from qdiff_kernels.layernorm_quantize import block_of_rows, layernorm_quantize
from qdiff_kernels.packing import pack, packed_width, unpack_rows
from qdiff_kernels.quantize import ACTIVATIONS, block_shape, quantize
from qdiff_kernels.tiles import Launch, Tile

from qdiff_engine import reference

# what exp overflows to is infinity, and x / infinity the right result
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.usefixtures("kernels", "poisoned_memory"),
]

DTYPES = [torch.float32, torch.float16]
Step = Callable[[Tensor, Tensor], None]


@pytest.fixture
def assert_steps() -> Iterator[Step]:
    """At most one step apart, in fewer than 0.1 % of all the elements of a test."""
    counts = [0, 0]

    def compare(q: Tensor, expected: Tensor) -> None:
        assert q.dtype == torch.int8 and q.shape == expected.shape
        difference = (q.cpu().int() - expected.int()).abs()
        assert int(difference.max()) <= 1
        counts[0] += int(difference.sum())
        counts[1] += difference.numel()

    yield compare
    assert counts[0] <= 1e-3 * counts[1]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (33, 1040), (2, 7, 63), (1, 1, 1, 1), (2, 17, 5, 3), (1, 320, 16, 16)])
def test_quantize_equals_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    inverse = torch.rand(shape[1] if len(shape) == 4 else shape[-1]) + 0.5
    for bits, scale, zero_point in ((8, 0.021, -9), (8, 0.004, 127), (4, 0.3, -3)):
        for channel_inverse in (None, inverse):
            expected = reference.quantize(x, scale, zero_point, bits, channel_inverse=channel_inverse)
            on_it = None if channel_inverse is None else channel_inverse.to(DEVICE)
            q = quantize(surrounded(x), quantization(scale, zero_point), bits, channel_inverse=on_it)
            assert q.dtype == torch.int8 and torch.equal(q.cpu(), expected)
            assert q.is_contiguous(memory_format=CHANNELS_LAST if len(shape) == 4 else torch.contiguous_format)


def test_quantize_rounds_ties_to_even_and_saturates() -> None:
    x = torch.cat((torch.arange(-300, 301) / 2, torch.tensor([1e30, -1e30, 3e38, -3e38])))
    for bits, zero_point in ((8, 0), (8, -128), (8, 127), (4, 5)):
        expected = reference.quantize(x, 1.0, zero_point, bits)
        assert torch.equal(quantize(x.to(DEVICE), quantization(1.0, zero_point), bits).cpu(), expected)


@pytest.mark.parametrize(
    "upsample, padding", [(2, NO_PADDING), (1, (0, 1, 0, 1)), (2, (1, 1, 1, 1)), (3, (2, 0, 1, 3))]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
def test_quantize_upsamples_and_pads_with_the_zero_point(
    layout: torch.memory_format, upsample: int, padding: tuple[int, int, int, int]
) -> None:
    x, inverse = torch.randn(2, 17, 5, 3), torch.rand(17) + 0.5
    options: dict[str, Any] = {"upsample": upsample, "padding": padding, "channel_inverse": inverse}
    for given in (x.to(DEVICE).contiguous(memory_format=layout), surrounded(x)):
        q = quantize(given, quantization(0.02, 33), 8, **on_device(options))
        assert q.is_contiguous(memory_format=CHANNELS_LAST)
        assert torch.equal(q.cpu(), reference.quantize(x, 0.02, 33, 8, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_quantize_after_an_activation(activation: str, dtype: torch.dtype, assert_steps: Step) -> None:
    for shape, options in (((2, 9, 1040), {}), ((2, 34, 6, 5), {"padding": (1, 2, 0, 1)}), ((1, 2), {})):
        x = (torch.randn(shape) * 3).to(dtype)
        given: dict[str, Any] = {"activation": activation, **options}
        q = quantize(surrounded(x), quantization(0.031, -60), 8, **given)
        assert_steps(q, reference.quantize(x, 0.031, -60, 8, **given))


def test_an_empty_batch_gives_an_empty_result() -> None:
    table = quantization(0.1, 3)
    x = torch.ones(0, 6, 4, 4, device=DEVICE)
    assert quantize(x, table, 8, upsample=2).shape == (0, 6, 8, 8)
    assert groupnorm_silu_quantize(x, 2, None, None, 1e-5, table, padding=(0, 1, 0, 1)).shape == (0, 6, 5, 5)
    assert layernorm_quantize(x, None, None, 1e-5, table).shape == x.shape


NORMS = [
    ((2, 4, 1, 1), 2),
    ((2, 33, 5, 7), 3),
    ((1, 33, 4, 4), 33),
    ((1, 63, 3, 1), 21),
    ((1, 17, 33), 17),
    ((3, 32, 17), 8),
    ((1, 12, 70, 67), 1),
    ((1, 1040, 3, 5), 16),
    ((1, 2560, 4, 4), 32),
    ((1, 128, 32, 32), 32),
    ((1, 320, 16, 16), 32),
]


def plain_groupnorm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, **options: Any):
    """What a module in x's dtype computes."""
    x = torch.cat((x, options["x2"]), 1) if "x2" in options else x
    terms = {
        name: options[name].reshape(*options[name].shape, *[1] * (x.dim() - 2)) for name in options if name != "x2"
    }
    y = F.group_norm(x + terms["pre_add"] if "pre_add" in terms else x, groups, weight, bias, eps)
    return F.silu(y * (1 + terms["norm_scale"]) + terms["norm_shift"] if "norm_scale" in terms else y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, groups", NORMS)
def test_groupnorm_silu_quantize(shape: tuple[int, ...], groups: int, dtype: torch.dtype, assert_steps: Step) -> None:
    x = (torch.randn(shape) * 2 + 3).to(dtype)
    weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    given, table = surrounded(x), quantization(0.02, -20)
    for silu in (False, True) if dtype == torch.float32 else (True,):
        expected = reference.groupnorm_silu_quantize(x, groups, weight, bias, 1e-5, 0.02, -20, 8, silu=silu)
        q = groupnorm_silu_quantize(given, groups, weight.to(DEVICE), bias.to(DEVICE), 1e-5, table, silu=silu)
        assert_steps(q, expected)
        assert q.movedim(1, -1).is_contiguous()
    y = groupnorm_silu_quantize(given, groups, weight.to(DEVICE), bias.to(DEVICE), 1e-5, None)
    exact = reference.groupnorm_silu_quantize(x, groups, weight, bias, 1e-5, None, 0, 8)
    assert_as_close_as_torch(y, plain_groupnorm(x, groups, weight, bias, 1e-5), exact)
    assert y.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "c1, c2, size, groups, padding, upsample",
    [
        (17, 16, (5, 6), 3, NO_PADDING, 1),
        (17, 16, (5, 6), 3, (1, 1, 1, 1), 1),
        (17, 16, (5, 6), 3, (0, 1, 2, 1), 2),
        (1, 32, (3, 1), 11, (2, 0, 0, 1), 3),
        (64, 70, (9, 7), 2, (1, 1, 1, 1), 2),
        (320, 640, (8, 8), 32, NO_PADDING, 1),
    ],
)
def test_groupnorm_of_a_skip_concatenation_with_all_its_terms(
    c1: int, c2: int, size: tuple[int, int], groups: int, padding: Any, upsample: int, dtype: torch.dtype,
    assert_steps: Step,
) -> None:  # fmt: skip
    x, x2 = torch.randn(2, c1, *size).to(dtype), (torch.randn(2, c2, *size) * 4 + 1).to(dtype)
    weight, bias = torch.randn(c1 + c2).to(dtype), torch.randn(c1 + c2).to(dtype)
    terms = {name: torch.randn(2, c1 + c2).to(dtype) for name in ("pre_add", "norm_scale", "norm_shift")}
    place: dict[str, Any] = {"padding": padding, "upsample": upsample}
    options = {"x2": x2, **terms, **place}
    given = (surrounded(x), groups, weight.to(DEVICE), bias.to(DEVICE), 1e-6)
    on_it = on_device(options) | {"x2": surrounded(x2)}
    for inverse in (None, torch.rand(c1 + c2) + 0.5) if c1 < 320 else (None,):
        factors = {} if inverse is None else {"channel_inverse": inverse}
        q = groupnorm_silu_quantize(*given, quantization(0.03, 7), **on_it, **on_device(factors))
        expected = reference.groupnorm_silu_quantize(x, groups, weight, bias, 1e-6, 0.03, 7, 8, **options, **factors)
        assert_steps(q, expected)
        assert q.is_contiguous(memory_format=CHANNELS_LAST)
    exact = reference.groupnorm_silu_quantize(x, groups, weight, bias, 1e-6, None, 0, 8, **options)
    plain = reference.place(plain_groupnorm(x, groups, weight, bias, 1e-6, x2=x2, **terms), upsample, padding, 0.0)
    y = groupnorm_silu_quantize(*given, None, **on_it)
    assert_as_close_as_torch(y, plain, exact)


def test_groupnorm_divides_an_unquantised_result() -> None:
    x, inverse = torch.randn(2, 48, 5, 3), torch.rand(48) + 0.5
    y = groupnorm_silu_quantize(x.to(DEVICE), 3, None, None, 1e-5, None, channel_inverse=inverse.to(DEVICE))
    exact = reference.groupnorm_silu_quantize(x, 3, None, None, 1e-5, None, 0, 8, channel_inverse=inverse)
    assert_as_close_as_torch(y, F.silu(F.group_norm(x, 3)) * inverse[:, None, None], exact)


def test_groupnorm_reads_the_halves_of_a_scale_shift_embedding() -> None:
    x, both = torch.randn(2, 32, 3, 4).to(DEVICE), torch.randn(2, 64).to(DEVICE)
    shift, scale = both.chunk(2, dim=1)
    given = (x, 4, None, None, 1e-5, None)
    y = groupnorm_silu_quantize(*given, norm_scale=scale.contiguous(), norm_shift=shift.contiguous())
    assert torch.equal(y, groupnorm_silu_quantize(*given, norm_scale=scale, norm_shift=shift))


def test_groupnorm_is_the_same_however_many_tiles_a_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, x2 = torch.randn(2, 40, 23, 20).to(DEVICE), torch.randn(2, 8, 23, 20).to(DEVICE)
    given = (x, 4, None, None, 1e-5, quantization(0.02, 9))
    results = []
    for count in (1, 3, 8):
        monkeypatch.setattr("qdiff_kernels.groupnorm_silu_quantize.tiles_per_program", lambda *_, count=count: count)
        results.append(groupnorm_silu_quantize(*given, x2=x2, padding=(1, 0, 0, 2)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_groupnorm_takes_one_row_of_terms_for_the_batch(assert_steps: Step) -> None:
    x, terms = torch.randn(3, 32, 4, 4), {name: torch.randn(32) for name in ("pre_add", "norm_scale", "norm_shift")}
    expected = reference.groupnorm_silu_quantize(x, 4, None, None, 1e-5, 0.3, 0, 4, **terms)
    q = groupnorm_silu_quantize(x.to(DEVICE), 4, None, None, 1e-5, quantization(0.3, 0), 4, **on_device(terms))
    assert_steps(q, expected)


@pytest.mark.parametrize("shape, groups", [((1, 64, 24, 24), 8), ((1, 6, 70, 70), 6)])
@pytest.mark.parametrize("mean", [100.0, 3000.0])
def test_groupnorm_keeps_its_digits_where_the_mean_is_far_above_the_deviation(
    mean: float, shape: tuple[int, ...], groups: int
) -> None:
    x = torch.randn(shape) + mean
    for pre_add in (None, torch.full((shape[1],), -mean / 2)):
        options = {} if pre_add is None else {"pre_add": pre_add}
        exact = reference.groupnorm_silu_quantize(x, groups, None, None, 1e-5, None, 0, 8, **options)
        y = groupnorm_silu_quantize(x.to(DEVICE), groups, None, None, 1e-5, None, **on_device(options))
        assert_as_close_as_torch(y, plain_groupnorm(x, groups, None, None, 1e-5, **options), exact)


def test_groupnorm_of_a_constant_image_is_its_bias() -> None:
    x, bias = torch.full((2, 8, 9, 9), 7.25, device=DEVICE), torch.randn(8)
    y = groupnorm_silu_quantize(x, 2, None, bias.to(DEVICE), 1e-5, None, silu=False)
    assert torch.equal(y.cpu(), bias[:, None, None].expand(2, 8, 9, 9))


@pytest.mark.parametrize("case", ["3x3", "boxes", "small images in boxes", "in parts", "two segments", "1x1"])
def test_groupnorm_takes_its_statistics_from_the_convolution_before(case: str) -> None:
    """The same affine map as from a second pass over the convolution's output, to float32's last digits."""
    size = {"small images in boxes": (4, 4), "3x3": (6, 8)}.get(case, (8, 16))
    kernel, dtype = {"1x1": ((1, 1), torch.float32)}.get(case, ((3, 1), torch.float16))
    pixels, n, tile = size[0] * size[1], 24, Tile(64, 32, 64, 4, 1)
    launch = Launch(tile, 2 if case == "in parts" else 1, "boxes" in case)
    geometry = Geometry(kernel, padding=(0, 0, 0, 0) if case == "1x1" else (1, 1, 0, 0))
    segments = []
    for _ in range(2 if case == "two segments" else 1):
        image = torch.randint(-128, 128, (3, 64, *size), dtype=torch.int8).contiguous(memory_format=CHANNELS_LAST)
        weight = torch.randint(-127, 128, (n, 64 * kernel[0] * kernel[1]), dtype=torch.int8)
        packed = pack(weight, torch.rand(n) * 1e-3 + 1e-4, 8)
        segments.append(Segment(image.to(DEVICE), on_device(packed), quantization(0.04, 3)))
    given = (segments, geometry, None, (torch.randn(n) * 30).to(DEVICE))
    statistics = statistics_for(3, n, pixels, DEVICE)
    assert statistics is not None and statistics.shape == (3, pixels // min(pixels & -pixels, 64), 2, n)
    y = int_conv2d(*given, out_dtype=dtype, launch=launch, statistics=statistics)
    assert torch.equal(y, int_conv2d(*given, out_dtype=dtype, launch=launch))
    rows, terms = y.movedim(1, -1).reshape(3, pixels, n), (8, None, None, 1e-5, None, None, None)
    maps = [affine_of(rows, None, *terms, statistics=given).double() for given in (statistics, None)]
    assert torch.allclose(*maps, rtol=2e-6, atol=2e-6 * float(maps[1].abs().max()))
    exact = reference.groupnorm_silu_quantize(y.cpu(), 8, None, None, 1e-5, None, 0, 8)
    z = groupnorm_silu_quantize(y, 8, None, None, 1e-5, None, statistics=statistics)
    assert_as_close_as_torch(z, plain_groupnorm(y.cpu(), 8, None, None, 1e-5), exact)


def test_statistics_of_a_skip_concatenation_are_joined() -> None:
    x, x2 = torch.randn(2, 32, 4, 8).to(DEVICE), (torch.randn(2, 16, 4, 8) + 2).to(DEVICE)
    parts = []
    for part in (x, x2):
        chunks = part.movedim(1, -1).reshape(2, 1, 32, -1).double()
        mean = chunks.mean(2)
        parts.append(torch.stack((mean, ((chunks - mean[:, :, None]) ** 2).sum(2)), 2).float())
    statistics = torch.cat(parts, -1)
    assert statistics.shape == statistics_for(2, 48, 32, DEVICE).shape
    given: dict[str, Any] = {"x2": x2, "pre_add": torch.randn(2, 48).to(DEVICE)}
    y, expected = (
        groupnorm_silu_quantize(x, 4, None, None, 1e-5, None, statistics=s, **given) for s in (statistics, None)
    )
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert statistics_for(1, 1, 5 * 7 * 8, DEVICE) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (33, 63), (2, 9, 1040), (2, 32, 320), (16, 1280), (2, 5120)])
def test_layernorm_quantize(shape: tuple[int, ...], dtype: torch.dtype, assert_steps: Step) -> None:
    x = (torch.randn(shape) * 2 + 3).to(dtype)
    weight, bias = torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1]).to(dtype)
    for affine in ((weight, bias), (None, None)):
        on_it = tuple(None if values is None else values.to(DEVICE) for values in affine)
        q = layernorm_quantize(surrounded(x), *on_it, 1e-5, quantization(0.02, 11))
        assert_steps(q, reference.layernorm_quantize(x, *affine, 1e-5, 0.02, 11, 8))
        y = layernorm_quantize(surrounded(x), *on_it, 1e-5, None)
        exact = reference.layernorm_quantize(x, *affine, 1e-5, None, 0, 8)
        assert_as_close_as_torch(y, F.layer_norm(x, shape[-1:], *affine, 1e-5), exact)


@pytest.mark.parametrize("mean", [100.0, 3000.0])
def test_layernorm_keeps_its_digits_where_the_mean_is_far_above_the_deviation(mean: float) -> None:
    x = torch.randn(16, 1280) + mean
    y = layernorm_quantize(x.to(DEVICE), None, None, 1e-5, None)
    exact = reference.layernorm_quantize(x, None, None, 1e-5, None, 0, 8)
    assert_as_close_as_torch(y, F.layer_norm(x, (1280,), None, None, 1e-5), exact)


def test_norms_give_the_dtype_that_is_asked_for() -> None:
    x = torch.randn(2, 8, 6, device=DEVICE)
    for dtype in DTYPES:
        assert layernorm_quantize(x, None, None, 1e-5, None, out_dtype=dtype).dtype == dtype
        assert groupnorm_silu_quantize(x, 2, None, None, 1e-5, None, out_dtype=dtype).dtype == dtype


@pytest.mark.parametrize("k", [1, 33, 64, 130, 1040])
def test_rows_are_written_packed(k: int) -> None:
    x, inverse, table = torch.randn(17, k).to(DEVICE), (torch.rand(k) + 0.5).to(DEVICE), quantization(0.3, -3)
    weight, bias = torch.randn(k).to(DEVICE), torch.randn(k).to(DEVICE)
    for run in (
        lambda **options: quantize(surrounded(x), table, 4, channel_inverse=inverse, **options),
        lambda **options: quantize(surrounded(torch.cat((x, x), 1)), table, 4, activation="geglu", **options),
    ):
        packed = run(packed=True)
        assert packed.dtype == torch.uint8 and packed.shape == (17, packed_width(k))
        assert torch.equal(unpack_rows(packed, k), run())
    packed = layernorm_quantize(surrounded(x), weight, bias, 1e-5, table, 4, packed=True)
    assert packed.dtype == torch.uint8 and packed.shape == (17, packed_width(k))
    plain = layernorm_quantize(x, weight, bias, 1e-5, table, 4)
    # the row's sums are added in another order
    steps = (unpack_rows(packed, k).int() - plain.int()).abs()
    assert int(steps.max()) <= 1 and int(steps.sum()) <= 1e-3 * steps.numel()


@pytest.mark.parametrize("upsample, padding", [(1, NO_PADDING), (2, (1, 0, 2, 1))])
@pytest.mark.parametrize("c2", [0, 64])
def test_images_are_written_packed(c2: int, upsample: int, padding: Any) -> None:
    x, table = torch.randn(2, 128, 5, 3), quantization(0.3, -3)
    place: dict[str, Any] = {"upsample": upsample, "padding": padding}
    options = place | ({"x2": surrounded(torch.randn(2, c2, 5, 3))} if c2 else {})
    weight, inverse = torch.randn(128 + c2).to(DEVICE), (torch.rand(128 + c2) + 0.5).to(DEVICE)
    normalised = (surrounded(x), 32, weight, None, 1e-5, table, 4)
    for packed, plain in (
        [quantize(surrounded(x), table, 4, packed=p, **place) for p in (True, False)],
        [groupnorm_silu_quantize(*normalised, packed=p, **options) for p in (True, False)],
        [groupnorm_silu_quantize(*normalised, channel_inverse=inverse, packed=p, **options) for p in (True, False)],
    )[: 3 if upsample == 1 else 2]:
        assert packed.dtype == torch.uint8 and packed.is_contiguous(memory_format=CHANNELS_LAST)
        assert torch.equal(unpack_rows(packed.movedim(1, -1), plain.shape[1]).movedim(-1, 1), plain)


def test_two_runs_give_the_same_bits() -> None:
    x, table = torch.randn(1, 33, 24, 24).half().to(DEVICE), quantization(0.03, -4)
    rows = torch.randn(5, 1040).to(DEVICE)
    for run in (
        lambda: quantize(x, table, 8, activation="gelu"),
        lambda: groupnorm_silu_quantize(x, 3, None, None, 1e-5, None, out_dtype=torch.float32),
        lambda: layernorm_quantize(rows, None, None, 1e-5, None),
    ):
        assert torch.equal(run(), run())


def test_block_sizes_cover_what_they_have_to() -> None:
    for pixels in (1, 3, 64, 4096, 16384):
        for features in ((1,), (33,), (320,), (2560,), (320, 640), (1, 33)):
            block_p, block_c = block_shape(pixels, *features)
            assert block_p & (block_p - 1) == 0 and 512 <= block_p * block_c <= 2048
            chunk = tiles_of(pixels, block_p) * block_p
            assert -(-pixels // chunk) <= MAX_CHUNKS
    assert block_shape(4096, 320) == (32, 64) and block_shape(4096, 1280) == (8, 256)
    for chunks in (1, 5, 64):
        for size in (1, 10, 80, 2560):
            block_k, block_c, _ = merged_block(chunks, size)
            assert block_k * block_c <= 1024 and (block_k >= chunks or block_k * block_c >= 512)
    for k in (1, 17, 320, 1040, 5120, 32768):
        block_m, block_k, warps = block_of_rows(4096, k)
        assert block_k >= k and block_m * block_k <= 32 * 32 * warps and warps <= 32
    assert tiles_per_program(1, 5) == 1 and tiles_per_program(512, 10) == 5 and tiles_per_program(4096, 80) == 8


X = torch.ones(1, 2, 3, 4)
TABLE = torch.tensor([0.1, 10.0, 0.0])


WRONG: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, "x must be float16.*got torch.int8", lambda: quantize(X.to(torch.int8), TABLE, 8)),
    (TypeError, "x must be float16.*got torch.float64", lambda: quantize(X.double(), TABLE, 8)),
    (ValueError, "bits must be 4 or 8, got 5", lambda: quantize(X, TABLE, 5)),
    (TypeError, "quantization must be float32.*got torch.float64", lambda: quantize(X, TABLE.double(), 8)),
    (ValueError, r"quantization must be dense \[3\], got \[2\]", lambda: quantize(X, TABLE[:2], 8)),
    (
        ValueError,
        r"statistics must be dense float32 \[1, chunks, 2, 2\].*dividing 12 pixels, got torch.float32 \[1, 5, 2, 2\]",
        lambda: groupnorm_silu_quantize(X, 1, None, None, 1e-5, TABLE, statistics=torch.ones(1, 5, 2, 2)),
    ),
    (ValueError, "packed needs a quantization with bits=4, got 8", lambda: quantize(X, TABLE, 8, packed=True)),
    (ValueError, "packed needs.*got none", lambda: layernorm_quantize(X, None, None, 0.1, None, 4, packed=True)),
    (
        ValueError,
        "packed needs multiples of 64 channels, got 2 and 0",
        lambda: groupnorm_silu_quantize(X, 1, None, None, 1e-5, TABLE, 4, packed=True),
    ),
    (ValueError, "activation must be one of none.*got 'relu6'", lambda: quantize(X, TABLE, 8, activation="relu6")),
    (ValueError, "even number of features.*3, 3", lambda: quantize(X[0, 0, :, :3], TABLE, 8, activation="geglu")),
    (ValueError, r"channel_inverse.*\[2\], got \[4\]", lambda: quantize(X, TABLE, 8, channel_inverse=torch.ones(4))),
    (ValueError, "upsample must be a positive integer, got 0", lambda: quantize(X, TABLE, 8, upsample=0)),
    (ValueError, "padding must be.*got", lambda: quantize(X, TABLE, 8, padding=(1, 1))),
    (ValueError, "padding must be.*-1", lambda: quantize(X, TABLE, 8, padding=(0, 0, 0, -1))),
    (ValueError, r"x must be \[N, C, H, W\] to be", lambda: quantize(X[0], TABLE, 8, upsample=2)),
    (ValueError, r"x must have features.*got \[\]", lambda: quantize(X[0, 0, 0, 0], TABLE, 8)),
    (ValueError, "groups must divide the 2 channels", lambda: groupnorm_silu_quantize(X, 3, None, None, 1e-5, TABLE)),
    (ValueError, "x must be .*spatial", lambda: groupnorm_silu_quantize(X[0, 0], 1, None, None, 1e-5, TABLE)),
    (ValueError, "eps must be", lambda: groupnorm_silu_quantize(X, 1, None, None, -1.0, TABLE)),
    (ValueError, r"bias must be dense \[2\]", lambda: groupnorm_silu_quantize(X, 1, None, torch.ones(3), 1e-5, TABLE)),
    (
        TypeError,
        "x2 must be torch.float32 like x",
        lambda: groupnorm_silu_quantize(X, 1, None, None, 0.1, TABLE, x2=X.half()),
    ),
    (ValueError, "x2 must be", lambda: groupnorm_silu_quantize(X, 1, None, None, 0.1, TABLE, x2=X[:, :, :2])),
    (
        ValueError,
        r"pre_add must be \[2\] or \[1, 2\], got \[2, 2\]",
        lambda: groupnorm_silu_quantize(X, 1, None, None, 0.1, TABLE, pre_add=torch.ones(2, 2)),
    ),
    (TypeError, "out_dtype must be None", lambda: layernorm_quantize(X, None, None, 0.1, TABLE, out_dtype=torch.half)),
    (
        TypeError,
        "out_dtype must be float16",
        lambda: layernorm_quantize(X, None, None, 0.1, None, out_dtype=torch.int8),
    ),
    (ValueError, r"weight must be dense \[4\]", lambda: layernorm_quantize(X, torch.ones(3), None, 0.1, TABLE)),
    (ValueError, "K <= 32768, got", lambda: layernorm_quantize(torch.ones(40000), None, None, 0.1, TABLE)),
]


@pytest.mark.parametrize("error, message, call", WRONG)
def test_wrong_arguments_are_named(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()
