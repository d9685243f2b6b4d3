"""What stays floating: integer layers on dequantised weights, where that was measured to be faster, and mode A16."""

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


def linear_by_sample(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[b] = W x[b] + bias, one b at a time: a matrix product's last bits depend on how many rows it has."""
    if len(x) > 1 and x.device.type == "cpu" and bool((x == x[:1]).all()):  # elsewhere the host would wait for it
        return F.linear(x[:1], weight, bias).repeat(len(x), *[1] * (x.dim() - 1))
    return torch.cat([F.linear(row, weight, bias) for row in x.split(1)])


def _upsampled(x: Tensor, factor: int) -> Tensor:
    """Nearest upsampling of an image tensor of any dtype, channels last."""
    x = x.permute(0, 2, 3, 1).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return x.permute(0, 3, 1, 2)


def placed_as(x: Tensor, upsample: int, padding: tuple[int, int, int, int]) -> Tensor:
    """Upsampled and zero-padded floating activations, as the quantiser would have written their integers."""
    if upsample > 1:
        x = _upsampled(x, upsample)
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom)) if any(padding) else x
