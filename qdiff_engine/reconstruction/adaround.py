"""AdaRound: which of its two neighbouring integers each weight becomes, relaxed so that a gradient can choose.

Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (ICML 2020), equations 21-25.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import numerics
from ..weights import QuantizedWeight

ZETA, GAMMA = 1.1, -0.1  # the sigmoid is stretched to [GAMMA, ZETA] and clipped, so that 0 and 1 are reached
_SHARPNESS = (20.0, 2.0)  # of the regulariser, at the end of the warm-up and at the end
_WARM_UP = 0.2  # share of the iterations without the regulariser


@dataclass(frozen=True)
class SoftWeight:
    """w ~ s clamp(floor(w / s) + h(v)), h(v) = clamp(sigmoid(v) (zeta - gamma) + gamma, 0, 1); ``choice`` is v.

    Args:
        floor: float32 in the weight's shape; ``choice``: likewise, the parameter to learn.
        scale: float32 [N], or [N, G] by groups of K; ``bits``: 4 or 8.
    """

    floor: Tensor
    choice: Tensor
    scale: Tensor
    bits: int

    @classmethod
    def of(cls, weight: Tensor, start: QuantizedWeight) -> SoftWeight:
        """The relaxation that lies halfway between the float ``weight`` and ``start``, whose choices it has."""
        floor, upward = neighbours(weight, start)
        choice = -torch.log((ZETA - GAMMA) / (upward - GAMMA) - 1)
        return cls(floor, choice.requires_grad_(), start.scale, start.bits)

    def upward(self) -> Tensor:
        """h(v) in [0, 1]."""
        return (torch.sigmoid(self.choice) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def value(self, upward: Tensor) -> Tensor:
        """The relaxed weight for h(v) = ``upward``."""
        low, high = numerics.weight_range(self.bits)
        values, scales = numerics.by_scale((self.floor + upward).clamp(low, high), self.scale)
        return (values * scales).reshape(self.floor.shape)

    def rounded(self) -> QuantizedWeight:
        """The integers that the choices stand for."""
        low, high = numerics.weight_range(self.bits)
        values = (self.floor + (self.choice.detach() >= 0)).clamp(low, high)
        return QuantizedWeight(values.to(torch.int8), self.scale, self.bits)


def neighbours(weight: Tensor, start: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """(the lower of two integers, how far up between them lies the middle of the float ``weight`` and ``start``).

    The two are the integer of ``start`` and its neighbour towards ``weight``, both float32 in the weight's shape; the
    second value is in [0.01, 0.49] where the lower one is that of ``start``, in [0.51, 0.99] where the upper one is.
    """
    values, scales = numerics.by_scale(weight.float(), start.scale)
    scaled = (values / scales).reshape(weight.shape)
    chosen = start.values.float()
    floor = torch.where(scaled >= chosen, chosen, chosen - 1)
    upward = (scaled + chosen) / 2 - floor
    return floor, torch.where(chosen == floor, upward.clamp(max=0.49), upward.clamp(min=0.51)).clamp(0.01, 0.99)


def undecided(upward: Tensor, sharpness: float) -> Tensor:
    """The sum over weights of 1 - |2 h - 1|^b: 0 where every choice is made."""
    return (1 - (2 * upward - 1).abs().pow(sharpness)).sum()


def sharpness(iteration: int, iterations: int) -> float | None:
    """b at an iteration: None in the warm-up, then from 20 linearly down to 2."""
    start = _WARM_UP * iterations
    if iteration < start:
        return None
    done = (iteration - start) / max(iterations - start, 1)
    return _SHARPNESS[1] + (_SHARPNESS[0] - _SHARPNESS[1]) * (1 - done)
