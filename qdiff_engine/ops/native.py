"""Quantisers, norms and attention by the C++ kernels of `qdiff_engine._C`: float32 in, channels innermost, CPU only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import extension, operands
from .extension import (
    available,
    channels_last,
    check_placement,
    check_quantizer,
    empty_channels_last,
    floats,
    pointer,
    required,
)
from .operands import QuantizedCopy

__all__ = ["attention", "available", "groupnorm_silu_quantize", "layernorm_quantize", "quantize"]

ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "geglu")  # the order of Activation in csrc/kernels.h
_NO_PADDING = (0, 0, 0, 0)


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
    x = required("x", x)
    check_quantizer(scale, zero_point, bits, storage)
    check_placement(x.dim(), upsample, padding)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension")
    channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    if activation == "geglu":
        if channels % 2:
            raise ValueError(f"x must have an even number of channels for geglu, got {channels}")
        channels //= 2
    channel_inverse = floats("channel_inverse", channel_inverse, (channels,))

    if x.dim() == 4:
        x = channels_last(x)
        batch, _, height, width = x.shape
        top, bottom, left, right = padding
        shape = (batch, channels, height * upsample + top + bottom, width * upsample + left + right)
        out = torch.empty(shape, dtype=storage, memory_format=torch.channels_last)
    else:
        x = x.contiguous()
        out = torch.empty((*x.shape[:-1], channels), dtype=storage)
        batch, height, width = 1, 1, out.numel() // max(1, channels)
    if x.numel():
        extension.kernels().quantize(
            x.data_ptr(), out.data_ptr(), batch, height, width, channels, scale, zero_point, bits,
            pointer(channel_inverse), ACTIVATIONS.index(activation), upsample, padding, storage == torch.uint8,
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
    x, x2 = required("x", x), floats("x2", x2)
    if x.dim() < 3:
        raise ValueError(f"x must be [N, C, *spatial] with at least 3 dimensions, got {list(x.shape)}")
    if x2 is not None and (x2.dim() != x.dim() or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:]):
        raise ValueError(f"x2 must match x except in channels, got {list(x2.shape)} beside {list(x.shape)}")
    batch, c1, c2 = x.shape[0], x.shape[1], 0 if x2 is None else x2.shape[1]
    channels = c1 + c2
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels, got {groups}")
    check_quantizer(1.0 if scale is None else scale, zero_point, bits, storage)
    check_placement(x.dim(), upsample, padding)
    weight, bias = floats("weight", weight, (channels,)), floats("bias", bias, (channels,))
    pre_add = floats("pre_add", pre_add, (batch, channels))
    norm_scale = floats("norm_scale", norm_scale, (batch, channels))
    norm_shift = floats("norm_shift", norm_shift, (batch, channels))
    channel_inverse = floats("channel_inverse", channel_inverse, (channels,))

    operands.check_copies([part for part in (x, x2) if part is not None], copies, storage)

    x = channels_last(x)
    x2 = None if x2 is None or c2 == 0 else channels_last(x2)
    spatial = list(x.shape[2:])
    height, width = spatial if len(spatial) == 2 else (1, x.numel() // max(1, batch * c1))
    if x.dim() == 4:
        spatial = [height * upsample + padding[0] + padding[1], width * upsample + padding[2] + padding[3]]
    out = empty_channels_last([batch, channels, *spatial], torch.float32 if scale is None else storage)
    if x.numel():
        address = out.data_ptr()
        extension.kernels().groupnorm_silu_quantize(
            x.data_ptr(), pointer(x2), batch, height, width, c1, c2, groups, eps, pointer(pre_add),
            pointer(weight), pointer(bias), pointer(norm_scale), pointer(norm_shift), silu,
            address if scale is None else 0, 0 if scale is None else address, 1.0 if scale is None else scale,
            pointer(channel_inverse), zero_point, bits, upsample, padding, storage == torch.uint8,
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
    x = required("x", x).contiguous()
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have features along its last axis, got {list(x.shape)}")
    check_quantizer(1.0 if scale is None else scale, zero_point, bits, storage)
    features = x.shape[-1]
    weight, bias = floats("weight", weight, (features,)), floats("bias", bias, (features,))
    out = torch.empty(x.shape, dtype=torch.float32 if scale is None else storage)
    address = out.data_ptr()
    if x.numel():
        extension.kernels().layernorm_quantize(
            x.data_ptr(), x.numel() // features, features, pointer(weight), pointer(bias), eps,
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
    check_quantizer(*(output or (1.0, 0, 8)), storage)
    out = torch.empty(batch, queries, heads, dim, dtype=torch.float32 if output is None else storage)
    address = out.data_ptr()
    extension.kernels().attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), address if output is None else 0,
        (0, 1.0, 0, 8) if output is None else (address, *output), batch, heads, queries, k.shape[2], dim,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], dim**-0.5 if scale is None else scale, storage == torch.uint8,
    )  # fmt: skip
    return out.transpose(1, 2)
