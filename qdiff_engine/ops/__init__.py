"""The operators of the engine, and the only place that knows which backend runs them.

A backend that is named but missing raises; the automatic choice takes the first available one of the table below.
A caller with a hot loop takes the function itself once: ``run = ops.resolve("int_conv2d", x.device)``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operands import ConvWeight, GemmWeight, QuantizedCopy, Segment, pack_conv2d, pack_gemm

__all__ = [
    "BackendError",
    "ConvWeight",
    "GemmWeight",
    "QuantizedCopy",
    "Segment",
    "backends",
    "chosen",
    "denoise_step",
    "groupnorm_silu_quantize",
    "int_conv2d",
    "int_gemm",
    "layernorm_quantize",
    "pack_conv2d",
    "pack_gemm",
    "quantize",
    "resolve",
    "storage",
    "supports",
]

# operator -> (backend, module of this package that implements it), fastest first
_TABLE: dict[str, tuple[tuple[str, str], ...]] = {
    "quantize": (("triton", "triton_kernels"), ("native", "native"), ("torch", "plain")),
    "groupnorm_silu_quantize": (("triton", "triton_kernels"), ("native", "native"), ("torch", "plain")),
    "layernorm_quantize": (("triton", "triton_kernels"), ("native", "native"), ("torch", "plain")),
    "attention": (("native", "native"), ("torch", "plain")),
    "int_gemm": (
        ("triton", "triton_kernels"),
        ("onednn", "onednn"),
        ("native", "native_matmul"),
        ("torch", "plain"),
    ),
    "int_conv2d": (
        ("triton", "triton_kernels"),
        ("onednn", "onednn"),
        ("native", "native_matmul"),
        ("torch", "plain"),
    ),
    "denoise_step": (("triton", "triton_kernels"), ("native", "native_sampler"), ("torch", "plain")),
}


class BackendError(ValueError):
    """A backend that was asked for by name cannot run here; the message says why."""


class Backend(NamedTuple):
    """What runs operators: where, and how to find out whether it can."""

    devices: tuple[str, ...]
    storage: torch.dtype  # how it likes quantised activations: int8 (q) or uint8 (q + 128)
    available: Callable[[], tuple[bool, str]]  # (whether, reason)


def _imported(module: str) -> Callable[[], tuple[bool, str]]:
    return lambda: importlib.import_module(f"{__name__}.{module}").available()


def _planned(name: str) -> Callable[[], tuple[bool, str]]:
    def status() -> tuple[bool, str]:
        gpu = "" if torch.cuda.is_available() else ", and there is no NVIDIA GPU here"
        return False, f"the {name} kernels are not part of this version yet{gpu}"

    return status


_BACKENDS = {
    "onednn": Backend(("cpu",), torch.uint8, _imported("onednn")),
    "native": Backend(("cpu",), torch.int8, _imported("native")),
    "torch": Backend(("cpu", "cuda"), torch.int8, _imported("plain")),
    "triton": Backend(("cuda",), torch.int8, _imported("triton_kernels")),
    "cuda": Backend(("cuda",), torch.int8, _planned("CUDA")),
}


@functools.cache
def _status(name: str) -> tuple[bool, str]:
    return _BACKENDS[name].available()


def backends() -> dict[str, dict[str, Any]]:
    """Backend name -> {"available": bool, "reason": str}."""
    return {name: dict(zip(("available", "reason"), _status(name), strict=True)) for name in _BACKENDS}


@functools.cache
def _find(operator: str, device: str, backend: str | None) -> tuple[str, Callable[..., Any]]:
    if operator not in _TABLE:
        raise ValueError(f"operator must be one of {', '.join(_TABLE)}, got {operator!r}")
    if backend is not None and backend not in _BACKENDS:
        raise BackendError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    refusals = [] if backend is None or backend in dict(_TABLE[operator]) else [_refusal(backend, operator)]
    for name, module in _TABLE[operator]:
        if backend not in (None, name):
            continue
        if device not in _BACKENDS[name].devices and not (backend == name and _interpreted(name)):
            refusals.append(f"{name} runs on {' and '.join(_BACKENDS[name].devices)}, not on {device}")
        elif not _status(name)[0]:
            refusals.append(f"{name}: {_status(name)[1]}")
        else:
            return name, getattr(importlib.import_module(f"{__name__}.{module}"), operator)
    raise BackendError(f"no backend for {operator}: {'; '.join(refusals)}")


def _interpreted(backend: str) -> bool:
    """Whether a backend that is asked for by name runs on any device: Triton, where it interprets its kernels."""
    return backend == "triton" and importlib.import_module(f"{__name__}.triton_kernels").interpreted()


def _refusal(backend: str, operator: str) -> str:
    """Why a backend that is not in an operator's row of the table cannot run it."""
    is_available, reason = _status(backend)
    return f"{backend}: {reason}" if not is_available else f"{backend} has no {operator}"


