"""Channel equalisation: a factor c[k] per channel of an activation, which the weights that multiply it absorb.

x[k] w[n, k] = (x[k] / c[k]) (w[n, k] c[k]): channels of very different size share one activation scale, and a factor
gives a small one more of its steps, at the weights' cost. Candidates are c[k] = |x_k|^p / |W_k|^q over a grid of
exponents, the size of a channel its largest or its root mean square value; the one with the least error of the layers'
outputs is taken, site by site, over samples of all rows, activations and weights quantised as the recipe asks, and
only where other samples confirm that it beats c = 1.

Rounding the factors to powers of two would make them exact, and costs most of what they gain: neighbouring channels
seldom differ by more than that.

Source: SmoothQuant (Xiao et al., ICML 2023), equation 4 (p = alpha, q = 1 - alpha), with the exponents searched.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibration.calibration import Calibration
from .calibration.checkpoint import Checkpoint, fingerprint
from .calibration.observers import BINS, Histogram, affine, merged
from .graph.factors import FACTORS, LIMIT, channel_axis, factor_keys, readers
from .graph.interpret import flatten_conditioning, quantize_rows, run_float
from .graph.ir import Const, Graph, Node
from .recipe import Recipe
from .rounding import nearest

EXPONENTS = ((0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (0.25, 0.25), (0.35, 0.15))  # (p, q)
_VECTORS = 1024  # samples of a layer's input
_CHOOSING = 4  # every fourth step's choose a candidate, the others' confirm it
_SCALE_VECTORS = 128  # those that the weights' scales are searched with
_WORTH = 0.98  # of the error with c = 1: a site with factors is not quantised by the product or norm before it
_BATCH = 16


@dataclass(frozen=True)
class Reader:
    """A K segment of a layer: its weight [N, C, T], samples of its input [P, C, T], step by step, and weight bits.

    group: of inputs that share a weight scale; 0 for all of them.
    """

    weight: Tensor
    inputs: Tensor
    bits: int
    group: int = 0


@torch.no_grad()
def equalise(
    calibration: Calibration,
    recipe: Recipe,
    bits: Tensor,
    on_step: Callable[[], None] | None = None,
    cache_dir: str | Path | None = None,
) -> Calibration:
    """The calibration of the equalised network: its factors and weights, and statistics of what its quantisers see.

    Args:
        recipe: weight bits, observer and rows that candidates are judged with; weights are rounded to nearest.
        bits: uint8 [R, S], activation bits of every site in every row.
        on_step: called after each of `progress_steps`.
        cache_dir: folder for the sites that are searched; an interrupted run with the same arguments resumes there.

    Returns:
        ``calibration`` itself where no site gains, or where it is equalised already.
    """
    if factor_keys(calibration.capture.graph):
        return calibration
    advance = on_step or (lambda: None)
    asked = {name: getattr(recipe, name) for name in ("weight_bits", "weight_group", "observer", "rows")}
    key = {**calibration.key, "equalise": asked, "bits": fingerprint(bits)}
    checkpoint = None if cache_dir is None else Checkpoint.open(cache_dir, key)
    aligned, factors = _aligned_sites(calibration), {}
    for i, (site, column) in enumerate(zip(calibration.sites, bits.unbind(1), strict=True)):
        known = None if checkpoint is None else checkpoint.load(i)
        if known is None and site in aligned:
            found = search(_readers(calibration, site, recipe), _rows(calibration), column, recipe)
            known = {} if found is None else {"factors": found}
            if checkpoint is not None:
                checkpoint.save(i, known)
        if known:
            factors[site] = known["factors"]
        advance()
    return _observed(with_factors(calibration, factors), set(factors), advance) if factors else calibration


def progress_steps(calibration: Calibration) -> int:
    """How often `equalise` reports progress, at most."""
    return len(calibration.sites) + len(calibration.trajectory.timesteps)


def _rows(calibration: Calibration) -> Tensor:
    """int64 [steps]: the row of every step of the trajectory."""
    return torch.tensor([calibration.timesteps.index(t) for t in calibration.trajectory.timesteps])


def _float_run(calibration: Calibration, **hooks: Any) -> Callable[..., tuple[Tensor]]:
    """The calibrated network as a function, with the hooks of `run_float`."""

    def run(sample: Tensor, timestep: Tensor, **conditioning: Any) -> tuple[Tensor]:
        inputs = {"sample": sample, "timestep": timestep, **flatten_conditioning(conditioning)}
        return (run_float(calibration.capture.graph, calibration.capture.constants, inputs, **hooks),)

    return run


def _aligned_sites(calibration: Calibration) -> set[str]:
    """Sites whose channels are the input channels of every layer behind them, whatever layout changes lie between.

    Found by sending the channel's number through the network in place of every activation. First layers are left out:
    the network's input is not equalised.
    """
    graph = calibration.capture.graph
    operators = {node.kwargs["site"]: node.op for node in graph.nodes if "site" in node.kwargs}
    sources, wrong = graph.quantizer_of(), set()

    def numbered(site: str, x: Tensor) -> Tensor:
        return _channel_numbers(x, channel_axis(operators[site], x.dim()))

    def compare(node: Node, segment: int, x: Tensor) -> None:
        grouped = node.kwargs.get("groups", 1) != 1 or f"{node.kwargs['layer']}:{segment}" not in calibration.inputs
        same = torch.equal(x, _channel_numbers(x, 1 if node.op == "int_conv2d" else -1))
        if grouped or not same or node.kwargs.get("edge") == "first":
            wrong.add(sources[node.args[segment].name].kwargs["site"])

    path = calibration.trajectory
    sample = path.samples[0][:2]
    run = _float_run(calibration, activation=numbered, layer_input=compare)
    calibration.guidance.branches(run, sample, path.timesteps[0], range(len(sample)))
    return set(readers(graph)) - wrong


def _channel_numbers(x: Tensor, axis: int) -> Tensor:
    shape = [1] * x.dim()
    shape[axis] = -1
    return torch.arange(x.shape[axis], dtype=x.dtype).reshape(shape).expand_as(x)


def _readers(calibration: Calibration, site: str, recipe: Recipe) -> list[Reader]:
    """The layers behind a site, with as many of their samples from every step."""
    found, steps = [], len(calibration.trajectory.timesteps)
    for node, segment in readers(calibration.capture.graph)[site]:
        weight = calibration.capture.constants[node.kwargs["weight"].key]
        if len(node.args) > 1:
            weight = weight.split(list(node.kwargs["segments"]), 1)[segment]
        group = recipe.weight_group if node.op == "int_gemm" else 0
        weight = weight.float().reshape(*weight.shape[:2], -1)
        samples = calibration.inputs[f"{node.kwargs['layer']}:{segment}"]
        by_step = samples.reshape(steps, -1, samples.shape[1])[:, : -(-_VECTORS // steps)]
        inputs = by_step.reshape(-1, *weight.shape[1:]).float()
        found.append(Reader(weight, inputs, 8 if node.kwargs.get("edge") else recipe.weight_bits, group))
    return found


def candidates(parts: list[Reader]) -> list[Tensor]:
    """Factors float32 [C] of each size and pair of exponents, of geometric mean 1; 1 where a channel is dead."""
    largest = [
        torch.stack([part.inputs.abs().amax((0, 2)) for part in parts]).amax(0),
        torch.stack([part.weight.abs().amax((0, 2)) for part in parts]).amax(0),
    ]
    mean_square = [
        torch.stack([part.inputs.square().mean((0, 2)) for part in parts]).mean(0).sqrt(),
        torch.stack([part.weight.square().mean((0, 2)) for part in parts]).mean(0).sqrt(),
    ]
    tiny = torch.finfo(torch.float32).tiny
    alive = (mean_square[0] > tiny) & (mean_square[1] > tiny)
    if not bool(alive.any()):
        return []
    found = []
    for x, w in (largest, mean_square):
        x, w = x.clamp(min=tiny).log2(), w.clamp(min=tiny).log2()
        for p, q in EXPONENTS:
            exponent = p * x - q * w
            found.append(torch.where(alive, exponent - exponent[alive].mean(), 0.0).exp2().clamp(1 / LIMIT, LIMIT))
    return found


def search(parts: list[Reader], step_rows: Tensor, bits: Tensor, recipe: Recipe) -> Tensor | None:
    """float32 [C]: the candidate with the least error of the layers' outputs; None where that does not beat c = 1.

    Args:
        parts: the layers behind a site; their samples are as many from each step, in order.
        step_rows: int64 [steps], the row that serves each step.
        bits: uint8 [R], the site's activation bits.
    """
    options, steps = candidates(parts), torch.arange(len(step_rows))
    if not options:
        return None
    few = steps % _CHOOSING == min(_CHOOSING, len(steps)) // 2
    chosen = output_errors(parts, options, steps[few], step_rows, bits, recipe)
    best = options[chosen.index(min(chosen))]
    others = steps[~few] if len(steps) > 1 else steps
    before, after = output_errors(parts, [torch.ones_like(best), best], others, step_rows, bits, recipe)
    return best if after < _WORTH * before else None


def output_errors(
    parts: list[Reader], options: list[Tensor], steps: Tensor, step_rows: Tensor, bits: Tensor, recipe: Recipe
) -> list[float]:
    """Sum over the layers of |Q(x / c) Q(w c)^T - x w^T|^2 for each c of ``options``.

    Args:
        steps: indices of the steps whose samples count.
        step_rows: int64, the row that serves each step of all.
        bits: uint8 [R], activation bits; 16 leaves a row's x / c as it is.
        recipe: for its observer; rows share one range if all of them do ("static").
    """
    inputs = [part.inputs.unflatten(0, (len(step_rows), -1))[steps].flatten(0, 1) for part in parts]
    exact = [x.flatten(1) @ part.weight.flatten(1).T for x, part in zip(inputs, parts, strict=True)]
    present, rows = step_rows[steps].unique(return_inverse=True)
    rows, bits = rows.repeat_interleave(len(inputs[0]) // len(steps)), bits[present]

    def divided(factors: Tensor) -> list[Tensor]:
        return [(x / factors[:, None]).flatten(1) for x in inputs]

    statistics = [_row_statistics(torch.cat(divided(factors), 1), rows, len(bits)) for factors in options]
    counts, ranges = (torch.stack(values, 1) for values in zip(*statistics, strict=True))
    scale, zero_point = _affines(*merged(counts, ranges, min(recipe.row_group(), 1)), bits, recipe)
    totals = []
    for option, factors in enumerate(options):
        total, affines = 0.0, (scale[rows, option], zero_point[rows, option])
        for part, x, y in zip(parts, divided(factors), exact, strict=True):
            few = torch.linspace(0, len(x) - 1, min(len(x), _SCALE_VECTORS)).long()
            equal = (part.weight * factors[:, None]).flatten(1)
            weight = nearest(equal, part.bits, x[few], group=part.group).dequantize()
            total += float((quantize_rows(x, *affines, bits[rows]) @ weight.T - y).square().sum())
        totals.append(total)
    return totals


def _row_statistics(x: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(counts float64 [R, BINS], ranges float64 [R, 2]) of the vectors [P, D] of each row; a range includes 0."""
    low = torch.zeros(count).scatter_reduce(0, rows, x.amin(1), "amin")
    high = torch.zeros(count).scatter_reduce(0, rows, x.amax(1), "amax")
    width = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    bins = ((x - low[rows, None]) * (BINS / width)[rows, None]).long().clamp_(0, BINS - 1)
    counts = torch.bincount((bins + BINS * rows[:, None]).flatten(), minlength=BINS * count)
    return counts.double().reshape(count, BINS), torch.stack([low, high], -1).double()


