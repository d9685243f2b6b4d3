"""Integer products and convolutions by the C++ kernels of `qdiff_engine._C`, for weights packed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import numerics
from . import extension
from .extension import channels_last, check_quantizer, empty_channels_last, floats, integers, pointer, required


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
    kernels, rows, columns = extension.kernels(), weight.shape[0] // groups, weight.numel() // weight.shape[0]
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
    q = integers("q", q).contiguous()
    packed = weight if isinstance(weight, PackedGemm) else pack_gemm(weight)
    channels, features = packed.shape
    if q.dim() == 0 or q.shape[-1] != features:
        raise ValueError(f"q must be [..., {features}] for weight {[channels, features]}, got {list(q.shape)}")
    check_quantizer(scale, zero_point, 8, torch.int8)
    weight_scale = required("weight_scale", weight_scale, (channels,))
    bias = floats("bias", bias, (channels,))
    shape = (*q.shape[:-1], channels)
    residual = floats("residual", residual, shape)
    out = torch.empty(shape, dtype=torch.int32 if accumulators else torch.float32)
    epilogue = (
        zero_point, scale, weight_scale.data_ptr(), packed.sums.data_ptr(), 0, pointer(bias), 0, pointer(residual),
    )  # fmt: skip
    extension.kernels().int_gemm(
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
    q = integers("q", q)
    packed = weight if isinstance(weight, PackedConv2d) else pack_conv2d(weight, groups)
    if packed.groups != groups:
        raise ValueError(f"groups must be {packed.groups}, as the weight was packed, got {groups}")
    channels, group_channels, kernel_h, kernel_w = packed.weight.shape
    if q.dim() != 4 or q.shape[1] != group_channels * groups:
        raise ValueError(f"q must be [B, {group_channels * groups}, H, W], got {list(q.shape)}")
    check_quantizer(scale, zero_point, 8, torch.int8)
    strides, dilations, sides = _pair("stride", stride), _pair("dilation", dilation), _sides(padding)
    batch, in_channels, height, width = q.shape
    out_h = numerics.conv_output_size(height, kernel_h, strides[0], sides[0], sides[1], dilations[0])
    out_w = numerics.conv_output_size(width, kernel_w, strides[1], sides[2], sides[3], dilations[1])
    if out_h < 1 or out_w < 1:
        raise ValueError(f"the {kernel_h}x{kernel_w} kernel does not fit into the padded image {[height, width]}")
    shape = (batch, channels, out_h, out_w)
    weight_scale = required("weight_scale", weight_scale, (channels,))
    bias, temb = floats("bias", bias, (channels,)), floats("temb", temb, (batch, channels))
    residual = _match_layout("residual", residual, shape)

    q = channels_last(q)
    out = empty_channels_last(shape, torch.int32 if accumulators else torch.float32)
    index, sums = packed.border_classes((height, width), strides, sides, dilations)
    epilogue = (
        zero_point, scale, weight_scale.data_ptr(), sums.data_ptr(), index.data_ptr(), pointer(bias),
        pointer(temb), pointer(residual),
    )  # fmt: skip
    extension.kernels().int_conv2d(
        q.data_ptr(), q.dtype == torch.uint8, packed.panels.data_ptr(), (batch, height, width, in_channels),
        (channels, groups, kernel_h, kernel_w), (*strides, sides[0], sides[2], *dilations), (out_h, out_w),
        out.data_ptr(), accumulators, epilogue,
    )  # fmt: skip
    return out


def _match_layout(name: str, x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """An optional float32 [N, C, H, W] of the given shape with its channels innermost in memory."""
    x = floats(name, x)
    if x is None:
        return None
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    return channels_last(x)
