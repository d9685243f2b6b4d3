"""Where the features of a value are after layout changes: they may move as a whole, or be split and merged."""

from __future__ import annotations

from math import prod

import torch

from ..graph.ir import Dim, Node, sizes
from ..graph.operators import FLOAT_OPS

_PERMUTING = frozenset({"permute", "transpose", "movedim", "t"})  # the other layout changes keep the order in memory
_BATCH = 7919  # a size that is none of a layer's, in place of the batch


def moved_axis(layout: Node, shape: tuple[Dim, ...], axis: int) -> int | None:
    """The axis of ``layout``'s result that is, whole and alone, ``axis`` of its input; None where there is none."""
    before, after = sizes(shape, _BATCH), sizes(layout.shape, _BATCH)
    size, step = before[axis], prod(before[axis + 1 :])
    if layout.op in _PERMUTING:
        strides = FLOAT_OPS[layout.op](torch.empty(before, device="meta"), *layout.args[1:], **layout.kwargs).stride()
    else:
        strides = tuple(prod(after[i + 1 :]) for i in range(len(after)))
    found = [i for i, place in enumerate(zip(after, strides, strict=True)) if place == (size, step)]
    return found[0] if len(found) == 1 else None


def features_axis(node: Node) -> int:
    """The axis of the features in what an integer operator writes: of images the second one, of rows the last."""
    of_images = node.op in ("int_conv2d", "groupnorm_silu_quantize") or (node.op == "quantize" and len(node.shape) == 4)
    return 1 if of_images else len(node.shape) - 1
