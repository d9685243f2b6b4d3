"""Find the layers that integers can run, and put a quantiser in front of each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..numerics import MAX_K
from .ir import Const, Graph, Node, Ref
from .operators import LAYOUT_OPS
from .rewrite import Rewriter
from .sections import SEQUENCE, TIMESTEP, dependencies

LAYER_OPS = frozenset({"conv2d", "linear"})
_FLOAT_REASONS = {
    "conv_transpose2d": "transposed convolution has no integer kernel",
    "conv_transpose1d": "transposed convolution has no integer kernel",
    "conv1d": "one-dimensional convolution wider than 1 has no integer kernel",
    "conv3d": "three-dimensional convolution has no integer kernel",
    "scaled_dot_product_attention": "attention products stay floating point",
    "matmul": "products of two activations stay floating point",
    "bmm": "products of two activations stay floating point",
    "baddbmm": "products of two activations stay floating point",
    "einsum": "products of two activations stay floating point",
    "mm": "products of two activations stay floating point",
    "addmm": "a product written as addmm has no integer kernel",
}
_TIME_REASON = "depends on the timestep and vector conditioning only: exact, and cached"


def layer_name(node: Node) -> str:
    """The name of the module a layer came from: its weight's key without ".weight"."""
    weight = node.kwargs.get("weight") or (node.args[1] if len(node.args) > 1 else None)
    return weight.key.removesuffix(".weight") if isinstance(weight, Const) else node.name


def float_reason(node: Node, kinds: frozenset[str], constants: dict[str, Tensor]) -> str | None:
    """Why a node that multiplies stays floating point; None for one that integers can run or that does not multiply."""
    if node.op in _FLOAT_REASONS:
        return _FLOAT_REASONS[node.op]
    if node.op not in LAYER_OPS:
        return None
    if not isinstance(node.args[1], Const):
        return "its weight is computed, not stored"
    if len(node.args) > 2 and isinstance(node.args[2], Ref):
        return "its bias is computed, not stored"
    if "sample" not in kinds and (TIMESTEP in kinds or SEQUENCE not in kinds):
        return _TIME_REASON
    taps = constants[node.args[1].key][0].numel()
    if taps > MAX_K:
        return f"{taps} products overflow an int32 accumulator (at most {MAX_K})"
    return None


def canonicalise(graph: Graph, constants: dict[str, Tensor]) -> None:
    """One spelling per layer: width-1 conv1d becomes a linear, zero padding moves into its convolution."""
    rewriter = Rewriter(graph)
    for node in list(graph.nodes):
        if node.op == "conv1d" and _is_pointwise(node, constants):
            _pointwise_to_linear(rewriter, node, constants)
        elif node.op == "conv2d":
            _explicit_convolution(rewriter, node, constants)
        elif node.op == "transpose":
            source = rewriter.producer(node.args[0])
            if source is not None and source.op == "transpose" and _swapped(source) == _swapped(node):
                rewriter.replace_value(node.name, source.args[0].name)
    graph.prune()


def _swapped(node: Node) -> set[int]:
    return {axis % len(node.shape) for axis in node.args[1:3]}


def _is_pointwise(node: Node, constants: dict[str, Tensor]) -> bool:
    weight = node.args[1]
    stride, padding, _, groups = _convolution_arguments(node, 1)
    return (
        isinstance(weight, Const)
        and (constants[weight.key].dim() == 2 or constants[weight.key].shape[-1] == 1)  # flattened for another use
        and (stride, padding, groups) == ((1,), (0,), 1)
    )


def _pointwise_to_linear(rewriter: Rewriter, node: Node, constants: dict[str, Tensor]) -> None:
    """y[b, :, l] = W x[b, :, l] + bias as transpose, linear, transpose."""
    weight = node.args[1]
    constants[weight.key] = constants[weight.key].flatten(1)
    batch, channels, length = node.shape
    source = rewriter.shape(node.args[0])
    before = Node(rewriter.fresh(f"{node.name}_in"), "transpose", (node.args[0], 1, 2), {}, (batch, length, source[1]))
    bias = node.args[2] if len(node.args) > 2 else None
    linear = Node(
        rewriter.fresh(f"{node.name}_linear"), "linear", (Ref(before.name), weight, bias), {}, (batch, length, channels)
    )
    before.section = linear.section = node.section
    rewriter.insert_before(node, before, linear)
    node.op, node.args, node.kwargs = "transpose", (Ref(linear.name), 1, 2), {}
    rewriter.refresh()


def _convolution_arguments(node: Node, axes: int) -> tuple[Any, ...]:
    """(stride, padding, dilation, groups), the first three spelt out per axis; padding may be a word."""
    names, defaults = ("stride", "padding", "dilation", "groups"), (1, 0, 1, 1)
    values = []
    for i, (name, default) in enumerate(zip(names, defaults, strict=True)):
        value = node.args[3 + i] if len(node.args) > 3 + i else node.kwargs.get(name, default)
        if name != "groups" and not isinstance(value, str):
            value = tuple(value) if isinstance(value, tuple | list) else (value,)
            value = value * axes if len(value) == 1 else value
        values.append(value)
    return tuple(values)


