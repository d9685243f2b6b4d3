"""Input-bias correction: the mean distance between two trajectories, added back after a step."""

from __future__ import annotations

from torch import Tensor

from .moments import paired


def input_bias(x: Tensor, quantized: Tensor) -> Tensor:
    """B[c] = E[x[c] - x_hat[c]], the mean over samples and pixels, float64 [C]; added to x_hat after the step.

    Args:
        x: latents of the float trajectory after a step, [n, C, *spatial].
        quantized: latents of the quantised one after the same step with the same noise, whose earlier steps carried
            their corrections already (from the noisiest step down).

    Raises:
        ValueError: shapes that differ, or values that are not finite.

    Source: Yao et al., Timestep-Aware Correction for Quantized Diffusion Models, ECCV 2024 (input bias correction).
    """
    one, other = paired(x, quantized)
    return (one - other).mean(1)
