"""Which quantised values of a graph lowered for a GPU are stored two to a byte, in rows that give them 4 bits.

That halves what moves between kernels. A value is where its writer can pack it, every layer that reads it can unpack
it, the layout changes in between keep its features together, and fewer bytes come of it; else it stays int8. Which row
gives a value 4 bits is the table's business: the same graph serves every mode.
"""

from __future__ import annotations

from typing import Any

from .. import ops
from ..graph.ir import Graph, Node, Ref
from ..graph.operators import LAYOUT_OPS
from ..graph.rewrite import Rewriter
from .features import features_axis, moved_axis

_RESHAPING = ("view", "reshape")


def pack_values(graph: Graph) -> None:
    """Sets ``packed`` of every node that quantises.

    Layout changes of packed values become "quantized_layout": ``op`` is what they were, ``of_bytes`` the arguments
    that move bytes in place of values.
    """
    rewriter = Rewriter(graph)
    for node in graph.nodes:
        if node.kwargs.get("site") is None:
            continue
        can_be = node.section == "main" and _can_pack(rewriter, node)
        layouts = _layouts_to_readers(rewriter, node, features_axis(node)) if can_be else None
        node.kwargs["packed"] = layouts is not None
        for layout, moved in layouts or ():
            layout.kwargs = {"op": layout.op, "of_bytes": _of_bytes(layout, moved)}
            layout.op = "quantized_layout"


def _can_pack(rewriter: Rewriter, node: Node) -> bool:
    """Whether the operator that writes a value can pack it."""
    if node.op == "groupnorm_silu_quantize":
        return all(ops.packs(rewriter.shape(part)[1], whole=True) for part in node.args)
    return node.op != "int_conv2d" or node.kwargs["groups"] == 1


def _layouts_to_readers(rewriter: Rewriter, value: Node, axis: int) -> list[tuple[Node, int]] | None:
    """(layout change, axis of the features behind it) on the ways to the readers; None if one of them cannot unpack."""
    readers, layouts = rewriter.users[value.name], []
    if not readers or value.name == rewriter.graph.output:
        return None
    for reader in readers:
        if reader.op in LAYOUT_OPS:
            moved = moved_axis(reader, value.shape, axis)
            further = None if moved is None else _layouts_to_readers(rewriter, reader, moved)
            if moved is None or further is None:
                return None
            layouts += [(reader, moved), *further]
        elif not _unpacks(reader, value, axis):
            return None
    return layouts


def _unpacks(layer: Node, value: Node, axis: int) -> bool:
    """Whether a layer reads its operand ``value`` packed along ``axis``."""
    features = value.shape[axis]
    assert isinstance(features, int), "features do not depend on the batch"
    if Ref(value.name) not in layer.args:
        return False
    if layer.op == "int_gemm":
        return axis == len(value.shape) - 1 and ops.packs(features)
    return layer.op == "int_conv2d" and axis == 1 and ops.packs(features // layer.kwargs["groups"], whole=True)


def _of_bytes(layout: Node, axis: int) -> tuple[Any, ...]:
    """A layout change's arguments, where they are sizes with those of packed features."""
    if layout.op not in _RESHAPING:
        return layout.args
    nested = isinstance(layout.args[1], tuple | list)
    shape, features = list(layout.args[1] if nested else layout.args[1:]), layout.shape[axis]
    if isinstance(features, int) and shape[axis] == features:  # it may be -1, too
        shape[axis] = ops.packed_width(features)
    return (layout.args[0], tuple(shape)) if nested else (layout.args[0], *shape)
