"""Streaming moments of a prediction and of the error that quantisation adds to it: sums that merge, in float64.

With e the float prediction, e_hat the quantised one and d = e_hat - e, the sums of e^i d^j, i + j <= 4, over samples
and pixels give every statistic below, also those of the residual d - k e for a k that is known only at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ORDERS = tuple((i, j) for i in range(5) for j in range(5 - i))  # of e^i d^j, the last axis of the sums
_COLUMN = {order: column for column, order in enumerate(ORDERS)}
_ROUNDING = 1e-12  # a variance below this share of the second moment is what rounding leaves of a constant


@dataclass(frozen=True)
class Normality:
    """Jarque-Bera test of the residual, channels centred on their own and pooled.

    Args:
        skewness, excess_kurtosis: float64 [...]; 0 for a normal distribution.
        p_value: float64 [...], exp(-JB / 2) with JB = n (skewness^2 + kurtosis^2 / 4) / 6, as if the n values were
            independent. Neighbouring pixels are not, so a small value alone says little; the two moments say how far.
    """

    skewness: Tensor
    excess_kurtosis: Tensor
    p_value: Tensor


@dataclass(frozen=True)
class Moments:
    """sums[..., c, (i, j)] = sum over samples and pixels of e[c]^i d[c]^j, d = e_hat - e, i + j <= 4.

    Leading axes, such as the rows of a table, are carried through every statistic. Variances divide by n, so one value
    has variance 0; a channel whose variance is rounding (1e-12 of its second moment) counts as constant.
    """

    sums: Tensor  # float64 [..., C, 15]

    def __post_init__(self) -> None:
        if self.sums.dtype != torch.float64 or self.sums.dim() < 2 or self.sums.shape[-1] != len(ORDERS):
            raise ValueError(
                f"sums must be float64 [..., C, {len(ORDERS)}], got {self.sums.dtype} {list(self.sums.shape)}"
            )
        if not bool(torch.isfinite(self.sums).all()):
            raise ValueError("sums must be finite")

    @classmethod
    def of(cls, e: Tensor, quantized: Tensor) -> Moments:
        """The moments of one batch: ``e`` and ``quantized``, [n, C, *spatial] of the same shape.

        Raises:
            ValueError: other shapes, an empty batch, or a value that is not finite.
        """
        e, quantized = paired(e, quantized)
        delta = quantized - e
        powers_e, powers_d = [torch.ones_like(e), e], [torch.ones_like(e), delta]
        for _ in range(3):
            powers_e.append(powers_e[-1] * e)
            powers_d.append(powers_d[-1] * delta)
        return cls(torch.stack([(powers_e[i] * powers_d[j]).sum(1) for i, j in ORDERS], -1))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of samples together."""
        return Moments(self.sums + other.sums)

    def raw(self, i: int, j: int) -> Tensor:
        """E[e^i d^j], [..., C]; 0 where nothing was measured."""
        return self.sums[..., _COLUMN[i, j]] / self.count[..., None].clamp(min=1)

    @property
    def count(self) -> Tensor:
        """Values per channel, [...]."""
        return self.sums[..., 0, _COLUMN[0, 0]]

    def check_measured(self) -> None:
        """Raise ValueError unless every leading index has at least one value."""
        if bool((self.count < 1).any()):
            raise ValueError("the noise was measured on no samples; at least one per row is needed")

    @property
    def mean(self) -> Tensor:
        """E e, [..., C]."""
        return self.raw(1, 0)

    @property
    def variance(self) -> Tensor:
        """Var e, [..., C]."""
        return _central(self.raw(2, 0), self.raw(1, 0))

    @property
    def error_mean(self) -> Tensor:
        """E d, [..., C]."""
        return self.raw(0, 1)

    @property
    def error_variance(self) -> Tensor:
        """Var d, [..., C]."""
        return _central(self.raw(0, 2), self.raw(0, 1))

    @property
    def covariance(self) -> Tensor:
        """Cov(d, e), [..., C]; 0 where e or d is constant."""
        found = self.raw(1, 1) - self.raw(1, 0) * self.raw(0, 1)
        return torch.where((self.variance > 0) & (self.error_variance > 0), found, torch.zeros_like(found))

    @property
    def quantized_mean(self) -> Tensor:
        """E e_hat, [..., C]."""
        return self.mean + self.error_mean

    @property
    def quantized_variance(self) -> Tensor:
        """Var e_hat = Var e + 2 Cov(d, e) + Var d, [..., C]."""
        found = self.variance + 2 * self.covariance + self.error_variance
        second = self.raw(2, 0) + 2 * self.raw(1, 1) + self.raw(0, 2)
        return torch.where(found > _ROUNDING * second, found, torch.zeros_like(found))

    @property
    def quantized_covariance(self) -> Tensor:
        """Cov(e, e_hat) = Var e + Cov(d, e), [..., C]."""
        return self.variance + self.covariance

    @property
    def k(self) -> Tensor:
        """k = sum over c of Cov(d, e) / sum over c of Var(e), [...]; 0 where e is constant in every channel."""
        variance = self.variance.sum(-1)
        return torch.where(variance > 0, self.covariance.sum(-1) / variance.clamp(min=1e-300), 0.0)

    def residual_mean(self, k: Tensor) -> Tensor:
        """mu = E[d - k e], [..., C]."""
        return self.error_mean - k[..., None] * self.mean

    def residual_variances(self, k: Tensor) -> Tensor:
        """Var(d - k e), [..., C]."""
        k = k[..., None]
        return (self.error_variance - 2 * k * self.covariance + k.square() * self.variance).clamp(min=0)

    def residual_variance(self, k: Tensor) -> Tensor:
        """The mean over channels of Var(d - k e), [...]."""
        return self.residual_variances(k).mean(-1)

    @property
    def snr(self) -> Tensor:
        """|e| / |d|, a ratio of norms, [...]; infinite without error."""
        signal, noise = self.sums[..., _COLUMN[2, 0]].sum(-1), self.sums[..., _COLUMN[0, 2]].sum(-1)
        return torch.where(noise > 0, (signal / noise.clamp(min=1e-300)).sqrt(), math.inf)

    def normality(self, k: Tensor) -> Normality:
        """How far d - k e is from a normal distribution; exactly normal where it is constant, to rounding."""
        raw = [self._residual_raw(k, order) for order in range(5)]
        mean = raw[1]
        second = self.residual_variances(k).mean(-1)
        third = (raw[3] - 3 * mean * raw[2] + 2 * mean**3).mean(-1)
        fourth = (raw[4] - 4 * mean * raw[3] + 6 * mean.square() * raw[2] - 3 * mean**4).mean(-1)
        some, safe = second > _ROUNDING * self.error_variance.mean(-1), second.clamp(min=1e-300)
        skewness = torch.where(some, third / safe**1.5, 0.0)
        kurtosis = torch.where(some, fourth / safe.square() - 3, 0.0)
        n = self.count * self.sums.shape[-2]
        return Normality(skewness, kurtosis, torch.exp(-n / 12 * (skewness.square() + kurtosis.square() / 4)))

    def _residual_raw(self, k: Tensor, order: int) -> Tensor:
        """E[(d - k e)^order], [..., C]."""
        total = torch.zeros_like(self.mean)
        for i in range(order + 1):
            total = total + math.comb(order, i) * (-k[..., None]) ** i * self.raw(i, order - i)
        return total


def paired(e: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """Both predictions as float64 [C, values], after `check_pair`."""
    check_pair(e, quantized)
    one, other = (value.detach().double().transpose(0, 1).flatten(1) for value in (e, quantized))
    return one, other


def check_pair(e: Tensor, quantized: Tensor) -> None:
    """Raise ValueError unless both are alike, [n, C, *spatial] with n >= 1, and finite."""
    if e.shape != quantized.shape or e.dim() < 2 or e.numel() == 0:
        raise ValueError(
            f"predictions must have one shape [n, C, *spatial] with n >= 1, got {list(e.shape)} and "
            f"{list(quantized.shape)}"
        )
    for name, value in (("float", e), ("quantised", quantized)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"the {name} prediction holds NaN or infinity")


def _central(second: Tensor, mean: Tensor) -> Tensor:
    """E x^2 - (E x)^2, and 0 where that is only rounding."""
    variance = second - mean.square()
    return torch.where(variance > _ROUNDING * second, variance, torch.zeros_like(variance))
