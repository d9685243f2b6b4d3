"""Products measure their results for the GroupNorm that reads them: one pass over the activations less.

A product's kernel writes the mean and the squared deviations of every chunk of pixels beside its result, of the values
as they are stored. Chunks depend on the image's size alone and each is written by one program, nothing is added
atomically: two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

from ..graph.ir import Graph, Node, Ref
from ..graph.operators import LAYOUT_OPS
from ..graph.rewrite import Rewriter
from .features import features_axis, moved_axis


def measure_for_norms(graph: Graph) -> None:
    """Gives a GroupNorm all of whose inputs products make their ``statistics``: references to what these write.

    A product's ``statistics`` names the "group_statistics" node behind it, which only says where that comes from.
    """
    rewriter = Rewriter(graph)
    for norm in [node for node in graph.nodes if node.op == "groupnorm_silu_quantize"]:
        products = [_product_of(rewriter, part) for part in norm.args]
        measured = [_statistics_of(rewriter, product) for product in products if product is not None and all(products)]
        norm.kwargs["statistics"] = tuple(Ref(node.name) for node in measured)


def _product_of(rewriter: Rewriter, value: Any) -> Node | None:
    """The product that makes the image ``value``, if its pixels and channels are the product's rows and outputs."""
    node, layouts = rewriter.producer(value), []
    while node is not None and node.op in LAYOUT_OPS:
        layouts.append(node)
        node = rewriter.producer(node.args[0])
    if node is None or node.op not in ("int_gemm", "int_conv2d") or node.section != "main" or node.shape[0] != "B":
        return None
    if node.kwargs["site"] is not None or node.kwargs["geglu"] or node.kwargs.get("groups", 1) > 1:
        return None
    shape, image, channel = node.shape, 0, features_axis(node)
    for layout in reversed(layouts):
        moved_image, moved_channel = moved_axis(layout, shape, image), moved_axis(layout, shape, channel)
        if moved_image is None or moved_channel is None:
            return None
        shape, image, channel = layout.shape, moved_image, moved_channel
    return node if (image, channel) == (0, 1) else None


def _statistics_of(rewriter: Rewriter, product: Node) -> Node:
    """The node for a product's statistics, made at its first use."""
    if product.kwargs["statistics"] is None:
        node = Node(rewriter.fresh(f"{product.name}.statistics"), "group_statistics", (Ref(product.name),))
        node.section = product.section
        product.kwargs["statistics"] = node.name
        rewriter.graph.nodes.insert(rewriter.graph.nodes.index(product) + 1, node)
        rewriter.refresh()
    return rewriter.by_name[product.kwargs["statistics"]]
