"""Recipe's plan -> the mode of every row, with what was measured on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..evaluation import evaluating
from ..plan_requests import FULL_BITS, MODE_BITS, PlanRequest, check_reachable, switchable_fraction
from .budget import Effects, Progress, best_assignment, block_sizes, expanded, measure_effects
from .snr import RULE_MODES, measure_snr, snr_plan, threshold_for
from .trial import Planned, Sampler, by_bits, final_errors

TRIAL_SAMPLES = 8


@dataclass(frozen=True)
class PlanChoice:
    """A plan and why it was chosen.

    Args:
        modes: one per row, noisiest first.
        serves: "fidelity" (the image of a seed) or "distribution" (how good images are).
        threshold: that the SNR rule used; None for other plans and where no row runs at A4.
        final_error: measured mean squared error of the final images of a budget's plan; None for others.
        tried: (final error, modes) of every candidate of a budget.
    """

    modes: tuple[str, ...]
    serves: str
    threshold: float | None = None
    final_error: float | None = None
    tried: tuple[tuple[float, tuple[str, ...]], ...] = field(default=())

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


def trials(request: PlanRequest, rows: int) -> int:
    """How often `choose` reports progress."""
    if request.kind == "snr":
        return 1
    return len(_bases(request)) * len(block_sizes(rows)) * (len(request.modes) - 1)


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
    rows, candidates = len(timesteps), []
    for base in _bases(request):
        effects = measure_effects(models, row, rows, sampler, reference, base, on_trial)
        candidates.append(within_budget(effects, request.fraction))
    return best_measured(candidates, models, row, sampler, reference)


def _bases(request: PlanRequest) -> tuple[str, ...]:
    """The uniform plans that enclose the budget; one where it is met by a uniform plan."""
    bits = request.fraction * FULL_BITS
    low = max((m for m in request.modes if MODE_BITS[m] <= bits), key=MODE_BITS.__getitem__)
    high = min((m for m in request.modes if MODE_BITS[m] >= bits), key=MODE_BITS.__getitem__)
    return (low,) if low == high else (low, high)


def within_budget(effects: Effects, fraction: float) -> tuple[str, ...]:
    """The plan of least predicted error, exact under the assumption that effects add up."""
    return expanded(effects, best_assignment(effects.costs(), effects.sizes, effects.modes, fraction))


def best_measured(
    candidates: list[tuple[str, ...]],
    models: Mapping[str, Any],
    row: Callable[[float], int],
    sampler: Sampler,
    reference: Tensor,
) -> PlanChoice:
    """The candidate whose own final error, measured, is the least."""
    tried = []
    for modes in dict.fromkeys(candidates):
        images = sampler.run(Planned(models, row, modes))
        tried.append((float(final_errors(images, reference).mean()), modes))
    error, modes = min(tried, key=lambda pair: pair[0])
    return PlanChoice(modes, "fidelity", final_error=error, tried=tuple(tried))
