"""Run an integer graph in floating point: plain (for calibration) or simulated (fake-quant, differentiable).

Both are one interpretation with two hooks: what happens to an activation at a quantiser, and which weight a layer
multiplies with. The integers themselves are run by the runtime's programs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import numerics
from ..tables import Table
from ..weights import QuantizedWeight
from .factors import FACTORS, channel_axis, divided
from .ir import Const, Graph, Node, Ref, map_leaves
from .operators import FACTORY_OPS, FLOAT_OPS, INTEGER_OPS

ActivationHook = Callable[[str, Tensor], Tensor]  # (site, x) -> what the layer sees
InputHook = Callable[[Node, int, Tensor], None]  # (layer node, segment, the layer's input)
WeightHook = Callable[[Node, int, Tensor], Tensor]  # (layer node, segment, float weight or None) -> weight
ProductHook = Callable[[Node, int, Tensor], Tensor]  # (layer node, segment, W x without bias) -> what is added up
Evaluation = Callable[[dict[str, Any]], dict[str, Any]]  # the values that some nodes read -> those that later ones read
RunPart = Callable[[Evaluation, dict[str, Any]], dict[str, Any]]


def flatten_conditioning(conditioning: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Nested keyword arguments as the graph's input names: {"added_cond_kwargs": {"x": t}} -> added_cond_kwargs_x."""
    flat: dict[str, Tensor] = {}
    for name, value in (conditioning or {}).items():
        if isinstance(value, Mapping):
            flat.update({f"{name}_{k}": v for k, v in flatten_conditioning(value).items()})
        else:
            flat[name] = value
    return flat


def run_float(
    graph: Graph,
    constants: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    *,
    activation: ActivationHook | None = None,
    weight: WeightHook | None = None,
    product: ProductHook | None = None,
    observe: Callable[[Node, Tensor], None] | None = None,
    layer_input: InputHook | None = None,
    dtype: torch.dtype = torch.float32,
    parts: Sequence[Sequence[Node]] | None = None,
    run_part: RunPart = lambda part, values: part(values),
) -> Tensor:
    """Output of the graph in floating-point arithmetic of ``dtype``.

    Args:
        graph: an integer graph (or a captured one).
        constants: the float parameters; layer weights may be absent when ``weight`` supplies them.
        inputs: "sample" [B, C, H, W], "timestep" [B], and the conditioning under the graph's input names.
        activation: applied to every quantiser's input, with the site's name; identity by default.
        weight: returns the weight of a layer's K segment; the float one by default.
        product: applied to every K segment's product before bias and residual are added; identity by default.
        observe: called with every node and its value, as it is computed.
        layer_input: called with every layer and the input of each of its K segments.
        dtype: float32 or float64.
        parts: consecutive pieces of the graph's nodes, each evaluated by ``run_part``, which may choose to do so twice.
    """
    interpreter = FloatInterpreter(constants, dtype)
    interpreter.activation = activation or interpreter.activation
    interpreter.weight = weight or interpreter.weight
    interpreter.product = product
    interpreter.layer_input = layer_input or interpreter.layer_input
    interpreter.device = inputs["sample"].device
    values: dict[str, Any] = {}
    for name in graph.inputs:
        value = inputs[name]
        values[name] = value.to(dtype) if value.is_floating_point() and name != "timestep" else value
    values["sample"] = values["sample"].contiguous(memory_format=torch.channels_last)
    last_use = {name: node.name for node in graph.nodes for name in node.refs()}

    def evaluate(nodes: Sequence[Node], read: dict[str, Any]) -> dict[str, Any]:
        known = dict(read)
        for node in nodes:
            value = known[node.name] = interpreter.evaluate(node, known)
            if observe is not None:
                observe(node, value)
            for name in node.refs():
                if last_use[name] == node.name and name != graph.output:
                    known.pop(name, None)
        return known

    if parts is None:
        return evaluate(graph.nodes, values)[graph.output]
    for nodes in parts:
        values = run_part(functools.partial(evaluate, nodes), values)
    return values[graph.output]


