"""What ``qdiff calibrate --correct`` does once the integers are there, and refuses before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .output import Output


def check_samplers(recipe: Any, correction: str, scheduler: Any, steps: int) -> None:
    """Refuse a sampler that the plan or the correction is not for, before anything is learnt."""
    from ..correction import estimation
    from ..plans import choice
    from ..samplers import prepared

    ready = prepared(scheduler, steps)
    choice.check_sampler(recipe.plan_request(), ready, [float(t) for t in ready.timesteps])
    estimation.check_sampler(correction, scheduler, steps)


def corrected(
    output: Output,
    model: Any,
    unet: Any,
    scheduler: Any,
    method: str,
    partial: Path,
    settings: dict[str, Any],
    calibration: Any,
) -> Any:
    """The model corrected by ``method``; the noise of `candidate_modes` is measured in every row.

    ``settings``: of both, with the calibration's seed; corrections see other trajectories.
    """
    from ..correction.estimation import correct
    from ..correction.measurement import SEED, measure_noise
    from ..recipe import check_correct

    settings = {**settings, "seed": settings["seed"] + SEED}
    with output.progress("measuring the noise", int(model.key["steps"])) as advance:
        noise = measure_noise(
            model,
            unet,
            scheduler,
            calibration=calibration,
            modes=candidate_modes(model),
            cache_dir=partial / "noise",
            on_step=lambda _: advance(),
            **settings,
        )
    steps = int(model.key["steps"]) if check_correct(method).rolled_out else 1
    with output.progress("correcting", steps) as advance:
        return correct(
            model,
            unet,
            scheduler,
            noise,
            method,
            cache_dir=partial / "rollout",
            on_step=lambda _: advance(),
            **settings,
        )


def candidate_modes(model: Any) -> tuple[str, ...]:
    """The modes that the model's plan has, or was chosen from."""
    from ..plans.choice import needed_modes

    request = model.recipe.plan_to_measure()
    chosen_from = () if request is None else needed_modes(request)
    return tuple(dict.fromkeys([*model.table.modes, *chosen_from]))
