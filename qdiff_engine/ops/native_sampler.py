"""`denoise_step` by the C++ kernel of `qdiff_engine._C`: one pass over the latents."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension, operands

_PREDICTIONS = ("unclipped", "epsilon", "v_prediction", "sample")  # the order of Prediction in csrc/kernels.h


def available() -> tuple[bool, str]:
    """Whether the C++ extension can be imported, and why not."""
    return extension.available()


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
    if x.device.type != "cpu":
        raise ValueError(f"x must be on the CPU, got {x.device}")
    images = [None if t is None else t.float().contiguous() for t in (x, cond, uncond, noise)]
    corrections = [None if t is None else t.contiguous() for t in (a, b, input_bias)]
    out = torch.empty(x.shape)
    values = constants.tolist()
    if guidance is not None:
        values[7] = float(guidance)
    if x.numel():
        pixels = x.numel() // (len(x) * x.shape[1])
        mapped = input_bias is not None and input_bias.dim() > 1
        extension.kernels().denoise_step(
            [extension.pointer(tensor) for tensor in (*images, *corrections, out)],
            (len(x), x.shape[1], pixels, pixels if mapped else 1),
            _PREDICTIONS.index(prediction_type) if clipped else 0,
            values,
        )
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return out.to(x.dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
