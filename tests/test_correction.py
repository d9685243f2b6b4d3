"""Corrections from moments: planted truths recovered, closed forms against numerical minimisers, degenerate input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qdiff_engine.correction.drift import input_affine, input_bias
from qdiff_engine.correction.moments import Moments
from qdiff_engine.correction.output import LEAST_K, KeptSums, identity, mmse, ner, ptqd
from qdiff_engine.correction.variance import calibrated_sigma, sigma_scale

SHAPE = (64, 3, 32, 32)
BIAS = torch.tensor([0.05, -0.12, 0.3], dtype=torch.float64)
MEAN = torch.tensor([0.0, 0.7, -0.4], dtype=torch.float64)
DEVIATION = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)


def column(values: Tensor) -> Tensor:
    return values[:, None, None]


def planted(k: float, noise: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """e with its own mean and deviation per channel, and e_hat = (1 + k) e + bias + noise z.

    The planted moments are those of the samples themselves: z has mean 0, variance 1 and does not correlate with e.
    """
    generator = torch.Generator().manual_seed(seed)
    e, z = (standardised(torch.randn(SHAPE, generator=generator, dtype=torch.float64)) for _ in range(2))
    z = standardised(z - (z * e).mean((0, 2, 3), keepdim=True) * e)
    e = column(MEAN) + column(DEVIATION) * e
    return e, (1 + k) * e + column(BIAS) + noise * z


def standardised(values: Tensor) -> Tensor:
    """Mean 0 and variance 1 in every channel."""
    centred = values - values.mean((0, 2, 3), keepdim=True)
    return centred / centred.square().mean((0, 2, 3), keepdim=True).sqrt()


def correlation(a: Tensor, b: Tensor) -> float:
    """Correlation over samples, pixels and channels, each channel centred."""
    a, b = (value - value.mean((0, 2, 3), keepdim=True) for value in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("k", [0.0, 0.02, 0.25])
def test_ptqd_recovers_what_was_planted(k: float) -> None:
    e, quantized = planted(k)
    moments = Moments.of(e, quantized)
    found = ptqd(moments, clamp=False)
    assert float(moments.k) == pytest.approx(k, rel=1e-6, abs=1e-9)
    assert torch.allclose(found.a, torch.full((3,), 1 / (1 + k), dtype=torch.float64), rtol=1e-6)
    assert torch.allclose(found.b, -BIAS / (1 + k), rtol=1e-6, atol=0)
    assert float(found.noise_variance) == pytest.approx(0.01 / (1 + k) ** 2, rel=1e-6)
    left = column(found.a) * quantized + column(found.b) - e
    assert abs(correlation(left, e)) < 1e-3
    assert float(left.mean((0, 2, 3)).abs().max()) < 1e-9


def test_the_bias_is_the_mean_of_the_residual() -> None:
    """A channel mean neither masquerades as correlation, nor is the correlated part removed twice."""
    e, quantized = planted(0.3, noise=0.0)
    quantized = 1.3 * e
    moments = Moments.of(e, quantized)
    found = ptqd(moments)
    assert float(moments.k) == pytest.approx(0.3, rel=1e-9)
    assert float(found.b.abs().max()) < 1e-9, "no bias was planted; the mean of d is 0.3 E e"
    shifted = Moments.of(e, e + column(MEAN))
    assert abs(float(shifted.k)) < 1e-9
    assert torch.allclose(ptqd(shifted).b, -MEAN, atol=1e-9)


def test_negative_k_is_clamped_unless_asked() -> None:
    e, quantized = planted(-0.2)
    moments = Moments.of(e, quantized)
    assert torch.equal(ptqd(moments).a, torch.ones(3, dtype=torch.float64))
    assert torch.allclose(ptqd(moments, clamp=False).a, torch.full((3,), 1.25, dtype=torch.float64), rtol=0.01)
    clamped, free = (
        float((column(c.a) * quantized + column(c.b) - e).square().mean())
        for c in (ptqd(moments), ptqd(moments, clamp=False))
    )
    assert free < clamped
    for asked, factor in ((True, 1.0), (False, 1.25)):  # the correlated part is no noise, left in or not
        assert float(ptqd(moments, asked).noise_variance) == pytest.approx(factor**2 * 0.01, rel=1e-6)


@pytest.mark.parametrize("k", [-1.0, -1.05, -3.0])
def test_k_near_minus_one_stays_bounded(k: float) -> None:
    moments = Moments.of(*planted(k))
    found = ptqd(moments, clamp=False)
    assert torch.allclose(found.a, torch.full((3,), 1 / (1 + LEAST_K), dtype=torch.float64))
    assert bool(torch.isfinite(found.b).all()) and bool(torch.isfinite(ptqd(moments).b).all())


@pytest.mark.parametrize("k", [-0.3, 0.0, 0.25])
def test_mmse_is_the_regression_on_the_quantised_prediction(k: float) -> None:
    e, quantized = planted(k, noise=0.4)
    found = mmse(Moments.of(e, quantized))
    variance = DEVIATION.square()
    a = (1 + k) * variance / ((1 + k) ** 2 * variance + 0.16)
    assert torch.allclose(found.a, a, rtol=1e-6)
    assert torch.allclose(found.b, MEAN - a * ((1 + k) * MEAN + BIAS), rtol=1e-6, atol=0)
    left = column(found.a) * quantized + column(found.b) - e
    for channel in range(3):
        assert abs(correlation(left[:, channel : channel + 1], quantized[:, channel : channel + 1])) < 1e-3
    squared = left.square().mean((0, 2, 3))
    for change in (0.99, 1.01):  # no other slope has less error
        worse = change * column(found.a) * quantized
        worse = worse - worse.mean((0, 2, 3), keepdim=True) - (e - e.mean((0, 2, 3), keepdim=True))
        assert bool((worse.square().mean((0, 2, 3)) > squared).all())


def test_moments_merge_to_those_of_all_samples() -> None:
    e, quantized = planted(0.1)
    whole = Moments.of(e, quantized)
    parts = [Moments.of(a, b) for a, b in zip(e.split(7), quantized.split(7), strict=True)]
    merged = parts[-1]
    for part in reversed(parts[:-1]):
        merged = merged + part
    assert torch.allclose(merged.sums, whole.sums, rtol=1e-12)
    assert merged.sums.shape == (3, 15), "memory does not grow with samples"
    for name in ("mean", "variance", "error_mean", "error_variance", "covariance", "quantized_variance", "k", "snr"):
        assert torch.allclose(getattr(merged, name), getattr(whole, name), rtol=1e-9, atol=1e-12), name


def test_statistics_are_those_of_the_data() -> None:
    e, quantized = planted(0.1, noise=0.3)
    moments, k = Moments.of(e, quantized), torch.tensor(0.07, dtype=torch.float64)
    residual = quantized - e - k * e
    over = (0, 2, 3)
    assert torch.allclose(moments.variance, e.var(over, correction=0), rtol=1e-9)
    assert torch.allclose(moments.quantized_mean, quantized.mean(over), rtol=1e-9)
    assert torch.allclose(moments.quantized_variance, quantized.var(over, correction=0), rtol=1e-9)
    centred = (e - e.mean(over, keepdim=True)) * (quantized - quantized.mean(over, keepdim=True))
    assert torch.allclose(moments.quantized_covariance, centred.mean(over), rtol=1e-9)
    assert torch.allclose(moments.residual_mean(k), residual.mean(over), rtol=1e-9)
    assert torch.allclose(moments.residual_variances(k), residual.var(over, correction=0), rtol=1e-9)
    assert float(moments.snr) == pytest.approx(float(e.norm() / (quantized - e).norm()), rel=1e-9)
    assert float(moments.count) == 64 * 32 * 32


def test_rows_are_corrected_side_by_side() -> None:
    """Leading axes: the tables of all rows at once are those of each row."""
    rows = [Moments.of(*planted(k, noise)) for k, noise in ((0.1, 0.1), (0.3, 0.2))]
    together = Moments(torch.stack([row.sums for row in rows]))
    for correct in (ptqd, mmse, identity):
        every = correct(together)
        for r, row in enumerate(rows):
            one = correct(row)
            assert torch.equal(every.a[r], one.a) and torch.equal(every.b[r], one.b)
            assert torch.equal(every.noise_variance[r], one.noise_variance)


def test_normality_of_the_residual() -> None:
    e, quantized = planted(0.2)
    moments = Moments.of(e, quantized)
    normal = moments.normality(moments.k)
    assert abs(float(normal.skewness)) < 0.03 and abs(float(normal.excess_kurtosis)) < 0.06
    assert float(normal.p_value) > 0.01
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(SHAPE, generator=generator, dtype=torch.float64)
    exponential = -torch.log1p(-uniform)
    for noise, skewness, kurtosis in ((uniform, 0.0, -1.2), (exponential, 2.0, 6.0)):
        other = Moments.of(e, 1.2 * e + noise)
        found = other.normality(other.k)
        assert float(found.skewness) == pytest.approx(skewness, abs=0.05)
        assert float(found.excess_kurtosis) == pytest.approx(kurtosis, abs=0.3)
        assert float(found.p_value) < 1e-6
    for factor in (1.0, 1.3, 0.7):
        exact = Moments.of(e, factor * e)
        left = exact.normality(exact.k)
        assert [float(v) for v in (left.skewness, left.excess_kurtosis, left.p_value)] == [0, 0, 1], "nothing is left"


def ner_loss(gain: float, e: Tensor, quantized: Tensor, lambda1: float, lambda2: float, tau: float, n: int | None):
    """The loss as written, element by element, for one channel [n, H, W]."""
    kept = e.abs() > tau * e.abs().mean((1, 2), keepdim=True)
    e, quantized = e[kept], quantized[kept]
    squared = (gain * quantized - e).square().mean() / (e.square().mean() if n is None else 1)
    relative = (gain * quantized / e - 1).square().mean() * (1 if n is None else n)
    return float((1 - lambda1) * squared + lambda1 * relative + lambda2 * (gain - 1) ** 2)


def minimiser(loss: Any) -> float:
    """Golden-section search of a convex function."""
    low, high, ratio = -3.0, 3.0, (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return (low + high) / 2


@pytest.mark.parametrize("elements", [None, 3 * 32 * 32])
@pytest.mark.parametrize(("lambda1", "lambda2", "tau"), [(0.8, 0.1, 1.0), (0.0, 0.0, 0.5), (1.0, 0.3, 2.0)])
def test_ner_is_the_minimiser_of_its_loss(lambda1: float, lambda2: float, tau: float, elements: int | None) -> None:
    e, quantized = planted(0.15, noise=0.5)
    parts = [KeptSums.of(a, b, tau) for a, b in zip(e.split(10), quantized.split(10), strict=True)]
    kept = parts[0]
    for part in parts[1:]:
        kept = kept + part
    found = ner(kept, lambda1, lambda2, elements)
    for c in range(3):
        best = minimiser(lambda gain, c=c: ner_loss(gain, e[:, c], quantized[:, c], lambda1, lambda2, tau, elements))
        assert float(found[c]) == pytest.approx(best, abs=1e-6)


def test_ner_of_perfect_and_of_worthless_predictions() -> None:
    e, _ = planted(0.0)
    assert torch.allclose(ner(KeptSums.of(e, e)), torch.ones(3, dtype=torch.float64), atol=1e-12)
    generator = torch.Generator().manual_seed(9)
    noise = 30 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    assert float(ner(KeptSums.of(e, noise)).abs().max()) < 0.01
    nothing = torch.full((2, 3, 4, 4), 0.5)  # no |e| is above the mean: nothing is kept
    assert torch.equal(ner(KeptSums.of(nothing, 2 * nothing)), torch.ones(3, dtype=torch.float64))
    silent = KeptSums.of(e, torch.zeros_like(e))
    assert torch.equal(ner(silent, 0.0, 0.0), torch.ones(3, dtype=torch.float64)), "0 / 0 corrects nothing"


def test_ner_has_no_unit() -> None:
    e, quantized = planted(0.1, noise=0.5)
    one, other = (ner(KeptSums.of(scale * e, scale * quantized)) for scale in (1.0, 1e-3))
    assert torch.allclose(one, other, rtol=1e-9)


def test_input_bias_removes_a_planted_drift() -> None:
    """A rollout x' = c x + d e whose quantised branch drifts by a constant per element and step."""
    generator = torch.Generator().manual_seed(3)
    drifts = column(BIAS) * torch.randn(SHAPE[1:], generator=generator, dtype=torch.float64)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    quantized, uncorrected = x.clone(), x.clone()
    for step in range(10):
        drift = drifts * (step + 1) / 10
        jitter = 0.01 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        x, quantized, uncorrected = (
            0.9 * value - 0.1 * value.tanh() + own
            for value, own in ((x, 0.0), (quantized, drift + jitter), (uncorrected, drift + jitter))
        )
        quantized = quantized + input_bias(x, quantized)
    before, after = (float((x - other).mean(0).abs().max()) for other in (uncorrected, quantized))
    assert before > 0.1 and after < 1e-9
    assert float((x - quantized).square().mean()) < 0.01 * float((x - uncorrected).square().mean())


