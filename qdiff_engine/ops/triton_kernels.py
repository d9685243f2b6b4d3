"""The Triton kernels of `qdiff_kernels` as operators: NVIDIA GPUs, or any machine in Triton's interpreter, for tests.

A quantisation (s, z) may be two Python numbers, or, in place of the scale, the float32 [3] tensor (s, 1 / s, z) on the
device that the kernels read: a captured CUDA graph then follows whatever row of the table was copied there.

Beside int8 and uint8, 4-bit activations have a third storage here: `gpu_values.PACKED`.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import numerics
from . import operands
from .gpu_values import PACKED, packed_width
from .operands import ConvWeight, GemmWeight, QuantizedCopy, Segment, recent

_NAME = "triton"
OLDEST = (8, 0)  # compute capability: asynchronous copies, and int8 matrix instructions of this form
# in the interpreter a loop's bound is int() of an array, of one element until Triton 3.7, which numpy 2.4 refuses
_SQUEEZES, _REFUSES = (3, 7), (2, 4)


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
        numpy = importlib.import_module("numpy")
        if _release(triton) < _SQUEEZES and _release(numpy) >= _REFUSES:
            return False, f"Triton {triton.__version__}'s interpreter needs numpy < 2.4, got {numpy.__version__}"
        return True, f"Triton {triton.__version__} in its interpreter (TRITON_INTERPRET=1): exact and slow, for tests"
    if not torch.cuda.is_available():
        return False, "there is no NVIDIA GPU here"
    refusal = unsupported(torch.device("cuda", torch.cuda.current_device()))
    if refusal is not None:
        return False, refusal
    remarks = ["not yet verified on hardware"]
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        remarks.append("no C compiler found (gcc, clang or CC), and Triton needs one before it first starts a kernel")
    return True, f"Triton {triton.__version__} on {torch.cuda.get_device_name()}; {'; '.join(remarks)}"


def _release(module: Any) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(map(int, module.__version__.split(".")[:2]))


def unsupported(device: torch.device) -> str | None:
    """Why the kernels cannot run on an NVIDIA GPU; None where they can."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        return f"there is no GPU number {index}: torch sees {torch.cuda.device_count()}"
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST:
        return None
    found, needed = (".".join(map(str, version)) for version in (capability, OLDEST))
    return f"{torch.cuda.get_device_name(index)} has compute capability {found}, the kernels need {needed} or newer"


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
        padding=padding, packed=storage == PACKED,
    )  # fmt: skip
    return _stored(q, storage)


def _check_scale(
    x: Tensor, scale: float | Tensor | None, zero_point: int, bits: int, upsample: int, padding: Any, storage: Any
) -> None:
    number = None if isinstance(scale, Tensor) else scale  # what the device holds was checked when the table was made
    if storage == PACKED and (bits != 4 or scale is None):
        raise ValueError(f"storage {PACKED} needs 4-bit integers, got {bits} bits and scale {scale}")
    plain = torch.int8 if storage == PACKED else storage
    operands.check_quantize(x, number, zero_point, bits, upsample, padding, plain)


def _stored(q: Tensor, storage: torch.dtype) -> Tensor:
    """What a kernel wrote, int8 or packed, in the storage that was asked for."""
    return q.view(PACKED) if storage == PACKED else numerics.stored(q, storage)


def _as_plain(q: Tensor, weight: GemmWeight | ConvWeight) -> Tensor:
    """q, or in place of packed activations of the weight's features something that the shared checks can read."""
    if not isinstance(q, Tensor) or q.dtype != PACKED or not isinstance(weight, GemmWeight | ConvWeight):
        return q
    k = weight.values.shape[1] * (weight.groups if isinstance(weight, ConvWeight) else 1)
    axis = 1 if q.dim() == 4 else -1
    if not q.dim() or q.shape[axis] != packed_width(k):
        raise ValueError(f"q must hold {k} features in {packed_width(k)} bytes, got {list(q.shape)}")
    shape = list(q.shape)
    shape[axis] = k
    return torch.empty(shape, dtype=torch.int8, device="meta")


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
    copies: Sequence[QuantizedCopy | None] = (),
    storage: torch.dtype = torch.int8,
    statistics: Sequence[Tensor] = (),
) -> Tensor:
    """q = quantize(silu(group_norm(cat(x, x2) + pre_add) * (1 + norm_scale) + norm_shift)).

    See `ops.groupnorm_silu_quantize`. ``statistics``: what the products that made x and x2 wrote.
    """
    _check_scale(x, scale, zero_point, bits, upsample, padding, storage)
    inputs = [part for part in (x, x2) if part is not None]
    operands.check_copies(inputs, copies, storage)
    for part, copy in zip(inputs, copies, strict=False):
        if copy is not None:
            copy.out.copy_(quantize(part, copy.scale, copy.zero_point, copy.bits, storage=storage))
    q = _kernels("groupnorm_silu_quantize").groupnorm_silu_quantize(
        x, groups, weight, bias, eps, _quantization(scale, zero_point, x.device), bits, silu=silu, x2=x2,
        pre_add=pre_add, norm_scale=norm_scale, norm_shift=norm_shift, channel_inverse=channel_inverse,
        upsample=upsample, padding=padding, packed=storage == PACKED, statistics=_joined(statistics),
    )  # fmt: skip
    return q if scale is None else _stored(q, storage)


