"""Calibration + table -> the integer weights of every layer, each learnt on what the layers before it really give."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.calibration import Calibration
from ..calibration.checkpoint import Checkpoint, fingerprint
from ..graph.ir import Graph, Node
from ..rounding import gptq, nearest
from ..tables import Table
from ..weights import QuantizedWeight
from .blocks import Block, find_blocks
from .branch import Branch
from .inputs import SegmentInputs, layer_vectors
from .layers import LAYERS, RoundedLayer, bias_shift, layer_bits, layers, round_layer, segments, with_own_biases
from .learning import BlockData, BlockNetwork, learn_rounding
from .learning_set import LearningSet, learning_set

_SAMPLES = 256  # of the learning set, fewer where they would not fit
_MEMORY = 2 << 30  # bytes of the values that wait for a later node, in both branches


@dataclass(frozen=True)
class Progress:
    """Where learning is: ``loss`` is the block's squared error, 1 for nearest rounding; 0 iterations for GPTQ."""

    block: int
    blocks: int
    iteration: int
    iterations: int
    loss: float | None = None


OnProgress = Callable[[Progress], None]


@torch.no_grad()
def reconstruct(
    calibration: Calibration,
    table: Table,
    method: str,
    weight_bits: int,
    iterations: int = 0,
    cache_dir: str | Path | None = None,
    on_layer: Callable[[str], None] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, RoundedLayer]:
    """Round layer after layer (``gptq``) or block after block (``adaround``) from inputs of the quantised prefix.

    The whole learning set advances through the graph node by node, in a quantised copy and, where targets are needed,
    in a float one: every layer is rounded when its inputs already carry the errors of all layers before it, at the
    cost of two passes over the network. Memory is bounded by the size of the learning set.

    Args:
        table: the activations' scales and zero points, as they will be deployed.
        method: "gptq" or "adaround"; ``iterations``: of each block, for the latter.
        weight_bits: of all layers but the first and the last.
        cache_dir: folder for work in progress; an interrupted run with the same arguments resumes there.
        on_layer: called with each layer's name once it is rounded; ``on_progress``: after every iteration.

    Returns:
        {layer: its integers and what its bias gains}; the same arguments give the same bit for bit, resumed or not.
    """
    if method not in ("gptq", "adaround"):
        raise ValueError(f"method must be gptq or adaround, got {method!r}")
    if method == "adaround" and iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}; none is nearest rounding")
    capture = calibration.capture
    sizes = {n.kwargs["layer"]: len(capture.constants[n.kwargs["weight"].key]) for n in layers(capture.graph)}
    graph, constants = with_own_biases(
        capture.graph, capture.constants, {layer: torch.zeros(size) for layer, size in sizes.items()}
    )
    data = learning_set(calibration, samples_that_fit(graph))
    checkpoint = None
    if cache_dir is not None:
        key = {"method": method, "bits": weight_bits, "iterations": iterations, "samples": len(data)}
        statistics = {"scale": table.scale, "zero_point": table.zero_point, "bits": table.bits, **data.inputs}
        checkpoint = Checkpoint.open(cache_dir, {**calibration.key, **key, "data": fingerprint(statistics)})
    stage = _Stage(calibration, graph, constants, data, table, method, weight_bits, iterations)
    blocks = find_blocks(graph)
    for index, block in enumerate(blocks):
        known = checkpoint.load(index) if checkpoint is not None and block.layers else None
        begun = _reporter(index, len(blocks), iterations, on_progress)
        tensors = stage.finish(block, known, begun)
        if checkpoint is not None and known is None and tensors:
            checkpoint.save(index, tensors)
        for node in block.layers:
            if on_layer is not None:
                on_layer(node.kwargs["layer"])
    return stage.rounded


def _reporter(block: int, blocks: int, iterations: int, on_progress: OnProgress | None) -> Callable[[float], None]:
    done = 0

    def report(loss: float) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(Progress(block, blocks, done, iterations, loss))

    return report


