"""The Triton kernels of `qdiff_kernels` as operators: NVIDIA GPUs, or any machine in Triton's interpreter, for tests.

A quantisation (s, z) may be two Python numbers, or, in place of the scale, the float32 [3] tensor (s, 1 / s, z) on the
device that the kernels read: a captured CUDA graph then follows whatever row of the table was copied there.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import numerics
from . import operands
from .operands import ConvWeight, GemmWeight, QuantizedCopy, Segment, recent

_NAME = "triton"
OLDEST = (8, 0)  # compute capability: asynchronous copies, and int8 matrix instructions of this form


def interpreted() -> bool:
    """Whether Triton was told to run kernels in its interpreter, on any device, exactly and slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> tuple[bool, str]:
    """Whether Triton can run here, and on what or why not."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return False, f"Triton cannot be imported ({error})"
    if interpreted():
        return True, f"Triton {triton.__version__} in its interpreter (TRITON_INTERPRET=1): exact and slow, for tests"
    if not torch.cuda.is_available():
        return False, "there is no NVIDIA GPU here"
    capability, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    if capability < OLDEST:
        found, needed = (".".join(map(str, version)) for version in (capability, OLDEST))
        return False, f"{name} has compute capability {found}, the kernels need {needed} or newer"
    return True, f"Triton {triton.__version__} on {name}; not yet verified on hardware"


def _kernels(operator: str) -> Any:
    return importlib.import_module(f"qdiff_kernels.{operator}")


def _quantization(scale: float | Tensor | None, zero_point: int | None, device: torch.device) -> Tensor | None:
    if scale is None or isinstance(scale, Tensor):
        return scale
    assert zero_point is not None
    return torch.tensor([scale, numerics.inverse_scale(scale), zero_point], device=device)


def quantize(
    x: Tensor,
    scale: float | Tensor,
    zero_point: int,
    bits: int,
    *,
    activation: str = "none",
    channel_inverse: Tensor | None = None,
    upsample: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    storage: torch.dtype = torch.int8,
) -> Tensor:
    """q[..., k] = clamp(round_half_even(activation(x[..., k]) * inv) + z); see `ops.quantize`."""
    _check_scale(x, scale, zero_point, bits, upsample, padding, storage)
    quantization = _quantization(scale, zero_point, x.device)
    q = _kernels("quantize").quantize(
        x, quantization, bits, activation=activation, channel_inverse=channel_inverse, upsample=upsample,
        padding=padding,
    )  # fmt: skip
    return numerics.stored(q, storage)


def _check_scale(
    x: Tensor, scale: float | Tensor | None, zero_point: int, bits: int, upsample: int, padding: Any, storage: Any
) -> None:
    number = None if isinstance(scale, Tensor) else scale  # what the device holds was checked when the table was made
    operands.check_quantize(x, number, zero_point, bits, upsample, padding, storage)


def groupnorm_silu_quantize(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float | Tensor | None,
    zero_point: int,
    bits: int,
    *,
    silu: bool = True,
    x2: Tensor | None = None,
    pre_add: Tensor | None = None,
    norm_scale: Tensor | None = None,
    norm_shift: Tensor | None = None,
    upsample: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    copies: Sequence[QuantizedCopy | None] = (),
    storage: torch.dtype = torch.int8,
) -> Tensor:
    """q = quantize(silu(group_norm(cat(x, x2) + pre_add) * (1 + norm_scale) + norm_shift)).

    See `ops.groupnorm_silu_quantize`.
    """
    _check_scale(x, scale, zero_point, bits, upsample, padding, storage)
    inputs = [part for part in (x, x2) if part is not None]
    operands.check_copies(inputs, copies, storage)
    for part, copy in zip(inputs, copies, strict=False):
        if copy is not None:
            copy.out.copy_(quantize(part, copy.scale, copy.zero_point, copy.bits, storage=storage))
    q = _kernels("groupnorm_silu_quantize").groupnorm_silu_quantize(
        x, groups, weight, bias, eps, _quantization(scale, zero_point, x.device), bits, silu=silu, x2=x2,
        pre_add=pre_add, norm_scale=norm_scale, norm_shift=norm_shift, upsample=upsample, padding=padding,
    )  # fmt: skip
    return q if scale is None else numerics.stored(q, storage)


def layernorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float | Tensor | None,
    zero_point: int,
    bits: int,
    *,
    storage: torch.dtype = torch.int8,
) -> Tensor:
    """q[..., k] = quantize(layer_norm(x)[..., k]); see `ops.layernorm_quantize`."""
    _check_scale(x, scale, zero_point, bits, 1, (0, 0, 0, 0), storage)
    quantization = _quantization(scale, zero_point, x.device)
    q = _kernels("layernorm_quantize").layernorm_quantize(x, weight, bias, eps, quantization, bits)
    return q if scale is None else numerics.stored(q, storage)


def int_gemm(
    q: Tensor,
    weight: GemmWeight,
    scale: float | Tensor | None,
    zero_point: int | None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    reuse_residual: bool = False,
    output_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y[m, n] = s s_w[n] o[n] (acc[m, n] - z wsum[n]) + bias[n] + residual[m, n]; see `ops.int_gemm`."""
    operands.check_gemm(q, weight, scale, zero_point, bias, residual, output_scale, half=True)
    packed = weight.prepared.get(_NAME)
    if packed is None:
        packed = weight.prepared[_NAME] = _kernels("packing").pack(weight.values, weight.scale, weight.bits)
    if output_scale is not None:
        packed = packed._replace(scale=packed.scale * output_scale)
    return _kernels("int_gemm").int_gemm(
        _signed(q), packed, _quantization(scale, zero_point, q.device), bias, residual=residual, out_dtype=out_dtype
    )


