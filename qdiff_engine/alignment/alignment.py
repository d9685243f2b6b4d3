"""IntegerUNet + Calibration -> IntegerUNet whose step sizes, and if asked rounding, are learnt over groups of steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from ..calibration.calibration import Calibration
from ..calibration.checkpoint import Checkpoint, fingerprint
from ..calibration.selection import selected_pairs
from ..graph.factors import factor_keys
from ..memory import memory_errors
from ..models import usable_device
from ..pair_requests import parse_selection
from ..recipe import Recipe, check_align
from ..reconstruction.layers import layers, segments
from ..reconstruction.stage import recorded_inputs
from ..runtime.model import IntegerUNet
from ..samplers import check_count, coefficients, prepared
from .gradient import rollout
from .learnt import Learnt, Simulation
from .memory import Memory, estimated
from .path import Path, float_path
from .rounding import Originals
from .training import AlignmentSettings, Progress, Trainer, group_starts

_RECORDED = ("iterations", "batch", "pairs", "rounding")  # settings that are fields of a recipe, as align_...
_ERROR_BATCHES = 2  # of the float path, that the error at the groups' ends is measured on


def align(
    model: IntegerUNet,
    calibration: Calibration,
    settings: AlignmentSettings | None = None,
    *,
    device: str | torch.device = "cpu",
    cache_dir: str | FilePath | None = None,
    on_start: Callable[[Memory], None] | None = None,
    on_iteration: Callable[[Progress], None] | None = None,
) -> IntegerUNet:
    """``model`` with learnt activation scales, zero points and weight scales: a new model.

    Its integers stay, unless ``settings.rounding`` lets each weight choose again between two.

    Groups of M consecutive steps start on the calibration's float trajectories and run in a differentiable simulation;
    the loss compares their last latents with the float ones. Memory does not depend on M; see `gradient`.

    Args:
        model: from `quantize`; not corrected yet, since corrections are measured on what alignment changes.
        calibration: the one that the model was made with; of an equalised model, and to learn rounding, what
            `quantization.equalised` gives.
        settings: group size, iterations, batch and learning rates; by default the recipe's.
        device: where the simulation learns.
        cache_dir: folder for work in progress; an interrupted run with the same arguments resumes there.
        on_start: told the peak memory that learning is expected to take, before it starts.
        on_iteration: called after every iteration, for progress.

    Returns:
        On the CPU the same arguments give the same model bit for bit, resumed or not; with 0 iterations it is ``model``
        itself.

    Raises:
        ValueError: an argument out of range, a device that is not there, another calibration, a corrected model, a
            sampler that is not differentiable, learning rates that diverge.
        TypeError: an argument of the wrong kind.
        OSError: not enough memory; the message names the setting to lower.
    """
    settings, device = _checked(model, calibration, settings), usable_device(device)
    if settings.iterations == 0:
        return model
    with memory_errors(f"align {settings.batch} samples at a time", _mend(settings)):
        path = float_path(calibration, settings.batch)
        selection = parse_selection(settings.pairs)
        pairs = None if selection.kind == "every" else selected_pairs(calibration, selection, settings.seed)
        learnt = Learnt(model, device, originals=originals(model, calibration) if settings.rounding else None)
        simulation = Simulation(model, learnt, settings.recompute)
        if on_start is not None:
            on_start(estimated(simulation, path, settings.batch))
        key = {**progress_key(model, calibration, settings), "device": device.type}
        checkpoint = None if cache_dir is None else Checkpoint.open(cache_dir, key)
        Trainer(simulation, path, settings, checkpoint, pairs).run(on_iteration)
    return IntegerUNet(
        graph=model.graph,
        weights=learnt.weights(),
        constants=learnt.constants(model),
        table=learnt.table(),
        recipe=_recorded(model.recipe, settings),
        key=model.key,
        model_config=model.model_config,
        device=model.device,
        dtype=model.dtype,
    )


def originals(model: IntegerUNet, calibration: Calibration) -> Originals:
    """What the integers of ``model`` stand for, and what they multiplied in the float network.

    Raises:
        ValueError: the calibration's network is not equalised like the model's.
    """
    constants, factors = calibration.capture.constants, factor_keys(model.graph)
    alike = factors == factor_keys(calibration.capture.graph)
    if not alike or any(not torch.equal(model.constants[key], constants[key]) for key in factors):
        raise ValueError(
            "calibration is not equalised as the model is, so that its weights are others; give "
            "qdiff_engine.quantization.equalised(calibration, model.recipe)"
        )
    nodes = {node.kwargs["layer"]: node for node in layers(calibration.capture.graph)}
    return Originals(
        weights={layer: segments(node, constants) for layer, node in nodes.items()},
        inputs={layer: recorded_inputs(calibration, node) for layer, node in nodes.items()},
    )


def _mend(settings: AlignmentSettings) -> str:
    """What lessens the memory of learning, the cheapest first."""
    if not settings.recompute:
        return "set recompute (--align-recompute)" + (", or lower batch (--align-batch)" if settings.batch > 1 else "")
    return "lower batch (--align-batch)" if settings.batch > 1 else "batch is 1 already: use a device with more memory"


def end_errors(model: Any, calibration: Calibration, group: int, batch: int = 4) -> list[float]:
    """|x_hat - x| / |x| at the end of every group of ``group`` steps, each from the float path's latents.

    Args:
        model: anything called like the UNet; an `IntegerUNet` is measured through its integers.
    """
    path = float_path(calibration, batch)
    return [
        _end_error(model, path, start, count) for start, count in group_starts(path.length, check_count("group", group))
    ]


def _end_error(model: Any, path: Path, start: int, count: int) -> float:
    wrong = right = 0.0
    for moments in path.moments[:_ERROR_BATCHES]:
        end, target = rollout(model, path.steps, path.guidance, moments[start], count)[-1], moments[start + count]
        wrong += float((end.latents - target.latents).double().square().sum())
        right += float(target.latents.double().square().sum())
    return math.sqrt(wrong / max(right, 1e-30))


def settings_of(recipe: Recipe) -> AlignmentSettings:
    """The settings that a recipe's ``align`` fields stand for; 0 iterations where ``align`` is "none"."""
    group = check_align(recipe.align)
    if group is None:
        return AlignmentSettings(iterations=0)
    return AlignmentSettings(group=group, **{name: getattr(recipe, f"align_{name}") for name in _RECORDED})


