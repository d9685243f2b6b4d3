"""Calibration + table -> the integer weights of every layer, each learnt on what the layers before it really give."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.calibration import Calibration
from ..calibration.checkpoint import Checkpoint, fingerprint
from ..graph.factors import factor_keys
from ..graph.ir import Graph, Node
from ..memory import memory_errors
from ..pair_requests import parse_selection
from ..rounding import gptq
from ..tables import Table
from ..weights import QuantizedWeight
from .blocks import Block, find_blocks
from .branch import Branch
from .inputs import SegmentInputs, layer_vectors
from .layers import LAYERS, RoundedLayer, bias_shift, layer_bits, layers, round_layer, segments, with_own_biases
from .learning import BlockData, BlockNetwork, Means, learn_rounding
from .learning_set import LearningSet, learning_set
from .memory import Memory, estimated, waiting_bytes
from .step_sizes import StepSizes, learnt_table

_MEMORY = 2 << 30  # bytes of the values that wait for a later node, in both branches


@dataclass(frozen=True)
class Progress:
    """Where learning is.

    Args:
        loss: the block's squared error on a batch, 1 for the integers that it starts from; None of a block that an
            earlier run finished.
        advanced: iterations since the last report: one, or all of such a block.
    """

    block: int
    blocks: int
    iteration: int
    iterations: int
    loss: float | None
    advanced: int = 1


OnProgress = Callable[[Progress], None]
OnStart = Callable[[Memory], None]


@dataclass(frozen=True)
class Reconstruction:
    """{layer: its integers and what its bias gains}, and the table with the step sizes that were learnt, if any."""

    layers: dict[str, RoundedLayer]
    table: Table


@dataclass(frozen=True)
class ReconstructionSettings:
    """How weights are rounded.

    Args:
        method: "gptq" or "adaround".
        weight_bits: of all layers but the first and the last.
        iterations: of each block, for AdaRound.
        step_groups: with AdaRound, learn the activations' step sizes and zero points, too, one for so many
            neighbouring rows (0: for all); None leaves the table as it is.
        samples: of the learning set; fewer where their values would take more than 2 GiB between two nodes.
        pairs: which they are, see `learning_set`; a selection names their number itself.
        batch: samples per iteration of AdaRound.
        device: where the network is evaluated and the rounding learnt; what waits for a later node is in the memory of
            the CPU.
        weight_group: how many inputs of a linear layer share a scale, where that divides K; 0: all.

    Raises:
        ValueError: another method, less than one iteration of AdaRound, no samples, an empty batch.
    """

    method: str
    weight_bits: int = 4
    iterations: int = 0
    step_groups: int | None = None
    samples: int = 256
    pairs: str = "every"
    batch: int = 8
    device: str | torch.device = "cpu"
    weight_group: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("gptq", "adaround"):
            raise ValueError(f"method must be gptq or adaround, got {self.method!r}")
        if self.learns and self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}; none is nearest rounding")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")

    @property
    def learns(self) -> bool:
        """Whether rounding follows a gradient."""
        return self.method == "adaround"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "device": str(self.device)}


@torch.no_grad()
def reconstruct(
    calibration: Calibration,
    table: Table,
    settings: ReconstructionSettings,
    cache_dir: str | Path | None = None,
    on_layer: Callable[[str], None] | None = None,
    on_progress: OnProgress | None = None,
    on_start: OnStart | None = None,
) -> Reconstruction:
    """Round layer after layer (``gptq``), or learn block after block from there (``adaround``).

    The whole learning set advances through the graph node by node, in a quantised copy and, where targets are needed,
    in a float one: every layer is rounded when its inputs already carry the errors of all layers before it, at the
    cost of two passes over the network. Memory is bounded by the size of the learning set.

    Args:
        table: the activations' scales and zero points, as they will be deployed.
        cache_dir: folder for work in progress; an interrupted run with the same arguments resumes there.
        on_layer: called with each layer's name once it is rounded; ``on_progress``: after every iteration.
        on_start: told the peak memory that this is expected to take, before it starts.

    Returns:
        On the CPU the same arguments give the same bit for bit, resumed or not.

    Raises:
        ValueError: a weight that is not finite.
        OSError: not enough memory; the message names the setting to lower.
    """
    capture = calibration.capture
    sizes = {n.kwargs["layer"]: len(capture.constants[n.kwargs["weight"].key]) for n in layers(capture.graph)}
    graph, constants = with_own_biases(
        capture.graph, capture.constants, {layer: torch.zeros(size) for layer, size in sizes.items()}
    )
    asked = parse_selection(settings.pairs).count or settings.samples
    most = max(1, _MEMORY // (2 * max(waiting_bytes(graph), 1)))
    data = learning_set(calibration, min(asked, most), settings.pairs)
    checkpoint = None
    if cache_dir is not None:
        statistics = {"scale": table.scale, "zero_point": table.zero_point, "bits": table.bits, **data.inputs}
        statistics |= {key: capture.constants[key] for key in sorted(factor_keys(graph))}
        key = {**calibration.key, "reconstruction": settings.to_dict(), "data": fingerprint(statistics)}
        checkpoint = Checkpoint.open(cache_dir, key)
    stage, blocks = _Stage(calibration, graph, constants, data, table, settings), find_blocks(graph)
    selected = settings.pairs != "every"
    lower = "the number of learn_pairs (--learn-pairs)" if selected else "learn_samples (--learn-samples)"
    mend = (
        f"lower {lower} for the memory of the CPU, learn_batch (--learn-batch) for that of the device that learns, or "
        "use one with more"
    )
    with memory_errors(f"round weights with {len(data)} samples", mend):
        if on_start is not None:
            learnt = (settings.learns, settings.batch, settings.step_groups)
            on_start(estimated(graph, constants, blocks, table, data, *learnt))
        _run(stage, blocks, checkpoint, on_layer, on_progress)
    return Reconstruction(stage.rounded, stage.table)


def _run(
    stage: _Stage,
    blocks: list[Block],
    checkpoint: Checkpoint | None,
    on_layer: Callable[[str], None] | None,
    on_progress: OnProgress | None,
) -> None:
    """Every block, or what an earlier run found for it."""
    for index, block in enumerate(blocks):
        known = checkpoint.load(index) if checkpoint is not None and block.layers else None
        report = _reporter(index, len(blocks), stage.settings.iterations, on_progress)
        count = stage.settings.iterations if stage.settings.learns else 0
        if known is not None and on_progress is not None and count:
            on_progress(Progress(index, len(blocks), count, count, None, count))
        tensors = stage.finish(block, known, report)
        if checkpoint is not None and known is None and tensors:
            checkpoint.save(index, tensors)
        for node in block.layers:
            if on_layer is not None:
                on_layer(node.kwargs["layer"])


def _reporter(block: int, blocks: int, iterations: int, on_progress: OnProgress | None) -> Callable[[float], None]:
    done = 0

    def report(loss: float) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(Progress(block, blocks, done, iterations, loss))

    return report


class _Stage:
    """The branches, and what is rounded so far."""

    def __init__(
        self,
        calibration: Calibration,
        graph: Graph,
        constants: dict[str, Tensor],
        data: LearningSet,
        table: Table,
        settings: ReconstructionSettings,
    ) -> None:
        self.calibration, self.graph, self.constants = calibration, graph, constants
        self.data, self.table, self.settings = data, table, settings
        self.float_constants = dict(constants)
        self.weights: dict[str, tuple[Tensor, ...]] = {}
        self.rounded: dict[str, RoundedLayer] = {}
        self.quantized = Branch(graph, constants, data, table, self.weights, settings.device)
        self.floating = Branch(graph, self.float_constants, data, device=settings.device) if settings.learns else None

    def finish(
        self, block: Block, known: Mapping[str, Tensor] | None, report: Callable[[float], None]
    ) -> dict[str, Tensor]:
        """Round a block's layers, or take them from an earlier run, and advance past it; their tensors to keep."""
        learnt: dict[str, tuple[QuantizedWeight, ...]] = {}
        tensors: dict[str, Tensor] = {}
        if self.floating is not None:
            if block.layers and known is None:
                learnt, tensors = self._learn(block, report)
            else:
                for node in block.nodes:
                    self.floating.advance(node)
        self.table = self.quantized.table = learnt_table(self.table, tensors if known is None else known)
        for node in block.nodes:
            if node.op in LAYERS:
                name = node.kwargs["layer"]
                layer = self._known(node, known) if known is not None else self._round(node, learnt.get(name))
                self._use(node, layer)
                self.rounded[name] = layer
                tensors |= layer.tensors(name)
            self.quantized.advance(node)
        return tensors

    def _known(self, node: Node, known: Mapping[str, Tensor]) -> RoundedLayer:
        bits = layer_bits(node, self.settings.weight_bits)
        return RoundedLayer.from_tensors(known, node.kwargs["layer"], len(node.args), bits)

    def _round(self, node: Node, learnt: tuple[QuantizedWeight, ...] | None) -> RoundedLayer:
        """The layer's integers, by GPTQ unless they are ``learnt``, and its bias, for what the layer receives."""
        parts, inputs = segments(node, self.constants), self._inputs(self.quantized, node, covariance=learnt is None)
        if learnt is not None:
            return RoundedLayer(learnt, bias_shift(parts, learnt, inputs))
        return self._by_gptq(node, parts, inputs)

    def _by_gptq(self, node: Node, parts: Sequence[Tensor], inputs: Sequence[SegmentInputs | None]) -> RoundedLayer:
        bits = layer_bits(node, self.settings.weight_bits)
        return round_layer(parts, bits, inputs, gptq, self.settings.weight_group)

    def _use(self, node: Node, layer: RoundedLayer) -> None:
        """From here on the quantised branch has these weights and this bias."""
        self.weights[node.kwargs["layer"]] = tuple(weight.dequantize() for weight in layer.weights)
        if layer.shift is not None:
            key = node.kwargs["bias"].key
            self.constants[key] = self.float_constants[key] + layer.shift

    def _inputs(self, branch: Branch, node: Node, covariance: bool) -> list[SegmentInputs | None]:
        parts = segments(node, self.constants)
        if node.kwargs.get("groups", 1) != 1:
            return [None] * len(parts)
        return [
            SegmentInputs.streamed(layer_vectors(node, i, part.shape, branch.of(ref.name)), covariance)
            for i, (part, ref) in enumerate(zip(parts, node.args, strict=True))
        ]

    def _start(self, block: Block) -> tuple[dict[str, tuple[QuantizedWeight, ...]], Means]:
        """GPTQ's integers for a block's layers, and the mean of what each of them multiplies."""
        fork, start, means = self.quantized.fork(), {}, {}
        for node in block.nodes:
            if node.op in LAYERS:
                name, inputs = node.kwargs["layer"], self._inputs(fork, node, covariance=True)
                layer = self._by_gptq(node, segments(node, self.constants), inputs)
                self._use(node, layer)
                start[name] = layer.weights
                if layer.shift is not None:
                    means[name] = tuple(x.mean for x in inputs if x is not None)
            fork.advance(node)
        return start, means

    def _learn(
        self, block: Block, report: Callable[[float], None]
    ) -> tuple[dict[str, tuple[QuantizedWeight, ...]], dict[str, Tensor]]:
        """AdaRound of a block, and the step sizes learnt with it; the float branch advances past it."""
        assert self.floating is not None
        scalars = [node for node in self.graph.nodes if node.op.startswith("sym_")]
        own = {node.name for node in scalars}
        entries = [name for name in block.entries if name not in own]
        start, means = self._start(block)  # first, for GPTQ's matrices are as large as the entries
        quantized = {name: self._gathered(self.quantized, name) for name in entries}
        floating = {name: self._gathered(self.floating, name) for name in entries}
        target: Any = None
        for node in block.nodes:
            self.floating.advance(node)
            if node.name == block.exit:
                target = torch.cat(self.floating.of(node.name))
        # sizes are taken from the latents
        quantized["sample"] = floating["sample"] = self.data.inputs["sample"]
        batched = {name: each for name in quantized if (each := self._each(name))}
        data = BlockData(quantized, floating, batched, target, self.data.rows)
        network = BlockNetwork(block, scalars, self.float_constants, self.table, self.settings.device)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.calibration.key['seed']} {block.exit}".encode()))
        if self.settings.step_groups is not None:
            network.steps = StepSizes(self.table, block.body, self.settings.step_groups)
        amount = (self.settings.iterations, generator, self.settings.batch)
        weights = learn_rounding(network, start, means, data, *amount, on_iteration=report)
        return weights, {} if network.steps is None else network.steps.tensors()

    def _each(self, name: str) -> int:
        """How many values along a value's first axis belong to a sample; 0 where it is the same for all."""
        shapes = {**self.graph.inputs, **{node.name: node.shape for node in self.graph.nodes}}
        first = shapes[name][0] if shapes[name] else 1
        return int(first[:-1] or 1) if isinstance(first, str) else 0

    def _gathered(self, branch: Branch, name: str) -> Any:
        """A value of all samples in one; of one chunk, where it is the same for all.

        Raises:
            ValueError: it has no axis for samples, and is not the same for all: batches of it cannot be made.
        """
        parts = branch.of(name)
        if self._each(name):
            return torch.cat(parts)
        if any(not torch.equal(torch.as_tensor(part), torch.as_tensor(parts[0])) for part in parts[1:]):
            raise ValueError(
                f"weights 'adaround' cannot learn on samples of several timesteps: the value {name!r} differs between "
                "them, but has no axis for the samples of a batch; use 'gptq'"
            )
        return parts[0]


def recorded_inputs(calibration: Calibration, node: Node) -> list[SegmentInputs | None]:
    """What each K segment of a layer multiplied while the float network was calibrated."""
    samples = [calibration.inputs.get(f"{node.kwargs['layer']}:{i}") for i in range(len(node.args))]
    return [None if x is None else SegmentInputs.of(x) for x in samples]
