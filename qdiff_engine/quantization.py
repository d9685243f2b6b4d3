"""Calibration + Recipe -> IntegerUNet: weights become integers, statistics become the table."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .alignment.alignment import align, check_alignment, settings_of
from .alignment.training import Progress as AlignmentProgress
from .calibration.calibration import Calibration
from .calibration.observers import affine, merged
from .equalisation import equalise
from .graph.capture import hash_parameters
from .graph.factors import factor_keys
from .graph.ir import Graph
from .models import usable_device
from .plan_requests import expected_modes, preset_modes
from .plans.choice import TRIAL_SAMPLES, PlanChoice, check_sampler, choose, needed_modes
from .plans.trial import Sampler
from .recipe import Recipe
from .reconstruction.layers import RoundedLayer, layer_bits, round_layer, segments, with_own_biases
from .reconstruction.layers import layers as layers
from .reconstruction.stage import OnProgress, OnStart, ReconstructionSettings, reconstruct, recorded_inputs
from .rounding import nearest
from .runtime.model import IntegerUNet
from .sampling import initial_noise
from .tables import MODE_BITS, Table, with_learnt

_SEARCH_CHUNK = 512  # histograms searched at a time, to bound memory


@torch.no_grad()
def quantize(
    unet: nn.Module,
    calibration: Calibration,
    recipe: Recipe,
    on_layer: Callable[[str], None] | None = None,
    on_trial: Callable[[], None] | None = None,
    on_plan: Callable[[PlanChoice], None] | None = None,
    on_progress: OnProgress | None = None,
    on_start: OnStart | None = None,
    on_align: Callable[[AlignmentProgress], None] | None = None,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> IntegerUNet:
    """The integer model of ``unet``: real int4/int8 weights and a scale and zero point per quantiser and row.

    Args:
        unet: the module that ``calibration`` was made with; checked by the hash of its parameters.
        calibration: statistics of every quantiser's input; they serve any recipe.
        recipe: precisions, observer, row grouping, plan. Its ``correct`` is for `qdiff_engine.correct`, a later step
            that needs the sampler; here it only warns.
        on_layer: called with each layer's name once its weights are integers, for progress.
        on_trial: called after each trial of a plan that is measured; see `plans.choice.trials`.
        on_plan: called with such a plan once it is chosen.
        on_progress: called after each iteration of weights that are learnt; see `reconstruction.stage.Progress`.
        on_start: told the peak memory that rounding by gptq or adaround is expected to take, before it starts.
        on_align: called after each iteration of alignment, where the recipe asks for it.
        cache_dir: folder for work in progress (gptq, adaround, alignment); an interrupted run resumes there, to the
            same bits.
        device: where gptq, adaround and alignment evaluate the network and learn; the model itself begins on the CPU.

    Raises:
        ValueError: the unet is not the calibrated one, the plan does not fit the rows, there is no such device.
    """
    if not isinstance(calibration, Calibration):
        raise TypeError(f"calibration must come from qdiff_engine.calibrate, got {type(calibration).__name__}")
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, got {type(recipe).__name__}; Recipe.named('w8a8') makes one")
    if hash_parameters(unet) != calibration.key["model_hash"]:
        raise ValueError("unet is not the one that was calibrated: its parameters have another hash")
    device, cache = usable_device(device), None if cache_dir is None else Path(cache_dir)
    if recipe.align != "none":
        check_alignment(settings_of(recipe), calibration)
    request = recipe.plan_to_measure()
    trial_sampler = None if request is None else _trial_sampler(calibration)
    if trial_sampler is not None:
        check_sampler(request, trial_sampler.scheduler, calibration.timesteps)
    calibration = equalised(calibration, recipe, cache_dir=None if cache is None else cache / "equalise")
    captured, parameters = calibration.capture.graph, calibration.capture.constants
    rounding = None if cache is None else cache / "weights"
    rounded, learnt = rounded_layers(calibration, recipe, rounding, on_layer, on_progress, on_start, device)
    weights = {layer: parts.weights for layer, parts in rounded.items()}
    shifts = {layer: parts.shift for layer, parts in rounded.items()}
    graph, parameters = with_own_biases(without_weights(captured), parameters, shifts)
    constants = {key: parameters[key] for key in sorted({key for node in graph.nodes for key in node.consts()})}
    if recipe.correct != "none":
        warnings.warn(
            f"recipe asks for correct={recipe.correct!r}, which needs the sampler: call measure_noise(model, unet, "
            "scheduler) and correct(model, unet, scheduler, noise)",
            UserWarning,
            stacklevel=2,
        )

    def model(table: Table) -> IntegerUNet:
        return IntegerUNet(
            graph=graph,
            weights=weights,
            constants=constants,
            table=table,
            recipe=recipe,
            key=calibration.key,
            model_config=calibration.capture.config,
        )

    def aligned(unaligned: IntegerUNet) -> IntegerUNet:
        """With learnt step sizes, where the recipe asks for them; `align` itself takes more settings."""
        if recipe.align == "none":
            return unaligned
        folder = None if cache is None else cache / "align"
        return align(unaligned, calibration, device=device, cache_dir=folder, on_iteration=on_align)

    if request is None or trial_sampler is None:
        return aligned(model(with_learnt(make_table(calibration, recipe), learnt)))
    tables = {mode: with_learnt(make_table(calibration, recipe, mode), learnt) for mode in needed_modes(request)}
    first = model(next(iter(tables.values())))  # the others share its packed weights
    trials = {mode: first.with_table(table) for mode, table in tables.items()}
    choice = choose(request, trials, first.table.row, calibration.timesteps, unet, trial_sampler, on_trial)
    if on_plan is not None:
        on_plan(choice)
    chosen = with_learnt(make_table(calibration, recipe, choice.modes), learnt)
    return aligned(first.with_table(chosen))


def equalised(
    calibration: Calibration,
    recipe: Recipe,
    on_step: Callable[[], None] | None = None,
    cache_dir: str | Path | None = None,
) -> Calibration:
    """The calibration of the network that the recipe quantises: equalised where it asks for that, once.

    Factors are searched at the modes of the plan; where it is still to be measured, at its fewest bits.

    Args:
        on_step: called after each of `equalisation.progress_steps`, for progress.
        cache_dir: folder for work in progress; an interrupted run with the same arguments resumes there.

    Raises:
        ValueError: the calibration is equalised, the recipe is not.
    """
    if recipe.equalise == "off":
        if factor_keys(calibration.capture.graph):
            raise ValueError("calibration is equalised, and recipe has equalise='off'; give one that has 'on'")
        return calibration
    request, rows = recipe.plan_to_measure(), len(calibration.timesteps)
    if request is None:
        modes = plan_of(recipe, rows)
    else:
        modes = (min(needed_modes(request), key=MODE_BITS.__getitem__),) * rows
    bits = site_bits(calibration.capture.graph, calibration.sites, modes, recipe.edges)
    return equalise(calibration, recipe, bits, on_step, cache_dir)


def _trial_sampler(calibration: Calibration) -> Sampler:
    """The deployment sampler on the calibration's first trajectories."""
    key = calibration.key
    if calibration.scheduler is None:
        raise ValueError("calibration has no scheduler, so no plan can be measured with it; calibrate again")
    noise = initial_noise((min(TRIAL_SAMPLES, key["samples"]), *calibration.shape), key["seed"])
    return Sampler(calibration.scheduler, noise, key["steps"], key["seed"], key["eta"], calibration.guidance)


