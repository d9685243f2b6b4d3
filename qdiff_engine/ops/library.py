"""The operators as ``torch.ops.qdiff.*``: opaque to torch.compile and torch.export, with shapes known beforehand.

`register` makes them known to PyTorch, once; the functions below have the arguments of their namesakes in `ops`, and
call them. A quantisation travels as a float32 [3] tensor (s, 1 / s, z), so that compiled code serves every row of a
table: a caller who keeps such tensors on the device passes one as ``scale``. Results are new tensors: there is no
``reuse_residual``, no ``copies``, and no gradient. What a backend prepares of a weight is kept while its tensors live.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from . import dispatch
from .operands import ConvWeight, GemmWeight, Output, Segment

_SCHEMAS = {
    "quantize": "(Tensor x, Tensor quantization, SymInt bits, str activation, Tensor? channel_inverse, "
    "SymInt upsample, SymInt[] padding, ScalarType storage, str? backend) -> Tensor",
    "groupnorm_silu_quantize": "(Tensor x, SymInt groups, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? quantization, SymInt bits, bool silu, Tensor? x2, Tensor? pre_add, Tensor? norm_scale, "
    "Tensor? norm_shift, Tensor? channel_inverse, SymInt upsample, SymInt[] padding, ScalarType storage, "
    "str? backend) -> Tensor",
    "layernorm_quantize": "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? quantization, SymInt bits, "
    "ScalarType storage, str? backend) -> Tensor",
    "int_gemm": "(Tensor q, Tensor values, Tensor weight_scale, Tensor sums, SymInt weight_bits, "
    "Tensor? quantization, Tensor? bias, Tensor? residual, Tensor? output_scale, bool geglu, Tensor? output, "
    "SymInt output_bits, ScalarType out_dtype, str? backend) -> Tensor",
    "int_conv2d": "(Tensor[] q, Tensor[] values, Tensor[] weight_scales, Tensor[] sums, SymInt[] weight_bits, "
    "Tensor?[] quantizations, SymInt[] bits, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, "
    "SymInt upsample, Tensor? bias, Tensor? temb, Tensor? residual, Tensor? output_scale, Tensor? output, "
    "SymInt output_bits, ScalarType out_dtype, str? backend) -> Tensor",
    "denoise_step": "(Tensor x, Tensor cond, Tensor? uncond, Tensor? noise, Tensor constants, float? guidance, "
    "str prediction_type, bool clipped, Tensor? a, Tensor? b, Tensor? input_bias, str? backend) -> Tensor",
}
_PREPARED = WeakTensorKeyDictionary()  # a weight's values -> (versions, its other constants, backends' own forms of it)


@functools.cache
def register() -> None:
    """Define ``torch.ops.qdiff``, one operator per name of `ops`; calling it again changes nothing."""
    for name, schema in _SCHEMAS.items():
        run, fake = globals()[f"_{name}"], globals()[f"_{name}_shape"]
        torch.library.custom_op(f"qdiff::{name}", run, mutates_args=(), schema=schema).register_fake(fake)


def quantization(scale: float | Tensor, zero_point: int) -> Tensor:
    """float32 [3], (s, float32(1 / s), z); a tensor is one already."""
    if isinstance(scale, Tensor):
        return scale
    return torch.tensor([scale, 1.0 / scale, float(zero_point)], dtype=torch.float32)


def _optional(scale: float | Tensor | None, zero_point: int | None, device: torch.device) -> Tensor | None:
    if scale is None or isinstance(scale, Tensor):
        return scale
    return quantization(scale, zero_point or 0).to(device)


def _affine(quantization: Tensor | None, operator: str, backend: str | None) -> tuple[Any, int]:
    """(scale, zero point) as the backend reads them: the tensor itself, or two numbers."""
    if quantization is None:
        return None, 0
    if dispatch.chosen(operator, quantization.device, backend) in dispatch.EPILOGUES:
        return quantization, 0
    scale, _, zero_point = quantization.tolist()
    return scale, int(zero_point)


def _output(quantization: Tensor | None, bits: int, operator: str, backend: str | None) -> Output | None:
    return None if quantization is None else (*_affine(quantization, operator, backend), bits)


def _prepared(values: Tensor, *others: Any) -> dict[str, Any]:
    """What backends prepare of a weight made of ``values`` and others, kept while the tensors live unchanged."""
    tensors = [t for t in (values, *others) if isinstance(t, Tensor)]
    versions = [None if t.is_inference() else t._version for t in tensors]
    found = _PREPARED.get(values)
    same = found is not None and found[0] == versions and all(map(_same, found[1], others))
    if not same:
        found = _PREPARED[values] = versions, others, {}
    return found[2]


def _same(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, Tensor) else a == b


def _image(like: Tensor, channels: Any, size: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """An empty [N, channels, *size] with its channels innermost in memory."""
    return like.new_empty((like.shape[0], *size, channels), dtype=dtype).movedim(-1, 1)


def _enlarged(x: Tensor, upsample: int, padding: Sequence[int]) -> tuple[Any, ...]:
    """Size of the image that a quantiser writes for ``x``."""
    if x.dim() != 4:
        return tuple(x.shape[2:])
    top, bottom, left, right = padding
    return (x.shape[2] * upsample + top + bottom, x.shape[3] * upsample + left + right)


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
    backend: str | None = None,
) -> Tensor:
    """`ops.quantize` as ``torch.ops.qdiff.quantize``."""
    affine = _optional(scale, zero_point, x.device)
    return torch.ops.qdiff.quantize(x, affine, bits, activation, channel_inverse, upsample, padding, storage, backend)


def _quantize(x, quantization, bits, activation, channel_inverse, upsample, padding, storage, backend):
    run = dispatch.resolve("quantize", x.device, backend)
    return run(
        x, *_affine(quantization, "quantize", backend), bits, activation=activation, channel_inverse=channel_inverse,
        upsample=upsample, padding=tuple(padding), storage=storage,
    )  # fmt: skip


def _quantize_shape(x, quantization, bits, activation, channel_inverse, upsample, padding, storage, backend):
    halves = 2 if activation == "geglu" else 1
    if x.dim() != 4:
        return x.new_empty((*x.shape[:-1], x.shape[-1] // halves), dtype=storage)
    return _image(x, x.shape[1] // halves, _enlarged(x, upsample, padding), storage)


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
    channel_inverse: Tensor | None = None,
    upsample: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    storage: torch.dtype = torch.int8,
    backend: str | None = None,
) -> Tensor:
    """`ops.groupnorm_silu_quantize` as ``torch.ops.qdiff.groupnorm_silu_quantize``; unquantised in x's dtype."""
    affine = _optional(scale, zero_point, x.device)
    return torch.ops.qdiff.groupnorm_silu_quantize(
        x, groups, weight, bias, eps, affine, bits, silu, x2, pre_add, norm_scale, norm_shift, channel_inverse,
        upsample, padding, storage, backend,
    )  # fmt: skip