def test_input_affine_removes_a_planted_spread_and_drift() -> None:
    """x_hat = s x + drift with independent noise; g and B, fitted on one half, hold for the other."""
    generator = torch.Generator().manual_seed(4)
    size = (4000, *SHAPE[1:])
    x = 0.5 + torch.randn(size, generator=generator, dtype=torch.float64)
    drift = 0.3 * torch.randn(SHAPE[1:], generator=generator, dtype=torch.float64)
    quantized = 1.2 * x + drift + 0.5 * torch.randn(size, generator=generator, dtype=torch.float64)
    g, bias = input_affine(x[:2000], quantized[:2000])
    assert g == pytest.approx(1 / math.sqrt(1.2**2 + 0.5**2), rel=0.01)
    corrected = g * quantized + bias
    assert float((corrected[:2000] - x[:2000]).mean(0).abs().max()) < 1e-12
    assert float(corrected[:2000].var(0, correction=0).mean()) == pytest.approx(
        float(x[:2000].var(0, correction=0).mean()), rel=1e-12
    )
    seen, unseen = corrected[2000:], x[2000:]
    assert float(seen.var(0).mean() / unseen.var(0).mean()) == pytest.approx(1.0, rel=0.01)
    assert float((seen - unseen).mean(0).square().mean()) < 0.01 * float(drift.square().mean())