def _joined(statistics: Sequence[Tensor]) -> Tensor | None:
    """Those of a skip concatenation: chunks depend on the image's size alone."""
    return torch.cat(list(statistics), -1) if len(statistics) > 1 else next(iter(statistics), None)


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
    q = _kernels("layernorm_quantize").layernorm_quantize(
        x, weight, bias, eps, quantization, bits, packed=storage == PACKED
    )
    return q if scale is None else _stored(q, storage)


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
    geglu: bool = False,
    output: operands.Output | None = None,
    out_dtype: torch.dtype = torch.float32,
    storage: torch.dtype = torch.int8,
    statistics: Tensor | None = None,
) -> Tensor:
    """y[m, n] = s s_w[n] o[n] (acc[m, n] - z wsum[n]) + bias[n] + residual[m, n]; see `ops.int_gemm`.

    storage: of the result that ``output`` quantises, int8 or `PACKED`.
    statistics: from `ops.statistics_for`, written for the GroupNorm that reads the result next.
    """
    operands.check_gemm(_as_plain(q, weight), weight, scale, zero_point, bias, residual, output_scale, half=True)
    packed = _packed_matrix(weight)
    if output_scale is not None:
        packed = packed._replace(scale=packed.scale * output_scale)
    y = _kernels("int_gemm").int_gemm(
        _signed(q), packed, _quantization(scale, zero_point, q.device), bias, residual=residual, geglu=geglu,
        statistics=statistics, **_written(output, out_dtype, storage, q.device),
    )  # fmt: skip
    return y if output is None else _stored(y, storage)


def _written(
    output: operands.Output | None, out_dtype: torch.dtype, storage: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """How a product's kernel writes its result: in ``out_dtype``, or quantised."""
    if output is None:
        return {"out_dtype": out_dtype}
    scale, zero_point, bits = output
    quantization = _quantization(scale, zero_point, device)
    return {"out_quantization": quantization, "out_bits": bits, "out_packed": storage == PACKED}


def _signed(q: Tensor) -> Tensor:
    """Floating activations, int8, or the bytes of packed ones."""
    if q.dtype == PACKED:
        return q.view(torch.uint8)
    return q if q.is_floating_point() else numerics.signed(q)


def int_conv2d(
    segments: Sequence[Segment],
    bias: Tensor | None = None,
    *,
    temb: Tensor | None = None,
    residual: Tensor | None = None,
    reuse_residual: bool = False,
    output_scale: Tensor | None = None,
    output: operands.Output | None = None,
    out_dtype: torch.dtype = torch.float32,
    storage: torch.dtype = torch.int8,
    statistics: Tensor | None = None,
) -> Tensor:
    """y = sum over segments of s s_w (acc - z wsum[class]) + bias + temb + residual; see `ops.int_conv2d`.

    storage, statistics: as for `int_gemm`; neither `PACKED` nor statistics with groups.
    """
    plain = [s._replace(q=_as_plain(s.q, s.weight)) for s in segments]
    operands.check_conv2d(plain, bias, temb, residual, output_scale, half=True)
    if segments[-1].weight.groups > 1 and (storage == PACKED or statistics is not None):
        raise ValueError(f"storage {PACKED} and statistics need groups=1, got {segments[-1].weight.groups}")
    y, terms, launches = None, _Terms(output_scale, bias, temb, residual), _launches(segments)
    final = _written(output, out_dtype, storage, segments[0].q.device)
    final = final if statistics is None else {**final, "statistics": statistics}
    for i, part in enumerate(launches):
        written = final if i == len(launches) - 1 else {"out_dtype": torch.float32}
        y = _grouped(part[0], terms, written) if part[0].weight.groups > 1 else _convolve(part, terms, written)
        terms = _Terms(output_scale, residual=y)
    assert y is not None
    return y if output is None else _stored(y, storage)


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


def _grouped(segment: Segment, terms: _Terms, written: dict[str, Any]) -> Tensor:
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
        _convolve([segment._replace(q=q, weight=part)], _Terms(*share), written)
        for q, part, share in zip(images, parts, zip(*shares, strict=True), strict=True)
    ]
    return torch.cat(outputs, 1).contiguous(memory_format=torch.channels_last)


