"""A copy of the graph that advances node by node over the whole learning set and keeps the values still needed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..graph.interpret import FloatInterpreter, row_quantizer
from ..graph.ir import Graph, Node
from ..tables import Table
from .learning_set import LearningSet
from .placement import placed


class Branch:
    """The values of every sample, chunk by chunk, of the nodes evaluated so far that a later node reads.

    Args:
        graph: with its float parameters, ``constants``.
        data: the learning set; its chunks are evaluated one by one.
        table: scales and zero points of the activations, which are then fake-quantised; None leaves them floating.
        weights: {layer: one weight per K segment} that take the float ones' place; may grow while the branch advances.
        constants: may change while the branch advances, too.
        device: where nodes are evaluated; between them, values wait in the memory of the CPU.
    """

    def __init__(
        self,
        graph: Graph,
        constants: Mapping[str, Tensor],
        data: LearningSet,
        table: Table | None = None,
        weights: Mapping[str, tuple[Tensor, ...]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.weights, self.device = {} if weights is None else weights, torch.device(device)
        self.constants, self.interpreter = constants, FloatInterpreter({}, torch.float32)
        self.interpreter.device = self.device
        self.rows = []
        self.values: list[dict[str, Any]] = []
        for row, chunk in data.chunks():
            self.rows.append(row)
            values: dict[str, Any] = {name: data.inputs[name][chunk] for name in graph.inputs}
            values["sample"] = values["sample"].contiguous(memory_format=torch.channels_last)
            self.values.append(values)
        self.table = table
        self.last_use = {name: node.name for node in graph.nodes for name in node.refs()}
        self.kept = {graph.output}

    def advance(self, node: Node) -> None:
        """Evaluate ``node`` for every chunk, and forget what only it has read."""
        self.interpreter.constants = {key: placed(self.constants[key], self.device) for key in node.consts()}
        own = [placed(weight, self.device) for weight in self.weights.get(str(node.kwargs.get("layer")), ())]
        self.interpreter.weight = lambda node, segment, weight: own[segment] if own else weight
        for row, values in zip(self.rows, self.values, strict=True):
            if self.table is not None:
                self.interpreter.activation = row_quantizer(self.table, row)
            read = {name: placed(values[name], self.device) for name in node.refs()}
            values[node.name] = placed(self.interpreter.evaluate(node, read), "cpu")
            for name in set(node.refs()) - self.kept:
                if self.last_use[name] == node.name:
                    del values[name]

    def fork(self) -> Branch:
        """A branch at the same place that advances by itself; weights and constants stay shared."""
        other = copy.copy(self)
        other.values = [dict(values) for values in self.values]
        return other

    def of(self, name: str) -> list[Any]:
        """The value called ``name``, one per chunk."""
        return [values[name] for values in self.values]
