"""Range and histogram of a tensor, as calibration's observers read them; C++ where the extension is built."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native


def min_max(x: Tensor) -> tuple[float, float]:
    """(smallest, largest) value of ``x``.

    Raises:
        ValueError: ``x`` holds NaN or infinity.
    """
    if native.available()[0]:
        return native.min_max(x)
    low, high = torch.aminmax(x)
    if not (bool(torch.isfinite(low)) and bool(torch.isfinite(high))):
        raise ValueError("x holds NaN or infinity")
    return float(low), float(high)


def histogram(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Counts int64 [bins] of the values of ``x`` in equal bins over [low, high]; outside values join the end bins."""
    if native.available()[0]:
        return native.histogram(x, bins, low, high)
    return torch.histc(x.float().clamp(low, high), bins, low, high).long()
