"""Stages of ``qdiff calibrate`` that learn, their settings and what they report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import Function, count_option
from .output import Output, megabytes

_ROUNDING = 1e-4  # of a layer's largest output: float32 sums in another order stay below


def rounding_options(function: Function) -> Function:
    """--weights, --weight-group, --learn-iterations, --learn-samples, --learn-pairs, --learn-batch, --step-sizes."""
    for option in (
        click.option(
            "--step-sizes",
            type=click.Choice(["observed", "learnt"]),
            default="observed",
            show_default=True,
            help="Of activations: as the observer finds them, or learnt in the same blocks with --weights adaround.",
        ),
        count_option(
            "--learn-samples",
            256,
            "Inputs that --weights gptq and adaround learn on, from all steps; fewer take less memory.",
        ),
        click.option(
            "--learn-pairs",
            default="every",
            show_default=True,
            help="Which inputs these are: every, drawn evenly; or N of them: uniform:N, gaussian:N[:MEAN,DEVIATION], "
            "density:N, see --align-pairs.",
        ),
        count_option("--learn-batch", 8, "Of these, how many an iteration of adaround takes; fewer take less memory."),
        count_option("--learn-iterations", 500, "Of each block, with --weights adaround; 0 learns nothing.", least=0),
        click.option(
            "--weight-group",
            type=click.Choice(["0", "64", "128"]),
            default="0",
            show_default=True,
            help="Inputs of a linear layer that share a weight scale, where that divides their number; 0: all of them.",
        ),
        click.option(
            "--weights",
            help="How weights are rounded: nearest, gptq or adaround (learnt).  "
            "[default: the recipe's; gptq for 4 bits]",
        ),
    ):
        function = option(function)
    return function


def check_pairs(recipe: Any, scheduler: Any, steps: int, samples: int) -> None:
    """Refuse to learn on more pairs than a calibration will have, before it is made."""
    from ..pair_requests import parse_selection
    from ..samplers import prepared

    asked, there = parse_selection(recipe.learn_pairs).count, len(prepared(scheduler, steps).timesteps) * samples
    if asked > there:
        raise ValueError(f"--learn-pairs {recipe.learn_pairs}: the calibration has {there} pairs; name fewer")


def rounding_note(output: Output, recipe: Any) -> Any:
    """What tells the user how much memory rounding is expected to take, from a `reconstruction.memory.Memory`."""

    def started(memory: Any) -> None:
        option = "--learn-samples" if recipe.learn_pairs == "every" else "--learn-pairs"
        output.note(
            f"rounding weights ({recipe.weights}) takes about {megabytes(memory.total)} at its peak, "
            f"{megabytes(memory.of_samples)} of it for its {memory.samples} samples ({option})"
        )

    return started


def learning_iterations(recipe: Any, calibration: Any) -> int:
    """How many iterations learning the recipe's weights takes."""
    from ..reconstruction.blocks import find_blocks

    if recipe.weights != "adaround":
        return 0
    return recipe.learn_iterations * sum(1 for block in find_blocks(calibration.capture.graph) if block.layers)


def learning_now(progress: Any) -> str:
    """What a `reconstruction.stage.Progress` says, in a few words."""
    if progress.loss is None:
        return f"block {progress.block}, learnt earlier"
    return f"learning block {progress.block}, loss {progress.loss:.3f}"


def align_options(function: Function) -> Function:
    """--align, --align-iterations, --align-batch, --align-recompute, --align-pairs, --align-rounding."""
    for option in (
        click.option(
            "--align-rounding",
            is_flag=True,
            help="Learn again, too, which of its two neighbouring integers each weight becomes: more memory and time.",
        ),
        click.option(
            "--align-recompute",
            is_flag=True,
            help="Compute activations twice instead of keeping them: less memory, more time, the same bits.",
        ),
        click.option(
            "--align-pairs",
            default="every",
            show_default=True,
            help="Latents and timesteps that --align learns on: every; uniform:N or gaussian:N[:MEAN,DEVIATION], drawn "
            "by timestep; density:N, typical and diverse ones.",
        ),
        count_option("--align-batch", None, "Samples per call of --align, by default 4; fewer take less memory."),
        count_option(
            "--align-iterations", None, "Optimiser steps of --align, by default 200; each takes M calls.", least=0
        ),
        click.option(
            "--align",
            default="none",
            show_default=True,
            help="Learn step sizes over groups of M denoising steps: none or accuquant:M.",
        ),
    ):
        function = option(function)
    return function


