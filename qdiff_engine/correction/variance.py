"""Variance schedule calibration: the sampler adds less noise where the quantised prediction brings its own."""

from __future__ import annotations

import torch
from torch import Tensor


def calibrated_sigma(sigma: Tensor, ce: Tensor, noise_variance: Tensor) -> Tensor:
    """s'[r] = sqrt(max(0, s[r]^2 - ce[r]^2 q[r])), one formula for every sampler and correction.

    The noise that a step adds and the noise ce * error that it inherits from the prediction then have the variance that
    the float sampler adds. The direction coefficient of DDIM keeps the original s.

    Args:
        sigma: float64 [R], standard deviation of the sampler's noise.
        ce: float64 [R], the sampler's coefficient of the model's output in x' at that step.
        noise_variance: float64 [R], a^2 sigma_q^2: `OutputCorrection.noise_variance`.

    Raises:
        ValueError: shapes that differ, a value that is not finite, a negative sigma or variance.

    Source: He et al., PTQD, NeurIPS 2023 (variance schedule calibration), with the strided schedule's alpha.
    """
    if not sigma.shape == ce.shape == noise_variance.shape:
        shapes = [list(value.shape) for value in (sigma, ce, noise_variance)]
        raise ValueError(f"sigma, ce and noise_variance must have one shape, got {shapes}")
    for name, value in (("sigma", sigma), ("ce", ce), ("noise_variance", noise_variance)):
        if not bool(torch.isfinite(value).all()) or (name != "ce" and bool((value < 0).any())):
            raise ValueError(f"{name} must be finite{'' if name == 'ce' else ' and at least 0'}")
    return (sigma.double().square() - ce.double().square() * noise_variance.double()).clamp(min=0).sqrt()


def sigma_scale(sigma: Tensor, ce: Tensor, noise_variance: Tensor) -> Tensor:
    """s' / s in [0, 1], float64 [R]; 1 where the sampler adds no noise, so that nothing is calibrated there."""
    calibrated = calibrated_sigma(sigma, ce, noise_variance)
    return torch.where(sigma > 0, calibrated / torch.where(sigma > 0, sigma, 1.0), 1.0)
