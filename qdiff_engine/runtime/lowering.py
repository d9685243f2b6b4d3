"""Rearrangements that suit a machine without changing a value: what the CPU's convolutions cannot fuse, others do.

oneDNN's integer convolution adds no per-sample bias, and pays for zero points where it pads. So the time embedding
moves into the GroupNorm that reads the convolution, and upsampling and padding into the quantiser that feeds it.
"""

from __future__ import annotations

import copy

from ..graph.ir import Graph, Node, Ref
from ..graph.rewrite import Rewriter

_PLACING = ("quantize", "groupnorm_silu_quantize")


def lower_for_cpu(graph: Graph) -> Graph:
    """A copy of ``graph`` whose quantisers carry ``upsample`` and ``padding``, and whose norms carry ``pre_add``."""
    lowered = Graph(dict(graph.inputs), [copy.copy(node) for node in graph.nodes], graph.output)
    for node in lowered.nodes:
        node.kwargs = dict(node.kwargs)
        if node.op in _PLACING:
            node.kwargs |= {"upsample": 1, "padding": (0, 0, 0, 0)}
        if node.op == "groupnorm_silu_quantize":
            node.kwargs["pre_add"] = None
    _merge_products(lowered)
    _embeddings_to_norms(lowered)
    _placement_to_quantizers(lowered)
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