def _signed(q: Tensor) -> Tensor:
    return q if q.is_floating_point() else numerics.signed(q)


def int_conv2d(
    segments: Sequence[Segment],
    bias: Tensor | None = None,
    *,
    temb: Tensor | None = None,
    residual: Tensor | None = None,
    reuse_residual: bool = False,
    output_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y = sum over segments of s s_w (acc - z wsum[class]) + bias + temb + residual; see `ops.int_conv2d`."""
    operands.check_conv2d(segments, bias, temb, residual, output_scale, half=True)
    y, terms = None, _Terms(output_scale, bias, temb, residual)
    for part in _launches(segments):
        y = _grouped(part[0], terms, out_dtype) if part[0].weight.groups > 1 else _convolve(part, terms, out_dtype)
        terms = _Terms(output_scale, residual=y)
    assert y is not None
    return y


class _Terms(NamedTuple):
    """What a convolution's result is scaled with, and what is added to it."""

    output_scale: Tensor | None
    bias: Tensor | None = None
    temb: Tensor | None = None
    residual: Tensor | None = None


def _launches(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments in the order given, two to a launch where the kernel takes two: of one kind, and without groups."""
    launches: list[list[Segment]] = []
    for segment in segments:
        kind = (segment.q.is_floating_point(), segment.weight.groups)
        last = launches[-1] if launches else []
        if len(last) == 1 and kind == (last[0].q.is_floating_point(), 1) == (kind[0], last[0].weight.groups):
            last.append(segment)
        else:
            launches.append([segment])
    return launches


def _grouped(segment: Segment, terms: _Terms, out_dtype: torch.dtype) -> Tensor:
    """One launch per group, side by side in the output."""
    weight, groups = segment.weight, segment.weight.groups
    parts = weight.prepared.get(_NAME)
    if parts is None:
        parts = weight.prepared[_NAME] = [
            dataclasses.replace(weight, values=values, scale=scale, sums=sums, groups=1, prepared={})
            for values, scale, sums in zip(
                weight.values.chunk(groups), weight.scale.chunk(groups), weight.sums.chunk(groups), strict=True
            )
        ]
    axes = (0, 0, 1, 1)
    shares = [[None] * groups if t is None else t.chunk(groups, axis) for t, axis in zip(terms, axes, strict=True)]
    images = segment.q.chunk(groups, 1)
    outputs = [
        _convolve([segment._replace(q=q, weight=part)], _Terms(*share), out_dtype)
        for q, part, share in zip(images, parts, zip(*shares, strict=True), strict=True)
    ]
    return torch.cat(outputs, 1).contiguous(memory_format=torch.channels_last)


def _convolve(segments: Sequence[Segment], terms: _Terms, out_dtype: torch.dtype) -> Tensor:
    module, weight = _kernels("int_conv2d"), segments[0].weight
    height, width = segments[0].q.shape[2:]
    geometry = module.Geometry(tuple(weight.values.shape[2:]), weight.stride, weight.padding, weight.dilation)
    parts, class_index = [], None
    for q, weight, scale, zero_point, _ in segments:
        packed, class_index = _packed(weight, height, width)
        if terms.output_scale is not None:
            packed = packed._replace(scale=packed.scale * terms.output_scale)
        parts.append(module.Segment(_signed(q), packed, _quantization(scale, zero_point, q.device)))
    return module.int_conv2d(
        parts, geometry, class_index, terms.bias, temb=terms.temb, residual=terms.residual, out_dtype=out_dtype
    )


def _packed(weight: ConvWeight, height: int, width: int) -> tuple[Any, Tensor]:
    """The kernel's weight and the border classes of an image size, on the weight's device; the values exist once."""
    prepared = weight.prepared.get(_NAME)
    if prepared is None:
        packing, order = _kernels("packing"), _kernels("int_conv2d").pack_order
        prepared = weight.prepared[_NAME] = packing.pack(order(weight.values), weight.scale, weight.bits), {}
    packed, by_size = prepared

    def classes() -> tuple[Tensor, Tensor]:
        found = numerics.border_classes(
            weight.values.cpu(), (height, width), weight.stride, weight.padding, weight.dilation
        )
        sums = found.sums * (16 if weight.bits == 4 else 1)  # the kernel sees 4-bit values 16 times as large
        index = found.index.flatten().to(torch.int32)
        return sums.to(weight.values.device), index.to(weight.values.device)

    sums, index = recent(by_size, (height, width), classes)
    return packed._replace(sums=sums), index


def denoise_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor | None,
    constants: Tensor,
    *,
    guidance: float | None = None,
    prediction_type: str = "epsilon",
    clipped: bool = False,
    a: Tensor | None = None,
    b: Tensor | None = None,
    input_bias: Tensor | None = None,
) -> Tensor:
    """x' = cx x + c0 x0 + ce e' + s' z + B[c]; see `ops.denoise_step`."""
    operands.check_denoise_step(x, (cond, uncond, noise), constants, (a, b, input_bias), prediction_type, guidance)
    return _kernels("denoise_step").denoise_step(
        x, cond, uncond, noise, constants, guidance=guidance, prediction_type=prediction_type, clipped=clipped, a=a,
        b=b, input_bias=input_bias,
    )  # fmt: skip
