"""quantize and the fused norms on every backend against `reference`: at most one step off, and that seldom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import CHANNELS_LAST, NO_PADDING, STORAGES, assert_close, assert_steps

from qdiff_engine import numerics, ops, reference
from qdiff_engine.ops import operands

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
@pytest.mark.parametrize(
    "upsample, padding", [(2, NO_PADDING), (1, (0, 1, 0, 1)), (2, (1, 1, 1, 1)), (3, (2, 0, 1, 3))]
)
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


@pytest.mark.parametrize("padding, upsample", [(NO_PADDING, 1), ((1, 1, 1, 1), 1), ((0, 1, 0, 1), 2)])
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
@pytest.mark.parametrize("size, padding", [((5, 6), NO_PADDING), ((5, 6), (1, 1, 1, 1)), ((16, 20), NO_PADDING)])
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