def test_input_affine_where_nothing_spreads() -> None:
    x = torch.randn(1, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    g, bias = input_affine(x, x + 1)
    assert g == 1.0 and torch.allclose(bias, torch.full(SHAPE[1:], -1.0, dtype=torch.float64), atol=1e-6)
    flat = torch.zeros(4, *SHAPE[1:])
    assert input_affine(torch.randn(4, *SHAPE[1:]), flat)[0] == 1.0
    spread = torch.randn(4, *SHAPE[1:])
    assert input_affine(flat, spread)[0] == 0.5, "it is bounded: latents are not wiped out"
    assert input_affine(spread, 0.1 * spread)[0] == 2.0


def test_the_variance_schedule_gives_the_planted_total() -> None:
    """x' = ce (e + noise) + s' z has the variance of ce e + s z, for PTQD's correction of a planted error."""
    generator = torch.Generator().manual_seed(5)
    e, quantized = planted(0.25, noise=0.4)
    found, ce, sigma = ptqd(Moments.of(e, quantized)), -0.7, 0.5
    calibrated = calibrated_sigma(*(torch.tensor([value], dtype=torch.float64) for value in (sigma, ce)),
                                  found.noise_variance[None])  # fmt: skip
    z = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    corrected = ce * (column(found.a) * quantized + column(found.b)) + float(calibrated) * z
    total = (corrected - ce * e).var(correction=0)
    assert float(total) == pytest.approx(sigma**2, rel=0.01)
    assert float(calibrated) ** 2 == pytest.approx(sigma**2 - (ce * 0.4 / 1.25) ** 2, rel=0.01)


def test_sigma_is_never_negative_and_zero_stays_zero() -> None:
    sigma, ce, noise = (torch.tensor(v, dtype=torch.float64) for v in ([0.0, 0.1, 0.1], [-1.0, -2.0, 0.5], [1.0, 1, 0]))
    assert torch.equal(sigma_scale(sigma, ce, noise), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    assert calibrated_sigma(sigma, ce, noise).tolist() == [0.0, 0.0, 0.1]


def test_one_sample_of_one_pixel() -> None:
    """No variance and no slope; only the distance itself is corrected."""
    e, quantized = torch.tensor([[[[0.4]], [[-1.0]]]]), torch.tensor([[[[0.5]], [[-1.5]]]])
    moments = Moments.of(e, quantized)
    for found in (ptqd(moments), mmse(moments)):
        assert torch.equal(found.a, torch.ones(2, dtype=torch.float64))
        assert torch.allclose(found.b, torch.tensor([-0.1, 0.5], dtype=torch.float64), atol=1e-7)
        assert float(found.noise_variance) == 0
    normality = moments.normality(moments.k)
    assert [float(v) for v in (normality.skewness, normality.excess_kurtosis, normality.p_value)] == [0, 0, 1]


def test_channels_without_variance() -> None:
    e, quantized = planted(0.2)
    e[:, 1], quantized[:, 1] = 0.3, 0.35
    moments = Moments.of(e.float(), quantized.float())
    assert moments.variance[1] == 0 and moments.quantized_variance[1] == 0 and moments.covariance[1] == 0
    assert float(moments.k) == pytest.approx(0.2, rel=0.01)
    found = mmse(moments)
    assert found.a[1] == 1 and float(found.b[1]) == pytest.approx(-0.05, abs=1e-6)
    constant = torch.full((4, 3, 8, 8), 0.1)
    for found in (ptqd(Moments.of(constant, constant)), mmse(Moments.of(constant, constant))):
        assert torch.equal(found.a, torch.ones(3, dtype=torch.float64))
        assert float(found.b.abs().max()) < 1e-12 and float(found.noise_variance) == 0
    assert math.isinf(float(Moments.of(constant, constant).snr))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_is_refused(bad: float, which: int) -> None:
    pair = list(planted(0.0))
    pair[which][3, 1, 2, 2] = bad
    name = ("float", "quantised")[which]
    for measure in (Moments.of, KeptSums.of, input_bias, input_affine):
        with pytest.raises(ValueError, match=f"the {name} prediction holds NaN or infinity"):
            measure(*pair)


def test_wrong_arguments() -> None:
    e, quantized = planted(0.0)
    with pytest.raises(ValueError, match="one shape"):
        Moments.of(e, quantized[:, :2])
    with pytest.raises(ValueError, match="n >= 1"):
        Moments.of(e[:0], quantized[:0])
    with pytest.raises(ValueError, match=r"float64 \[..., C, 15\]"):
        Moments(torch.zeros(3, 15))
    with pytest.raises(ValueError, match="finite"):
        Moments(torch.full((3, 15), math.nan, dtype=torch.float64))
    empty = Moments(torch.zeros(3, 15, dtype=torch.float64))
    for correct in (ptqd, mmse, identity):
        with pytest.raises(ValueError, match="no samples"):
            correct(empty)
    kept = KeptSums.of(e, quantized)
    for weights in ((-0.1, 0.1), (1.1, 0.1), (0.5, -1.0), (math.nan, 0.1)):
        with pytest.raises(ValueError, match="lambda1 must lie in"):
            ner(kept, *weights)
    with pytest.raises(ValueError, match="elements must be"):
        ner(kept, elements=0)
    with pytest.raises(ValueError, match="threshold must be"):
        KeptSums.of(e, quantized, -1.0)
    one = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="one shape"):
        calibrated_sigma(one, one, one[:1])
    for arguments in ((-one, one, one), (one, one, -one), (one, one * math.nan, one)):
        with pytest.raises(ValueError, match="must be finite"):
            calibrated_sigma(*arguments)
