"""The C++ kernels of `qdiff_engine._C` over torch tensors: float32 in and out, channels innermost, CPU only.

Every function checks its arguments, brings them into the layout the kernels read, allocates the output and calls the
kernel. The extension is imported on first use, after torch, whose OpenMP threads it shares.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qdiff_engine import numerics

from . import operands
from .operands import QuantizedCopy

ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "geglu")  # the order of Activation in csrc/kernels.h
_NO_PADDING = (0, 0, 0, 0)
_extension: Any = None


def available() -> tuple[bool, str]:
    """Whether the extension can be imported, and what it runs on or why not."""
    try:
        kernels = _kernels()
    except ImportError as error:
        return False, f"qdiff_engine._C cannot be imported ({error}); reinstall with a C++17 compiler to build it"
    features = [name for name, present in kernels.cpu_features().items() if present]
    return True, f"compiled C++ kernels; this processor has {', '.join(features) or 'no vector extension they use'}"


def cpu_features() -> dict[str, bool]:
    """Instruction sets this processor offers: avx2, avx512, avx512_vnni, amx_int8, dotprod."""
    return _kernels().cpu_features()


_MALLOC_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@functools.cache
def keep_freed_memory() -> bool:
    """Makes the C library of this process reuse freed memory, and says whether it does.

    Otherwise glibc returns every activation of some megabytes to the kernel, and the next layer's result is paged in
    again, one page fault after another. Left alone where an environment variable already says what malloc shall do.
    """
    if any(name in os.environ for name in _MALLOC_SETTINGS) or not available()[0]:
        return False
    return _kernels().keep_freed_memory()


def _kernels() -> Any:
    global _extension
    if _extension is None:
        _extension = importlib.import_module("qdiff_engine._C")
    torch.get_num_threads()  # gives a new Python thread torch's thread count instead of OpenMP's own default
    return _extension


def _floats(name: str, x: Tensor | None, shape: tuple[int, ...] | None = None) -> Tensor | None:
    """Checks an optional float32 CPU tensor, of the given shape if there is one; returned contiguous then."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        raise TypeError(
            f"{name} must be a float32 tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got {x.device}")
    if shape is None:
        return x
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    return x.contiguous()


