"""The specification of the operators, in plain PyTorch with float64 and int64: slow, and what every backend must equal.

Quantisation itself is specified in float32 (`numerics.quantize`): what precedes it is computed in float64 and rounded
to float32 once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import numerics


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
) -> Tensor:
    """q[..., k] = clamp(round_half_even(activation(x[..., k]) * inv_s * inv_c[k]) + z) as int8.

    ``x`` is [N, C, H, W] with the features along C, or has them along its last axis.
    """
    axis = 1 if x.dim() == 4 else -1
    y = activate(x.double().movedim(axis, -1), activation).float()
    q = numerics.quantize(y, scale, zero_point, bits, channel_inverse).movedim(-1, axis)
    return place(q, upsample, padding, zero_point)


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
) -> Tensor:
    """q[n, c] = quantize(silu(group_norm(cat(x, x2) + pre_add) * (1 + norm_scale) + norm_shift)[n, c] * inv_c[c]).

    As int8; inv_s and inv_c are multiplied first. ``scale`` None gives the float64 value itself, padded with 0.
    """
    x = (x if x2 is None else torch.cat((x, x2), dim=1)).double()
    spatial = [1] * (x.dim() - 2)

    def per_channel(values: Tensor) -> Tensor:  # [C] or [N, C]
        return values.double().reshape(*values.shape, *spatial)

    if pre_add is not None:
        x = x + per_channel(pre_add)
    grouped = x.reshape(len(x), groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    y = ((grouped - mean) / torch.sqrt(variance + eps)).reshape(x.shape)
    if weight is not None:
        y = y * per_channel(weight)
    if bias is not None:
        y = y + per_channel(bias)
    if norm_scale is not None:
        y = y * (1 + per_channel(norm_scale))
    if norm_shift is not None:
        y = y + per_channel(norm_shift)
    y = F.silu(y) if silu else y
    if scale is None:
        return place(y if channel_inverse is None else y * per_channel(channel_inverse), upsample, padding, 0.0)
    q = numerics.quantize(y.float().movedim(1, -1), scale, zero_point, bits, channel_inverse).movedim(-1, 1)
    return place(q, upsample, padding, zero_point)


def layernorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float | None,
    zero_point: int,
    bits: int,
) -> Tensor:
    """q[..., k] = quantize((x[..., k] - mean) / sqrt(var + eps) * weight[k] + bias[k]) as int8; scale None: float64."""
    x = x.double()
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + eps)
    if weight is not None:
        y = y * weight.double()
    if bias is not None:
        y = y + bias.double()
    return y if scale is None else numerics.quantize(y.float(), scale, zero_point, bits)


def gemm_accumulators(q: Tensor, weight: Tensor) -> Tensor:
    """acc[..., n] = sum over k of q[..., k] weight[n, k] in int64; ``q`` int8 or uint8 (q + 128), ``weight`` int8."""
    return numerics.signed(q).to(torch.int64) @ weight.to(torch.int64).t()


def int_gemm(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    scale: float,
    zero_point: int,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> Tensor:
    """y[m, n] = sum over g of s s_w[n, g] o[n] (acc[m, n, g] - z wsum[n, g]) + bias[n] + residual[m, n] in float64.

    Args:
        weight_scale: [N], or [N, G] for G groups along K.
    """
    scales = weight_scale.double().reshape(len(weight), -1) * scale
    if output_scale is not None:
        scales = scales * output_scale.double()[:, None]
    y = torch.zeros((), dtype=torch.float64)
    groups = scales.shape[1]
    for part, w, s in zip(q.chunk(groups, -1), weight.chunk(groups, 1), scales.T, strict=True):
        y = y + (gemm_accumulators(part, w) - zero_point * w.to(torch.int64).sum(1)).double() * s
    for term in (bias, residual):
        y = y if term is None else y + term.double()
    return y


def conv2d_accumulators(
    q: Tensor,
    weight: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """acc[n, o, i, j] = sum of q weight over the taps inside the image, in int64 [N, Cout, OH, OW]."""
    q = place(numerics.signed(q).to(torch.int64), 1, padding, 0)
    # float64 holds the sums of up to 2^38 products of 8-bit integers exactly
    return F.conv2d(q.double(), weight.double(), None, stride, 0, dilation, groups).to(torch.int64)


def int_conv2d(
    segments: Sequence[tuple[Tensor, Tensor, Tensor, float, int]],
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    temb: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> Tensor:
    """y = sum over segments of s s_w o (acc - z wsum[class]) + bias + temb + residual in float64 [N, Cout, OH, OW].

    Args:
        segments: (q, weight, weight_scale, scale, zero_point) of every stretch of the K axis.
    """
    y = torch.zeros((), dtype=torch.float64)
    for q, weight, weight_scale, scale, zero_point in segments:
        acc = conv2d_accumulators(q, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
        classes = numerics.border_classes(weight, (q.shape[2], q.shape[3]), stride, padding, dilation)
        wsum = classes.sums.to(torch.int64)[classes.index].permute(2, 0, 1)
        per_channel = scale * weight_scale.double() * (1.0 if output_scale is None else output_scale.double())
        y = y + (acc - zero_point * wsum).double() * per_channel[:, None, None]
    if bias is not None:
        y = y + bias.double()[:, None, None]
    if temb is not None:
        y = y + temb.double()[:, :, None, None]
    return y if residual is None else y + residual.double()


def activate(x: Tensor, activation: str) -> Tensor:
    """activation(x): "none", "silu", "gelu", "gelu_tanh", or "geglu": x[..., :F] gelu(x[..., F:])."""
    if activation == "geglu":
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation not in ("none", "silu"):
        raise ValueError(f"activation must be none, silu, gelu, gelu_tanh or geglu, got {activation!r}")
    return F.silu(x) if activation == "silu" else x


def place(x: Tensor, upsample: int, padding: tuple[int, int, int, int], fill: float) -> Tensor:
    """out[n, c, i, j] = x[n, c, (i - top) // u, (j - left) // u] inside the image, ``fill`` outside it."""
    top, bottom, left, right = padding
    if upsample > 1:
        x = x.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    return F.pad(x, (left, right, top, bottom), value=fill) if any(padding) else x


def denoise_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor | None,
    constants: Sequence[float] | Tensor,
    *,
    guidance: float | None = None,
    prediction_type: str = "epsilon",
    clipped: bool = False,
    a: Tensor | None = None,
    b: Tensor | None = None,
    input_bias: Tensor | None = None,
) -> Tensor:
    """x' = cx x + c0 x0 + ce e' + s' z + B, e' = a[c] e + b[c], e = uncond + g (cond - uncond) in float64.

    Where the scheduler clips, x0 = clamp(predicted sample, +-clip) and e' becomes the predicted noise; where it does
    not, c0 is unused and e' is the model's output, whatever it predicts.

    Args:
        constants: cx, c0, ce, s', sqrt(alpha_bar), sqrt(1 - alpha_bar), clip, g.
        guidance: g in place of the one in ``constants``.
        prediction_type: "epsilon", "v_prediction" or "sample".
        a, b: [C]; ``input_bias``: B, [C] or [C, *spatial].
    """
    cx, c0, ce, sigma, signal, deviation, clip, g = (float(value) for value in constants)
    g = g if guidance is None else guidance
    x, e = x.double(), cond.double()

    def per_channel(values: Tensor) -> Tensor:
        return values.double().reshape(-1, *[1] * (x.dim() - 2))

    if uncond is not None:
        e = uncond.double() + g * (e - uncond.double())
    if a is not None:
        e = e * per_channel(a)
    if b is not None:
        e = e + per_channel(b)
    y = cx * x
    if clipped:
        if prediction_type == "epsilon":
            sample = (x - deviation * e) / signal
        elif prediction_type == "v_prediction":
            sample, e = signal * x - deviation * e, signal * e + deviation * x
        elif prediction_type == "sample":
            sample, e = e, (x - signal * e) / deviation
        else:
            raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")
        y = y + c0 * sample.clamp(-clip, clip)
    y = y + ce * e
    if noise is not None:
        y = y + sigma * noise.double()
    if input_bias is None:
        return y
    return y + (per_channel(input_bias) if input_bias.dim() == 1 else input_bias.double())
