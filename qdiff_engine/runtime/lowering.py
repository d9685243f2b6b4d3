"""Rearrangements that suit a machine without changing a value: what the CPU's convolutions cannot fuse, others do.

oneDNN's integer convolution adds no per-sample bias, and pays for zero points where it pads. So the time embedding
moves into the GroupNorm that reads the convolution, and upsampling and padding into the quantiser that feeds it. What a
shortcut reads beside a GroupNorm is quantised by that GroupNorm, which has it in the cache.
"""

from __future__ import annotations

import copy

from ..graph.factors import FACTORS
from ..graph.ir import Graph, Node, Ref
from ..graph.operators import LAYOUT_OPS
from ..graph.rewrite import Rewriter
from .norm_statistics import measure_for_norms
from .packing import pack_values

_PLACING = ("quantize", "groupnorm_silu_quantize")
_PRODUCTS = ("int_gemm", "int_conv2d")


def lower_for_cpu(graph: Graph) -> Graph:
    """A copy of ``graph`` whose quantisers carry ``upsample`` and ``padding``, and whose norms carry ``pre_add``."""
    lowered = _prepared(graph)
    _embeddings_to_norms(lowered)
    _placement_to_quantizers(lowered)
    _copies_to_norms(lowered)
    _attention_to_kernel(lowered)
    return lowered


def lower_for_gpu(graph: Graph) -> Graph:
    """A copy of ``graph`` whose products quantise their own result (``site``) where a quantiser is all that reads it.

    With GEGLU in between, too (``geglu``). A GPU's convolution upsamples, pads and adds the time embedding by itself.
    GroupNorms get ``statistics`` from products, and 4-bit values are ``packed``.
    """
    lowered = _prepared(graph)
    _quantizers_to_products(lowered)
    measure_for_norms(lowered)
    pack_values(lowered)
    return lowered


def _prepared(graph: Graph) -> Graph:
    """A copy with merged products, and with every option that a kernel may be given still unused."""
    lowered = unrearranged(graph)
    _merge_products(lowered)
    return lowered


def unrearranged(graph: Graph) -> Graph:
    """A copy with the same nodes, every option that a kernel may be given still unused: one instruction a node."""
    lowered = Graph(dict(graph.inputs), [copy.copy(node) for node in graph.nodes], graph.output)
    for node in lowered.nodes:
        node.kwargs = dict(node.kwargs)
        if node.op in _PLACING:
            node.kwargs |= {"upsample": 1, "padding": (0, 0, 0, 0), FACTORS: node.kwargs.get(FACTORS)}
        if node.op == "groupnorm_silu_quantize":
            node.kwargs |= {"pre_add": None, "copies": {}, "statistics": ()}
        if node.op in _PRODUCTS:
            node.kwargs |= {"geglu": False, "site": None, "statistics": None}
    return lowered