def rounded_layers(
    calibration: Calibration,
    recipe: Recipe,
    cache_dir: str | Path | None = None,
    on_layer: Callable[[str], None] | None = None,
    on_progress: OnProgress | None = None,
    on_start: OnStart | None = None,
    device: str | torch.device = "cpu",
) -> tuple[dict[str, RoundedLayer], Table | None]:
    """The integer weights of every layer, and what its bias gains; the table of step sizes that were learnt, or None.

    Without iterations AdaRound is nearest rounding, and step sizes are as observed.
    """
    if recipe.weights == "gptq" or (recipe.weights == "adaround" and recipe.learn_iterations > 0):
        mode = f"A{recipe.activation_bits}"
        table = make_table(calibration, recipe, (mode,) * len(calibration.timesteps))
        groups = recipe.row_group() if recipe.step_sizes == "learnt" else None
        settings = ReconstructionSettings(
            method=recipe.weights,
            weight_bits=recipe.weight_bits,
            iterations=recipe.learn_iterations,
            step_groups=groups,
            samples=recipe.learn_samples,
            pairs=recipe.learn_pairs,
            batch=recipe.learn_batch,
            device=device,
            weight_group=recipe.weight_group,
        )
        found = reconstruct(calibration, table, settings, cache_dir, on_layer, on_progress, on_start)
        return found.layers, None if groups is None else found.table
    rounded = {}
    for node in layers(calibration.capture.graph):
        parts, inputs = segments(node, calibration.capture.constants), recorded_inputs(calibration, node)
        bits = layer_bits(node, recipe.weight_bits)
        rounded[node.kwargs["layer"]] = round_layer(parts, bits, inputs, nearest, recipe.weight_group)
        if on_layer is not None:
            on_layer(node.kwargs["layer"])
    return rounded, None


def without_weights(graph: Graph) -> Graph:
    """A copy whose layers no longer name their float weights: the integers have taken their place."""
    nodes = [copy.copy(node) for node in graph.nodes]
    for node in nodes:
        if node.op in ("int_conv2d", "int_gemm"):
            node.kwargs = {**node.kwargs, "weight": None}
    return Graph(graph.inputs, nodes, graph.output)


