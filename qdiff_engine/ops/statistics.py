"""Range and histogram of a tensor, as calibration's observers read them; C++ where the extension is built."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension


def min_max(x: Tensor) -> tuple[float, float]:
    """(smallest, largest) value of ``x``, float32 on the CPU.

    Raises:
        ValueError: ``x`` is empty, or holds NaN or infinity.
    """
    x = _checked(x)
    if not x.numel():
        raise ValueError(f"x must not be empty, got {list(x.shape)}")
    if extension.available()[0]:
        low, high, finite = extension.kernels().min_max(x.data_ptr(), x.numel())
    else:
        low, high = map(float, torch.aminmax(x))
        finite = bool(torch.isfinite(x).all())
    if not finite:
        raise ValueError(f"x of shape {list(x.shape)} holds NaN or infinite values")
    return low, high


def histogram(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """counts[clamp(floor((x - low) * bins / (high - low)), 0, bins - 1)] += 1 of float32 ``x``; int64 [bins].

    Values outside [low, high] count in the end bins. In float64 with the extension; in float32, whose rounding may move
    a value across the edge of its bin, without.
    """
    x = _checked(x)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if not low < high or high - low == float("inf"):
        raise ValueError(f"low must be below high and both finite, got {low} and {high}")
    if not extension.available()[0]:
        return torch.histc(x.clamp(low, high), bins, low, high).long()
    counts = torch.empty(bins, dtype=torch.int64)
    extension.kernels().histogram(x.data_ptr(), x.numel(), bins, low, high, counts.data_ptr())
    return counts


def _checked(x: Tensor) -> Tensor:
    """x in dense memory; in which order does not matter to a statistic over all values."""
    x = extension.required("x", x)
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x if dense else x.contiguous()