def samples_that_fit(graph: Graph) -> int:
    """How many samples may wait in both branches at the graph's fullest point, at most 256."""
    last = {name: i for i, node in enumerate(graph.nodes) for name in node.refs()}
    size = {node.name: 4 * torch.Size(per_sample(node.shape)).numel() for node in graph.nodes}
    alive = most = 0
    for i, node in enumerate(graph.nodes):
        alive += size[node.name]
        most = max(most, alive)
        alive -= sum(size.get(name, 0) for name in set(node.refs()) if last[name] == i)
    return max(1, min(_SAMPLES, _MEMORY // (2 * max(most, 1))))


def per_sample(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """A value's sizes in a batch of one."""
    return tuple(d if isinstance(d, int) else int(d[:-1] or 1) for d in shape)


class _Stage:
    """The branches, and what is rounded so far."""

    def __init__(
        self,
        calibration: Calibration,
        graph: Graph,
        constants: dict[str, Tensor],
        data: LearningSet,
        table: Table,
        method: str,
        weight_bits: int,
        iterations: int,
    ) -> None:
        self.calibration, self.graph, self.constants = calibration, graph, constants
        self.data, self.table, self.weight_bits, self.iterations = data, table, weight_bits, iterations
        self.float_constants = dict(constants)
        self.weights: dict[str, tuple[Tensor, ...]] = {}
        self.rounded: dict[str, RoundedLayer] = {}
        self.quantized = Branch(graph, constants, data, table, self.weights)
        self.floating = Branch(graph, self.float_constants, data) if method == "adaround" else None

    def finish(
        self, block: Block, known: Mapping[str, Tensor] | None, report: Callable[[float], None]
    ) -> dict[str, Tensor]:
        """Round a block's layers, or take them from an earlier run, and advance past it; returns them for a checkpoint."""
        learnt: dict[str, tuple[QuantizedWeight, ...]] = {}
        if self.floating is not None:
            if block.layers and known is None:
                learnt = self._learn(block, report)
            else:
                for node in block.nodes:
                    self.floating.advance(node)
        tensors: dict[str, Tensor] = {}
        for node in block.nodes:
            if node.op in LAYERS:
                layer = self._round(node, known, learnt.get(node.kwargs["layer"]))
                tensors |= layer.tensors(node.kwargs["layer"])
            self.quantized.advance(node)
        return tensors

    def _round(
        self, node: Node, known: Mapping[str, Tensor] | None, learnt: tuple[QuantizedWeight, ...] | None
    ) -> RoundedLayer:
        """The layer's integers, its new weight and bias given to the quantised branch."""
        name, parts = node.kwargs["layer"], segments(node, self.constants)
        bits = layer_bits(node, self.weight_bits)
        if known is not None:
            layer = RoundedLayer.from_tensors(known, name, len(parts), bits)
        else:
            inputs = self._inputs(node, parts, covariance=learnt is None)
            if learnt is None:
                layer = round_layer(parts, bits, inputs, gptq)
            else:
                layer = RoundedLayer(learnt, bias_shift(parts, learnt, inputs))
        self.rounded[name] = layer
        self.weights[name] = tuple(weight.dequantize() for weight in layer.weights)
        if layer.shift is not None:
            key = node.kwargs["bias"].key
            self.constants[key] = self.constants[key] + layer.shift
        return layer

    def _inputs(self, node: Node, parts: tuple[Tensor, ...], covariance: bool) -> list[SegmentInputs | None]:
        if node.kwargs.get("groups", 1) != 1:
            return [None] * len(parts)
        return [
            SegmentInputs.streamed(layer_vectors(node, i, part.shape, self.quantized.of(ref.name)), covariance)
            for i, (part, ref) in enumerate(zip(parts, node.args, strict=True))
        ]

    def _learn(self, block: Block, report: Callable[[float], None]) -> dict[str, tuple[QuantizedWeight, ...]]:
        """AdaRound of a block; the float branch advances past it."""
        assert self.floating is not None
        scalars = [node for node in self.graph.nodes if node.op.startswith("sym_")]
        own = {node.name for node in scalars}
        entries = [name for name in block.entries if name not in own]
        quantized = {name: self._gathered(self.quantized, name) for name in entries}
        floating = {name: self._gathered(self.floating, name) for name in entries}
        start = {node.kwargs["layer"]: self._nearest(node) for node in block.layers}
        target: Any = None
        for node in block.nodes:
            self.floating.advance(node)
            if node.name == block.exit:
                target = torch.cat(self.floating.of(node.name))
        # sizes are taken from the latents
        quantized["sample"] = floating["sample"] = self.data.inputs["sample"]
        batched = {name: each for name in quantized if (each := self._each(name))}
        data = BlockData(quantized, floating, batched, target, self.data.rows)
        network = BlockNetwork(block, scalars, self.float_constants, self.table)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.calibration.key['seed']} {block.exit}".encode()))
        means = self._means(network, start, data)
        return learn_rounding(network, start, means, data, self.iterations, generator, on_iteration=report)

    def _nearest(self, node: Node) -> tuple[QuantizedWeight, ...]:
        parts, inputs = segments(node, self.constants), recorded_inputs(self.calibration, node)
        return round_layer(parts, layer_bits(node, self.weight_bits), inputs, nearest).weights

    def _each(self, name: str) -> int:
        """How many values along a value's first axis belong to a sample; 0 where it is the same for all."""
        shapes = {**self.graph.inputs, **{node.name: node.shape for node in self.graph.nodes}}
        first = shapes[name][0] if shapes[name] else 1
        return int(first[:-1] or 1) if isinstance(first, str) else 0

    def _gathered(self, branch: Branch, name: str) -> Any:
        """A value of all samples in one; of one chunk, where it is the same for all."""
        parts = branch.of(name)
        return torch.cat(parts) if self._each(name) else parts[0]

    def _means(
        self, network: BlockNetwork, start: Mapping[str, tuple[QuantizedWeight, ...]], data: BlockData
    ) -> dict[str, tuple[Tensor, ...]]:
        """Mean of what each layer of the block multiplies, behind the quantised prefix and nearest rounding."""
        weights = {layer: tuple(w.dequantize() for w in own) for layer, own in start.items()}
        seen: dict[str, dict[int, list[Tensor]]] = {}

        def observe(node: Node, segment: int, x: Tensor) -> None:
            if node.kwargs.get("groups", 1) == 1:
                parts = seen.setdefault(node.kwargs["layer"], {}).setdefault(segment, [])
                shape = weights[node.kwargs["layer"]][segment].shape
                parts += [v.mean(0) for v in layer_vectors(node, segment, shape, [x])]

        for picked in torch.arange(len(data.rows)).split(16):
            network.evaluate(data.at(data.quantized, picked), data.rows[picked], weights, observe=observe)
        return {
            layer: tuple(torch.stack(by_segment[i]).mean(0) for i in sorted(by_segment))
            for layer, by_segment in seen.items()
        }


def recorded_inputs(calibration: Calibration, node: Node) -> list[SegmentInputs | None]:
    """What each K segment of a layer multiplied while the float network was calibrated."""
    samples = [calibration.inputs.get(f"{node.kwargs['layer']}:{i}") for i in range(len(node.args))]
    return [None if x is None else SegmentInputs.of(x) for x in samples]
