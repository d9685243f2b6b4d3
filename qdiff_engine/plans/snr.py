"""PTQD's rule: few bits where the quantisation noise is small beside the noise of the sampler's own step.

It serves the distribution of images: early steps decide which image comes out, hardly how good it is, and get the
fewest bits. The plan that keeps the image of a seed is `budget`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation import guided_prediction
from ..samplers import signal_shares
from ..sampling import Step
from .trial import Sampler, by_bits

_ABOVE = 1 + 2**-50  # times a rounded ratio q / s, and that times s: at least q
RULE_MODES = ("A4", "A8")


@dataclass(frozen=True)
class SignalToNoise:
    """Signal-to-noise ratios of every row.

    Args:
        signal: SNRf = alpha_bar / (1 - alpha_bar), a ratio of powers.
        quantised: per mode SNRq = |e| / |e - e_hat|, a ratio of norms, on the float trajectory's inputs.
    """

    signal: tuple[float, ...]
    quantised: dict[str, tuple[float, ...]]


def signal_to_noise(scheduler: Any, timesteps: Sequence[float]) -> tuple[float, ...]:
    """alpha_bar / (1 - alpha_bar) at every timestep; infinite without noise. Errors are those of `signal_shares`."""
    shares = signal_shares(scheduler, timesteps).tolist()
    return tuple(share / (1 - share) if share < 1 else math.inf for share in shares)


@torch.no_grad()
def measure_snr(
    models: Mapping[str, Any],
    row: Callable[[float], int],
    timesteps: Sequence[float],
    sampler: Sampler,
    path: Sequence[Step],
) -> SignalToNoise:
    """`SignalToNoise` of every row; a row that is visited twice has the energies of both visits.

    Args:
        models: one per mode; ``row``: of a timestep; ``timesteps``: of the rows.
        path: the float network's steps from the sampler's noise.
    """
    signal = torch.zeros(len(timesteps), dtype=torch.float64)
    noise = {mode: torch.zeros(len(timesteps), dtype=torch.float64) for mode in by_bits(models)}
    for step in path:
        r = row(step.timestep)
        signal[r] += step.prediction.double().square().sum()
        for mode in noise:
            predicted = guided_prediction(models[mode], sampler.guidance, step, sampler.batch)
            noise[mode][r] += (predicted - step.prediction).double().square().sum()
    ratios = {mode: (signal / value).sqrt().nan_to_num(math.inf, math.inf) for mode, value in noise.items()}
    return SignalToNoise(
        signal_to_noise(sampler.scheduler, timesteps), {mode: tuple(value.tolist()) for mode, value in ratios.items()}
    )


def snr_plan(snr: SignalToNoise, threshold: float) -> tuple[str, ...]:
    """Every row's smallest b with SNRq_b > threshold x SNRf, else the largest (PTQD, He et al. 2023, section 3.4)."""
    modes = by_bits(snr.quantised)
    plan = []
    for r, signal in enumerate(snr.signal):
        enough = (mode for mode in modes if _exceeds(snr.quantised[mode][r], threshold, signal))
        plan.append(next(enough, modes[-1]))
    return tuple(plan)


def _exceeds(quantised: float, threshold: float, signal: float) -> bool:
    return quantised > (threshold * signal if threshold else 0.0)  # 0 x infinity is 0 here


def threshold_for(snr: SignalToNoise, share: float) -> float:
    """The threshold at which the rule gives A4 to round(share x rows) rows: half-way between two rows, in logarithms.

    Rows whose ratios are equal cannot be parted; then the plan is the nearest the rule allows from below. Infinite for
    no row at A4.
    """
    lowest = by_bits(snr.quantised)[0]
    pairs = zip(snr.quantised[lowest], snr.signal, strict=True)
    critical = sorted((_ratio(quantised, signal) for quantised, signal in pairs), reverse=True)
    count = round(share * len(critical))
    if count == 0:
        return math.inf
    if count == len(critical):
        return 1.0 if math.isinf(critical[-1]) else critical[-1] / 2
    above, below = critical[count - 1], critical[count]
    if math.isinf(above):
        return below if math.isinf(below) else 2 * below + 1
    if below == 0:
        return above / 2
    return max(math.sqrt(above) * math.sqrt(below), below * _ABOVE)


def _ratio(quantised: float, signal: float) -> float:
    """SNRq / SNRf: the row runs at A4 below this threshold."""
    if signal == 0:
        return math.inf
    return 0.0 if math.isinf(signal) else quantised / signal
