"""How much memory reconstruction takes, told before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.ir import Graph, Node
from ..memory import SavedBytes
from ..tables import Table
from .blocks import Block
from .layers import layers, segments
from .learning import DROP, BlockNetwork, step_parameters
from .learning_set import LearningSet
from .step_sizes import StepSizes

_FLOAT = 4  # bytes
_PER_HESSIAN = 5 * 8  # X^T X, its copy in order, a factor, the inverse and its factor, in float64
_PER_WEIGHT = 10 * _FLOAT  # floor, choice, its gradient and Adam's two moments, h(v) and the relaxed weight twice


@dataclass(frozen=True)
class Memory:
    """Bytes that reconstruction is expected to hold at its peak.

    Args:
        rounded: the weights of all layers that are rounded already, as integers and as what these stand for.
        waiting: what later nodes still read of every sample, in the quantised branch and the float one.
        entries: what the block with the largest ones receives and answers, over all samples.
        hessian: GPTQ's matrices of the layer with the most inputs, also where AdaRound starts from them.
        learning: the choices of the largest block's weights, and what a batch keeps for its backward pass; on the
            device that learns. The others are in the memory of the CPU.
        samples: how many inputs of the network that is for: fewer than asked for where more would not fit.
    """

    rounded: int
    waiting: int
    entries: int
    hessian: int
    learning: int
    samples: int

    @property
    def total(self) -> int:
        """What is held at once: GPTQ is done when a block's entries are gathered and learning begins."""
        return self.rounded + self.waiting + max(self.hessian, self.entries + self.learning)

    @property
    def of_samples(self) -> int:
        """What fewer samples lessen."""
        return self.waiting + self.entries


def waiting_bytes(graph: Graph) -> int:
    """Of one sample, in one branch, at the graph's fullest point."""
    last = {name: i for i, node in enumerate(graph.nodes) for name in node.refs()}
    size = {node.name: _FLOAT * torch.Size(per_sample(node.shape)).numel() for node in graph.nodes}
    alive = most = 0
    for i, node in enumerate(graph.nodes):
        alive += size[node.name]
        most = max(most, alive)
        alive -= sum(size.get(name, 0) for name in set(node.refs()) if last[name] == i)
    return most


def per_sample(shape: Sequence[object], samples: int = 1) -> tuple[int, ...]:
    """A value's sizes in a batch of ``samples``."""
    return tuple(d if isinstance(d, int) else samples * int(str(d)[:-1] or 1) for d in shape)


def estimated(
    graph: Graph,
    constants: Mapping[str, Tensor],
    blocks: Sequence[Block],
    table: Table,
    data: LearningSet,
    learns: bool,
    batch: int = 8,
    step_groups: int | None = None,
) -> Memory:
    """The memory of reconstruction on ``data``; ``learns``: with AdaRound on ``batch`` samples, else GPTQ alone.

    ``step_groups``: of step sizes that are learnt, too, as `Recipe.row_group` says; None where none are.
    """
    branches, samples = 2 if learns else 1, len(data)
    waiting = branches * samples * waiting_bytes(graph)
    inputs = [part[0].numel() for node in layers(graph) if node.kwargs.get("groups", 1) == 1
              for part in segments(node, constants)]  # fmt: skip
    found = [block for block in blocks if block.layers] if learns else []
    shapes = {**graph.inputs, **{node.name: node.shape for node in graph.nodes}}
    entries = [
        samples * _FLOAT * (2 * sum(_numel(shapes[name]) for name in block.entries) + _numel(shapes[block.exit]))
        for block in found
    ]
    scalars = [node for node in graph.nodes if node.op.startswith("sym_")]
    dtypes = {name: value.dtype for name, value in data.inputs.items()}
    most = min(batch, samples)
    learning = [_learning_bytes(block, scalars, shapes, dtypes, constants, table, most, step_groups) for block in found]
    weights = sum(part.numel() for node in layers(graph) for part in segments(node, constants))
    hessian = _PER_HESSIAN * max(inputs, default=0) ** 2
    rounded = (_FLOAT + 1) * weights
    return Memory(rounded, waiting, max(entries, default=0), hessian, max(learning, default=0), samples)


def _numel(shape: Sequence[object]) -> int:
    return torch.Size(per_sample(shape)).numel()


def _learning_bytes(
    block: Block,
    scalars: list[Node],
    shapes: Mapping[str, Sequence[object]],
    dtypes: Mapping[str, torch.dtype],
    constants: Mapping[str, Tensor],
    table: Table,
    batch: int,
    step_groups: int | None,
) -> int:
    """What a block's weights and a batch's backward pass take: the latter from a call with one sample and with two."""
    network = BlockNetwork(block, scalars, constants, table)
    if step_groups is not None:
        network.steps = StepSizes(table, block.body, step_groups)
        step_parameters(network.steps)
    parts = {node.kwargs["layer"]: segments(node, network.constants) for node in block.layers}
    own = {node.name for node in scalars}
    names = [name for name in (*block.entries, "sample") if name not in own]
    one, two = (
        _saved_bytes(
            network,
            parts,
            {name: torch.zeros(per_sample(shapes[name], n), dtype=dtypes.get(name, torch.float32)) for name in names},
            n,
        )
        for n in (1, 2)
    )
    weights = sum(part.numel() for layer in parts.values() for part in layer)
    return _PER_WEIGHT * weights + one + max(two - one, 0) * (batch - 1)


def _saved_bytes(
    network: BlockNetwork,
    parts: Mapping[str, tuple[Tensor, ...]],
    values: dict[str, Tensor],
    samples: int,
) -> int:
    learnt = {layer: tuple(part.detach().requires_grad_() for part in own) for layer, own in parts.items()}
    held = [*network.constants.values(), *values.values(), *(part for own in learnt.values() for part in own)]
    with torch.enable_grad(), SavedBytes(held).counting() as saved:
        output = network.evaluate(values, torch.zeros(samples, dtype=torch.int64), learnt, (DROP, torch.Generator()))
    del output
    return saved.peak
