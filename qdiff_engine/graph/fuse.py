"""ATen graph -> integer graph: quantisers move to their producers, norms and epilogues fuse into the kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .ir import SECTIONS, Graph, Node, Ref
from .layers import canonicalise, insert_quantizers, mark_edges
from .operators import LAYOUT_OPS
from .rewrite import Rewriter


def fuse(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Turn a captured graph into the integer graph, in place; ``constants`` may gain reshaped weights."""
    canonicalise(graph, constants)
    insert_quantizers(graph, constants)
    hoist_quantizers(graph)
    split_concatenations(graph)
    fuse_activations(graph)
    fuse_norms(graph)
    fuse_epilogues(graph)
    mark_edges(graph)
    graph.prune()
    graph.validate(frozenset(node.op for node in graph.nodes))
    sections = [SECTIONS.index(node.section) for node in graph.nodes]
    assert sections == sorted(sections), "a value would be read before its section has run"


def hoist_quantizers(graph: Graph) -> None:
    """quantize(layout(x)) = layout(quantize(x)); quantisers of the same value become one.

    A product of attention stays put: its heads are adjacent only after the layout changes that follow it.
    """
    rewriter = Rewriter(graph)
    for node in [n for n in graph.nodes if n.op == "quantize"]:
        root = rewriter.producer(node.args[0])
        while root is not None and root.op in LAYOUT_OPS:
            root = rewriter.producer(root.args[0])
        if root is not None and root.op in ("scaled_dot_product_attention", "bmm", "matmul"):
            continue
        while True:
            layout = rewriter.producer(node.args[0])
            if layout is None or layout.op not in LAYOUT_OPS:
                break
            moved = Node(rewriter.fresh(f"{layout.name}_q"), layout.op, layout.args, dict(layout.kwargs), layout.shape)
            moved.section = layout.section
            for user in rewriter.users[node.name]:
                user.rename({node.name: moved.name})
            moved.args = (Ref(node.name), *layout.args[1:])
            node.args, node.shape = (layout.args[0],), rewriter.shape(layout.args[0])
            graph.nodes.insert(graph.nodes.index(node) + 1, moved)
            rewriter.refresh()
    _merge_equal(rewriter)


def _merge_equal(rewriter: Rewriter) -> None:
    """One node for quantisers of the same value, and for equal layout changes of the same value."""
    seen: dict[str, str] = {}
    for node in list(rewriter.graph.nodes):
        if node.op == "quantize":
            key = f"quantize {node.args} {node.kwargs['activation']}"
        elif node.op in LAYOUT_OPS:
            key = f"{node.op} {node.args} {node.kwargs}"
        else:
            continue
        if key in seen:
            rewriter.replace_value(node.name, seen[key])
            rewriter.remove(node)
        else:
            seen[key] = node.name


def split_concatenations(graph: Graph) -> None:
    """conv(quantize(cat(a, b))) = conv over two K segments, each with its own scale, zero point and weight scale."""
    rewriter = Rewriter(graph)
    for node in [n for n in graph.nodes if n.op == "quantize"]:
        parts = _channel_parts(rewriter, node.args[0])
        users = rewriter.users[node.name]
        if not parts or any(u.op != "int_conv2d" or u.kwargs["groups"] != 1 or len(u.args) > 1 for u in users):
            continue
        segments = []
        for i, part in enumerate(parts):
            name = rewriter.fresh(f"{node.name}.{i}")
            keywords = {**node.kwargs, "site": f"{node.kwargs['site']}.{i}"}
            segments.append(Node(name, "quantize", (part,), keywords, rewriter.shape(part), node.section))
        rewriter.insert_before(node, *segments)
        for user in users:
            user.args = tuple(Ref(s.name) for s in segments)
            user.kwargs["segments"] = tuple(s.shape[1] for s in segments)
        rewriter.refresh()
        rewriter.remove(node)


def _channel_parts(rewriter: Rewriter, value: Any) -> tuple[Ref, ...]:
    """The two parts of a concatenation of images along their channels; empty for anything else."""
    node = rewriter.producer(value)
    if node is None or node.op != "cat" or len(node.shape) != 4 or len(node.args[0]) != 2:
        return ()
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return tuple(node.args[0]) if axis % 4 == 1 else ()


def fuse_activations(graph: Graph) -> None:
    """quantize(silu(x)), quantize(gelu(x)) and quantize(GEGLU(x)) become one node with ``activation`` set."""
    rewriter = Rewriter(graph)
    for node in [n for n in graph.nodes if n.op == "quantize"]:
        source = rewriter.producer(node.args[0])
        if source is None or rewriter.only_user(source) is not node:
            continue
        if source.op == "silu":
            _absorb(rewriter, node, source.args[0], "silu")
        elif source.op == "gelu":
            tanh = "tanh" in (*source.args, *source.kwargs.values())
            _absorb(rewriter, node, source.args[0], "gelu_tanh" if tanh else "gelu")
        elif source.op == "mul":
            halves = _geglu_input(rewriter, source)
            if halves is not None:
                _absorb(rewriter, node, halves, "geglu")
    graph.prune()


