"""Rearrangements that suit a machine without changing a value: what the CPU's convolutions cannot fuse, others do.

oneDNN's integer convolution adds no per-sample bias, and pays for zero points where it pads. So the time embedding
moves into the GroupNorm that reads the convolution, and upsampling and padding into the quantiser that feeds it.
"""

from __future__ import annotations

import copy

from ..graph.ir import Graph, Ref
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
    _embeddings_to_norms(lowered)
    _placement_to_quantizers(lowered)
    return lowered


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