def _recorded(recipe: Recipe, settings: AlignmentSettings) -> Recipe:
    """The recipe that says how the model was aligned, as far as recipes can; the inverse of `settings_of`."""
    changes = {f"align_{name}": getattr(settings, name) for name in _RECORDED}
    return dataclasses.replace(recipe, align=f"accuquant:{settings.group}", **changes)


def _checked(model: Any, calibration: Any, settings: AlignmentSettings | None) -> AlignmentSettings:
    if not isinstance(model, IntegerUNet):
        raise TypeError(f"model must be an IntegerUNet, got {type(model).__name__}")
    if not isinstance(calibration, Calibration):
        raise TypeError(f"calibration must come from qdiff_engine.calibrate, got {type(calibration).__name__}")
    if calibration.key != model.key or calibration.timesteps != model.table.timesteps:
        raise ValueError("calibration is not the one that the model was made with")
    if model.correction is not None or model.table.corrects():
        raise ValueError("model is corrected already; align it first, then measure its noise and correct it")
    settings = settings_of(model.recipe) if settings is None else settings
    check_alignment(settings, calibration)
    return settings


def check_alignment(settings: Any, calibration: Calibration) -> None:
    """`check_settings` on a calibration's trajectories."""
    if calibration.scheduler is None:
        raise ValueError("calibration has no scheduler, so no steps can be taken with it; calibrate again")
    key = calibration.key
    check_settings(settings, calibration.scheduler, key["steps"], key["samples"], key["eta"])


def check_settings(settings: Any, scheduler: Any, steps: int, samples: int, eta: float = 0.0) -> None:
    """Raise TypeError or ValueError unless alignment can learn like that on so many samples of a deployment sampler."""
    if not isinstance(settings, AlignmentSettings):
        raise TypeError(f"settings must be AlignmentSettings, got {type(settings).__name__}")
    check_count("iterations", settings.iterations, least=0), check_count("seed", settings.seed, least=0)
    check_count("batch", settings.batch)
    ready = prepared(scheduler, steps)
    length = len(ready.timesteps)
    if check_count("group", settings.group) > length and settings.iterations > 0:
        raise ValueError(f"group must be at most the sampler's {length} steps, got {settings.group}")
    for name in ("scale_rate", "zero_point_rate", "weight_rate", "rounding_rate"):
        value = getattr(settings, name)
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    for name in ("rounding", "recompute"):
        if type(getattr(settings, name)) is not bool:
            raise TypeError(f"{name} must be a bool, got {type(getattr(settings, name)).__name__}")
    selection = parse_selection(settings.pairs)
    if selection.count > length * samples:
        raise ValueError(f"pairs must be at most the calibration's {length * samples}, got {selection.count}")
    if selection.kind != "every" and coefficients(ready, eta) is None:
        raise ValueError(
            f"pairs {settings.pairs!r} can be selected for DDIM and DDPM, whose steps keep no state; use 'every' with "
            f"{type(scheduler).__name__}"
        )


def progress_key(model: IntegerUNet, calibration: Calibration, settings: AlignmentSettings) -> dict[str, Any]:
    """What tells one alignment's work in progress from another's."""
    parts: dict[str, Tensor] = {}
    for name, weights in model.weights.items():
        for i, w in enumerate(weights):
            parts |= {f"{name}.{i}.values": w.values, f"{name}.{i}.scale": w.scale}
    table = model.table
    parts |= {"scale": table.scale, "zero_point": table.zero_point, "bits": table.bits}
    quantized = fingerprint(parts)
    return {**calibration.key, "quantized": quantized, "modes": list(table.modes), "align": settings.to_dict()}