def _absorb(rewriter: Rewriter, node: Node, value: Ref, activation: str) -> None:
    node.args = (value,)
    node.kwargs["activation"] = activation
    rewriter.refresh()


def _geglu_input(rewriter: Rewriter, node: Node) -> Ref | None:
    """x where ``node`` = x[first half] * gelu(x[second half]) along the last axis, each half read only here."""
    for value, gate in (node.args, node.args[::-1]):
        gelu, first = rewriter.producer(gate), rewriter.producer(value)
        if gelu is None or first is None or gelu.op != "gelu" or len(gelu.args) > 1 or gelu.kwargs:
            continue
        second = rewriter.producer(gelu.args[0])
        if second is None or (first.op, second.op) != ("getitem", "getitem") or first.args[0] != second.args[0]:
            continue
        chunk = rewriter.producer(first.args[0])
        if chunk is None or (first.args[1], second.args[1]) != (0, 1) or len(rewriter.users[chunk.name]) != 2:
            continue
        axis = chunk.args[2] if len(chunk.args) > 2 else chunk.kwargs.get("dim", 0)
        whole = rewriter.shape(chunk.args[0])
        halves = len(whole) != 4 and axis % len(whole) == len(whole) - 1
        halves = halves and first.shape == second.shape == (*whole[:-1], whole[-1] // 2)
        alone = all(rewriter.only_user(n) is not None for n in (gelu, first, second))
        if halves and alone and chunk.op in ("chunk", "split", "split_with_sizes"):
            return chunk.args[0]
    return None


def fuse_norms(graph: Graph) -> None:
    """GroupNorm (-> scale and shift) (-> SiLU) -> quantize, and LayerNorm -> quantize, become one node each."""
    rewriter = Rewriter(graph)
    for node in [n for n in graph.nodes if n.op == "quantize"]:
        silu = node.kwargs["activation"] == "silu"
        if node.kwargs["activation"] not in ("none", "silu"):
            continue
        source = rewriter.producer(node.args[0])
        if source is None or rewriter.only_user(source) is None:
            continue
        if source.op == "layer_norm" and not silu and len(source.args[1]) == 1:
            if _has_stored_affine(source):
                _fuse_layernorm(node, source)
        else:
            norm, scale, shift = _scaled_norm(rewriter, source)
            if norm is not None and _has_stored_affine(norm):
                _fuse_groupnorm(rewriter, node, norm, silu, scale, shift)
        rewriter.refresh()
    graph.prune()


def _has_stored_affine(norm: Node) -> bool:
    """Whether a norm's weight and bias are parameters, not values that the graph computes."""
    return not any(isinstance(value, Ref) for value in norm.args[2:])


def _fuse_layernorm(node: Node, norm: Node) -> None:
    weight, bias, eps = (list(norm.args[2:5]) + [None, None, 1e-5][len(norm.args) - 2 :])[:3]
    node.op = "layernorm_quantize"
    node.args = (norm.args[0],)
    node.kwargs = {"site": node.kwargs["site"], "weight": weight, "bias": bias, "eps": eps}


def _scaled_norm(rewriter: Rewriter, node: Node) -> tuple[Node | None, Ref | None, Ref | None]:
    """(norm, scale, shift) where ``node`` = norm * (1 + scale) + shift per sample and channel, or the norm itself."""
    if node.op == "group_norm":
        return node, None, None
    if node.op != "add" or len(node.args) != 2 or node.kwargs:
        return None, None, None
    for product, shift in (node.args, node.args[::-1]):
        mul = rewriter.producer(product)
        if mul is None or mul.op != "mul" or rewriter.only_user(mul) is None or not _per_channel(rewriter, shift, node):
            continue
        for value, factor in (mul.args, mul.args[::-1]):
            norm, one_plus = rewriter.producer(value), rewriter.producer(factor)
            if norm is None or norm.op != "group_norm" or rewriter.only_user(norm) is None or norm.shape != node.shape:
                continue
            plus_one = one_plus is not None and one_plus.op == "add" and one_plus.args[1:] == (1,)
            if one_plus is not None and plus_one and _per_channel(rewriter, one_plus.args[0], node):
                return norm, one_plus.args[0], shift
    return None, None, None


def _per_channel(rewriter: Rewriter, value: Any, image: Node) -> bool:
    """Whether ``value`` is [B, C, 1, 1]: a number per sample and channel of ``image``, not made from the latents."""
    if not isinstance(value, Ref):
        return False
    node = rewriter.producer(value)
    return rewriter.shape(value) == ("B", *image.shape[1:2], 1, 1) and node is not None and node.section != "main"


def _flat(rewriter: Rewriter, value: Ref, before: Node) -> Ref:
    """[B, C, 1, 1] -> [B, C]: the value ahead of its unsqueezes where there is one, else a flatten."""
    shape = rewriter.shape(value)
    node = rewriter.producer(value)
    while node is not None and node.op == "unsqueeze" and len(node.shape) > 2:
        value = node.args[0]
        node = rewriter.producer(value)
    if rewriter.shape(value) == shape[:2]:
        return value
    flat = Node(rewriter.fresh(f"{value.name}_flat"), "flatten", (value, 1), {}, shape[:2])
    flat.section = node.section if node is not None else before.section
    rewriter.insert_before(next(n for n in rewriter.graph.nodes if n.section == "main"), flat)
    return Ref(flat.name)


def _fuse_groupnorm(
    rewriter: Rewriter, node: Node, norm: Node, silu: bool, scale: Ref | None, shift: Ref | None
) -> None:
    groups, weight, bias, eps = (list(norm.args[1:5]) + [None, None, 1e-5][len(norm.args) - 2 :])[:4]
    keywords: dict[str, Any] = {"site": node.kwargs["site"], "groups": groups, "weight": weight, "bias": bias}
    keywords |= {"eps": eps, "silu": silu, "norm_scale": None, "norm_shift": None}
    if scale is not None and shift is not None:
        keywords["norm_scale"], keywords["norm_shift"] = _flat(rewriter, scale, node), _flat(rewriter, shift, node)
    node.op = "groupnorm_silu_quantize"
    node.args = _channel_parts(rewriter, norm.args[0]) or (norm.args[0],)
    node.kwargs = keywords


def fuse_epilogues(graph: Graph) -> None:
    """layer + time embedding and layer + residual move into the layer's epilogue."""
    rewriter = Rewriter(graph)
    for node in [n for n in graph.nodes if n.op == "add" and n.section == "main"]:
        if len(node.args) != 2 or node.kwargs or not all(isinstance(a, Ref) for a in node.args):
            continue
        sides = sorted(node.args, key=lambda a: rewriter.position.get(a.name, -1), reverse=True)
        for value, other in ((sides[0], sides[1]), (sides[1], sides[0])):
            if _fuse_add(rewriter, node, value, other):
                break
    graph.prune()


def _fuse_add(rewriter: Rewriter, add: Node, value: Ref, other: Ref) -> bool:
    """Move ``other`` into the epilogue of the layer that makes ``value``; the layer takes the addition's place."""
    chain = _layout_chain(rewriter, value, add)
    if chain is None:
        return False
    layer, layouts = chain
    takes_embedding = layer.op == "int_conv2d" and not layouts and layer.kwargs["temb"] is None
    if takes_embedding and _per_channel(rewriter, other, layer):
        layer.kwargs["temb"] = _flat(rewriter, other, layer)
    elif layer.kwargs["residual"] is None and rewriter.shape(other) == rewriter.shape(value):
        for layout in reversed(layouts):
            inverse = _inverse_layout(rewriter, layout, other)
            rewriter.insert_before(add, inverse)
            other = Ref(inverse.name)
        layer.kwargs["residual"] = other
    else:
        return False
    nodes = rewriter.graph.nodes
    for moved in (layer, *layouts):
        nodes.remove(moved)
    at = nodes.index(add)
    nodes[at:at] = [layer, *layouts]
    rewriter.refresh()
    rewriter.replace_value(add.name, (layouts[-1] if layouts else layer).name)
    rewriter.remove(add)
    return True


def _layout_chain(rewriter: Rewriter, value: Ref, user: Node) -> tuple[Node, list[Node]] | None:
    """The layer behind ``value`` and the layout changes between, all read by nobody else."""
    layouts: list[Node] = []
    node = rewriter.producer(value)
    while node is not None and rewriter.only_user(node) is user:
        if node.op in ("int_conv2d", "int_gemm"):
            # a layer of the prompt runs before the latents are known, and adds nothing made from them
            return (node, layouts[::-1]) if node.section == "main" else None
        if node.op not in ("transpose", "permute", "view", "reshape"):
            return None
        layouts.append(node)
        user, node = node, rewriter.producer(node.args[0])
    return None


def _inverse_layout(rewriter: Rewriter, layout: Node, value: Ref) -> Node:
    """The node that undoes ``layout`` on ``value``."""
    name = rewriter.fresh(f"{layout.name}_inverse")
    target = rewriter.shape(layout.args[0])
    if layout.op == "transpose":
        return Node(name, "transpose", (value, *layout.args[1:3]), {}, target, layout.section)
    if layout.op == "permute":
        came_from = [axis % len(target) for axis in layout.args[1]]
        back = tuple(came_from.index(axis) for axis in range(len(target)))
        return Node(name, "permute", (value, back), {}, target, layout.section)
    sizes = tuple(-1 if isinstance(d, str) else d for d in target)
    return Node(name, "reshape", (value, sizes), {}, target, layout.section)
