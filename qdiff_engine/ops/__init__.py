"""The operators of the engine, and the only place that knows which backend runs them.

A backend that is named but missing raises; the automatic choice takes the first available one of the table below.
A caller with a hot loop takes the function itself once: ``run = ops.resolve("int_conv2d", x.device)``.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import EPILOGUES, BackendError, backends, chosen, find, refusal, resolve, storage, supports
from .gpu_values import PACKED, keep_packed, packed_width, packs, statistics_for
from .operands import (
    ConvWeight,
    GemmWeight,
    Output,
    QuantizedCopy,
    Segment,
    check_finish,
    pack_conv2d,
    pack_gemm,
)

__all__ = [
    "PACKED",
    "BackendError",
    "ConvWeight",
    "GemmWeight",
    "Output",
    "QuantizedCopy",
    "Segment",
    "backends",
    "chosen",
    "denoise_step",
    "groupnorm_silu_quantize",
    "int_conv2d",
    "int_gemm",
    "keep_packed",
    "layernorm_quantize",
    "pack_conv2d",
    "pack_gemm",
    "packed_width",
    "packs",
    "quantize",
    "refusal",
    "resolve",
    "statistics_for",
    "storage",
    "supports",
]


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
    backend: str | None = None,
) -> Tensor:
    """q[..., k] = clamp(round_half_even(activation(x[..., k]) * inv) + z), inv = float32(inv_s * inv_c[k]).

    Args:
        x: float32 [N, C, H, W], features along C, or any other rank with its features last.
        scale, zero_point, bits: of the activation, see `numerics`.
        activation: "none", "silu", "gelu", "gelu_tanh", or "geglu": 2F features -> F, value * gelu(gate).
        channel_inverse: float32 [F], 1 / c of channel equalisation.
        upsample: integer factor of nearest-neighbour upsampling, 4-D only.
        padding: (top, bottom, left, right) pixels of value z around the (upsampled) image, 4-D only.
        storage: int8 holds q, uint8 holds q + 128.

    Returns:
        [N, F, H', W'] channels_last, or [..., F] contiguous.
    """
    run = resolve("quantize", x.device, backend)
    return run(
        x,
        scale,
        zero_point,
        bits,
        activation=activation,
        channel_inverse=channel_inverse,
        upsample=upsample,
        padding=padding,
        storage=storage,
    )


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
    backend: str | None = None,
) -> Tensor:
    """q[n, c] = quantize(silu(group_norm(cat(x, x2) + pre_add) * (1 + norm_scale) + norm_shift)[n, c] * inv_c[c]).

    Args:
        x: float32 [N, C, L] or [N, C, H, W].
        groups: normalisation groups over all channels; they may straddle ``x`` and ``x2``.
        weight, bias: float32 [C] or None.
        scale: None skips the quantisation and returns float32 (padded with 0).
        x2: channels that follow those of ``x``.
        pre_add, norm_scale, norm_shift: float32 [N, C].
        channel_inverse: float32 [C], inv_c = 1 / c of channel equalisation; multiplied with inv_s first, as `quantize`
            does. It divides an unquantised result, too, but no copy.
        upsample, padding, storage: as for `quantize`.
        copies: outputs for x and x2 quantised on their own as well, for a shortcut that reads them; 4-D only.

    Returns:
        [N, C, *spatial] with the channels innermost in memory.
    """
    run = resolve("groupnorm_silu_quantize", x.device, backend)
    return run(
        x,
        groups,
        weight,
        bias,
        eps,
        scale,
        zero_point,
        bits,
        silu=silu,
        x2=x2,
        pre_add=pre_add,
        norm_scale=norm_scale,
        norm_shift=norm_shift,
        channel_inverse=channel_inverse,
        upsample=upsample,
        padding=padding,
        copies=copies,
        storage=storage,
    )


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
    backend: str | None = None,
) -> Tensor:
    """q[..., k] = quantize(weight[k] (x[..., k] - mean) / sqrt(var + eps) + bias[k]), moments over the last axis.

    Args:
        x: float32 [..., K].
        weight, bias: float32 [K] or None.
        scale: None skips the quantisation and returns float32.
    """
    run = resolve("layernorm_quantize", x.device, backend)
    return run(x, weight, bias, eps, scale, zero_point, bits, storage=storage)


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
    geglu: bool = False,
    output: Output | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """y[m, n] = s s_w[n] o[n] (acc[m, n] - z wsum[n]) + bias[n] + residual[m, n], acc = sum over k of q w.

    With groups along K, the product is the sum over g of s s_w[n, g] o[n] (acc[m, n, g] - z wsum[n, g]).

    Args:
        q: int8 (q) or uint8 (q + 128) [..., K]; or floating (mode A16): multiplied with the dequantised weights.
        weight: from `pack_gemm`.
        scale, zero_point: of the activation; None in mode A16.
        bias: float32 [N].
        residual: float32 [..., N].
        reuse_residual: the residual's memory may be overwritten (and become the result).
        output_scale: float32 [N], o: multiplies the weight scale, not the bias.
        geglu: the first half of the outputs times gelu of the second is the result; without a residual.
        output: (scale, zero point, bits) that quantise the result.

    Returns:
        ``out_dtype`` [..., N], N halved by ``geglu``; int8 with ``output``.
    """
    check_finish(output, len(weight.scale) if geglu else 0, residual if geglu else None)
    terms = {"residual": residual, "reuse_residual": reuse_residual, "output_scale": output_scale}
    name, run = find("int_gemm", q.device.type, backend)
    if name in EPILOGUES:
        return run(q, weight, scale, zero_point, bias, **terms, geglu=geglu, output=output, out_dtype=out_dtype)
    return _finish(run(q, weight, scale, zero_point, bias, **terms), geglu, output, out_dtype)


def _finish(y: Tensor, geglu: bool, output: Output | None, dtype: torch.dtype) -> Tensor:
    if not geglu and output is None and y.dtype == dtype:
        return y
    return importlib.import_module(f"{__name__}.plain").finished(y, geglu, output, dtype)


def int_conv2d(
    segments: Sequence[Segment],
    bias: Tensor | None = None,
    *,
    temb: Tensor | None = None,
    residual: Tensor | None = None,
    reuse_residual: bool = False,
    output_scale: Tensor | None = None,
    output: Output | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """y = sum over segments of s s_w o (acc - z wsum[class]) + bias + temb + residual, per output channel.

    Args:
        segments: one, or several for the stretches of a skip concatenation.
        bias: float32 [Cout].
        temb: float32 [N, Cout], or [1, Cout] for the whole batch.
        residual: float32 [N, Cout, OH, OW].
        reuse_residual: the residual's memory may be overwritten (and become the result).
        output_scale: float32 [Cout], o: multiplies the weight scales, not the bias.
        output: (scale, zero point, bits) that quantise the result.

    Returns:
        ``out_dtype`` [N, Cout, OH, OW], channels_last; int8 with ``output``.
    """
    check_finish(output)
    terms = {"temb": temb, "residual": residual, "reuse_residual": reuse_residual, "output_scale": output_scale}
    name, run = find("int_conv2d", segments[0].q.device.type if segments else "cpu", backend)
    if name in EPILOGUES:
        return run(segments, bias, **terms, output=output, out_dtype=out_dtype)
    return _finish(run(segments, bias, **terms), False, output, out_dtype)


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
    """x' = cx x + c0 x0 + ce e' + s' z + B, e' = a[c] e + b[c], e = uncond + g (cond - uncond).

    With ``clipped``, x0 = clamp(predicted sample, +-clip) and e' becomes the predicted noise; without, c0 is unused.

    Args:
        x: floating latents [N, C, *spatial].
        cond, uncond, noise: floating, of x's shape; without ``uncond`` e is ``cond``, without ``noise`` z is 0.
        constants: float32 [8] on x's device: cx, c0, ce, s', sqrt(alpha_bar), sqrt(1 - alpha_bar), clip, g.
        guidance: g in place of the one in ``constants``.
        prediction_type: "epsilon", "v_prediction" or "sample".
        a, b: float32 [C]. ``input_bias``: B, float32 [C] or [C, *spatial].

    Returns:
        x' of x's shape and dtype, computed in float32; channels_last if x is, else contiguous.
    """
    run = resolve("denoise_step", x.device, backend)
    return run(
        x,
        cond,
        uncond,
        noise,
        constants,
        guidance=guidance,
        prediction_type=prediction_type,
        clipped=clipped,
        a=a,
        b=b,
        input_bias=input_bias,
    )
