"""The operators in plain PyTorch: exact integers on every device, used where nothing faster exists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import numerics
from . import operands
from .grouped import group_by_group
from .operands import ConvWeight, GemmWeight, QuantizedCopy, Segment

# float32 holds every integer up to 2^24, so any order of adding this many products of 8-bit integers is exact.
# 8-bit integers are exact in bfloat16 and TF32 too, so torch's matmul precision settings change nothing.
EXACT_TAPS = 2**24 // (128 * 128)

_ACTIVATIONS = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "geglu": lambda x: (lambda value, gate: value * F.gelu(gate))(*x.chunk(2, dim=-1)),
}


def available() -> tuple[bool, str]:
    """Always: (True, reason)."""
    return True, "plain PyTorch"


def quantize(
    x: Tensor,
    scale: float,
    zero_point: int,
    bits: int,
    *,
    activation: str = "none",
    channel_inverse: Tensor | None = None,
    upsample: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    storage: torch.dtype = torch.int8,
) -> Tensor:
    """q[..., k] = clamp(round(activation(x[..., k]) * inv_s * inv_c[k]) + z); see `ops.quantize`."""
    operands.check_quantize(x, scale, zero_point, bits, upsample, padding, storage)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    inner = channels_innermost(x) if x.dim() == 4 else x
    if activation == "geglu" and inner.shape[-1] % 2:
        raise ValueError(f"geglu needs an even number of features, got {inner.shape[-1]}")
    q = numerics.quantize(_ACTIVATIONS[activation](inner.float()), scale, zero_point, bits, channel_inverse)
    if x.dim() != 4:
        return numerics.stored(q.contiguous(), storage)
    return numerics.stored(place(channels_second(q), upsample, padding, zero_point), storage)


def groupnorm_silu_quantize(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float | None,
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
) -> Tensor:
    """q = quantize(silu(group_norm(cat(x, x2) + pre_add) * (1 + norm_scale) + norm_shift)).

    See `ops.groupnorm_silu_quantize`.
    """
    operands.check_quantize(x, scale, zero_point, bits, upsample, padding, storage)
    inputs = [part for part in (x, x2) if part is not None]
    operands.check_copies(inputs, copies, storage)
    operands.check_channel_inverse(channel_inverse, sum(part.shape[1] for part in inputs))
    for part, copy in zip(inputs, copies, strict=False):
        if copy is not None:
            copy.out.copy_(quantize(part, copy.scale, copy.zero_point, copy.bits, storage=storage))
    x = (x if x2 is None else torch.cat((x, x2), dim=1)).float()
    if x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels, got {groups}")
    per_channel = (..., *[None] * (x.dim() - 2))
    if pre_add is not None:
        x = x + pre_add[per_channel]
    y = torch.group_norm(x, groups, weight, bias, eps)
    if norm_scale is not None:
        y = y * (1 + norm_scale[per_channel])
    if norm_shift is not None:
        y = y + norm_shift[per_channel]
    inner = channels_innermost(F.silu(y) if silu else y).contiguous()
    if scale is None:
        y = inner if channel_inverse is None else inner * channel_inverse
        return place(channels_second(y), upsample, padding, 0.0)
    q = channels_second(numerics.quantize(inner, scale, zero_point, bits, channel_inverse))
    return numerics.stored(place(q, upsample, padding, zero_point), storage)


def layernorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float | None,
    zero_point: int,
    bits: int,
    *,
    storage: torch.dtype = torch.int8,
) -> Tensor:
    """q[..., k] = quantize(layer_norm(x)[..., k]); see `ops.layernorm_quantize`."""
    operands.check_quantize(x, scale, zero_point, bits, 1, (0, 0, 0, 0), storage)
    y = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    return y if scale is None else numerics.stored(numerics.quantize(y, scale, zero_point, bits), storage)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    output: tuple[float, int, int] | None = None,
    storage: torch.dtype = torch.int8,
) -> Tensor:
    """y[b, h, l] = sum_s softmax_s(scale q[b, h, l] . k[b, h, s]) v[b, h, s]; q, k, v [B, H, L or S, D]."""
    y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    if output is None:
        return y
    q = numerics.stored(numerics.quantize(y.float(), *output), storage)
    return q.transpose(1, 2).contiguous().transpose(1, 2)


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
    operands.check_gemm(q, weight, scale, zero_point, bias, residual, output_scale)
    if q.is_floating_point():
        values, scales = numerics.by_scale(weight.values, weight.scale)
        w = (values.float() * scales).flatten(1)
        y = F.linear(q.float(), w if output_scale is None else w * output_scale[:, None], bias)
        return y if residual is None else y.add_(residual)
    assert scale is not None and zero_point is not None
    weight_scale = weight.scale if output_scale is None else weight.scale * output_scale
    x = numerics.signed(q).reshape(1, -1, q.shape[-1])
    acc = _exact_sum(_chunks(x.float(), weight.values.t()[None]))[0]
    y = acc.sub_(weight.sums, alpha=zero_point).float().mul_(weight_scale * scale)
    y = y.reshape(*q.shape[:-1], len(weight.values))
    for term in (bias, residual):
        y = y if term is None else y.add_(term)
    return y


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
    operands.check_conv2d(segments, bias, temb, residual, output_scale)
    y = _convolve(segments[0], bias, output_scale)
    for segment in segments[1:]:
        y += _convolve(segment, None, output_scale)
    if temb is not None:
        y += temb[:, :, None, None]
    return y if residual is None else y.add_(residual)


def _convolve(segment: Segment, bias: Tensor | None, output_scale: Tensor | None) -> Tensor:
    """y[n, o, i, j] = s s_w[o] (acc - z wsum) + bias[o] of one segment, float32 channels_last."""
    q, weight, scale, zero_point, _ = segment
    weight_scale = weight.scale if output_scale is None else weight.scale * output_scale
    if q.is_floating_point():
        x = place(q.float(), weight.upsample, weight.padding, 0.0)
        dequantized = weight.values.float() * weight_scale[:, None, None, None]
        y = F.conv2d(x, dequantized, bias, weight.stride, 0, weight.dilation, weight.groups)
        return y.contiguous(memory_format=torch.channels_last)
    assert scale is not None and zero_point is not None
    # with the padding written out as z, every output sees all its taps and wsum is one number per channel
    x = place(numerics.signed(q), weight.upsample, weight.padding, zero_point)
    acc = _exact_sum(_taps(channels_innermost(x), weight)).transpose(0, 1).flatten(1)
    y = acc.sub_(weight.sums, alpha=zero_point).float().mul_(weight_scale * scale)
    y = y if bias is None else y.add_(bias)
    return channels_second(y.reshape(len(q), *weight.output_size(*q.shape[2:]), len(weight.values)).contiguous())


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
    """x' = cx x + c0 x0 + ce e' + s' z + B, added in the order of diffusers' schedulers; see `ops.denoise_step`."""
    operands.check_denoise_step(x, cond, uncond, noise, constants, prediction_type, a, b, input_bias, guidance)
    cx, c0, ce, sigma, signal, deviation, clip, g = constants.tolist()
    value, e = x.float(), cond.float()
    if uncond is not None:
        e = uncond.float() + (g if guidance is None else guidance) * (e - uncond.float())
    across = (-1, *[1] * (x.dim() - 2))
    e = e if a is None else e * a.reshape(across)
    e = e if b is None else e + b.reshape(across)
    y = cx * value if cx else None
    if clipped:
        if prediction_type == "epsilon":
            sample = (value - deviation * e) / signal
        elif prediction_type == "v_prediction":
            sample, e = signal * value - deviation * e, signal * e + deviation * value
        else:
            sample, e = e, (value - signal * e) / deviation
        sample = c0 * sample.clamp(-clip, clip)
        y = sample if y is None else y + sample
    if ce or y is None:
        y = ce * e if y is None else y + ce * e
    y = y if noise is None else y + sigma * noise.float()
    if input_bias is not None:
        y = y + (input_bias.reshape(across) if input_bias.dim() == 1 else input_bias)
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.to(x.dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


def _taps(x: Tensor, weight: ConvWeight) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (x [G, M, K], w [G, K, Cout / G]), one for every kernel tap: their products sum to the convolution."""
    n, height, width, _ = x.shape
    cout, k, kernel_r, kernel_s = weight.values.shape
    (sy, sx), (dy, dx), g = weight.stride, weight.dilation, weight.groups
    oh = numerics.conv_output_size(height, kernel_r, sy, 0, 0, dy)
    ow = numerics.conv_output_size(width, kernel_s, sx, 0, 0, dx)
    x = x.float()
    by_tap = weight.values.reshape(g, cout // g, k, kernel_r, kernel_s)
    for r in range(kernel_r):
        for s in range(kernel_s):
            tap = x[:, r * dy : r * dy + (oh - 1) * sy + 1 : sy, s * dx : s * dx + (ow - 1) * sx + 1 : sx]
            by_group = tap.reshape(n * oh * ow, g, k).transpose(0, 1)
            yield from _chunks(by_group, by_tap[..., r, s].transpose(1, 2))


def _chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """x [G, M, K] and w [G, K, N] cut along K into pieces of at most EXACT_TAPS."""
    for k in range(0, x.shape[-1], EXACT_TAPS):
        yield x[..., k : k + EXACT_TAPS], weight[:, k : k + EXACT_TAPS]


def _exact_sum(products: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """acc[g, m, n] = sum of a @ b over all pairs, int32, exact: float32 sums are emptied before they can round."""
    total = partial = None
    taps = 0
    for a, b in products:
        if partial is None or taps + a.shape[-1] > EXACT_TAPS:
            total = _emptied(total, partial)
            partial, taps = torch.bmm(a, b.float()), a.shape[-1]
        else:
            partial.baddbmm_(a, b.float())
            taps += a.shape[-1]
    total = _emptied(total, partial)
    assert total is not None
    return total


def _emptied(total: Tensor | None, partial: Tensor | None) -> Tensor | None:
    if partial is None:
        return total
    return partial.to(torch.int32) if total is None else total.add_(partial.to(torch.int32))


def finished(y: Tensor, geglu: bool, output: operands.Output | None, dtype: torch.dtype) -> Tensor:
    """What an epilogue makes of a product's result: [value | gate] -> value gelu(gate), quantised or in ``dtype``."""
    y = _ACTIVATIONS["geglu"](y) if geglu else y
    return y.to(dtype) if output is None else numerics.quantize(y, *output)


def channels_innermost(x: Tensor) -> Tensor:
    """[N, C, *spatial] seen as [N, *spatial, C]."""
    return x.movedim(1, -1)


def channels_second(x: Tensor) -> Tensor:
    """[N, *spatial, C] seen as [N, C, *spatial]."""
    return x.movedim(-1, 1)


def place(x: Tensor, upsample: int, padding: tuple[int, int, int, int], fill: float) -> Tensor:
    """out[n, c, i, j] = x[n, c, (i - top) / u, (j - left) / u] inside the image, ``fill`` outside; channels_last."""
    if x.dim() != 4:
        return x
    n, c, height, width = x.shape
    top, bottom, left, right = padding
    if upsample == 1 and not any(padding):
        return x.contiguous(memory_format=torch.channels_last)
    height, width = height * upsample, width * upsample
    out = torch.empty(
        (n, c, height + top + bottom, width + left + right),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    if any(padding):
        out.fill_(fill)
    inside = out[:, :, top : top + height, left : left + width]
    for i in range(upsample):
        for j in range(upsample):
            inside[:, :, i::upsample, j::upsample] = x
    return out
