"""Values that wait on the CPU, brought to the device that computes with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def placed(value: Any, device: torch.device | str) -> Any:
    """A tensor on ``device``; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value