def _affines(counts: Tensor, ranges: Tensor, bits: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Scale and zero point [R, O] of the statistics [R, O, BINS] and [R, O, 2], each row at its own bits [R]."""
    scale, zero_point = torch.ones(counts.shape[:2]), torch.zeros(counts.shape[:2], dtype=torch.int32)
    for width in (4, 8):
        mine = bits == width
        if bool(mine.any()):
            found = affine(recipe.observer, counts[mine].flatten(0, 1), ranges[mine].flatten(0, 1), width)
            scale[mine], zero_point[mine] = (values.reshape(-1, counts.shape[1]) for values in found)
    return scale, zero_point


def with_factors(calibration: Calibration, factors: Mapping[str, Tensor]) -> Calibration:
    """The same float network with its channels divided by ``factors`` at their sites and its weights multiplied.

    The statistics are still those of the network without factors. A weight that two layers share becomes two.
    """
    captured = calibration.capture
    nodes = [copy.copy(node) for node in captured.graph.nodes]
    graph = Graph(captured.graph.inputs, nodes, captured.graph.output)
    constants, inputs = dict(captured.constants), dict(calibration.inputs)
    for node in nodes:
        found = factors.get(node.kwargs.get("site"))  # type: ignore[arg-type]
        if found is not None:
            key = f"{node.kwargs['site']}.{FACTORS}"
            node.kwargs = {**node.kwargs, FACTORS: Const(key)}
            constants[key] = 1 / found
    for node, by_segment in _absorbing(graph, factors):
        layer, weight = node.kwargs["layer"], constants[node.kwargs["weight"].key]
        sizes = node.kwargs["segments"] if len(node.args) > 1 else (weight.shape[1],)
        taps = weight[0, 0].numel()
        for segment, found in by_segment.items():
            name = f"{layer}:{segment}"
            inputs[name] = (inputs[name].float() / found.repeat_interleave(taps)).to(inputs[name].dtype)
        whole = torch.cat([by_segment.get(i, torch.ones(size)) for i, size in enumerate(sizes)])
        key = f"{layer}.equalised"
        constants[key] = weight * whole.reshape(1, -1, *[1] * (weight.dim() - 2))
        node.kwargs = {**node.kwargs, "weight": Const(key)}
    read = {key for node in nodes for key in node.consts()}
    constants = {key: value for key, value in constants.items() if key in read}
    capture = dataclasses.replace(captured, graph=graph, constants=constants)
    return dataclasses.replace(calibration, capture=capture, inputs=inputs)


def _absorbing(graph: Graph, factors: Mapping[str, Tensor]) -> list[tuple[Node, dict[int, Tensor]]]:
    """(layer, {K segment: its factors}) of every layer that absorbs any."""
    found: dict[str, tuple[Node, dict[int, Tensor]]] = {}
    for site, layers in readers(graph).items():
        for node, segment in layers if site in factors else ():
            found.setdefault(node.name, (node, {}))[1][segment] = factors[site]
    return list(found.values())


def _observed(calibration: Calibration, sites: set[str], advance: Callable[[], None]) -> Calibration:
    """The calibration with the statistics of ``sites`` taken again, from a float pass over its trajectory."""
    counts, ranges = calibration.counts.clone(), calibration.ranges.clone()
    columns = {site: calibration.sites.index(site) for site in sites}
    seen = {(row, site): Histogram() for row in range(len(counts)) for site in sites}
    path = calibration.trajectory
    for timestep, sample, row in zip(path.timesteps, path.samples, _rows(calibration).tolist(), strict=True):

        def observe(site: str, x: Tensor, row: int = row) -> Tensor:
            if site in sites:
                seen[row, site].update(x)
            return x

        calibration.guidance.in_batches(_float_run(calibration, activation=observe), sample, timestep, _BATCH)
        advance()
    for (row, site), histogram in seen.items():
        if histogram.counts is not None:
            counts[row, columns[site]] = histogram.counts
            ranges[row, columns[site]] = torch.tensor([histogram.low, histogram.high], dtype=torch.float64)
    return dataclasses.replace(calibration, counts=counts, ranges=ranges)
