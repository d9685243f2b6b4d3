"""Corrections of the latents after a step: their mean and their spread about it become the float network's."""

from __future__ import annotations

from torch import Tensor

from .moments import check_pair

LARGEST_SCALE = 2.0  # g lies in [1/2, 2]


def input_bias(x: Tensor, quantized: Tensor) -> Tensor:
    """B[c, p] = E[x[c, p] - x_hat[c, p]], the mean over samples, float64 [C, *spatial]; added to x_hat after the step.

    Every element has its own: drift is seldom even. Averaged over pixels it would shift flat regions, which a sampler
    that clips holds in place, by what only edges are off.

    Args:
        x: latents of the float trajectory after a step, [n, C, *spatial].
        quantized: latents of the quantised one after the same step with the same noise, whose earlier steps carried
            their corrections already (from the noisiest step down).

    Raises:
        ValueError: shapes that differ, or values that are not finite.

    Source: Yao et al., Timestep-Aware Correction for Quantized Diffusion Models, ECCV 2024 (input bias correction, the
    mean over a batch).
    """
    check_pair(x, quantized)
    return (x.double() - quantized.double()).mean(0)


def input_affine(x: Tensor, quantized: Tensor) -> tuple[float, Tensor]:
    """(g, B): g x_hat + B has the mean of x at every element, and its variance over samples, averaged over elements.

    g = sqrt(mean_cp Var x[c, p] / mean_cp Var x_hat[c, p]) in [1/2, 2], B[c, p] = E x[c, p] - g E x_hat[c, p].
    Quantised latents spread too far or, where predictions fall short, not far enough; a mean alone leaves that.

    Args:
        x, quantized: as for `input_bias`. Of a single sample, or where x_hat does not vary, g is 1.

    Returns:
        g, and B float64 [C, *spatial].

    Raises:
        ValueError: shapes that differ, or values that are not finite.

    Source: ours; the second moment beside the first one of `input_bias`.
    """
    check_pair(x, quantized)
    one, other = x.double(), quantized.double()
    spread, other_spread = (float(value.var(0, correction=0).mean()) for value in (one, other))
    scale = 1.0
    if other_spread > 0:
        scale = min(max((spread / other_spread) ** 0.5, 1 / LARGEST_SCALE), LARGEST_SCALE)
    return scale, one.mean(0) - scale * other.mean(0)