def resolve(operator: str, device: torch.device | str = "cpu", backend: str | None = None) -> Callable[..., Any]:
    """The function that runs ``operator`` on ``device``: that of ``backend``, or of the fastest one available.

    Raises:
        BackendError: the backend is missing here, with the reason.
    """
    return _find(operator, torch.device(device).type, backend)[1]


def chosen(operator: str, device: torch.device | str = "cpu", backend: str | None = None) -> str:
    """Name of the backend that `resolve` takes."""
    return _find(operator, torch.device(device).type, backend)[0]


def supports(backend: str | None, operator: str) -> bool:
    """Whether a backend is, or is not known to be missing from, an operator's row of the table.

    False only for a known backend that has no such operator (oneDNN has no norms): others then run it.
    """
    return backend not in _BACKENDS or backend in dict(_TABLE[operator]) or not _status(backend)[0]


def storage(device: torch.device | str = "cpu", backend: str | None = None) -> torch.dtype:
    """Storage of quantised activations that the chosen `int_conv2d` reads without a conversion."""
    return _BACKENDS[chosen("int_conv2d", device, backend)].storage


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
    upsample: int = 1,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    copies: Sequence[QuantizedCopy | None] = (),
    storage: torch.dtype = torch.int8,
    backend: str | None = None,
) -> Tensor:
    """q = quantize(silu(group_norm(cat(x, x2) + pre_add) * (1 + norm_scale) + norm_shift)).

    Args:
        x: float32 [N, C, L] or [N, C, H, W].
        groups: normalisation groups over all channels; they may straddle ``x`` and ``x2``.
        weight, bias: float32 [C] or None.
        scale: None skips the quantisation and returns float32 (padded with 0).
        x2: channels that follow those of ``x``.
        pre_add, norm_scale, norm_shift: float32 [N, C].
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
    backend: str | None = None,
) -> Tensor:
    """y[m, n] = s s_w[n] o[n] (acc[m, n] - z wsum[n]) + bias[n] + residual[m, n], acc = sum over k of q w.

    Args:
        q: int8 (q) or uint8 (q + 128) [..., K]; or floating (mode A16): multiplied with the dequantised weights.
        weight: from `pack_gemm`.
        scale, zero_point: of the activation; None in mode A16.
        bias: float32 [N].
        residual: float32 [..., N].
        reuse_residual: the residual's memory may be overwritten (and become the result).
        output_scale: float32 [N], o: multiplies the weight scale, not the bias.

    Returns:
        float32 [..., N].
    """
    run = resolve("int_gemm", q.device, backend)
    return run(
        q,
        weight,
        scale,
        zero_point,
        bias,
        residual=residual,
        reuse_residual=reuse_residual,
        output_scale=output_scale,
    )


def int_conv2d(
    segments: Sequence[Segment],
    bias: Tensor | None = None,
    *,
    temb: Tensor | None = None,
    residual: Tensor | None = None,
    reuse_residual: bool = False,
    output_scale: Tensor | None = None,
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

    Returns:
        float32 [N, Cout, OH, OW], channels_last.
    """
    run = resolve("int_conv2d", segments[0].q.device if segments else "cpu", backend)
    return run(segments, bias, temb=temb, residual=residual, reuse_residual=reuse_residual, output_scale=output_scale)


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
    """x' = cx x + c0 x0 + ce e' + s' z + B[c], e' = a[c] e + b[c], e = uncond + g (cond - uncond).

    With ``clipped``, x0 = clamp(predicted sample, +-clip) and e' becomes the predicted noise; without, c0 is unused.

    Args:
        x: floating latents [N, C, *spatial]; ``cond``, ``uncond`` and ``noise`` have its shape or are None.
        constants: float32 [8] on x's device: cx, c0, ce, s', sqrt(alpha_bar), sqrt(1 - alpha_bar), clip, g.
        guidance: g in place of the one in ``constants``.
        prediction_type: "epsilon", "v_prediction" or "sample".
        a, b, input_bias: float32 [C] or None.

    Returns:
        x' of x's shape and dtype, computed in float32.
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
