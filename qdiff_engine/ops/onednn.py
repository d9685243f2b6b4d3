"""Integer GEMM and convolution through oneDNN, the x86 library inside PyTorch (u8 activations, s8 weights).

oneDNN multiplies u8 = q + 128. In a GEMM it subtracts the zero point itself. In a convolution a zero point other than
0 makes it repack the weights in every call (0.9 -> 4.2 ms for 1280 -> 1280 channels at 8 x 8 pixels, Xeon with AMX).
So the convolution runs with zero point 0 on an image padded with z, and -(z + 128) wsum goes into the bias, unless
that sum is so large that float32 would lose digits where the two cancel: then oneDNN subtracts in integers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import numerics
from . import operands, plain
from .grouped import group_by_group
from .operands import ConvWeight, GemmWeight, Segment, recent

NAME = "onednn"
_POINTWISE = "onednn pointwise"  # key of the matrix form of a 1x1 convolution
# (z + 128) |wsum| / ||w|| up to which folding the zero point into the bias costs less than 1e-5 of the largest output
CANCELLATION_LIMIT = 600
_OPERATORS = ("qlinear_prepack", "qlinear_pointwise", "qconv_prepack", "qconv2d_pointwise")
_NO_UNARY: tuple[str, list, str] = ("none", [], "")  # name, arguments and algorithm of an activation


@functools.cache
def available() -> tuple[bool, str]:
    """Whether oneDNN multiplies 8-bit integers exactly here, and why not: without VNNI it saturates in 16 bits."""
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.onednn, name)]
    if missing or not torch.backends.mkldnn.is_available():
        return False, f"this PyTorch has no oneDNN operators ({', '.join(missing) or 'mkldnn is off'})"
    try:
        exact = _saturating_test()
    except RuntimeError as error:
        return False, f"oneDNN's integer operators fail on this machine: {error}"
    if not exact:
        return False, "oneDNN's u8 x s8 products saturate on this CPU (no AVX-512 VNNI, AVX-VNNI or AMX): not exact"
    return True, "oneDNN integer operators, self-test exact"


def _saturating_test() -> bool:
    """Multiply the largest activations by the largest weights, where a 16-bit pair sum overflows, and compare."""
    k, n = 32, 32  # every sum stays below 2^24, exact in float32
    sign = torch.ones(n, dtype=torch.int8)
    sign[1::2] = -1
    values = torch.full((n, k), 127, dtype=torch.int8) * sign[:, None]
    q = torch.full((2, k, 5, 5), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    unit = torch.ones(n)
    expected = 255.0 * values.float().sum(1)
    linear = int_gemm(q[:, :, 0, 0], operands.pack_gemm(values, unit), 1.0, -128)
    taps = operands.pack_conv2d(values.reshape(n, k, 1, 1).expand(n, k, 3, 3).contiguous(), unit)
    conv = int_conv2d([Segment(q, taps, 1.0, -128)])
    return torch.equal(linear, expected.expand_as(linear)) and torch.equal(
        conv, (9 * expected)[:, None, None].expand_as(conv)
    )


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
    assert zero_point is not None
    packed = weight.prepared.get(NAME)
    if packed is None:
        packed = weight.prepared[NAME] = torch.ops.onednn.qlinear_prepack(weight.values, None), _zeros(weight)
    weight_scale = weight.scale if output_scale is None else weight.scale * output_scale
    activation = (numerics.stored(q, torch.uint8).contiguous(), scale, zero_point + numerics.OFFSET)
    matrix = (packed[0], weight_scale, packed[1])
    linear = torch.ops.onednn.qlinear_pointwise
    if residual is None:
        return linear.default(*activation, *matrix, bias, 1.0, 0, torch.float32, *_NO_UNARY)
    if reuse_residual and residual.is_contiguous():
        linear.binary(*activation, *matrix, residual, bias, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, *_NO_UNARY)
        return residual
    return linear.binary(
        *activation, *matrix, residual.contiguous(), bias, 1.0, 0, torch.float32, 1.0, 0, "add", 1.0, *_NO_UNARY
    )


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
    y = None
    if reuse_residual and residual is not None and residual.is_contiguous(memory_format=torch.channels_last):
        y, residual = residual, None
    for segment in segments:
        y, bias = _convolve(segment, bias, output_scale, y), None
    assert y is not None
    if temb is not None:
        y.add_(temb[:, :, None, None])
    return y if residual is None else y.add_(residual)


class _Prepared(NamedTuple):
    """What oneDNN's convolution reads beside the activation."""

    layouts: dict  # padded image shape -> weights in the layout that oneDNN likes best there
    zeros: Tensor  # int64 [Cout]
    scaled_sums: Tensor  # float32 [Cout], s_w wsum
    skew: float  # max over n of |wsum[n]| / ||w[n]||, near 3 for weights without a preferred sign