def aligned(
    output: Output, model: Any, calibration: Any, settings: Any, partial: Path, device: Any
) -> tuple[Any, dict[str, Any] | None]:
    """(the model with learnt step sizes, what that did) for `qe.AlignmentSettings`; None of 0 iterations."""
    from ..alignment.alignment import align, end_errors

    if settings.iterations == 0:
        return model, None
    peak: list[int] = []

    def started(memory: Any) -> None:
        peak.append(memory.total)
        output.note(
            f"aligning takes about {megabytes(memory.total)} at its peak, {megabytes(memory.saved)} of it for the "
            f"{settings.batch} samples of a call (--align-batch, --align-recompute)"
        )

    with output.progress("aligning", settings.iterations) as advance:
        new = align(
            model,
            calibration,
            settings,
            device=device,
            cache_dir=partial / "align",
            on_start=started,
            on_iteration=lambda p: advance(f"aligning, loss {p.loss:.2e}", p.advanced),
        )
    before, after = (end_errors(m, calibration, settings.group) for m in (model, new))
    found = {
        **settings.to_dict(),
        "memory_bytes": peak[0],
        "end_error_before": sum(before) / len(before),
        "end_error": sum(after) / len(after),
    }
    return new, found


def align_summary(found: dict[str, Any]) -> str:
    """What alignment did, for people."""
    return (
        f"aligned over groups of {found['group']} steps: error at their ends {found['end_error_before']:.4f} -> "
        f"{found['end_error']:.4f}, through the integers"
    )


def agreement(output: Output, model: Any, calibration: Any) -> list[dict[str, Any]]:
    """How far the integers are from the simulation that something was learnt on, layer by layer."""
    from ..alignment.agreement import calibrated_agreement

    layers = [layer.to_dict() for layer in calibrated_agreement(model, calibration)]
    wrong = [layer["name"] for layer in layers if layer["furthest"] > 1 or not layer["error"] < _ROUNDING]
    if wrong:
        output.note(
            f"integers and simulation differ by more than rounding in {', '.join(wrong)}: what was learnt there is not "
            "what runs; please report it, with the model"
        )
    return layers


def agreement_summary(layers: list[dict[str, Any]]) -> str:
    """The same for people, the least equal layer first."""
    ordered = sorted(layers, key=lambda layer: layer["error"], reverse=True)
    width = max(len(layer["name"]) for layer in layers)
    rows = (
        f"{layer['name']:<{width}}  {layer['error']:8.1e}  {layer['flipped']:9.4%}  {layer['furthest']:4d}"
        for layer in ordered
    )
    head = f"{'layer':<{width}}  {'error':>8}  {'flipped':>9}  {'by':>4}"
    return "\n".join(
        [
            "integers beside the simulation that was learnt on (output error; input integers that",
            "differ, and by how much):",
            head,
            *rows,
        ]
    )


def align_settings(
    align: str, iterations: int | None, batch: int | None, recompute: bool, pairs: str, rounding: bool, seed: int
) -> Any:
    """The settings of ``--align``; None is a setting's default."""
    from ..alignment.training import AlignmentSettings
    from ..pair_requests import parse_selection
    from ..recipe import check_align

    parse_selection(pairs, "--align-pairs")
    group = check_align(align)
    given: dict[str, Any] = {"iterations": iterations, "batch": batch}
    given |= {"recompute": recompute or None, "pairs": None if pairs == "every" else pairs}
    given |= {"rounding": rounding or None}
    chosen = {name: value for name, value in given.items() if value is not None}
    if group is None:
        if chosen:
            raise ValueError(f"--align-{next(iter(chosen))} says how --align learns; give --align accuquant:M, too")
        return AlignmentSettings(iterations=0)
    return AlignmentSettings(group=group, seed=seed, **chosen)
