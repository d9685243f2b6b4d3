"""`int_gemm` and `int_conv2d` by the C++ kernels of `native_products`, for packed weights and K segments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import extension, native_products, operands, plain
from .grouped import group_by_group
from .operands import ConvWeight, GemmWeight, Segment


def available() -> tuple[bool, str]:
    """Whether the C++ extension can be imported, and why not."""
    return extension.available()


@group_by_group
def int_gemm(
    q: Tensor,
    weight: GemmWeight,
    scale: float | None,
    zero_point: int | None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    reuse_residual: bool = False,
    output_scale: Tensor | None = None,
) -> Tensor:
    """y[m, n] = s s_w[n] (acc[m, n] - z wsum[n]) + bias[n] + residual[m, n]; see `ops.int_gemm`."""
    if q.is_floating_point():
        return plain.int_gemm(q, weight, scale, zero_point, bias, residual=residual, output_scale=output_scale)
    operands.check_gemm(q, weight, scale, zero_point, bias, residual, output_scale)
    assert scale is not None and zero_point is not None
    packed = weight.prepared.get("native")
    if packed is None:
        packed = weight.prepared["native"] = native_products.pack_gemm(weight.values)
    weight_scale = weight.scale if output_scale is None else weight.scale * output_scale
    return native_products.int_gemm(q, packed, weight_scale, scale, zero_point, bias, residual=residual)


def int_conv2d(
    segments: Sequence[Segment],
    bias: Tensor | None = None,
    *,
    temb: Tensor | None = None,
    residual: Tensor | None = None,
    reuse_residual: bool = False,
    output_scale: Tensor | None = None,
) -> Tensor:
    """y = sum over segments of s s_w (acc - z wsum[class]) + bias + temb + residual; see `ops.int_conv2d`."""
    if any(segment.q.is_floating_point() for segment in segments):
        return plain.int_conv2d(segments, bias, temb=temb, residual=residual, output_scale=output_scale)
    operands.check_conv2d(segments, bias, temb, residual, output_scale)
    if temb is not None and len(temb) == 1:  # one time embedding for the whole batch is a bias
        bias, temb = (temb[0] if bias is None else bias + temb[0]), None
    y = residual
    for segment in segments:
        y, bias, temb = _convolve(segment, bias, temb, y, output_scale), None, None
    assert y is not None
    return y


def _convolve(
    segment: Segment, bias: Tensor | None, temb: Tensor | None, residual: Tensor | None, output_scale: Tensor | None
) -> Tensor:
    q, weight, scale, zero_point, _ = segment
    assert scale is not None and zero_point is not None
    weight_scale = weight.scale if output_scale is None else weight.scale * output_scale
    return native_products.int_conv2d(
        plain.place(q, weight.upsample, (0, 0, 0, 0), 0) if weight.upsample > 1 else q,
        _packed(weight),
        weight_scale,
        scale,
        zero_point,
        bias,
        stride=weight.stride,
        padding=weight.padding,
        dilation=weight.dilation,
        groups=weight.groups,
        temb=temb,
        residual=residual,
    )


def _packed(weight: ConvWeight) -> native_products.PackedConv2d:
    if "native" not in weight.prepared:
        weight.prepared["native"] = native_products.pack_conv2d(weight.values, weight.groups)
    return weight.prepared["native"]
