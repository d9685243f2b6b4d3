"""Samples of what each layer multiplies: a few K-vectors per step, drawn at random places of the first batch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ..graph.ir import Graph, Node

_BUDGET = 1 << 30  # bytes of all samples together
_MOST, _LEAST = 2048, 256  # vectors per layer


class InputSampler:
    """Collects ``{"layer:segment": bfloat16 [P, K]}`` for one step at a time; K in the weights' own (c, r, s) order.

    The places depend on the layer, the step and the seed only, so an interrupted run that resumes draws the same.
    """

    def __init__(self, graph: Graph, constants: Mapping[str, Tensor], steps: int, seed: int) -> None:
        layers = [node for node in graph.nodes if node.op in ("int_gemm", "int_conv2d")]
        self.shapes = {node.kwargs["layer"]: tuple(constants[node.kwargs["weight"].key].shape) for node in layers}
        total = sum(torch.Size(shape[1:]).numel() for shape in self.shapes.values())
        vectors = min(_MOST, max(_LEAST, _BUDGET // (2 * max(total, 1))))
        self.per_step, self.seed = -(-vectors // steps), seed
        self.start(0)

    def start(self, step: int) -> None:
        """Begin a step: forget the last one's samples."""
        self.step = step
        self.taken: dict[str, Tensor] = {}

    def __call__(self, node: Node, segment: int, x: Tensor) -> None:
        """Take samples of ``x``, the input of a layer's K segment, unless this step has them."""
        name = f"{node.kwargs['layer']}:{segment}"
        if name in self.taken or node.kwargs.get("groups", 1) != 1:
            return
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.step} {name}".encode()))
        places = torch.randint(output_places(node, x), (self.per_step,), generator=generator)
        self.taken[name] = multiplied(node, self.shapes[node.kwargs["layer"]], x, places).to(torch.bfloat16)


def output_places(node: Node, x: Tensor) -> int:
    """How many vectors a layer multiplies when it is given ``x``: one per output pixel or token."""
    if node.op == "int_gemm":
        return x[..., 0].numel()
    return len(x) * int(node.shape[2]) * int(node.shape[3])


def multiplied(node: Node, weight_shape: tuple[int, ...], x: Tensor, places: Tensor) -> Tensor:
    """[P, K], K in the weights' own (c, r, s) order: what the layer multiplies at ``places`` int64 [P] of its output.

    For a convolution these are the taps under output pixels, 0 outside the image.
    """
    if node.op == "int_gemm":
        return x.reshape(-1, x.shape[-1])[places]
    k, factor = node.kwargs, node.kwargs["upsample"]
    out_height, out_width = int(node.shape[2]), int(node.shape[3])
    height, width = x.shape[2] * factor, x.shape[3] * factor
    _, _, r, s = weight_shape
    place = places.reshape(-1, 1, 1)
    image, row, column = place // (out_height * out_width), place // out_width % out_height, place % out_width
    top, _, left, _ = k["padding"]
    rows = row * k["stride"][0] - top + torch.arange(r).reshape(1, -1, 1) * k["dilation"][0]
    columns = column * k["stride"][1] - left + torch.arange(s).reshape(1, 1, -1) * k["dilation"][1]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    rows, columns = rows.clamp(0, height - 1) // factor, columns.clamp(0, width - 1) // factor
    patches = x.permute(0, 2, 3, 1)[image, rows, columns] * inside[..., None]  # [P, R, S, C]
    return patches.permute(0, 3, 1, 2).flatten(1)