def _groupnorm_silu_quantize(
    x, groups, weight, bias, eps, quantization, bits, silu, x2, pre_add, norm_scale, norm_shift, channel_inverse,
    upsample, padding, storage, backend,
):  # fmt: skip
    run = dispatch.resolve("groupnorm_silu_quantize", x.device, backend)
    affine = _affine(quantization, "groupnorm_silu_quantize", backend)
    y = run(
        x, groups, weight, bias, eps, *affine, bits, silu=silu, x2=x2, pre_add=pre_add, norm_scale=norm_scale,
        norm_shift=norm_shift, channel_inverse=channel_inverse, upsample=upsample, padding=tuple(padding),
        storage=storage,
    )  # fmt: skip
    return y if quantization is not None else y.to(x.dtype)


def _groupnorm_silu_quantize_shape(
    x, groups, weight, bias, eps, quantization, bits, silu, x2, pre_add, norm_scale, norm_shift, channel_inverse,
    upsample, padding, storage, backend,
):  # fmt: skip
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    return _image(x, channels, _enlarged(x, upsample, padding), x.dtype if quantization is None else storage)


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
    backend: str | None = None,
) -> Tensor:
    """`ops.layernorm_quantize` as ``torch.ops.qdiff.layernorm_quantize``; unquantised in x's dtype."""
    affine = _optional(scale, zero_point, x.device)
    return torch.ops.qdiff.layernorm_quantize(x, weight, bias, eps, affine, bits, storage, backend)


def _layernorm_quantize(x, weight, bias, eps, quantization, bits, storage, backend):
    run = dispatch.resolve("layernorm_quantize", x.device, backend)
    y = run(x, weight, bias, eps, *_affine(quantization, "layernorm_quantize", backend), bits, storage=storage)
    return y if quantization is not None else y.to(x.dtype)


def _layernorm_quantize_shape(x, weight, bias, eps, quantization, bits, storage, backend):
    return x.new_empty(x.shape, dtype=x.dtype if quantization is None else storage)


