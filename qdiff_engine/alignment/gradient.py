"""AccuQuant's gradient: a group of quantised steps is judged by its end, and back-propagated one call at a time.

    L = mean (x_hat_{i+M} - x_{i+M})^2,   x_hat_i = x_i,   x_hat_{j+1} = step_j(x_hat_j, e_hat(x_hat_j))

The exact gradient would hold M networks' activations. The approximate one lets the end's gradient reach every step
unchanged, as through x' = x + (step(sg(x)) - sg(x)) with sg = stop-gradient, so that one call's are held at a time.

Source: Lee et al., AccuQuant: Simulating Multiple Denoising Steps for Quantizing Diffusion Models (NeurIPS 2025).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sampling import Guidance
from .path import Moment, Steps


def predicted(network: Any, steps: Steps, guidance: Guidance, moment: Moment) -> Moment:
    """The moment after one step with the guided prediction of ``network``."""
    received, timestep = steps.received(moment), steps.timesteps[moment.index]
    return steps.advance(moment, guidance.prediction(network, received, timestep, moment.samples))


@torch.no_grad()
def rollout(network: Any, steps: Steps, guidance: Guidance, start: Moment, count: int) -> list[Moment]:
    """``start`` and the ``count`` moments after it."""
    moments = [start]
    for _ in range(count):
        moments.append(predicted(network, steps, guidance, moments[-1]))
    return moments


def accumulate_gradient(
    network: Any, steps: Steps, guidance: Guidance, start: Moment, count: int, target: Tensor
) -> float:
    """Add dL/dparameters of ``count`` steps to their ``.grad``, holding the activations of one call; L itself.

    The rollout without gradients keeps the latents only. Every call is then replayed from them, the last one first,
    since it gives the end that all others need: g = 2 (x_hat - x) / numel. Autograd takes g through the sampler's step,
    whose signed factor of the prediction it supplies. With ``count`` = 1 the gradient is exact.

    Args:
        network: the simulated network; ``start``: the float path's latents before the first of the steps.
        target: the float path's latents after the last.
    """
    moments = rollout(network, steps, guidance, start, count - 1)
    end = predicted(network, steps, guidance, moments.pop()).latents
    difference = end.detach() - target
    gradient = 2 * difference / difference.numel()
    end.backward(gradient)
    for moment in reversed(moments):
        predicted(network, steps, guidance, moment).latents.backward(gradient)
    return float(difference.square().mean())
