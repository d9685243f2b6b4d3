"""float weights -> integers: interchangeable functions ``(weight, bits, inputs, hessian, group) -> QuantizedWeight``.

``inputs`` [P, K] are vectors that the layer's weights really multiply, drawn from the calibration trajectories over
all rows, and ``hessian`` [K, K] the second moments of more of them; they tell which rounding errors the layer's output
feels. Where the bias absorbs the mean error, both are about the mean. With ``group``, a linear layer's weights have a
scale for every so many inputs, if that divides K; else, and with 0, one for each output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import numerics
from .weights import QuantizedWeight, scale_groups

Rounder = Callable[..., QuantizedWeight]  # (weight, bits, inputs=None, hessian=None, group=0)

_SHRINK = {8: torch.linspace(0.80, 1.0, 41).tolist(), 4: torch.linspace(0.50, 1.10, 49).tolist()}
_SEARCH_INPUTS = 512  # vectors that the scale search looks at
_DAMP = 0.01  # of the Hessian's mean diagonal, as GPTQ does
_BLOCK = 128


def search_scale(weight: Tensor, bits: int, inputs: Tensor | None = None, groups: int = 1) -> Tensor:
    """s_w[n] = argmin over shrunk ranges of sum_p (sum_k (w[n,k] - s q[n,k]) x[p,k])^2, nearest rounding.

    Args:
        weight: float32 [N, K].
        inputs: float32 [P, K]; without them the squared error of the weights themselves is least.
        groups: how many equal stretches of K have a scale of their own, each for the least error of its products.

    Returns:
        float32 [N], or [N, groups] of several; 1 for a row of zeros.
    """
    if groups > 1:
        of_groups = [None] * groups if inputs is None else inputs.chunk(groups, 1)
        parts = zip(weight.chunk(groups, 1), of_groups, strict=True)
        return torch.stack([search_scale(part, bits, x) for part, x in parts], 1)
    full = weight.abs().amax(1) / numerics.weight_range(bits)[1]
    full = torch.where(full > torch.finfo(torch.float32).tiny, full, torch.ones_like(full))
    if inputs is not None:
        inputs = inputs[torch.linspace(0, len(inputs) - 1, min(len(inputs), _SEARCH_INPUTS)).long()].T.contiguous()
    best, least = full, torch.full_like(full, torch.inf)
    for shrink in _SHRINK[bits]:
        scale = full * shrink
        error = numerics.quantize_weight(weight, scale, bits).float() * scale[:, None] - weight
        loss = (error if inputs is None else error @ inputs).square().sum(1)
        better = loss < least
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return best


def nearest(
    weight: Tensor, bits: int, inputs: Tensor | None = None, hessian: Tensor | None = None, group: int = 0
) -> QuantizedWeight:
    """q = round(w / s_w) with the scale of least output error per channel (`search_scale`); no use for ``hessian``."""
    flat = weight.float().flatten(1)
    scale = search_scale(flat, bits, inputs, scale_groups(weight.shape, group))
    return QuantizedWeight(numerics.quantize_weight(weight.float(), scale, bits), scale, bits)


def gptq(
    weight: Tensor, bits: int, inputs: Tensor | None = None, hessian: Tensor | None = None, group: int = 0
) -> QuantizedWeight:
    """Round one input channel after another; what each rounding spoils, the channels still to come make good.

    With H = X^T X / P + damp I and U the upper Cholesky factor of H^-1, channel k's error e = (w_k - s q_k) / U_kk is
    taken off the later channels as e U_k,j. Channels go by falling H_kk. Without inputs this is `nearest`.

    Args:
        hessian: float64 [K, K], X^T X / P of more vectors than ``inputs`` holds; else it is made from them.

    Source: Frantar et al., GPTQ (ICLR 2023), algorithm 1.
    """
    if inputs is None:
        return nearest(weight, bits, group=group)
    flat = weight.float().flatten(1)
    scale = search_scale(flat, bits, inputs, scale_groups(weight.shape, group))
    order, factor = _inverse_factor(second_moments(inputs) if hessian is None else hessian)
    values = torch.empty_like(flat, dtype=torch.int8)
    by_group = scale.reshape(len(scale), -1)
    group_of = order // (flat.shape[1] // by_group.shape[1])
    values[:, order] = _round_in_order(flat[:, order], by_group, group_of.tolist(), factor, bits)
    return QuantizedWeight(values.reshape(weight.shape), scale, bits)


def second_moments(inputs: Tensor) -> Tensor:
    """X^T X / P in float64 [K, K]; ``inputs`` [P, K]."""
    x = inputs.double()
    return x.T @ x / len(x)


def _inverse_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Channels by falling second moment, and the upper Cholesky factor of the damped inverse Hessian in that order."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    hessian = hessian[order][:, order]
    mean = hessian.diagonal().mean().clamp(min=1e-12)
    hessian.diagonal().add_(_DAMP * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return order, torch.linalg.cholesky(inverse, upper=True).float()


def _round_in_order(weight: Tensor, scale: Tensor, group_of: list[int], factor: Tensor, bits: int) -> Tensor:
    """The GPTQ sweep over columns in blocks; ``weight`` [N, K] and ``factor`` [K, K] in the same channel order.

    scale: [N, G], of which column k has ``scale[:, group_of[k]]``.
    """
    weight, (low, high) = weight.clone(), numerics.weight_range(bits)
    values = torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, weight.shape[1], _BLOCK):
        block = slice(start, min(start + _BLOCK, weight.shape[1]))
        local, local_factor = weight[:, block].T.contiguous(), factor[block, block]
        errors = torch.empty_like(local)
        for k in range(len(local)):
            own = scale[:, group_of[start + k]]
            q = torch.round(local[k] / own).clamp_(low, high)
            values[:, start + k] = q.to(torch.int8)
            errors[k] = (local[k] - q * own) / local_factor[k, k]
            local[k + 1 :].addr_(local_factor[k, k + 1 :], errors[k], alpha=-1)
        weight[:, block.stop :] -= errors.T @ factor[block, block.stop :]
    return values