def _required(name: str, x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    checked = _floats(name, x, shape)
    if checked is None:
        raise TypeError(f"{name} must be a float32 tensor, got None")
    return checked


def _integers(name: str, q: Tensor) -> Tensor:
    if not isinstance(q, Tensor) or q.dtype not in (torch.int8, torch.uint8):
        found = q.dtype if isinstance(q, Tensor) else type(q).__name__
        raise TypeError(f"{name} must be an int8 or uint8 (q + 128) tensor, got {found}")
    if q.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got {q.device}")
    return q


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _check_quantizer(scale: float, zero_point: int, bits: int, storage: torch.dtype) -> None:
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    low, high = numerics.activation_range(bits)
    if not low <= zero_point <= high:
        raise ValueError(f"zero_point must be in [{low}, {high}] for {bits} bits, got {zero_point}")
    if storage not in (torch.int8, torch.uint8):
        raise TypeError(f"storage must be torch.int8 or torch.uint8, got {storage}")


def _check_placement(dims: int, upsample: int, padding: Sequence[int]) -> None:
    if upsample < 1:
        raise ValueError(f"upsample must be at least 1, got {upsample}")
    if len(padding) != 4 or min(padding) < 0:
        raise ValueError(f"padding must be (top, bottom, left, right), none negative, got {padding}")
    if dims != 4 and (upsample != 1 or any(padding)):
        raise ValueError(f"upsample and padding need a 4-D x [N, C, H, W], got {dims} dimensions")


def _channels_last(x: Tensor) -> Tensor:
    """[N, C, *spatial] as itself, copied where its memory does not have the channels innermost."""
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _empty_channels_last(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if len(shape) == 4:
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    return torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype).movedim(-1, 1)


def quantize(
    x: Tensor,
    scale: float,
    zero_point: int,
    bits: int,
    *,
    activation: str = "none",
    channel_inverse: Tensor | None = None,
    upsample: int = 1,
    padding: Sequence[int] = _NO_PADDING,
    storage: torch.dtype = torch.int8,
) -> Tensor:
    """q[..., k] = clamp(round_half_even(f(x[..., k]) * inv) + z), inv = float32(float32(1 / s) * channel_inverse[k]).

    Args:
        x: float32 [N, C, H, W], channels along axis 1, or any other rank with the features along the last axis.
        activation: f, one of `ACTIVATIONS`; geglu halves the channels, f(value, gate) = value * gelu(gate).
        channel_inverse: float32 [C], C counted after the activation.
        upsample, padding: nearest upsampling, then (top, bottom, left, right) filled with z; 4-D only.
        storage: int8 holds q, uint8 holds q + 128.

    Returns:
        [N, C, H', W'] in channels_last memory, or contiguous with x's shape.
    """
    x = _required("x", x)
    _check_quantizer(scale, zero_point, bits, storage)
    _check_placement(x.dim(), upsample, padding)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension")
    channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    if activation == "geglu":
        if channels % 2:
            raise ValueError(f"x must have an even number of channels for geglu, got {channels}")
        channels //= 2
    channel_inverse = _floats("channel_inverse", channel_inverse, (channels,))

    if x.dim() == 4:
        x = _channels_last(x)
        batch, _, height, width = x.shape
        top, bottom, left, right = padding
        shape = (batch, channels, height * upsample + top + bottom, width * upsample + left + right)
        out = torch.empty(shape, dtype=storage, memory_format=torch.channels_last)
    else:
        x = x.contiguous()
        out = torch.empty((*x.shape[:-1], channels), dtype=storage)
        batch, height, width = 1, 1, out.numel() // max(1, channels)
    if x.numel():
        _kernels().quantize(
            x.data_ptr(), out.data_ptr(), batch, height, width, channels, scale, zero_point, bits,
            _address(channel_inverse), ACTIVATIONS.index(activation), upsample, padding, storage == torch.uint8,
        )  # fmt: skip
    return out


def groupnorm_silu_quantize(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float | None,
    zero_point: int = 0,
    bits: int = 8,
    *,
    silu: bool = True,
    x2: Tensor | None = None,
    pre_add: Tensor | None = None,
    norm_scale: Tensor | None = None,
    norm_shift: Tensor | None = None,
    channel_inverse: Tensor | None = None,
    upsample: int = 1,
    padding: Sequence[int] = _NO_PADDING,
    copies: Sequence[QuantizedCopy | None] = (),
    storage: torch.dtype = torch.int8,
) -> Tensor:
    """q = quantise(silu(((h - mean_g) / sqrt(var_g + eps) * weight + bias) * (1 + norm_scale) + norm_shift)),
    h = cat(x, x2) + pre_add; quantised with inv = float32(float32(1 / s) * channel_inverse[c]).

    Args:
        x, x2: float32 [N, C1, *spatial] and optionally [N, C2, *spatial]; C = C1 + C2 is divided into ``groups``,
            which may straddle the two.
        weight, bias: float32 [C] or None.
        scale: activation scale, or None for the float32 value before quantisation (padding is 0 then).
        pre_add, norm_scale, norm_shift: float32 [N, C] or None.
        channel_inverse: float32 [C] or None; a float32 result is multiplied with it.
        upsample, padding, storage: as in `quantize`.
        copies: outputs for x and x2 quantised on their own as well; 4-D only.

    Returns:
        [N, C, *spatial'] with the channels innermost in memory.
    """
    x, x2 = _required("x", x), _floats("x2", x2)
    if x.dim() < 3:
        raise ValueError(f"x must be [N, C, *spatial] with at least 3 dimensions, got {list(x.shape)}")
    if x2 is not None and (x2.dim() != x.dim() or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:]):
        raise ValueError(f"x2 must match x except in channels, got {list(x2.shape)} beside {list(x.shape)}")
    batch, c1, c2 = x.shape[0], x.shape[1], 0 if x2 is None else x2.shape[1]
    channels = c1 + c2
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels, got {groups}")
    _check_quantizer(1.0 if scale is None else scale, zero_point, bits, storage)
    _check_placement(x.dim(), upsample, padding)
    weight, bias = _floats("weight", weight, (channels,)), _floats("bias", bias, (channels,))
    pre_add = _floats("pre_add", pre_add, (batch, channels))
    norm_scale = _floats("norm_scale", norm_scale, (batch, channels))
    norm_shift = _floats("norm_shift", norm_shift, (batch, channels))
    channel_inverse = _floats("channel_inverse", channel_inverse, (channels,))

    operands.check_copies([part for part in (x, x2) if part is not None], copies, storage)

    x = _channels_last(x)
    x2 = None if x2 is None or c2 == 0 else _channels_last(x2)
    spatial = list(x.shape[2:])
    height, width = spatial if len(spatial) == 2 else (1, x.numel() // max(1, batch * c1))
    if x.dim() == 4:
        spatial = [height * upsample + padding[0] + padding[1], width * upsample + padding[2] + padding[3]]
    out = _empty_channels_last([batch, channels, *spatial], torch.float32 if scale is None else storage)
    if x.numel():
        address = out.data_ptr()
        _kernels().groupnorm_silu_quantize(
            x.data_ptr(), _address(x2), batch, height, width, c1, c2, groups, eps, _address(pre_add),
            _address(weight), _address(bias), _address(norm_scale), _address(norm_shift), silu,
            address if scale is None else 0, 0 if scale is None else address, 1.0 if scale is None else scale,
            _address(channel_inverse), zero_point, bits, upsample, padding, storage == torch.uint8,
            [_copy(copies, 0), _copy(copies, 1)],
        )  # fmt: skip
    return out


def _copy(copies: Sequence[QuantizedCopy | None], index: int) -> tuple[int, float, int, int]:
    """(address, scale, zero point, bits) of one of ``copies``; address 0 for none."""
    copy = copies[index] if index < len(copies) else None
    return (0, 1.0, 0, 8) if copy is None else (copy.out.data_ptr(), copy.scale, copy.zero_point, copy.bits)


def layernorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float | None,
    zero_point: int = 0,
    bits: int = 8,
    *,
    storage: torch.dtype = torch.int8,
) -> Tensor:
    """q[m, k] = quantise((x[m, k] - mean_m) / sqrt(var_m + eps) * weight[k] + bias[k]); scale None gives float32.

    Args:
        x: float32 [..., K].
        weight, bias: float32 [K] or None.
        scale, zero_point, bits, storage: as in `quantize`.
    """
    x = _required("x", x).contiguous()
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have features along its last axis, got {list(x.shape)}")
    _check_quantizer(1.0 if scale is None else scale, zero_point, bits, storage)
    features = x.shape[-1]
    weight, bias = _floats("weight", weight, (features,)), _floats("bias", bias, (features,))
    out = torch.empty(x.shape, dtype=torch.float32 if scale is None else storage)
    address = out.data_ptr()
    if x.numel():
        _kernels().layernorm_quantize(
            x.data_ptr(), x.numel() // features, features, _address(weight), _address(bias), eps,
            address if scale is None else 0, 0 if scale is None else address, 1.0 if scale is None else scale,
            zero_point, bits, storage == torch.uint8,
        )  # fmt: skip
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    output: tuple[float, int, int] | None = None,
    storage: torch.dtype = torch.int8,
) -> Tensor:
    """y[b, h, l] = sum_s softmax_s(scale q[b, h, l] . k[b, h, s]) v[b, h, s], in float32 or quantised.

    Args:
        q: float32 [B, H, L, D]; k, v: float32 [B, H, S, D]; any strides, adjacent channels are fastest.
        scale: 1 / sqrt(D) by default.
        output: (scale, zero point, bits) of the quantised result, or None for float32.
        storage: as in `quantize`.

    Returns:
        [B, H, L, D], a view of memory laid out [B, L, H, D]: the heads of a token are adjacent.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != torch.float32 or x.dim() != 4:
            raise TypeError(f"{name} must be float32 [B, H, L, D], got {x.dtype} {list(x.shape)}")
    batch, heads, queries, dim = q.shape
    expected = (batch, heads, k.shape[2], dim)
    if tuple(k.shape) != expected or tuple(v.shape) != expected or 0 in (*q.shape, k.shape[2]):
        raise ValueError(f"k and v must be [{batch}, {heads}, S, {dim}], got {list(k.shape)} and {list(v.shape)}")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    _check_quantizer(*(output or (1.0, 0, 8)), storage)
    out = torch.empty(batch, queries, heads, dim, dtype=torch.float32 if output is None else storage)
    address = out.data_ptr()
    _kernels().attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), address if output is None else 0,
        (0, 1.0, 0, 8) if output is None else (address, *output), batch, heads, queries, k.shape[2], dim,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], dim**-0.5 if scale is None else scale, storage == torch.uint8,
    )  # fmt: skip
    return out.transpose(1, 2)


@dataclass(frozen=True)
class PackedGemm:
    """A weight int8 [N, K] as the kernels read it."""

    shape: tuple[int, int]
    panels: Tensor  # int16, see csrc/int_dot.h
    sums: Tensor  # int32 [1, N]


@dataclass(frozen=True)
class PackedConv2d:
    """A weight int8 [Cout, Cin / groups, R, S] as the kernels read it, and its border classes by geometry."""

    weight: Tensor
    groups: int
    panels: Tensor  # int16, see csrc/int_dot.h
    borders: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def border_classes(self, *geometry: tuple) -> tuple[Tensor, Tensor]:
        """int32 class index [OH, OW] and weight sums [classes, Cout] for (image, stride, padding, dilation)."""
        found = self.borders.get(geometry)
        if found is None:
            classes = numerics.border_classes(self.weight, *geometry)
            found = classes.index.to(torch.int32).contiguous(), classes.sums.contiguous()
            self.borders[geometry] = found
        return found


def _check_weight(weight: Tensor, dims: int, layout: str) -> None:
    if not isinstance(weight, Tensor) or weight.dtype != torch.int8:
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be an int8 tensor, got {found}")
    if weight.device.type != "cpu":
        raise ValueError(f"weight must be on the CPU, got {weight.device}")
    if weight.dim() != dims or not weight.numel():
        raise ValueError(f"weight must be {layout}, got {list(weight.shape)}")
    if weight.numel() // weight.shape[0] > numerics.MAX_K:
        raise ValueError(f"weight sums more than {numerics.MAX_K} products per output: {list(weight.shape)}")


def _pack(weight: Tensor, groups: int) -> Tensor:
    kernels, rows, columns = _kernels(), weight.shape[0] // groups, weight.numel() // weight.shape[0]
    panels = torch.empty(groups * kernels.packed_size(rows, columns), dtype=torch.int16)
    kernels.pack_panels(weight.data_ptr(), panels.data_ptr(), groups, rows, columns)
    return panels


def pack_gemm(weight: Tensor) -> PackedGemm:
    """Packs an int8 weight [N, K] once for many calls of `int_gemm`."""
    _check_weight(weight, 2, "[N, K]")
    sums = weight.sum(1, dtype=torch.int32).unsqueeze(0)
    return PackedGemm((weight.shape[0], weight.shape[1]), _pack(weight.contiguous(), 1), sums)


def pack_conv2d(weight: Tensor, groups: int = 1) -> PackedConv2d:
    """Packs an int8 weight [Cout, Cin / groups, R, S] once for many calls of `int_conv2d`."""
    _check_weight(weight, 4, "[Cout, Cin / groups, R, S]")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} output channels, got {groups}")
    return PackedConv2d(weight, groups, _pack(weight.permute(0, 2, 3, 1).contiguous(), groups))


def int_gemm(
    q: Tensor,
    weight: Tensor | PackedGemm,
    weight_scale: Tensor,
    scale: float,
    zero_point: int,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    accumulators: bool = False,
) -> Tensor:
    """y[m, n] = (sum_k q[m, k] w[n, k] - z wsum[n]) (s s_w[n]) + bias[n] + residual[m, n], exact up to the bracket.

    Args:
        q: int8 [..., K], or uint8 holding q + 128.
        weight: int8 [N, K], or packed by `pack_gemm` (a plain tensor is packed on every call).
        weight_scale: float32 [N].
        bias: float32 [N] or None. residual: float32 [..., N] or None.
        accumulators: return the int32 sums alone.
    """
    q = _integers("q", q).contiguous()
    packed = weight if isinstance(weight, PackedGemm) else pack_gemm(weight)
    channels, features = packed.shape
    if q.dim() == 0 or q.shape[-1] != features:
        raise ValueError(f"q must be [..., {features}] for weight {[channels, features]}, got {list(q.shape)}")
    _check_quantizer(scale, zero_point, 8, torch.int8)
    weight_scale = _required("weight_scale", weight_scale, (channels,))
    bias = _floats("bias", bias, (channels,))
    shape = (*q.shape[:-1], channels)
    residual = _floats("residual", residual, shape)
    out = torch.empty(shape, dtype=torch.int32 if accumulators else torch.float32)
    epilogue = (
        zero_point, scale, weight_scale.data_ptr(), packed.sums.data_ptr(), 0, _address(bias), 0, _address(residual),
    )  # fmt: skip
    _kernels().int_gemm(
        q.data_ptr(), q.dtype == torch.uint8, packed.panels.data_ptr(), q.numel() // features, features, channels,
        out.data_ptr(), accumulators, epilogue,
    )  # fmt: skip
    return out


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be a positive integer or two (vertical, horizontal), got {value}")
    return pair[0], pair[1]


def _sides(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    if len(sides) == 2:
        sides = (sides[0], sides[0], sides[1], sides[1])
    if len(sides) != 4 or min(sides) < 0:
        raise ValueError(f"padding must be one integer, two, or (top, bottom, left, right), got {padding}")
    return sides[0], sides[1], sides[2], sides[3]


def int_conv2d(
    q: Tensor,
    weight: Tensor | PackedConv2d,
    weight_scale: Tensor,
    scale: float,
    zero_point: int,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    temb: Tensor | None = None,
    residual: Tensor | None = None,
    accumulators: bool = False,
) -> Tensor:
    """y[m, n] = (acc[m, n] - z wsum[class(m), n]) (s s_w[n]) + bias[n] + temb[b, n] + residual[m, n].

    acc sums q * w over the taps inside the image; the border classes are those of `numerics.border_classes`.

    Args:
        q: int8 [B, Cin, H, W], or uint8 holding q + 128; channels_last memory is read without a copy.
        weight: int8 [Cout, Cin / groups, R, S], or packed by `pack_conv2d` (a plain tensor is packed on every call).
        weight_scale: float32 [Cout].
        padding: one integer, (vertical, horizontal) or (top, bottom, left, right).
        temb: float32 [B, Cout] or None. residual: float32 [B, Cout, OH, OW] or None.
        accumulators: return the int32 sums acc alone.
    """
    q = _integers("q", q)
    packed = weight if isinstance(weight, PackedConv2d) else pack_conv2d(weight, groups)
    if packed.groups != groups:
        raise ValueError(f"groups must be {packed.groups}, as the weight was packed, got {groups}")
    channels, group_channels, kernel_h, kernel_w = packed.weight.shape
    if q.dim() != 4 or q.shape[1] != group_channels * groups:
        raise ValueError(f"q must be [B, {group_channels * groups}, H, W], got {list(q.shape)}")
    _check_quantizer(scale, zero_point, 8, torch.int8)
    strides, dilations, sides = _pair("stride", stride), _pair("dilation", dilation), _sides(padding)
    batch, in_channels, height, width = q.shape
    out_h = numerics.conv_output_size(height, kernel_h, strides[0], sides[0], sides[1], dilations[0])
    out_w = numerics.conv_output_size(width, kernel_w, strides[1], sides[2], sides[3], dilations[1])
    if out_h < 1 or out_w < 1:
        raise ValueError(f"the {kernel_h}x{kernel_w} kernel does not fit into the padded image {[height, width]}")
    shape = (batch, channels, out_h, out_w)
    weight_scale = _required("weight_scale", weight_scale, (channels,))
    bias, temb = _floats("bias", bias, (channels,)), _floats("temb", temb, (batch, channels))
    residual = _match_layout("residual", residual, shape)

    q = _channels_last(q)
    out = _empty_channels_last(shape, torch.int32 if accumulators else torch.float32)
    index, sums = packed.border_classes((height, width), strides, sides, dilations)
    epilogue = (
        zero_point, scale, weight_scale.data_ptr(), sums.data_ptr(), index.data_ptr(), _address(bias),
        _address(temb), _address(residual),
    )  # fmt: skip
    _kernels().int_conv2d(
        q.data_ptr(), q.dtype == torch.uint8, packed.panels.data_ptr(), (batch, height, width, in_channels),
        (channels, groups, kernel_h, kernel_w), (*strides, sides[0], sides[2], *dilations), (out_h, out_w),
        out.data_ptr(), accumulators, epilogue,
    )  # fmt: skip
    return out


def _match_layout(name: str, x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """An optional float32 [N, C, H, W] of the given shape with its channels innermost in memory."""
    x = _floats(name, x)
    if x is None:
        return None
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    return _channels_last(x)


def add_(y: Tensor, residual: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
    """y[n, c, ...] += temb[n, c] + residual[n, c, ...], in place.

    Args:
        y: float32 [N, C, *spatial] with the channels innermost in memory.
        residual: float32 of y's shape or None. temb: float32 [N, C] or None.
    """
    y = _required("y", y)
    if y.dim() < 3 or not y.movedim(1, -1).is_contiguous():
        raise ValueError(f"y must be [N, C, *spatial] with channels innermost, got {list(y.shape)}, {y.stride()}")
    batch, channels = y.shape[0], y.shape[1]
    residual = _match_layout("residual", residual, tuple(y.shape))
    temb = _floats("temb", temb, (batch, channels))
    pixels = y.numel() // max(1, batch * channels)
    _kernels().add(y.data_ptr(), batch, pixels, channels, _address(residual), _address(temb))
    return y


def histogram(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """counts[clamp(floor((x - low) * bins / (high - low)), 0, bins - 1)] += 1, in float64; int64 [bins].

    Values outside [low, high] count in the end bins.
    """
    x = _required("x", x)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if not low < high or high - low == float("inf"):
        raise ValueError(f"low must be below high and both finite, got {low} and {high}")
    counts = torch.empty(bins, dtype=torch.int64)
    x = _any_order(x)
    _kernels().histogram(x.data_ptr(), x.numel(), bins, low, high, counts.data_ptr())
    return counts


def min_max(x: Tensor) -> tuple[float, float]:
    """(min x, max x); a ValueError where x is empty or holds a NaN or an infinity."""
    x = _required("x", x)
    if not x.numel():
        raise ValueError(f"x must not be empty, got {list(x.shape)}")
    x = _any_order(x)
    low, high, finite = _kernels().min_max(x.data_ptr(), x.numel())
    if not finite:
        raise ValueError(f"x of shape {list(x.shape)} holds NaN or infinite values")
    return low, high


def _any_order(x: Tensor) -> Tensor:
    """x in dense memory; in which order does not matter to a statistic over all values."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x if dense else x.contiguous()


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """uint8 [N, ceil(k / 2)], low nibble first -> int8 [N, k]; the inverse of `numerics.pack_int4`."""
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() != 2:
        found = f"{packed.dtype} {list(packed.shape)}" if isinstance(packed, Tensor) else type(packed).__name__
        raise TypeError(f"packed must be uint8 [N, {(k + 1) // 2}], got {found}")
    if packed.shape[1] != (k + 1) // 2 or packed.device.type != "cpu":
        expected = [packed.shape[0], (k + 1) // 2]
        raise ValueError(f"packed must be {expected} on the CPU, got {list(packed.shape)} on {packed.device}")
    packed = packed.contiguous()
    out = torch.empty((packed.shape[0], k), dtype=torch.int8)
    _kernels().unpack_int4(packed.data_ptr(), out.data_ptr(), packed.shape[0], k)
    return out


def run_denoise_step(
    tensors: Sequence[Tensor | None], shape: tuple[int, int, int, int], prediction: int, constants: Sequence[float]
) -> None:
    """The kernel of `native_sampler`: x, cond, uncond, noise [N, C, P], a, b [C], B [C, Q] and the output, float32.

    ``shape`` is (N, C, P, Q); Q is P or 1.
    """
    _kernels().denoise_step([_address(tensor) for tensor in tensors], shape, prediction, constants)