def int_gemm(
    q: Tensor,
    weight: GemmWeight,
    scale: float | Tensor | None,
    zero_point: int | None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    output_scale: Tensor | None = None,
    geglu: bool = False,
    output: Output | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """`ops.int_gemm` as ``torch.ops.qdiff.int_gemm``."""
    affine = _optional(scale, zero_point, q.device)
    written = None if output is None else _optional(output[0], output[1], q.device)
    return torch.ops.qdiff.int_gemm(
        q, weight.values, weight.scale, weight.sums, weight.bits, affine, bias, residual, output_scale, geglu, written,
        8 if output is None else output[2], out_dtype, backend,
    )  # fmt: skip


def _int_gemm(
    q, values, weight_scale, sums, weight_bits, quantization, bias, residual, output_scale, geglu, output, output_bits,
    out_dtype, backend,
):  # fmt: skip
    prepared = _prepared(values, weight_scale, sums, weight_bits)
    weight = GemmWeight(values, weight_scale, sums, weight_bits, prepared)
    return ops.int_gemm(
        q, weight, *_affine(quantization, "int_gemm", backend), bias, residual=residual, output_scale=output_scale,
        geglu=geglu, output=_output(output, output_bits, "int_gemm", backend), out_dtype=out_dtype, backend=backend,
    )  # fmt: skip


def _int_gemm_shape(
    q, values, weight_scale, sums, weight_bits, quantization, bias, residual, output_scale, geglu, output, output_bits,
    out_dtype, backend,
):  # fmt: skip
    features = values.shape[0] // 2 if geglu else values.shape[0]
    return q.new_empty((*q.shape[:-1], features), dtype=out_dtype if output is None else torch.int8)


def int_conv2d(
    segments: Sequence[Segment],
    bias: Tensor | None = None,
    *,
    temb: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: Tensor | None = None,
    output: Output | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """`ops.int_conv2d` as ``torch.ops.qdiff.int_conv2d``; the segments' weights walk the image alike.

    Raises:
        ValueError: no segment, or weights of different geometry.
    """
    weights = [segment.weight for segment in segments]
    geometries = [(w.stride, w.padding, w.dilation, w.groups, w.upsample) for w in weights]
    if not geometries or any(geometry != geometries[0] for geometry in geometries):
        raise ValueError(f"segments must be one or more of one geometry, got {geometries}")
    device = segments[0].q.device
    return torch.ops.qdiff.int_conv2d(
        [s.q for s in segments], [w.values for w in weights], [w.scale for w in weights], [w.sums for w in weights],
        [w.bits for w in weights], [_optional(s.scale, s.zero_point, device) for s in segments],
        [s.bits for s in segments], *geometries[0], bias, temb, residual, output_scale,
        None if output is None else _optional(output[0], output[1], device), 8 if output is None else output[2],
        out_dtype, backend,
    )  # fmt: skip


def _int_conv2d(
    q, values, weight_scales, sums, weight_bits, quantizations, bits, stride, padding, dilation, groups, upsample,
    bias, temb, residual, output_scale, output, output_bits, out_dtype, backend,
):  # fmt: skip
    segments = []
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    for i, affine in enumerate(quantizations):
        others = (weight_scales[i], sums[i], *geometry, weight_bits[i], upsample)
        weight = ConvWeight(values[i], *others, _prepared(values[i], *others))
        segments.append(Segment(q[i], weight, *_affine(affine, "int_conv2d", backend), bits[i]))
    return ops.int_conv2d(
        segments, bias, temb=temb, residual=residual, output_scale=output_scale,
        output=_output(output, output_bits, "int_conv2d", backend), out_dtype=out_dtype, backend=backend,
    )  # fmt: skip


def _int_conv2d_shape(
    q, values, weight_scales, sums, weight_bits, quantizations, bits, stride, padding, dilation, groups, upsample,
    bias, temb, residual, output_scale, output, output_bits, out_dtype, backend,
):  # fmt: skip
    weight = ConvWeight(values[0], weight_scales[0], sums[0], stride, padding, dilation, groups, 8, upsample)
    size = weight.output_size(q[0].shape[2], q[0].shape[3])
    return _image(q[0], values[0].shape[0], size, out_dtype if output is None else torch.int8)


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
    backend: str | None = None,
) -> Tensor:
    """`ops.denoise_step` as ``torch.ops.qdiff.denoise_step``."""
    return torch.ops.qdiff.denoise_step(
        x, cond, uncond, noise, constants, guidance, prediction_type, clipped, a, b, input_bias, backend
    )


def _denoise_step(
    x, cond, uncond, noise, constants, guidance, prediction_type, clipped, a, b, input_bias, backend
):  # fmt: skip
    run = dispatch.resolve("denoise_step", x.device, backend)
    return run(
        x, cond, uncond, noise, constants, guidance=guidance, prediction_type=prediction_type, clipped=clipped, a=a,
        b=b, input_bias=input_bias,
    )  # fmt: skip


def _denoise_step_shape(
    x, cond, uncond, noise, constants, guidance, prediction_type, clipped, a, b, input_bias, backend
):  # fmt: skip
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)