class FloatInterpreter:
    """Evaluates one node at a time; the hooks are attributes, as `run_float` documents them.

    ``device`` is where tensors are that a node makes of numbers; all others are where the values are that it reads.
    """

    def __init__(self, constants: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.constants, self.dtype = constants, dtype
        self.activation: ActivationHook = lambda site, x: x
        self.weight: WeightHook = lambda node, segment, weight: weight
        self.layer_input: InputHook = lambda node, segment, x: None
        self.product: ProductHook | None = None
        self.device = torch.device("cpu")

    def constant(self, key: str) -> Tensor:
        value = self.constants[key]
        return value.to(self.dtype) if value.is_floating_point() else value

    def leaf(self, values: dict[str, Any]) -> Callable[[Any], Any]:
        def resolve(value: Any) -> Any:
            if isinstance(value, Ref):
                return values[value.name]
            if isinstance(value, Const):
                return self.constant(value.key)
            return self.dtype if value is torch.float32 else value

        return resolve

    def evaluate(self, node: Node, values: dict[str, Any]) -> Any:
        """The node's value, from the values that it reads."""
        resolve = self.leaf(values)
        args = map_leaves(node.args, resolve)
        if node.op not in INTEGER_OPS:
            made = {"device": self.device} if node.op in FACTORY_OPS else {}
            return FLOAT_OPS[node.op](*args, **map_leaves(node.kwargs, resolve), **made)
        skip = ("weight",) if node.op in ("int_gemm", "int_conv2d") else ()
        kwargs = {k: v if k in skip else map_leaves(v, resolve) for k, v in node.kwargs.items()}
        return getattr(self, node.op)(node, args, kwargs)

    def quantize(self, node: Node, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Tensor:
        return self.quantized(node, activate(args[0], kwargs["activation"]), kwargs)

    def groupnorm_silu_quantize(self, node: Node, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Tensor:
        x = torch.cat(args, 1) if len(args) > 1 else args[0]
        y = F.group_norm(x, kwargs["groups"], kwargs["weight"], kwargs["bias"], kwargs["eps"])
        if kwargs["norm_scale"] is not None:
            shape = [*kwargs["norm_scale"].shape, *[1] * (x.dim() - 2)]
            y = y * (1 + kwargs["norm_scale"].reshape(shape)) + kwargs["norm_shift"].reshape(shape)
        return self.quantized(node, F.silu(y) if kwargs["silu"] else y, kwargs)

    def layernorm_quantize(self, node: Node, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Tensor:
        x = args[0]
        y = F.layer_norm(x, x.shape[-1:], kwargs["weight"], kwargs["bias"], kwargs["eps"])
        return self.quantized(node, y, kwargs)

    def quantized(self, node: Node, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What the layers behind a quantiser see of x, its channels divided by their factors."""
        return self.activation(kwargs["site"], divided(x, kwargs.get(FACTORS), channel_axis(node.op, x.dim())))

    def segment_weights(self, node: Node, count: int) -> list[Tensor]:
        stored = node.kwargs["weight"]
        whole = self.constant(stored.key) if stored is not None else None  # None once it is quantised
        parts: list[Any] = [whole] * count
        if count > 1 and whole is not None:
            parts = list(whole.split(list(node.kwargs["segments"]), 1))
        return [self.weight(node, i, part) for i, part in enumerate(parts)]

    def multiplied(
        self, node: Node, segment: int, bias: Tensor | None, multiply: Callable[[Tensor | None], Tensor]
    ) -> Tensor:
        """W x + bias of a segment, W x through the hook if there is one."""
        if self.product is None:
            return multiply(bias)
        y = self.product(node, segment, multiply(None))
        return y if bias is None else y + bias.reshape(per_channel(node))

    def int_gemm(self, node: Node, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Tensor:
        (weight,) = self.segment_weights(node, 1)
        self.layer_input(node, 0, args[0])
        y = self.multiplied(node, 0, kwargs["bias"], lambda bias: F.linear(args[0], weight, bias))
        return y if kwargs["residual"] is None else y + kwargs["residual"]

    def int_conv2d(self, node: Node, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Tensor:
        y: Tensor | None = None
        for i, (x, weight) in enumerate(zip(args, self.segment_weights(node, len(args)), strict=True)):
            self.layer_input(node, i, x)
            multiply = functools.partial(convolve, x, weight, attributes=kwargs)
            part = self.multiplied(node, i, None if y is not None else kwargs["bias"], multiply)
            y = part if y is None else y + part
        assert y is not None
        if kwargs["temb"] is not None:
            y = y + kwargs["temb"][:, :, None, None]
        return y if kwargs["residual"] is None else y + kwargs["residual"]


def per_channel(layer: Node) -> tuple[int, ...]:
    """The shape in which a vector over output channels is broadcast against a layer's output."""
    return (-1,) if layer.op == "int_gemm" else (-1, 1, 1)


def activate(x: Tensor, activation: str) -> Tensor:
    """The pointwise function a quantiser applies first."""
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "geglu":
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)
    return x


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, attributes: Mapping[str, Any]) -> Tensor:
    """conv2d with a nearest-upsampled input and four-sided padding, as an ``int_conv2d`` node describes it."""
    if attributes["upsample"] > 1:
        x = F.interpolate(x, scale_factor=float(attributes["upsample"]), mode="nearest")
    top, bottom, left, right = attributes["padding"]
    padding = (top, left)
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    return F.conv2d(x, weight, bias, attributes["stride"], padding, attributes["dilation"], attributes["groups"])


def fake_quantize(x: Tensor, scale: Tensor | float, zero_point: Tensor | int, bits: int) -> Tensor:
    """s (clamp(round(x * inv_s) + z) - z), with the straight-through gradient inside the range.

    Rounds as `numerics.quantize` does (float32 product, half to even), so it equals the integers' values exactly.
    """
    low, high = numerics.activation_range(bits)
    if isinstance(scale, Tensor):
        scaled = x / scale
        rounded = scaled + (torch.round(scaled) - scaled).detach()
    else:
        scaled = x.float() * numerics.inverse_scale(scale)
        rounded = scaled + (torch.round(scaled) - scaled).detach()
    return ((rounded + zero_point).clamp(low, high) - zero_point).to(x.dtype) * scale


def quantize_rows(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor) -> Tensor:
    """s[j] (clamp(round(x[j] * (1 / s[j])) + z[j]) - z[j]) for each sample j, straight-through inside the range.

    Rounds as `numerics.quantize` does. Samples with 16 bits stay as they are.

    Args:
        x: [n * k, ...], k values along the first axis for each sample; scale, zero_point, bits: [n].
    """
    low, high = numerics.activation_limits(bits)
    s, z, low, high, floating = (_each(t, x) for t in (scale, zero_point, low, high, bits == 16))
    scaled = x * s.reciprocal()
    rounded = scaled + (torch.round(scaled) - scaled).detach()
    quantized = (torch.minimum(torch.maximum(rounded + z, low), high) - z) * s
    return torch.where(floating, x, quantized)


def _each(values: Tensor, x: Tensor) -> Tensor:
    """[n] values, one per sample, along the first axis of ``x`` [n * k, ...]."""
    return values.repeat_interleave(len(x) // len(values)).reshape(-1, *[1] * (x.dim() - 1))


def row_quantizer(table: Table, row: int) -> ActivationHook:
    """The activation hook that fake-quantises as the table's ``row`` says."""
    sites = {site: i for i, site in enumerate(table.sites)}

    def activation(site: str, x: Tensor) -> Tensor:
        at = sites[site]
        bits = int(table.bits[row, at])
        if bits == 16:
            return x
        return fake_quantize(x, float(table.scale[row, at]), int(table.zero_point[row, at]), bits)

    return activation


def simulate(
    graph: Graph,
    constants: Mapping[str, Tensor],
    weights: Mapping[str, tuple[QuantizedWeight, ...]],
    table: Table,
    inputs: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float64,
    observe: Callable[[Node, Tensor], None] | None = None,
) -> Tensor:
    """The quantised model's output with fake-quant arithmetic in ``dtype``: what the integers must reproduce."""
    row = table.row(float(inputs["timestep"].flatten()[0]))
    activation = row_quantizer(table, row)

    def weight(node: Node, segment: int, _: Tensor | None) -> Tensor:
        return weights[node.kwargs["layer"]][segment].dequantize(dtype)

    output = run_float(graph, constants, inputs, activation=activation, weight=weight, observe=observe, dtype=dtype)
    shape = (1, -1, *[1] * (output.dim() - 2))
    return output * table.output_scale[row].to(dtype).reshape(shape) + table.output_shift[row].to(dtype).reshape(shape)
