"""Observers against brute force on the values themselves."""

import pytest
import torch

from qdiff_engine import numerics
from qdiff_engine.calibration.observers import BINS, Histogram, affine, merged
from qdiff_engine.ops import statistics


def _histogram(x: torch.Tensor, parts: int = 1) -> Histogram:
    histogram = Histogram()
    for part in x.chunk(parts):
        histogram.update(part)
    return histogram


def _affine(observer: str, histogram: Histogram, bits: int) -> tuple[float, int]:
    ranges = torch.tensor([[histogram.low, histogram.high]], dtype=torch.float64)
    assert histogram.counts is not None
    scale, zero_point = affine(observer, histogram.counts[None].double(), ranges, bits)
    return float(scale), int(zero_point)


def _error(x: torch.Tensor, scale: float, zero_point: int, bits: int) -> float:
    q = numerics.quantize(x, scale, zero_point, bits)
    return float((numerics.dequantize(q, scale, zero_point) - x).square().mean())


DISTRIBUTIONS = {
    "normal": lambda: torch.randn(20000),
    "silu": lambda: torch.nn.functional.silu(torch.randn(20000) * 2),
    "outlier": lambda: torch.cat([torch.randn(20000), torch.tensor([40.0])]),
    "one-sided": lambda: torch.rand(20000) * 3 + 1,
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_is_close_to_the_best_of_a_dense_search(name: str, bits: int) -> None:
    x = DISTRIBUTIONS[name]()
    scale, zero_point = _affine("mse", _histogram(x), bits)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    best = float("inf")
    for a in torch.linspace(0.03, 1, 40):
        for b in torch.linspace(0.03, 1, 40):
            s, z = numerics.affine_from_range(a * low * torch.ones(1), b * high * torch.ones(1), bits)
            best = min(best, _error(x, float(s), int(z), bits))
    assert _error(x, scale, zero_point, bits) <= best * 1.03


@pytest.mark.parametrize("bits", [4, 8])
def test_minmax_clips_nothing(bits: int) -> None:
    x = torch.randn(5000)
    scale, zero_point = _affine("minmax", _histogram(x), bits)
    q_low, q_high = numerics.activation_range(bits)
    half = 0.5001 * scale  # what rounding the zero point may take off an end
    assert scale * (q_low - zero_point) <= float(x.min()) + half
    assert scale * (q_high - zero_point) >= float(x.max()) - half


def test_percentile_ignores_a_lone_outlier() -> None:
    x = torch.cat([torch.randn(50000), torch.tensor([1000.0])])
    assert _affine("percentile", _histogram(x), 8)[0] < _affine("minmax", _histogram(x), 8)[0] / 20


def test_a_constant_zero_site_is_defined() -> None:
    for observer in ("minmax", "percentile", "mse"):
        assert _affine(observer, _histogram(torch.zeros(100)), 8) == (1.0, 0)


def test_histogram_keeps_every_value_when_its_range_grows() -> None:
    x = torch.cat([torch.randn(1000) * s for s in (0.1, 1.0, 5.0, 2.0)])
    histogram = _histogram(x, parts=4)
    assert histogram.counts is not None and float(histogram.counts.sum()) == len(x)
    assert histogram.low <= float(x.min()) and histogram.high >= float(x.max())
    width = (histogram.high - histogram.low) / BINS
    centres = histogram.low + width * (torch.arange(BINS).double() + 0.5)
    placed = torch.repeat_interleave(centres, histogram.counts.long())
    assert float((placed - x.double().sort().values).abs().max()) < 3 * width, "each value near its own bin"


def test_histogram_refuses_nan() -> None:
    with pytest.raises(ValueError, match="NaN or infinit"):
        Histogram().update(torch.tensor([1.0, float("nan")]))


def test_merging_rows_keeps_counts_and_spans_all() -> None:
    counts = torch.randint(0, 50, (5, 2, BINS)).double()
    ranges = torch.stack([-torch.rand(5, 2) - 0.1, torch.rand(5, 2) + 0.1], -1).double()
    grouped, spans = merged(counts, ranges, 2)
    assert torch.equal(grouped[0], grouped[1]) and not torch.equal(grouped[1], grouped[2])
    assert torch.equal(grouped[0].sum(-1), counts[:2].sum((0, 2)))
    assert torch.equal(spans[0, :, 0], ranges[:2, :, 0].amin(0))
    static, _ = merged(counts, ranges, 0)
    assert torch.equal(static[4].sum(-1), counts.sum((0, 2)))


def test_native_statistics_equal_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 17, 33)
    native = statistics.min_max(x), statistics.histogram(x, 64, -2.0, 2.0)
    monkeypatch.setattr(statistics.extension, "available", lambda: (False, "hidden"))
    assert statistics.min_max(x) == native[0]
    # the two may put a value on a bin's very edge into either neighbour
    assert int((statistics.histogram(x, 64, -2.0, 2.0) - native[1]).abs().sum()) <= 4
