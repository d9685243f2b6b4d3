"""What the integer operators work on: weights, K segments, and the checks every backend shares."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import numerics

STORAGES = (torch.int8, torch.uint8)
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "geglu")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
_T = TypeVar("_T")


@dataclass(eq=False)
class GemmWeight:
    """Weights of a linear layer, w[n, k] = scale[n] * values[n, k], or scale[n, k // (K / G)] * values[n, k]."""

    values: Tensor  # int8 [N, K]
    scale: Tensor  # float32 [N], or [N, G] with one for each of G groups along K
    sums: Tensor  # int32 like scale, sum of values over k, or over every group
    bits: int = 8  # 4 promises values in [-8, 7], which a backend may keep packed
    prepared: dict[str, Any] = field(default_factory=dict, repr=False)  # backend name -> its own form of the weights

    @property
    def scale_groups(self) -> int:
        """G: how many scales along K an output has."""
        return 1 if self.scale.dim() == 1 else self.scale.shape[1]


@dataclass(eq=False)
class ConvWeight:
    """Weights of a convolution, w[n, k, r, s] = scale[n] * values[n, k, r, s], and how it walks the image."""

    values: Tensor  # int8 [Cout, Cin / groups, R, S]
    scale: Tensor  # float32 [Cout]
    sums: Tensor  # int32 [Cout], sum of values over all taps
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, bottom, left, right
    dilation: tuple[int, int]
    groups: int
    bits: int = 8
    upsample: int = 1  # the image is read as its nearest-neighbour enlargement by this factor
    prepared: dict[str, Any] = field(default_factory=dict, repr=False)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input image of this size."""
        (_, _, r, s), (top, bottom, left, right), u = self.values.shape, self.padding, self.upsample
        return (
            numerics.conv_output_size(u * height, r, self.stride[0], top, bottom, self.dilation[0]),
            numerics.conv_output_size(u * width, s, self.stride[1], left, right, self.dilation[1]),
        )


class Segment(NamedTuple):
    """One stretch of the K axis with its own quantisation: x[n, k, ...] = scale * (q - zero_point).

    In mode A16 ``q`` is floating (the activation itself), and ``scale`` and ``zero_point`` are None.
    ``bits`` 4 promises q in [-8, 7], which a backend may use to be faster; 8 is right for every q.
    """

    q: Tensor  # int8 (q), uint8 (q + 128) or floating, [N, C, H, W]
    weight: ConvWeight
    scale: float | None = None
    zero_point: int | None = None
    bits: int = 8


Output = tuple[float, int, int]  # (scale, zero point, bits): a product's result is quantised for its only reader


class QuantizedCopy(NamedTuple):
    """An input quantised on its own: out = clamp(round_half_even(x / scale) + zero_point, lo, hi), ``bits`` wide."""

    out: Tensor  # [N, C, H, W] channels_last; int8 holds q, uint8 holds q + 128
    scale: float
    zero_point: int
    bits: int


_LOCK = threading.RLock()  # of every cache of `recent`: none of them is large, and a miss packs a layer's weights


def recent(cache: dict[Hashable, _T], key: Hashable, make: Callable[[], _T], limit: int = 2) -> _T:
    """``cache[key]``, made on first use; the ``limit`` most recently used entries stay, whatever threads ask."""
    with _LOCK:
        value = cache.pop(key) if key in cache else make()
        while len(cache) >= limit:
            del cache[next(iter(cache))]
        cache[key] = value
    return value


def pack_gemm(weight: Tensor, weight_scale: Tensor, bits: int = 8) -> GemmWeight:
    """w[n, k] = weight_scale[n] * weight[n, k], ready for `int_gemm`.

    Args:
        weight: int8 [N, K].
        weight_scale: float32 [N]; or [N, G] with a scale for each of G > 1 groups of K / G along K.
        bits: 8, or 4 for values in [-8, 7].
    """
    _check_weight(weight, weight_scale, bits, ("N", "K"))
    groups = 1 if weight_scale.dim() == 1 else weight_scale.shape[1]
    n, k = weight.shape
    sums = weight.reshape(n, groups, k // groups).sum(2, dtype=torch.int32)
    return GemmWeight(weight.contiguous(), weight_scale, sums.reshape(weight_scale.shape), bits)


def pack_conv2d(
    weight: Tensor,
    weight_scale: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    bits: int = 8,
    upsample: int = 1,
) -> ConvWeight:
    """w[n, k, r, s] = weight_scale[n] * weight[n, k, r, s], ready for `int_conv2d`.

    Args:
        weight: int8 [Cout, Cin / groups, R, S].
        weight_scale: float32 [Cout].
        stride, dilation: (vertical, horizontal).
        padding: (top, bottom, left, right); out-of-image taps count as the activation's zero point.
        groups: divides Cin and Cout.
        bits: 8, or 4 for values in [-8, 7].
        upsample: factor of nearest-neighbour upsampling through which the image is read.
    """
    _check_weight(weight, weight_scale, bits, ("Cout", "Cin / groups", "R", "S"))
    _check_integers("stride", stride, 2, 1)
    _check_integers("padding", padding, 4, 0)
    _check_integers("dilation", dilation, 2, 1)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide Cout = {weight.shape[0]}, got {groups}")
    if upsample < 1:
        raise ValueError(f"upsample must be at least 1, got {upsample}")
    sums = weight.sum((1, 2, 3), dtype=torch.int32)
    return ConvWeight(weight.contiguous(), weight_scale, sums, stride, padding, dilation, groups, bits, upsample)


def _check_integers(name: str, value: tuple[int, ...], length: int, least: int) -> None:
    if not isinstance(value, tuple) or len(value) != length or min(value) < least:
        raise ValueError(f"{name} must be a tuple of {length} integers >= {least}, got {value}")


def _check_weight(weight: Tensor, weight_scale: Tensor, bits: int, axes: tuple[str, ...]) -> None:
    if weight.dtype != torch.int8 or weight.dim() != len(axes):
        raise TypeError(f"weight must be int8 [{', '.join(axes)}], got {weight.dtype} {list(weight.shape)}")
    if weight_scale.dtype != torch.float32 or not numerics.fits_weight(weight_scale, weight):
        grouped = f", or [{weight.shape[0]}, G] with G > 1 that divides {weight.shape[1]}" if len(axes) == 2 else ""
        raise TypeError(
            f"weight_scale must be float32 [{weight.shape[0]}]{grouped}, "
            f"got {weight_scale.dtype} {list(weight_scale.shape)}"
        )
    if (taps := weight[0].numel() if len(weight) else 0) > numerics.MAX_K:
        raise ValueError(f"weight has {taps} taps per output, an int32 accumulator holds {numerics.MAX_K}")
    low, high = numerics.weight_range(bits)
    if bits == 4 and weight.numel() and not low <= int(weight.min()) <= int(weight.max()) <= high:
        raise ValueError(
            f"weight must lie in [{low}, {high}] for 4 bits, got {int(weight.min())} .. {int(weight.max())}"
        )


def check_gemm(
    q: Tensor,
    weight: GemmWeight,
    scale: float | Tensor | None,
    zero_point: int | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output_scale: Tensor | None,
    *,
    half: bool = False,
) -> None:
    """Raise TypeError or ValueError where the operands of `int_gemm` do not fit.

    half: bias, residual and time embedding may be of any floating dtype, not only float32.
    """
    if not isinstance(weight, GemmWeight):
        raise TypeError(f"weight must come from pack_gemm, got {type(weight).__name__}")
    n, k = weight.values.shape
    _check_activation(q, scale, zero_point)
    if q.dim() == 0 or q.shape[-1] != k:
        raise ValueError(f"q must be [..., {k}] for a weight [{n}, {k}], got {list(q.shape)}")
    _check_float("bias", bias, (n,), half)
    _check_float("output_scale", output_scale, (n,))
    _check_float("residual", residual, (*q.shape[:-1], n), half)


def check_finish(output: Output | None, geglu_outputs: int = 0, geglu_residual: Tensor | None = None) -> None:
    """Raise ValueError where a product cannot finish its result: its own quantisation, or GEGLU's halves."""
    if geglu_outputs % 2 or geglu_residual is not None:
        raise ValueError(f"geglu needs an even number of outputs and no residual, got {geglu_outputs} outputs")
    if output is not None and not isinstance(output[0], Tensor):  # what a device holds was checked with its table
        check_affine(*output)


def check_conv2d(
    segments: Sequence[Segment],
    bias: Tensor | None,
    temb: Tensor | None,
    residual: Tensor | None,
    output_scale: Tensor | None,
    *,
    half: bool = False,
) -> None:
    """Raise TypeError or ValueError where the operands of `int_conv2d` do not fit.

    half: bias, residual and time embedding may be of any floating dtype, not only float32.
    """
    if not segments:
        raise ValueError("segments must hold at least one Segment, got none")
    shape = None
    for q, weight, scale, zero_point, _ in segments:
        if not isinstance(weight, ConvWeight):
            raise TypeError(f"weight must come from pack_conv2d, got {type(weight).__name__}")
        _check_activation(q, scale, zero_point)
        n, k = weight.values.shape[:2]
        if q.dim() != 4 or q.shape[1] != k * weight.groups:
            raise ValueError(f"q must be [N, {k * weight.groups}, H, W], got {list(q.shape)}")
        output = (q.shape[0], n, *weight.output_size(q.shape[2], q.shape[3]))
        if min(output[2:]) < 1:
            raise ValueError(f"q {list(q.shape)} is smaller than the kernel {list(weight.values.shape)}")
        if shape not in (None, output):
            raise ValueError(f"segments must give one output shape, got {list(shape or ())} and {list(output)}")
        shape = output
    assert shape is not None
    _check_float("bias", bias, shape[1:2], half)
    _check_float("output_scale", output_scale, shape[1:2])
    _check_float("residual", residual, shape, half)
    if temb is not None and tuple(temb.shape) != (1, shape[1]):
        _check_float("temb", temb, shape[:2], half)


def _check_activation(q: Tensor, scale: float | Tensor | None, zero_point: int | None) -> None:
    if q.is_floating_point():
        return
    if q.dtype not in STORAGES:
        raise TypeError(f"q must be int8, uint8 or floating, got {q.dtype}")
    if scale is None or zero_point is None:
        raise ValueError(f"scale and zero_point are needed for an integer q, got {scale} and {zero_point}")


def _check_float(name: str, tensor: Tensor | None, shape: tuple[int, ...], half: bool = False) -> None:
    if tensor is None:
        return
    fits = tensor.dtype == torch.float32 or (half and tensor.is_floating_point())
    if not fits or tuple(tensor.shape) != tuple(shape):
        wanted = "floating" if half else "float32"
        raise ValueError(f"{name} must be {wanted} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def check_copies(inputs: Sequence[Tensor], copies: Sequence[QuantizedCopy | None], storage: torch.dtype) -> None:
    """Raise ValueError where ``copies`` does not name one output, or None, for each of the first ``inputs``."""
    if len(copies) > len(inputs):
        raise ValueError(f"copies must have an entry for x and one for x2 if given, got {len(copies)}")
    for x, copy in zip(inputs, copies, strict=False):
        if copy is None:
            continue
        check_quantize(x, copy.scale, copy.zero_point, copy.bits, 1, (0, 0, 0, 0), storage)
        placed = copy.out.shape == x.shape and copy.out.is_contiguous(memory_format=torch.channels_last)
        if not placed or copy.out.dtype != storage:
            raise ValueError(
                f"copies must be {storage} {list(x.shape)} channels_last, got {copy.out.dtype} {list(copy.out.shape)}"
            )


def check_channel_inverse(channel_inverse: Tensor | None, channels: int) -> None:
    """Raise ValueError unless the inverse factors are None or float32 [channels]."""
    _check_float("channel_inverse", channel_inverse, (channels,))


def check_quantize(
    x: Tensor,
    scale: float | None,
    zero_point: int,
    bits: int,
    upsample: int,
    padding: tuple[int, int, int, int],
    storage: torch.dtype,
) -> None:
    """Raise TypeError or ValueError where the arguments of a quantising operator are out of range."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating, got {x.dtype}")
    if storage not in STORAGES:
        raise TypeError(f"storage must be torch.int8 or torch.uint8, got {storage}")
    if upsample < 1 or len(padding) != 4 or min(padding) < 0:
        raise ValueError(f"upsample must be >= 1 and padding four integers >= 0, got {upsample} and {padding}")
    if x.dim() != 4 and (upsample != 1 or any(padding)):
        raise ValueError(f"upsample and padding need x [N, C, H, W], got {list(x.shape)}")
    if scale is not None:
        check_affine(scale, zero_point, bits)


def check_affine(scale: float, zero_point: int, bits: int) -> None:
    """Raise ValueError where a quantisation (s, z, bits) is out of range."""
    low, high = numerics.activation_range(bits)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if not low <= zero_point <= high:
        raise ValueError(f"zero_point must lie in [{low}, {high}] for {bits} bits, got {zero_point}")


def check_denoise_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor | None,
    constants: Tensor,
    prediction_type: str,
    a: Tensor | None,
    b: Tensor | None,
    input_bias: Tensor | None,
    guidance: float | None,
) -> None:
    """Raise TypeError or ValueError where the operands of `denoise_step` do not fit."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        raise ValueError("x must be floating [N, C, *spatial]")
    if cond is None:
        raise TypeError("cond must be a tensor, got None")
    for name, values in (("cond", cond), ("uncond", uncond), ("noise", noise)):
        if values is not None and not values.is_floating_point():
            raise TypeError(f"{name} must be floating, got {values.dtype}")
        if values is not None and values.shape != x.shape:
            raise ValueError(f"{name} must be {list(x.shape)} like x, got {list(values.shape)}")
    _check_float("constants", constants, (8,))
    for name, values in (("a", a), ("b", b)):
        _check_float(name, values, tuple(x.shape[1:2]))
    mapped = input_bias is not None and input_bias.dim() > 1
    _check_float("input_bias", input_bias, tuple(x.shape[1:]) if mapped else tuple(x.shape[1:2]))
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {prediction_type!r}")
    if guidance is not None and not isinstance(guidance, int | float):
        raise TypeError(f"guidance must be a number or None, got {type(guidance).__name__}")