def _merge_products(graph: Graph) -> None:
    """Products of one input (query, key and value) become one, over the concatenated outputs, and views of it.

    The merged node's ``layer`` and ``bias`` are tuples, in the order of its outputs.
    """
    groups: dict[tuple, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "int_gemm" and node.kwargs["residual"] is None and node.kwargs.get("edge") is None:
            groups.setdefault(node.args, []).append(node)
    for (source, *_), nodes in groups.items():
        if len(nodes) < 2 or len({node.kwargs["bias"] is None for node in nodes}) > 1:
            continue
        sizes = [int(node.shape[-1]) for node in nodes]
        merged = Node(f"{nodes[0].name}.merged", "int_gemm", (source,), dict(nodes[0].kwargs), section=nodes[0].section)
        merged.kwargs |= {name: tuple(node.kwargs[name] for node in nodes) for name in ("layer", "bias")}
        merged.shape = (*nodes[0].shape[:-1], sum(sizes))
        graph.nodes.insert(graph.nodes.index(nodes[0]), merged)
        for i, (node, size) in enumerate(zip(nodes, sizes, strict=True)):
            node.op, node.args, node.kwargs = "narrow", (Ref(merged.name), -1, sum(sizes[:i]), size), {}


def _embeddings_to_norms(graph: Graph) -> None:
    """conv + temb -> GroupNorm becomes conv -> GroupNorm(x + temb), where nothing else reads the sum."""
    rewriter = Rewriter(graph)
    for node in graph.nodes:
        if node.op != "int_conv2d" or node.kwargs["temb"] is None:
            continue
        norm = rewriter.only_user(node)
        if norm is None or norm.op != "groupnorm_silu_quantize" or norm.args != (Ref(node.name),):
            continue
        if list(norm.refs()).count(node.name) == 1 and len(norm.shape) == 4:
            norm.kwargs["pre_add"], node.kwargs["temb"] = node.kwargs["temb"], None


def _placement_to_quantizers(graph: Graph) -> None:
    """The quantiser writes the upsampled and padded image itself, where no other layer reads the plain one."""
    rewriter = Rewriter(graph)
    for node in graph.nodes:
        if node.op != "int_conv2d":
            continue
        if node.kwargs["upsample"] == 1 and not any(node.kwargs["padding"]):
            continue
        sources = [rewriter.producer(ref) for ref in node.args]
        if all(s is not None and s.op in _PLACING and rewriter.only_user(s) is node for s in sources):
            for source in sources:
                assert source is not None
                source.kwargs["upsample"], source.kwargs["padding"] = node.kwargs["upsample"], node.kwargs["padding"]
            node.kwargs["upsample"], node.kwargs["padding"] = 1, (0, 0, 0, 0)


def _copies_to_norms(graph: Graph) -> None:
    """Quantising what a GroupNorm reads becomes that GroupNorm's work: its ``copies`` maps argument -> quantiser.

    The quantiser stays in the graph as "quantized_copy", which only says where its value comes from.
    """
    rewriter = Rewriter(graph)
    norms = [node for node in graph.nodes if node.op == "groupnorm_silu_quantize" and len(node.shape) == 4]
    for norm in norms:
        for i, source in enumerate(norm.args):
            readers = rewriter.users[source.name] if isinstance(source, Ref) else ()
            copies = [node for node in readers if _is_plain_quantizer(node) and len(node.shape) == 4]
            if len(copies) != 1 or list(norm.refs()).count(source.name) != 1:
                continue
            (copy,), at = copies, rewriter.position[norm.name]
            if any(rewriter.position[user.name] < at for user in rewriter.users[copy.name]):
                continue
            norm.kwargs["copies"][i] = copy.name
            copy.op = "quantized_copy"
            rewriter.move_behind(copy, norm)


def _is_plain_quantizer(node: Node) -> bool:
    """Whether a node quantises a value as it is: no activation function, no factors, nothing placed around it."""
    plain = {"activation": "none", "upsample": 1, "padding": (0, 0, 0, 0), FACTORS: None}
    return node.op == "quantize" and all(node.kwargs[name] == value for name, value in plain.items())


def _quantizers_to_products(graph: Graph) -> None:
    """product -> layout changes -> quantiser becomes product -> layout changes; with GEGLU, right behind the product.

    Where the quantiser's site stays in floating point, the product writes that: GEGLU is still its own.
    """
    rewriter = Rewriter(graph)
    for node in [node for node in graph.nodes if node.op in _PRODUCTS]:
        last, reader = node, rewriter.only_user(node)
        while reader is not None and reader.op in LAYOUT_OPS:
            last, reader = reader, rewriter.only_user(reader)
        if reader is None or reader.op != "quantize" or reader.section != node.section:
            continue
        geglu = reader.kwargs["activation"] == "geglu"
        if geglu and (node.op != "int_gemm" or last is not node or node.kwargs["residual"] is not None):
            continue
        if reader.kwargs[FACTORS] is not None or not (geglu or _is_plain_quantizer(reader)):
            continue
        node.kwargs |= {"geglu": geglu, "site": reader.kwargs["site"]}
        if geglu:
            node.shape = reader.shape
        rewriter.replace_value(reader.name, last.name)
        rewriter.remove(reader)


def _attention_to_kernel(graph: Graph) -> None:
    """What `ops.attention` computes becomes "attention"; a quantiser behind it joins it, and its ``site`` too."""
    rewriter = Rewriter(graph)
    for node in list(graph.nodes):
        if node.op != "scaled_dot_product_attention" or not _fits_attention(rewriter, node):
            continue
        node.op, node.kwargs = "attention", {"scale": node.kwargs.get("scale")}
        last, reader = node, rewriter.only_user(node)
        while reader is not None and reader.op in LAYOUT_OPS:  # they move quantised values as they move floating ones
            last, reader = reader, rewriter.only_user(reader)
        if reader is not None and _is_plain_quantizer(reader):
            node.kwargs["site"] = reader.kwargs["site"]
            rewriter.replace_value(reader.name, last.name)
            rewriter.remove(reader)


def _fits_attention(rewriter: Rewriter, node: Node) -> bool:
    """Whether `ops.attention` computes this node: q, k and v [B, H, L, D] alike, without a mask or a flag."""
    if len(node.args) != 3 or not all(isinstance(arg, Ref) for arg in node.args) or not set(node.kwargs) <= {"scale"}:
        return False
    q, k, v = (rewriter.shape(arg) for arg in node.args)
    return len(q) == len(k) == 4 and k == v and (*q[:2], q[-1]) == (*k[:2], k[-1])
