"""denoise_step: x' = cx x + c0 x0 + ce e' + s' z + B, e' = a[c] e + b[c], e = uncond + g (cond - uncond).

One pass over the latents does guidance, correction and the sampler's update. All scalars of a step are read from a row
of a table on the device, so that one captured CUDA graph serves every step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize import check_device, check_floating, check_vector

CONSTANTS = ("cx", "c0", "ce", "sigma", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar", "clip", "guidance")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
BLOCK = 512


@triton.jit
def _denoise_step_kernel(
    x,
    cond,
    uncond,
    noise,
    constants,
    factor,
    shift,
    input_bias,
    out,
    elements,
    channels,
    pixels,
    stride_xn,
    stride_xc,
    stride_xp,
    stride_en,
    stride_ec,
    stride_ep,
    stride_un,
    stride_uc,
    stride_up,
    stride_zn,
    stride_zc,
    stride_zp,
    stride_on,
    stride_oc,
    stride_op,
    stride_bc,
    stride_bp,
    guidance,
    PREDICTION: tl.constexpr,
    CLIPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = element < elements
    p = element % pixels
    c = element // pixels % channels
    n = (element // pixels // channels).to(tl.int64)
    value = tl.load(x + n * stride_xn + c * stride_xc + p * stride_xp, mask=within, other=0.0).to(tl.float32)
    e = tl.load(cond + n * stride_en + c * stride_ec + p * stride_ep, mask=within, other=0.0).to(tl.float32)
    if uncond is not None:
        u = tl.load(uncond + n * stride_un + c * stride_uc + p * stride_up, mask=within, other=0.0).to(tl.float32)
        g = tl.load(constants + 7) if guidance is None else guidance
        e = u + g * (e - u)
    if factor is not None:
        e *= tl.load(factor + c, mask=within, other=0.0)
    if shift is not None:
        e += tl.load(shift + c, mask=within, other=0.0)
    y = tl.load(constants) * value
    if CLIPPED:
        signal = tl.load(constants + 4)
        deviation = tl.load(constants + 5)
        if PREDICTION == "epsilon":
            sample = (value - deviation * e) / signal
        elif PREDICTION == "v_prediction":
            sample = signal * value - deviation * e
            e = signal * e + deviation * value
        else:
            sample = e
            e = (value - signal * sample) / deviation
        clip = tl.load(constants + 6)
        y += tl.load(constants + 1) * tl.minimum(tl.maximum(sample, -clip), clip)
    y += tl.load(constants + 2) * e
    if noise is not None:
        z = tl.load(noise + n * stride_zn + c * stride_zc + p * stride_zp, mask=within, other=0.0).to(tl.float32)
        y += tl.load(constants + 3) * z
    if input_bias is not None:
        y += tl.load(input_bias + c * stride_bc + p * stride_bp, mask=within, other=0.0)
    tl.store(out + n * stride_on + c * stride_oc + p * stride_op, y.to(out.dtype.element_ty), mask=within)


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
    """x'[n, c, p] = cx x + c0 x0 + ce e' + s' z + B[c, p], e' = a[c] e + b[c], e = uncond + g (cond - uncond).

    Without clipping c0 is not used, and e' is the model's output whatever it predicts. With it, the output becomes the
    pair of x0 = clamp(predicted sample, +-clip) and e' = predicted noise, the latter as it was before the clamp.

    Args:
        x: float16, bfloat16 or float32 latents [N, C, *spatial].
        cond, uncond, noise: floating, of x's shape; without ``uncond`` e is ``cond``, without ``noise`` z is 0.
        constants: float32 [8] on the device, one row of a table: cx, c0, ce, s', sqrt(alpha_bar),
            sqrt(1 - alpha_bar), clip, g (`CONSTANTS`). DDIM has cx = 0 where it clips, DDPM ce = 0.
        guidance: g in place of the row's.
        prediction_type: "epsilon", "v_prediction" or "sample".
        clipped: whether the scheduler clamps the predicted sample.
        a, b: float32 [C] corrections of the output, or None.
        input_bias: float32 [C] or [C, *spatial], B, or None.

    Returns:
        x' of x's shape and dtype, computed in float32; channels_last if x is, else contiguous.

    Raises:
        TypeError, ValueError: an argument's type or shape; the message names it.
    """
    check_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be [N, C, *spatial], got {list(x.shape)}")
    for name, values in (("cond", cond), ("uncond", uncond), ("noise", noise)):
        if values is not None:
            check_floating(name, values)
            if values.shape != x.shape:
                raise ValueError(f"{name} must be {list(x.shape)} like x, got {list(values.shape)}")
            check_device(name, values, x.device)
    float32 = (torch.float32,)
    check_vector("constants", constants, len(CONSTANTS), x.device, float32)
    by_channel = input_bias is None or input_bias.dim() == 1
    for name, values in (("a", a), ("b", b), ("input_bias", input_bias if by_channel else None)):
        check_vector(name, values, x.shape[1], x.device, float32)
    if input_bias is not None and not by_channel:
        if input_bias.shape != x.shape[1:] or not input_bias.is_contiguous():
            raise ValueError(
                f"input_bias must be dense [{x.shape[1]}] or {list(x.shape[1:])}, got {list(input_bias.shape)}"
            )
        check_vector("input_bias", input_bias.flatten(), x[0].numel(), x.device, float32)
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {prediction_type!r}")
    if guidance is not None and not isinstance(guidance, int | float):
        raise TypeError(f"guidance must be a number or None, got {type(guidance).__name__}")
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)
    if out.numel():
        n, channels = x.shape[:2]
        inputs = [None if t is None else t.reshape(n, channels, -1) for t in (x, cond, uncond, noise)]
        to = out.view(n, channels, -1)
        strides = [s for t in (*inputs, to) for s in ((0, 0, 0) if t is None else t.stride())]
        strides += [1, 0] if by_channel else [to.shape[2], 1]  # of B
        _denoise_step_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            *inputs, constants, a, b, input_bias, to, out.numel(), channels, to.shape[2], *strides,
            None if guidance is None else float(guidance), PREDICTION=prediction_type, CLIPPED=clipped, BLOCK=BLOCK,
        )  # fmt: skip
    return out
