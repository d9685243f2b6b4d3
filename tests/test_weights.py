"""Quantised weights: the stored form and back, bit for bit, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_engine import numerics
from qdiff_engine.weights import QuantizedWeight


def random_weight(shape: tuple[int, ...], bits: int, seed: int = 0) -> QuantizedWeight:
    g = torch.Generator().manual_seed(seed)
    low, high = numerics.weight_range(bits)
    values = torch.randint(low, high + 1, shape, generator=g, dtype=torch.int8)
    return QuantizedWeight(values, torch.rand(shape[0], generator=g) + 0.01, bits)


sizes = st.integers(1, 6)
shapes = st.one_of(st.tuples(sizes, st.integers(1, 70)), st.tuples(sizes, sizes, sizes, sizes))


@settings(deadline=None)
@given(shapes, st.sampled_from([4, 8]), st.integers(0, 99))
def test_stored_round_trip(shape: tuple[int, ...], bits: int, seed: int) -> None:
    weight = random_weight(shape, bits, seed)
    stored = weight.stored()
    k = math.prod(shape[1:])
    assert stored.dtype == (torch.uint8 if bits == 4 else torch.int8)
    assert tuple(stored.shape) == (shape[0], (k + 1) // 2 if bits == 4 else k)
    again = QuantizedWeight.from_stored(stored, weight.scale, bits, shape)
    assert torch.equal(again.values, weight.values) and again.values.is_contiguous()
    assert torch.equal(again.scale, weight.scale) and again.bits == bits


@pytest.mark.parametrize("bits", [4, 8])
def test_k_runs_over_row_column_channel(bits: int) -> None:
    """stored[n, (r, s, c)] = values[n, c, r, s], two to a byte with the even k low."""
    weight = random_weight((2, 3, 2, 5), bits)
    stored = weight.stored()
    for n, c, r, s in [(0, 0, 0, 0), (1, 2, 1, 4), (0, 1, 1, 3), (1, 0, 0, 1)]:
        k = (r * 5 + s) * 3 + c
        if bits == 8:
            found = int(stored[n, k])
        else:
            found = (int(stored[n, k // 2]) >> (4 * (k % 2))) & 0xF
            found -= 16 * (found > 7)
        assert found == int(weight.values[n, c, r, s])


@pytest.mark.parametrize("shape", [(7, 33), (5, 3, 3, 1)])
@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_in_pieces(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], bits: int) -> None:
    weight = random_weight(shape, bits)
    for chunk in (1, 20, 66, 10**6):
        monkeypatch.setattr("qdiff_engine.weights._CHUNK", chunk)
        again = QuantizedWeight.from_stored(weight.stored(), weight.scale, bits, shape)
        assert torch.equal(again.values, weight.values)


def test_dequantize() -> None:
    weight = random_weight((3, 2, 3, 3), 8)
    expected = torch.stack([weight.values[n].double() * weight.scale[n].double() for n in range(3)])
    assert torch.equal(weight.dequantize(torch.float64), expected)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"values": torch.ones(2, 3)}, "values must be a non-empty int8"),
    "rank": ({"values": torch.ones(2, 3, 4, dtype=torch.int8)}, "values must be a non-empty int8"),
    "empty": ({"values": torch.ones(2, 0, dtype=torch.int8)}, "values must be a non-empty int8"),
    "bits": ({"bits": 5}, "bits must be 4 or 8"),
    "rows of scale": ({"scale": torch.ones(3)}, "scale must be float32"),
    "type of scale": ({"scale": torch.ones(2).double()}, "scale must be float32"),
    "NaN": ({"scale": torch.tensor([1.0, math.nan])}, "positive and finite"),
    "infinity": ({"scale": torch.tensor([1.0, math.inf])}, "positive and finite"),
    "zero": ({"scale": torch.tensor([1.0, 0.0])}, "positive and finite"),
    "-128": ({"values": torch.full((2, 3), -128, dtype=torch.int8)}, r"\[-127, 127\]"),
    "8 in 4 bits": ({"values": torch.full((2, 3), 8, dtype=torch.int8), "bits": 4}, r"\[-8, 7\]"),
    "K": ({"values": torch.ones(2, numerics.MAX_K + 1, dtype=torch.int8)}, "K must be at most"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    changes, message = BAD[case]
    fields = {"values": torch.ones(2, 3, dtype=torch.int8), "scale": torch.ones(2), "bits": 8, **changes}
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(**fields)


def test_refused_when_stored() -> None:
    """Sizes, types and shapes that do not fit; a half byte of padding that is not 0; values out of range."""
    weight = random_weight((4, 7), 4)
    stored, scale = weight.stored(), weight.scale
    for shape in [(), (4,), (4, 7, 1), (4, 9), (3, 7), (0, 7), (4, -7), (2**31, 2**31)]:
        with pytest.raises(ValueError, match="shape must hold|stored weights must be"):
            QuantizedWeight.from_stored(stored, scale, 4, shape)
    with pytest.raises(ValueError, match="stored weights must be"):
        QuantizedWeight.from_stored(stored, scale, 8, (4, 7))
    padded = stored.clone()
    padded[1, -1] |= 0x10
    with pytest.raises(ValueError, match="padded with 0"):
        QuantizedWeight.from_stored(padded, scale, 4, (4, 7))
    with pytest.raises(ValueError, match=r"\[-127, 127\]"):
        QuantizedWeight.from_stored(torch.full((1, 2), -128, dtype=torch.int8), torch.ones(1), 8, (1, 2))
