"""Recipe's plan -> the mode of every row, with what was measured on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..plan_requests import FULL_BITS, MODE_BITS, PlanRequest, check_reachable, switchable_fraction
from ..samplers import signal_shares
from ..sampling import evaluating, initial_noise
from .budget import Effects, Progress, best_assignment, block_sizes, expanded, measure_effects
from .snr import RULE_MODES, measure_snr, snr_plan, threshold_for
from .trial import Planned, Sampler, by_bits, final_errors

TRIAL_SAMPLES, CHECK_SAMPLES = 8, 32


@dataclass(frozen=True)
class PlanChoice:
    """A plan and why it was chosen.

    Args:
        modes: one per row, noisiest first.
        serves: "fidelity" (the image of a seed) or "distribution" (how good images are).
        threshold: that the SNR rule used; None for other plans and where no row runs at A4.
        final_error: measured mean squared error of the final images of a budget's plan; None for others.
    """

    modes: tuple[str, ...]
    serves: str
    threshold: float | None = None
    final_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object ``plan`` of ``qdiff calibrate``."""
        return {
            "serves": self.serves,
            "switchable_fraction": switchable_fraction(self.modes),
            "shares": {mode: self.modes.count(mode) / len(self.modes) for mode in MODE_BITS},
            "threshold": self.threshold,
            "final_error": self.final_error,
        }


def needed_modes(request: PlanRequest) -> tuple[str, ...]:
    """The uniform models that choosing the plan takes."""
    return RULE_MODES if request.kind == "snr" else request.modes


def check_sampler(request: PlanRequest | None, scheduler: Any, timesteps: Sequence[float]) -> None:
    """Raise ValueError where the plan cannot be found for a sampler; cheap, so that it can come first."""
    if request is not None and request.kind == "snr":
        signal_shares(scheduler, timesteps)


def trials(request: PlanRequest, rows: int) -> int:
    """How often `choose` reports progress."""
    if request.kind == "snr":
        return 1
    return 2 * len(block_sizes(rows)) * len(request.modes) if len(request.modes) > 1 else 0


def choose(
    request: PlanRequest,
    models: Mapping[str, Any],
    row: Callable[[float], int],
    timesteps: tuple[float, ...],
    unet: nn.Module,
    sampler: Sampler,
    on_trial: Progress | None = None,
) -> PlanChoice:
    """The plan that ``request`` asks for, measured on the trajectories of ``sampler``.

    Args:
        models: the quantised network at each of `needed_modes`, uniform; they share their weights.
        row: the row that serves a timestep; ``timesteps``: of the rows.
        unet: the float network.
        on_trial: called `trials` times.

    Raises:
        ValueError: a budget below the cheapest plan, or a sampler that the rule cannot serve.
    """
    with evaluating(unet):
        reference, path = sampler.path(unet)
    if request.kind == "snr":
        snr = measure_snr(models, row, timesteps, sampler, path)
        threshold = threshold_for(snr, request.share) if request.threshold is None else request.threshold
        if on_trial is not None:
            on_trial()
        return PlanChoice(snr_plan(snr, threshold), "distribution", threshold if math.isfinite(threshold) else None)
    check_reachable(request.fraction, tuple(by_bits(models)))
    if len(request.modes) == 1:
        return best_measured([(request.modes[0],) * len(timesteps)], models, row, unet, sampler)
    below = max((m for m in request.modes if MODE_BITS[m] <= request.fraction * FULL_BITS), key=MODE_BITS.__getitem__)
    candidates = []
    with evaluating(unet):
        for carrier in (unet, models[below]):
            effects = measure_effects(models, row, len(timesteps), carrier, sampler, reference, on_trial)
            candidates.append(within_budget(effects, request.fraction))
    return best_measured(candidates, models, row, unet, sampler)


def within_budget(effects: Effects, fraction: float) -> tuple[str, ...]:
    """The plan of least predicted error, exact under the assumption that effects add up."""
    return expanded(effects, best_assignment(effects.costs(), effects.sizes, effects.modes, fraction))


def best_measured(
    candidates: list[tuple[str, ...]],
    models: Mapping[str, Any],
    row: Callable[[float], int],
    unet: nn.Module,
    sampler: Sampler,
) -> PlanChoice:
    """The candidate of least final error on `CHECK_SAMPLES` samples of another seed than the effects'."""
    seed = sampler.seed + 1
    noise = initial_noise((CHECK_SAMPLES, *sampler.noise.shape[1:]), seed)
    fresh = dataclasses.replace(sampler, noise=noise, seed=seed)
    with evaluating(unet):
        reference = fresh.run(unet)
    tried = []
    for modes in dict.fromkeys(candidates):
        images = fresh.run(Planned(models, row, modes))
        tried.append((float(final_errors(images, reference).mean()), modes))
    error, modes = min(tried, key=lambda pair: pair[0])
    return PlanChoice(modes, "fidelity", final_error=error)
