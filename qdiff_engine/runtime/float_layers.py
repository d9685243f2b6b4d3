"""An integer layer run in floating point, on its dequantised weights, where that was measured to be faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..graph.interpret import activate, convolve
from ..graph.ir import Node
from ..weights import QuantizedWeight

FloatLayer = Callable[..., Tensor]


def layer_names(node: Node) -> tuple[str, ...]:
    """The layers that a product multiplies with: one, or several that the lowering merged."""
    layer = node.kwargs["layer"]
    return layer if isinstance(layer, tuple) else (layer,)


def float_layer(
    node: Node,
    weights: Sequence[QuantizedWeight],
    device: torch.device,
    dtype: torch.dtype,
    quantize: Callable[..., Any],
) -> FloatLayer:
    """The layer ``node`` through torch: (inputs, bias, output_scale, temb, residual, output) -> result in ``dtype``.

    It costs the memory of its weights in ``dtype``. The segments of a skip concatenation are multiplied as one.

    Args:
        weights: of its K segments, or of the products that the lowering merged into a linear layer.
        quantize: makes the integers of ``output``, a quantisation or None.
    """
    axis = 0 if node.op == "int_gemm" else 1
    weight = torch.cat([part.dequantize().to(device, dtype) for part in weights], axis)
    if node.op == "int_conv2d":
        weight = weight.contiguous(memory_format=torch.channels_last)

    def run(
        inputs: Sequence[Tensor],
        bias: Tensor | None,
        output_scale: Tensor | None,
        temb: Tensor | None,
        residual: Tensor | None,
        output: ops.Output | None,
    ) -> Tensor:
        x = inputs[0] if len(inputs) == 1 else torch.cat(list(inputs), 1)
        inside = None if bias is None or output_scale is not None else bias.to(dtype)
        y = F.linear(x, weight, inside) if node.op == "int_gemm" else convolve(x, weight, inside, node.kwargs)
        per_channel = (...,) if node.op == "int_gemm" else (..., None, None)
        if output_scale is not None:
            y = y * output_scale.to(dtype)[per_channel]
            y = y if bias is None else y + bias.to(dtype)[per_channel]
        y = y if temb is None else y + temb.to(dtype)[:, :, None, None]
        y = y if residual is None else y + residual.to(dtype)
        y = activate(y, "geglu") if node.kwargs.get("geglu") else y
        return y if output is None else quantize(y, *output)

    return run