def _convolve(segments: Sequence[Segment], terms: _Terms, written: dict[str, Any]) -> Tensor:
    module, weight = _kernels("int_conv2d"), segments[0].weight
    height, width = segments[0].q.shape[2:]
    geometry = module.Geometry(
        tuple(weight.values.shape[2:]), weight.stride, weight.padding, weight.dilation, weight.upsample
    )
    parts, class_index = [], None
    for q, weight, scale, zero_point, _ in segments:
        packed, class_index = _packed(weight, height, width)
        if terms.output_scale is not None:
            packed = packed._replace(scale=packed.scale * terms.output_scale)
        parts.append(module.Segment(_signed(q), packed, _quantization(scale, zero_point, q.device)))
    return module.int_conv2d(
        parts, geometry, class_index, terms.bias, temb=terms.temb, residual=terms.residual, **written
    )


def keep_packed(weight: GemmWeight | ConvWeight) -> None:
    """Pack a weight now, and forget its plain integers: on the device they are there once.

    For weights that nobody else holds, and that only these kernels multiply by. A grouped convolution packs later.
    """
    if isinstance(weight, ConvWeight):
        if weight.groups > 1:
            return
        _packed_filter(weight)
    else:
        _packed_matrix(weight)
    weight.values = weight.values.to("meta")  # its shape is still asked for


def _packed_matrix(weight: GemmWeight) -> Any:
    """The kernel's weight, on the device of the plain one."""
    if _NAME not in weight.prepared:
        weight.prepared[_NAME] = _kernels("packing").pack(weight.values, weight.scale, weight.bits)
    return weight.prepared[_NAME]


class _Filter(NamedTuple):
    """What the kernels need of a convolution's weight: its packed integers, and their sums over each tap."""

    packed: Any  # KernelWeight
    taps: Tensor  # int32 [Cout, 1, R, S] on the host, sums over the input channels
    by_size: dict[Any, tuple[Tensor, Tensor]]  # image size -> (sums by border class, class of every pixel)


def _packed_filter(weight: ConvWeight) -> _Filter:
    if _NAME not in weight.prepared:
        ordered = _kernels("int_conv2d").pack_order(weight.values)
        packed = _kernels("packing").pack(ordered, weight.scale, weight.bits)
        taps = weight.values.sum(1, keepdim=True, dtype=torch.int32).cpu()
        weight.prepared[_NAME] = _Filter(packed, taps, {})
    return weight.prepared[_NAME]


def _packed(weight: ConvWeight, height: int, width: int) -> tuple[Any, Tensor]:
    """The kernel's weight and the border classes of an image size, on one device."""
    packed, taps, by_size = _packed_filter(weight)

    def classes() -> tuple[Tensor, Tensor]:
        image = (weight.upsample * height, weight.upsample * width)
        found = numerics.border_classes(taps, image, weight.stride, weight.padding, weight.dilation)
        sums = found.sums * (16 if weight.bits == 4 else 1)  # the kernel sees 4-bit values 16 times as large
        index = found.index.flatten().to(torch.int32)
        return sums.to(packed.values.device), index.to(packed.values.device)

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
    """x' = cx x + c0 x0 + ce e' + s' z + B, e' = a[c] e + b[c]; see `ops.denoise_step`."""
    operands.check_denoise_step(x, cond, uncond, noise, constants, prediction_type, a, b, input_bias, guidance)
    return _kernels("denoise_step").denoise_step(
        x, cond, uncond, noise, constants, guidance=guidance, prediction_type=prediction_type, clipped=clipped, a=a,
        b=b, input_bias=input_bias,
    )  # fmt: skip
