"""BOPs = sum of MACs x weight bits x activation bits: what a network's multiplications cost, whatever runs them.

Counted are convolutions, linears and products of two activations, per sample and evaluation of the network; what
stays floating point counts 32 x 32, floating activations of integer weights (A16) count 16 bits, and activation bits
that change with the timestep are averaged over the calibrated rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from .graph.ir import Const, Graph, Node, Ref, sizes
from .graph.layers import layer_name
from .plan_requests import switchable_fraction
from .quantization import likely_plan, site_bits
from .recipe import Recipe
from .runtime.model import IntegerUNet

FLOAT_BITS = 32
_PRODUCTS = {"matmul": 0, "bmm": 0, "mm": 0, "baddbmm": 1, "addmm": 1}  # operator -> position of its left factor
_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d"})
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_INTEGER_LAYERS = frozenset({"int_conv2d", "int_gemm"})

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerBops:
    """One node that multiplies; ``gbops`` = macs x weight_bits x activation_bits / 1e9."""

    name: str
    macs: int
    weight_bits: float
    activation_bits: float  # mean over rows, and over K segments by their MACs

    @property
    def gbops(self) -> float:
        """1e-9 x macs x weight bits x activation bits."""
        return self.macs * self.weight_bits * self.activation_bits / 1e9


@dataclass(frozen=True)
class Bops:
    """The count of a network, in BOPs per sample: ``ratio`` = reference / total, ``reference`` all in 32 x 32 bits.

    ``switchable_fraction``: BOPs of the layers whose activation bits follow the plan, over the same at A8; None for a
    network in floating point.
    """

    layers: tuple[LayerBops, ...]
    switchable_fraction: float | None = None

    @property
    def macs(self) -> int:
        """Multiplications per sample."""
        return sum(layer.macs for layer in self.layers)

    @property
    def total(self) -> float:
        """BOPs per sample at the layers' precisions."""
        return math.fsum(layer.macs * layer.weight_bits * layer.activation_bits for layer in self.layers)

    @property
    def reference(self) -> float:
        """BOPs per sample of the same network in floating point."""
        return float(self.macs * FLOAT_BITS * FLOAT_BITS)

    @property
    def ratio(self) -> float:
        """How many times fewer than in floating point; 1 for a network without multiplications."""
        return self.reference / self.total if self.total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``qdiff bops``."""
        return {
            "total_gbops": self.total / 1e9,
            "float_gbops": self.reference / 1e9,
            "ratio": self.ratio,
            "switchable_fraction": self.switchable_fraction,
            "layers": [{**asdict(layer), "gbops": layer.gbops} for layer in self.layers],
        }


def count_bops(model: IntegerUNet) -> Bops:
    """BOPs of a quantised model, from the weights it holds and the activation bits of its table's rows."""
    if not isinstance(model, IntegerUNet):
        raise TypeError(f"model must be an IntegerUNet, got {type(model).__name__}; see qdiff_engine.quantize")
    weights = {layer: [tuple(w.values.shape) for w in parts] for layer, parts in model.weights.items()}
    bits = {layer: parts[0].bits for layer, parts in model.weights.items()}
    means = model.table.bits.double().mean(0).tolist()
    shapes = {key: tuple(value.shape) for key, value in model.constants.items()}
    counted = count_graph(model.graph, shapes, weights, bits, dict(zip(model.table.sites, means, strict=True)))
    return replace(counted, switchable_fraction=switchable_fraction(model.table.modes))


def count_recipe(graph: Graph, constants: Mapping[str, Tensor], recipe: Recipe | None) -> Bops:
    """BOPs that a captured, fused network will have with ``recipe``; in floating point with None.

    Args:
        graph: after `graph.fuse.fuse`.
        constants: its parameters, the layers' weights among them.
        recipe: its plan names as many rows as it likes, for the mean is all that counts; a plan that is measured
            later counts in the proportions that it asks for.
    """
    nodes = [node for node in graph.nodes if node.op in _INTEGER_LAYERS]
    shapes = {key: tuple(value.shape) for key, value in constants.items()}
    weights = {node.kwargs["layer"]: _segment_shapes(node, shapes[node.kwargs["weight"].key]) for node in nodes}
    sites = tuple(node.kwargs["site"] for node in graph.nodes if "site" in node.kwargs)
    if recipe is None:
        weight_bits = dict.fromkeys(weights, FLOAT_BITS)
        return count_graph(graph, shapes, weights, weight_bits, dict.fromkeys(sites, float(FLOAT_BITS)))
    weight_bits = {node.kwargs["layer"]: 8 if node.kwargs.get("edge") else recipe.weight_bits for node in nodes}
    modes = likely_plan(recipe)
    means = site_bits(graph, sites, modes, recipe.edges).double().mean(0).tolist()
    counted = count_graph(graph, shapes, weights, weight_bits, dict(zip(sites, means, strict=True)))
    return replace(counted, switchable_fraction=switchable_fraction(modes))


