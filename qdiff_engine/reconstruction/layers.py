"""Rounding one layer, and the bias that takes up what rounding does to the layer's mean output."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph.ir import Const, Graph, Node
from ..rounding import Rounder
from ..weights import QuantizedWeight
from .inputs import SegmentInputs

LAYERS = ("int_conv2d", "int_gemm")


@dataclass(frozen=True)
class RoundedLayer:
    """A layer's integer weights, one per K segment, and what its bias gains (float32 [N]; None: nothing is known)."""

    weights: tuple[QuantizedWeight, ...]
    shift: Tensor | None

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """For a checkpoint; `from_tensors` is the inverse."""
        named = {} if self.shift is None else {f"{layer}.shift": self.shift}
        for i, weight in enumerate(self.weights):
            named |= {f"{layer}.q{i}": weight.values, f"{layer}.scale{i}": weight.scale}
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], layer: str, segments: int, bits: int) -> RoundedLayer:
        """A layer from its checkpoint."""
        names = [(f"{layer}.q{i}", f"{layer}.scale{i}") for i in range(segments)]
        weights = tuple(QuantizedWeight(tensors[q], tensors[scale], bits) for q, scale in names)
        return cls(weights, tensors.get(f"{layer}.shift"))


def layers(graph: Graph) -> Iterator[Node]:
    """The nodes that multiply with quantised weights."""
    return (node for node in graph.nodes if node.op in LAYERS)


def layer_bits(node: Node, weight_bits: int) -> int:
    """Bits of a layer's weights: the first and last layers have 8."""
    return 8 if node.kwargs.get("edge") else weight_bits


def segments(node: Node, constants: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The float weight of a layer, one part per K segment.

    Raises:
        ValueError: the weight is not finite.
    """
    weight = constants[node.kwargs["weight"].key]
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"weight of layer {node.kwargs['layer']!r} holds NaN or infinity")
    return weight.split(list(node.kwargs["segments"]), 1) if len(node.args) > 1 else (weight,)


def round_layer(
    parts: Sequence[Tensor], bits: int, inputs: Sequence[SegmentInputs | None], rounder: Rounder, group: int = 0
) -> RoundedLayer:
    """Integer weights for the variance of what is multiplied; its mean is made good by the bias (`bias_shift`).

    Args:
        parts: the float weight of every K segment; ``inputs``: what each multiplies, None where that is not known.
        rounder: `rounding.nearest` or `rounding.gptq`; it is given the inputs without their mean.
        group: of inputs of a linear layer that share a scale; 0 for all of them.
    """
    weights = tuple(
        rounder(part, bits, group=group) if x is None else rounder(part, bits, x.vectors, x.covariance, group=group)
        for part, x in zip(parts, inputs, strict=True)
    )
    return RoundedLayer(weights, bias_shift(parts, weights, inputs))


def bias_shift(
    parts: Sequence[Tensor], weights: Sequence[QuantizedWeight], inputs: Sequence[SegmentInputs | None]
) -> Tensor | None:
    """b' - b = sum over segments of (W - s q) E[x]: the float bias [N] absorbs the mean error of the output.

    Without it a rounding error that all inputs share survives every average over pixels and steps, and moves the
    image's mean. None where the inputs are not known.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (ICCV 2019), 4.2.
    """
    shift = None
    for part, weight, x in zip(parts, weights, inputs, strict=True):
        if x is None:
            return None
        change = (part.float() - weight.dequantize()).flatten(1) @ x.mean
        shift = change if shift is None else shift + change
    return shift


def with_own_biases(
    graph: Graph, constants: Mapping[str, Tensor], shifts: Mapping[str, Tensor | None]
) -> tuple[Graph, dict[str, Tensor]]:
    """The graph with a bias of its own for every layer that has a shift, and the constants with that bias, shifted."""
    readers = Counter(key for node in graph.nodes for key in node.consts())
    nodes, changed = [copy.copy(node) for node in graph.nodes], dict(constants)
    for node in nodes:
        shift = shifts.get(node.kwargs["layer"]) if node.op in LAYERS else None
        if shift is None:
            continue
        bias: Any = node.kwargs["bias"]
        key = (
            bias.key if bias is not None and readers[bias.key] == 1 else _fresh(f"{node.kwargs['layer']}.bias", changed)
        )
        changed[key] = shift if bias is None else constants[bias.key].float() + shift
        node.kwargs = {**node.kwargs, "bias": Const(key)}
    return Graph(graph.inputs, nodes, graph.output), changed


def _fresh(key: str, taken: Mapping[str, Tensor]) -> str:
    while key in taken:
        key += ".own"
    return key
