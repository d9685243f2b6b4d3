"""The attention kernel against float64, at most twice plain PyTorch's own error."""

from typing import Any

import pytest
import torch

from qdiff_engine import numerics, ops
from qdiff_engine.ops import native, plain

SHAPES = [(1, 1, 1, 1, 1), (2, 3, 17, 33, 5), (8, 32, 64, 64, 8), (1, 8, 33, 77, 40), (2, 2, 63, 1040, 160)]


def _needs_extension() -> None:
    available, reason = native.available()
    if not available:
        pytest.skip(f"the C++ extension is not here: {reason}")


def _inputs(shape: tuple[int, ...], spread: float = 1.0) -> tuple[torch.Tensor, ...]:
    """q, k, v [B, H, L, D] as attention blocks make them: views of [B, L, H, D]."""
    batch, heads, queries, keys, dim = shape
    return tuple(spread * torch.randn(batch, n, heads, dim).transpose(1, 2) for n in (queries, keys, keys))


@pytest.mark.parametrize("spread", [0.1, 1.0, 12.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape: tuple[int, ...], spread: float) -> None:
    _needs_extension()
    q, k, v = _inputs(shape, spread)
    exact = plain.attention(q.double(), k.double(), v.double())
    error, plain_error = ((a - exact).abs().max() for a in (native.attention(q, k, v), plain.attention(q, k, v)))
    floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert error <= max(2 * plain_error, floor)


def test_attention_scale_and_layout() -> None:
    _needs_extension()
    q, k, v = _inputs((2, 4, 20, 24, 8))
    exact = plain.attention(q.double(), k.double(), v.double(), scale=0.25)
    out = native.attention(q.contiguous(), k, v.transpose(2, 3).contiguous().transpose(2, 3), scale=0.25)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    assert out.transpose(1, 2).is_contiguous(), "the heads of a token are adjacent in memory"


def test_attention_is_the_same_for_any_thread_count_and_batch() -> None:
    _needs_extension()
    q, k, v = _inputs((3, 4, 40, 70, 16))
    threads = torch.get_num_threads()
    whole = native.attention(q, k, v)
    torch.set_num_threads(1)
    try:
        assert torch.equal(whole, native.attention(q, k, v))
        assert torch.equal(whole[1:2], native.attention(q[1:2], k[1:2], v[1:2]))
    finally:
        torch.set_num_threads(threads)


def test_attention_of_equal_scores_is_the_mean() -> None:
    _needs_extension()
    q, k, v = _inputs((1, 2, 5, 300, 8))
    out = native.attention(torch.zeros_like(q), k, v)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [native, plain])
@pytest.mark.parametrize("storage", [torch.int8, torch.uint8])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_quantises_its_result(shape: tuple[int, ...], storage: torch.dtype, backend: Any) -> None:
    _needs_extension()
    q, k, v = _inputs(shape)
    exact = plain.attention(q.double(), k.double(), v.double()).float()
    result = backend.attention(q, k, v, output=(0.01, -7, 8), storage=storage)
    steps = (numerics.signed(result).int() - numerics.quantize(exact, 0.01, -7, 8).int()).abs()
    assert result.dtype == storage and result.transpose(1, 2).is_contiguous()
    assert int(steps.max()) <= 1 and int(steps.sum()) <= 1e-3 * steps.numel() + 1


def test_attention_with_scores_on_either_side_of_the_bound() -> None:
    """Small heads take a path without a maximum while scores allow it: rows of both kinds, side by side."""
    _needs_extension()
    q, k, v = _inputs((2, 2, 300, 130, 8))
    q[:, :, 100:140] *= 40.0
    exact = plain.attention(q.double(), k.double(), v.double())
    error, plain_error = ((a - exact).abs().max() for a in (native.attention(q, k, v), plain.attention(q, k, v)))
    assert error <= 2 * plain_error
    assert torch.equal(native.attention(q[:1], k[:1], v[:1]), native.attention(q, k, v)[:1])


def test_attention_refuses_what_does_not_fit() -> None:
    _needs_extension()
    q, k, v = _inputs((1, 2, 5, 7, 8))
    with pytest.raises(ValueError, match="k and v"):
        native.attention(q, k, v[:, :, :6])
    with pytest.raises(TypeError, match="q must be float32"):
        native.attention(q.double(), k, v)
    with pytest.raises(ValueError, match="scale must be positive"):
        native.attention(q, k, v, output=(0.0, 0, 8))


def test_attention_is_dispatched() -> None:
    expected = "native" if native.available()[0] else "torch"
    assert ops.chosen("attention") == expected
