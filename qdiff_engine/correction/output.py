"""Corrections of the prediction, e' = a e_hat + b per row and channel, each a plain function of moments.

They compose with the correction of the latents (`drift`) and the variance schedule (`variance`), which read nothing
but their result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Moments, paired

LEAST_K = -0.9  # at k = -1 the prediction holds no signal; 1 / (1 + k) is bounded by 10
KEPT = 6  # sums of `KeptSums`: count, e_hat e, e^2, e_hat / e, e_hat^2, e_hat^2 / e^2


@dataclass(frozen=True)
class OutputCorrection:
    """e'[c] = a[c] e_hat[c] + b[c].

    Args:
        a, b: float64 [..., C].
        noise_variance: float64 [...], the mean over channels of a^2 Var(d - k e): what is left that does not correlate
            with e, and what a sampler's own variance may absorb. In the units of the prediction, squared.
    """

    a: Tensor
    b: Tensor
    noise_variance: Tensor


def identity(moments: Moments) -> OutputCorrection:
    """a = 1, b = 0: no correction, and the variance of what does not correlate with e."""
    return corrected_by(moments, torch.ones_like(moments.mean))


def corrected_by(moments: Moments, a: Tensor) -> OutputCorrection:
    """b = 0 and a given a [..., C], with the variance that it leaves."""
    moments.check_measured()
    noise = (a.square() * moments.residual_variances(moments.k)).mean(-1)
    return OutputCorrection(a, torch.zeros_like(a), noise)


def ptqd(moments: Moments, clamp: bool = True) -> OutputCorrection:
    """a = 1 / (1 + k), b[c] = -mu[c] / (1 + k), k = max(0, Cov(d, e) / Var(e)), mu = E[d - k e].

    e and d are centred per channel, then pooled, so that k is one number per row; mu is the mean of the residual, not
    of d, whose correlated part 1 / (1 + k) removes already. A row whose e is constant has k = 0.

    Args:
        moments: of the float trajectory's inputs, after guidance.
        clamp: False lets k be negative, down to -0.9 (below, little signal is left to amplify).

    Raises:
        ValueError: a row without samples.

    Source: He et al., PTQD: Accurate Post-Training Quantization for Diffusion Models, NeurIPS 2023 (correlated
    noise and bias correction).
    """
    moments.check_measured()
    k = moments.k.clamp(min=0.0 if clamp else LEAST_K)
    a = (1 / (1 + k))[..., None].expand_as(moments.mean).contiguous()
    b = -moments.residual_mean(k) * a
    # what does not correlate with e, whatever k was bounded by
    return OutputCorrection(a, b, a[..., 0].square() * moments.residual_variance(moments.k))


def mmse(moments: Moments) -> OutputCorrection:
    """a = Cov(e, e_hat) / Var(e_hat), b = E e - a E e_hat, per channel: least squared error of a e_hat + b.

    Where e_hat is constant a is 1, so that b moves it to the mean of e.

    Raises:
        ValueError: a row without samples.

    Source: Zeng et al., D2-DPM: Dual Denoising for Quantized Diffusion Probabilistic Models, AAAI 2025 (the Gaussian
    conditional expectation of e given e_hat).
    """
    moments.check_measured()
    variance = moments.quantized_variance
    a = torch.where(variance > 0, moments.quantized_covariance / variance.clamp(min=1e-300), 1.0)
    return OutputCorrection(
        a,
        moments.mean - a * moments.quantized_mean,
        (a.square() * moments.residual_variances(moments.k)).mean(-1),
    )


@dataclass(frozen=True)
class KeptSums:
    """Sums per channel of 1, e_hat e, e^2, e_hat / e, e_hat^2, e_hat^2 / e^2 over kept elements: |e| > tau mean |e|.

    The mean is that of a sample's channel, so that batches merge in any order.
    """

    sums: Tensor  # float64 [..., C, 6]

    @classmethod
    def of(cls, e: Tensor, quantized: Tensor, threshold: float = 1.0) -> KeptSums:
        """The sums of one batch: ``e`` and ``quantized`` [n, C, *spatial]; ``threshold`` is tau >= 0."""
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        n, channels = e.shape[:2]
        e, quantized = (value.reshape(channels, n, -1) for value in paired(e, quantized))
        kept = e.abs() > threshold * e.abs().mean(-1, keepdim=True)
        ratio = torch.where(kept, quantized / torch.where(kept, e, 1.0), 0.0)
        e, quantized = e * kept, quantized * kept
        terms = (kept.double(), quantized * e, e.square(), ratio, quantized.square(), ratio.square())
        return cls(torch.stack([term.sum((1, 2)) for term in terms], -1))

    def __add__(self, other: KeptSums) -> KeptSums:
        """The sums of both sets of samples together."""
        return KeptSums(self.sums + other.sums)


def ner(kept: KeptSums, lambda1: float = 0.8, lambda2: float = 0.1, elements: int | None = None) -> Tensor:
    """K [..., C], the minimiser of (1-l1) m((K e_hat - e)^2) / m(e^2) + l1 m((K e_hat / e - 1)^2) + l2 (K - 1)^2.

    m is the mean over kept elements, so the loss has no unit. K = 1 for a perfect prediction and where nothing was
    kept. The correction is a = K, b = 0.

    Args:
        kept: of rollouts that carry the earlier steps' corrections.
        lambda1, lambda2: weights of the relative error, in [0, 1], and of the distance to 1, at least 0.
        elements: N = C H W for the published sum form, (1-l1) m((K e_hat - e)^2) + l1 N m((K e_hat / e - 1)^2)
            + l2 (K - 1)^2, in which the relative term outweighs the others.

    Raises:
        ValueError: a weight outside its range.

    Source: Yao et al., Timestep-Aware Correction for Quantized Diffusion Models, ECCV 2024 (noise estimation
    reconstruction); the unit-free form is ours.
    """
    if not 0 <= lambda1 <= 1 or not lambda2 >= 0:
        raise ValueError(f"lambda1 must lie in [0, 1] and lambda2 be at least 0, got {lambda1} and {lambda2}")
    if elements is not None and elements < 1:
        raise ValueError(f"elements must be at least 1, got {elements}")
    count, product, energy, ratio, quantized, ratios = (
        kept.sums[..., i] / (kept.sums[..., 0].clamp(min=1) if i else 1) for i in range(KEPT)
    )
    some = count > 0
    unit = torch.where(some, energy, 1.0) if elements is None else torch.ones_like(energy)
    relative = lambda1 * (1 if elements is None else elements)
    above = (1 - lambda1) * product / unit + relative * ratio + lambda2
    below = (1 - lambda1) * quantized / unit + relative * ratios + lambda2
    return torch.where(some & (below > 0), above / torch.where(below > 0, below, 1.0), 1.0)