def _explicit_convolution(rewriter: Rewriter, node: Node, constants: dict[str, Tensor]) -> None:
    """Spell out a conv2d: padding (top, bottom, left, right), with a zero pad in front of it absorbed."""
    stride, padding, dilation, groups = _convolution_arguments(node, 2)
    if padding == "valid":
        padding = (0, 0)
    if padding == "same":
        if not isinstance(node.args[1], Const):
            return
        spans = [d * (k - 1) for d, k in zip(dilation, constants[node.args[1].key].shape[2:], strict=True)]
        top, left = spans[0] // 2, spans[1] // 2
        sides = (top, spans[0] - top, left, spans[1] - left)
    else:
        sides = (padding[0], padding[0], padding[1], padding[1])
    source = rewriter.producer(node.args[0])
    value = node.args[0]
    pad = _zero_pad(source)
    if source is not None and pad is not None:
        left, right, top, bottom = pad
        sides = (sides[0] + top, sides[1] + bottom, sides[2] + left, sides[3] + right)
        value = source.args[0]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    keywords = {"stride": stride, "padding": sides, "dilation": dilation, "groups": groups}
    node.args, node.kwargs = (value, node.args[1], bias), keywords
    rewriter.refresh()


def _zero_pad(node: Node | None) -> tuple[int, int, int, int] | None:
    """(left, right, top, bottom) of a zero padding of the two image axes."""
    if node is None or node.op not in ("pad", "constant_pad_nd"):
        return None
    amounts = tuple(node.args[1])
    mode = "constant" if node.op == "constant_pad_nd" else (node.args[2] if len(node.args) > 2 else "constant")
    at = 2 if node.op == "constant_pad_nd" else 3
    fill = node.args[at] if len(node.args) > at else 0
    if mode != "constant" or fill not in (0, None) or len(amounts) != 4 or min(amounts) < 0:
        return None
    return amounts


def insert_quantizers(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Replace every layer that integers can run by ``quantize`` and ``int_conv2d`` or ``int_gemm``."""
    rewriter = Rewriter(graph)
    kinds = dependencies(graph)
    names: set[str] = set()
    for node in [n for n in graph.nodes if n.op in LAYER_OPS]:
        if float_reason(node, kinds[node.name], constants) is not None:
            continue
        layer = layer_name(node)
        while layer in names:  # a module called twice quantises twice: its inputs differ
            layer += ".again"
        names.add(layer)
        _quantise_layer(rewriter, node, layer)


def _quantise_layer(rewriter: Rewriter, node: Node, layer: str) -> None:
    value, upsample = node.args[0], 1
    if node.op == "conv2d":
        value, upsample = _before_upsample(rewriter, value)
    quantize = Node(
        rewriter.fresh(f"{layer}.quantize"),
        "quantize",
        (value,),
        {"site": layer, "activation": "none"},
        rewriter.shape(value),
        node.section,
    )
    rewriter.insert_before(node, quantize)
    bias = node.args[2] if len(node.args) > 2 else None
    common = {"layer": layer, "weight": node.args[1], "bias": bias}
    if node.op == "conv2d":
        node.kwargs = {**common, **node.kwargs, "upsample": upsample, "temb": None, "residual": None}
    else:
        node.kwargs = {**common, "residual": None}
    node.op = "int_conv2d" if node.op == "conv2d" else "int_gemm"
    node.args = (Ref(quantize.name),)
    rewriter.refresh()


def _before_upsample(rewriter: Rewriter, value: Ref) -> tuple[Ref, int]:
    """Look through a nearest upsampling by a whole factor: (its input, the factor)."""
    node = rewriter.producer(value)
    if node is None or node.op != "upsample_nearest2d":
        return value, 1
    (_, _, h, w), (_, _, oh, ow) = rewriter.shape(node.args[0]), node.shape
    if oh % h or ow % w or oh // h != ow // w:
        return value, 1
    return node.args[0], oh // h


def mark_edges(graph: Graph) -> None:
    """Mark the first layers (fed by the latents through nothing but layout) and the last (whose result leaves).

    Every layer gets ``edge`` = "first", "last" or None.
    """
    rewriter = Rewriter(graph)
    fed_by_input = {"sample"}
    for node in graph.nodes:
        passes = node.op in LAYOUT_OPS | {"cat", "pad", "constant_pad_nd", "quantize"}
        if passes and node.section == "main" and any(name in fed_by_input for name in node.refs()):
            fed_by_input.add(node.name)
        if node.op in ("int_conv2d", "int_gemm"):
            sources = [ref.name for ref in node.args]
            node.kwargs["edge"] = "first" if any(name in fed_by_input for name in sources) else None
    last = rewriter.producer(Ref(graph.output))
    while last is not None and last.op in LAYOUT_OPS:
        last = rewriter.producer(last.args[0])
    if last is not None and last.op in ("int_conv2d", "int_gemm"):
        last.kwargs["edge"] = "last"