def count_graph(
    graph: Graph,
    shapes: Mapping[str, Shape],
    weights: Mapping[str, Sequence[Shape]],
    weight_bits: Mapping[str, int],
    activation_bits: Mapping[str, float],
) -> Bops:
    """The count of a fused graph whose precisions are given.

    Args:
        shapes: of the constants that floating nodes read, by key.
        weights: of every integer layer, one shape [Cout, Cin / groups, ...] per K segment.
        weight_bits: of every integer layer; ``activation_bits``: of every quantiser (site).
    """
    values = {name: sizes(shape, 1) for name, shape in graph.inputs.items()}
    values |= {node.name: sizes(node.shape, 1) for node in graph.nodes}
    sources = graph.quantizer_of()
    rows = []
    for node in graph.nodes:
        if node.op in _INTEGER_LAYERS:
            layer = node.kwargs["layer"]
            bits = [activation_bits[sources[ref.name].kwargs["site"]] for ref in node.args]
            rows.append(_integer_row(node, weights[layer], weight_bits[layer], bits))
        else:
            macs = float_macs(node, values, shapes)
            if macs:
                rows.append(LayerBops(layer_name(node), macs, float(FLOAT_BITS), float(FLOAT_BITS)))
    return Bops(tuple(rows))


def _integer_row(node: Node, segments: Sequence[Shape], weight_bits: int, bits: Sequence[float]) -> LayerBops:
    """The K segments of a layer are counted one by one, then written as one row with their mean bits."""
    outputs = math.prod(sizes(node.shape, 1))
    macs = [outputs * math.prod(shape[1:]) for shape in segments]
    mean = math.fsum(m * b for m, b in zip(macs, bits, strict=True)) / max(sum(macs), 1)
    return LayerBops(node.kwargs["layer"], sum(macs), float(weight_bits), mean)


def _segment_shapes(node: Node, weight: Shape) -> list[Shape]:
    if len(node.args) == 1:
        return [weight]
    return [(weight[0], channels, *weight[2:]) for channels in node.kwargs["segments"]]


def float_macs(node: Node, values: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> int:
    """Multiplications of a floating-point node for one sample; 0 for one that is neither layer nor product.

    Args:
        values: shapes of the graph's values for a batch of one; ``shapes``: of its constants.
    """

    def shape(value: Any) -> Shape:
        return values[value.name] if isinstance(value, Ref) else shapes[value.key] if isinstance(value, Const) else ()

    output = math.prod(values[node.name])
    if node.op in _CONVOLUTIONS or node.op == "linear":
        return output * math.prod(shape(node.args[1])[1:])
    if node.op in _TRANSPOSED:  # weight [Cin, Cout / groups, ...]: every input value meets all its taps
        return math.prod(shape(node.args[0])) * math.prod(shape(node.args[1])[1:])
    if node.op in _PRODUCTS:
        return output * shape(node.args[_PRODUCTS[node.op]])[-1]
    if node.op == "scaled_dot_product_attention":  # q k^T, then the weights times v
        query, key, value = (shape(a) for a in node.args[:3])
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if node.op == "einsum":
        return _einsum_macs(node.args[0], [shape(a) for a in node.args[1]])
    return 0


def _einsum_macs(equation: str, operands: Sequence[Shape]) -> int:
    """prod over all distinct indices of their sizes; of more than two factors, each further one multiplies again."""
    index_sizes: dict[str, int] = {}
    terms = equation.replace(" ", "").split("->")[0].split(",")
    for term, shape in zip(terms, operands, strict=True):
        before, _, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after)
        labels = [*before, *(f"...{hidden - i}" for i in range(hidden)), *after]
        for label, size in zip(labels, shape, strict=True):
            index_sizes[label] = max(index_sizes.get(label, 1), size)
    return math.prod(index_sizes.values()) * max(len(operands) - 1, 0)