def _convolve(segment: Segment, bias: Tensor | None, output_scale: Tensor | None, into: Tensor | None) -> Tensor:
    """y[n, o, i, j] = s s_w[o] acc + (bias[o] - s (z + 128) s_w[o] wsum[o]), added to ``into`` in place if given."""
    q, weight, scale, zero_point, bits = segment
    assert scale is not None and zero_point is not None
    q, offset = numerics.stored(q, torch.uint8), zero_point + numerics.OFFSET
    if _is_pointwise(weight):
        return _multiply_pixels(q, weight, scale, offset, bias, output_scale, into)
    if bits == 4:  # [-8, 7] is stored as [120, 135]; without the 120 there is little to cancel
        q, offset = q - 120, offset - 120
    q = plain.place(q, weight.upsample, weight.padding, offset)
    packed, prepared = _prepacked(weight, q.shape)
    weight_scale, scaled_sums = weight.scale, prepared.scaled_sums
    if output_scale is not None:
        weight_scale, scaled_sums = weight_scale * output_scale, scaled_sums * output_scale
    if offset and offset * prepared.skew <= CANCELLATION_LIMIT:
        shift = -scale * offset
        bias, offset = (scaled_sums * shift if bias is None else bias.add(scaled_sums, alpha=shift)), 0
    geometry = (weight.stride, (0, 0), weight.dilation, weight.groups)
    operand = (q, scale, offset, packed, weight_scale, prepared.zeros)
    convolution = torch.ops.onednn.qconv2d_pointwise
    if into is None:
        return convolution.default(*operand, bias, *geometry, 1.0, 0, torch.float32, *_NO_UNARY)
    convolution.binary(*operand, into, bias, *geometry, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, *_NO_UNARY)
    return into


def _is_pointwise(weight: ConvWeight) -> bool:
    plain_pixels = weight.groups == weight.upsample == 1 and not any(weight.padding)
    return tuple(weight.values.shape[2:]) == (1, 1) == weight.stride and plain_pixels


def _multiply_pixels(
    q: Tensor,
    weight: ConvWeight,
    scale: float,
    offset: int,
    bias: Tensor | None,
    output_scale: Tensor | None,
    into: Tensor | None,
) -> Tensor:
    """A 1x1 convolution as a matrix product over pixels: oneDNN adds into memory there at half the convolution's cost.

    The product takes the zero point as an integer, for nothing, so no digit is lost to it either.
    """
    packed = weight.prepared.get(_POINTWISE)
    if packed is None:
        matrix = torch.ops.onednn.qlinear_prepack(weight.values.flatten(1), None)
        packed = weight.prepared[_POINTWISE] = matrix, _zeros(weight)
    n, k, h, w = q.shape
    pixels = q.permute(0, 2, 3, 1).reshape(-1, k)
    weight_scale = weight.scale if output_scale is None else weight.scale * output_scale
    operand = (pixels, scale, offset, packed[0], weight_scale, packed[1])
    linear = torch.ops.onednn.qlinear_pointwise
    if into is None:
        rows = linear.default(*operand, bias, 1.0, 0, torch.float32, *_NO_UNARY)
        return rows.view(n, h, w, -1).permute(0, 3, 1, 2)
    rows = into.permute(0, 2, 3, 1).view(-1, into.shape[1])
    linear.binary(*operand, rows, bias, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, *_NO_UNARY)
    return into


def _prepacked(weight: ConvWeight, shape: Sequence[int]) -> tuple[Tensor, _Prepared]:
    """The weights in oneDNN's layout for this image shape, and what does not depend on the shape."""
    prepared = weight.prepared.get(NAME)
    if prepared is None:
        norm = weight.values.flatten(1).float().norm(dim=1).clamp_(min=1)
        skew = float((weight.sums.abs() / norm).max())
        prepared = weight.prepared[NAME] = _Prepared({}, _zeros(weight), weight.scale * weight.sums, skew)

    def pack() -> Tensor:
        return torch.ops.onednn.qconv_prepack(
            weight.values, weight.scale, 1.0, 0, weight.stride, (0, 0), weight.dilation, weight.groups, list(shape)
        )

    return recent(prepared.layouts, tuple(shape), pack), prepared


def _zeros(weight: GemmWeight | ConvWeight) -> Tensor:
    return torch.zeros(len(weight.scale), dtype=torch.int64)