def plan_of(recipe: Recipe, rows: int) -> tuple[str, ...]:
    """The mode of every row, for a plan that needs no measurement.

    Raises:
        ValueError: a plan for another number of rows, or one that has to be measured.
    """
    request = recipe.plan_request()
    if request is None:
        if len(recipe.plan) != rows:
            raise ValueError(f"plan names {len(recipe.plan)} rows, the calibration has {rows}")
        return tuple(recipe.plan)
    if request.measured:
        raise ValueError(f"plan {recipe.plan!r} is measured; quantize chooses it")
    if request.kind == "preset":
        return preset_modes(request.preset, rows)
    return (f"A{recipe.activation_bits}",) * rows


def likely_plan(recipe: Recipe) -> tuple[str, ...]:
    """Modes in the recipe's proportions, over as many rows as that takes: what BOPs need before any calibration."""
    request = recipe.plan_request()
    return tuple(recipe.plan) if request is None else expected_modes(request, f"A{recipe.activation_bits}")


def site_bits(
    graph: Graph, sites: tuple[str, ...], modes: tuple[str, ...], edges: str, switching: bool = False
) -> Tensor:
    """uint8 [R, S]: activation bits of every site in every row.

    A row's mode decides, except at the first layer (floating, or 8 bits with ``edges`` = "a8"), at the last (at
    least 8 bits) and at layers fed by the prompt alone (8 bits in every row, so that they run once per prompt).
    ``switching``: the modes are a part of a mixed plan, whose prompt is not floating even if they all are.
    """
    plan = torch.tensor([MODE_BITS[mode] for mode in modes], dtype=torch.uint8)
    bits = plan[:, None].repeat(1, len(sites))
    floating = bool((plan == 16).all()) and not switching
    column = {site: i for i, site in enumerate(sites)}
    for site, edge, section in site_roles(graph):
        if edge == "first":
            bits[:, column[site]] = 16 if edges == "a16" or floating else 8
        elif edge == "last":
            bits[:, column[site]] = plan.clamp(min=8)
        elif section == "prompt":
            bits[:, column[site]] = 16 if floating else 8
    return bits


def site_roles(graph: Graph) -> Iterator[tuple[str, str | None, str]]:
    """(site, edge of a layer it feeds, section) of every quantiser."""
    sources = graph.quantizer_of()
    edges: dict[str, str | None] = {}
    for node in layers(graph):
        for ref in node.args:
            site = sources[ref.name].kwargs["site"]
            edges[site] = edges.get(site) or node.kwargs.get("edge")
    for node in graph.nodes:
        if "site" in node.kwargs:
            yield node.kwargs["site"], edges.get(node.kwargs["site"]), node.section


def make_table(calibration: Calibration, recipe: Recipe, plan: str | tuple[str, ...] | None = None) -> Table:
    """Scales and zero points of every site in every row, from the recipe's observer and row grouping.

    Args:
        plan: the mode of every row; one mode for all of them, as they would be inside a mixed plan; or the recipe's.
    """
    graph, sites, rows = calibration.capture.graph, calibration.sites, len(calibration.timesteps)
    modes = plan_of(recipe, rows) if plan is None else (plan,) * rows if isinstance(plan, str) else plan
    bits = site_bits(graph, sites, modes, recipe.edges, switching=isinstance(plan, str))
    counts, ranges = merged(calibration.counts, calibration.ranges, recipe.row_group())
    scale, zero_point = torch.ones(rows, len(sites)), torch.zeros(rows, len(sites), dtype=torch.int32)
    for width in (4, 8):
        at = (bits == width).nonzero()
        for chunk in at.split(_SEARCH_CHUNK):
            r, s = chunk.unbind(1)
            if len(chunk):
                scale[r, s], zero_point[r, s] = affine(recipe.observer, counts[r, s], ranges[r, s], width)
    _share_prompt_rows(graph, sites, scale, zero_point)
    channels = _output_channels(graph)
    identity = torch.ones(rows, channels), torch.zeros(rows, channels)
    return Table(calibration.timesteps, modes, sites, scale, zero_point, bits, *identity)


def _share_prompt_rows(graph: Graph, sites: tuple[str, ...], scale: Tensor, zero_point: Tensor) -> None:
    """A prompt's layers see the same values at every step: one affine, so that their results can be kept."""
    for node in graph.nodes:
        if "site" in node.kwargs and node.section == "prompt":
            column = sites.index(node.kwargs["site"])
            scale[:, column], zero_point[:, column] = scale[0, column], zero_point[0, column]


def _output_channels(graph: Graph) -> int:
    shape = graph.node(graph.output).shape
    return int(shape[1]) if len(shape) > 1 else 1
