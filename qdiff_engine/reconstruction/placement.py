"""Where and how learning computes: values wait on the CPU, products may run on a GPU's tensor cores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def placed(value: Any, device: torch.device | str) -> Any:
    """A tensor on ``device``; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def mixed_precision() -> Iterator[None]:
    """Inside, a GPU multiplies float32 matrices in TF32, as it does in convolutions anyway, and adds up in float32.

    TF32 has eleven significant bits, which an 8-bit integer on its way to the next one needs; bfloat16 has eight.
    """
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before
