"""Operands of integer kernels, and what counts as equal to the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qdiff_engine import numerics, ops

STORAGES = [torch.int8, torch.uint8]
CHANNELS_LAST = torch.channels_last
NO_PADDING = (0, 0, 0, 0)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of Triton's kernels; "cpu": its interpreter


def present(backend: str) -> str:
    """The backend's name; a test of one that this machine lacks is skipped with the reason."""
    available(backend)
    if backend == "triton" and DEVICE.type != "cpu":
        pytest.skip("triton: runs on the GPU here, where tests/gpu and tests/test_kernels_*.py compare it")
    return backend


def available(backend: str) -> None:
    """Skip the test, with the reason, where this machine lacks the backend."""
    status = ops.backends()[backend]
    if not status["available"]:
        pytest.skip(f"{backend}: {status['reason']}")


def integers(*shape: int, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def image(n: int, c: int, h: int, w: int) -> Tensor:
    return integers(n, c, h, w).contiguous(memory_format=CHANNELS_LAST)


def quantization(scale: float, zero_point: int) -> Tensor:
    """(s, 1 / s, z) as the kernels read it."""
    return torch.tensor([scale, numerics.inverse_scale(scale), zero_point], device=DEVICE)


def surrounded(x: Tensor) -> Tensor:
    """x on the device, in memory with NaN before and after it: what a kernel reads past the ends shows."""
    axes = [0, *range(2, x.dim()), 1] if x.dim() == 4 else list(range(x.dim()))
    dense = x.permute(axes)
    buffer = torch.full((x.numel() + 8192,), float("nan"), dtype=x.dtype, device=DEVICE)
    inner = buffer[4096 : 4096 + x.numel()].view(dense.shape).copy_(dense)
    return inner.permute([axes.index(i) for i in range(x.dim())])


def on_device(value: Any) -> Any:
    """A tensor, or what tensors a dict or a packed weight holds, on `DEVICE`."""
    if isinstance(value, dict):
        return {name: on_device(item) for name, item in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*map(on_device, value))
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def assert_equal_integers(y: Tensor, expected: Tensor) -> None:
    """y float32 holds exactly the int64 ``expected``, which float32 can hold."""
    assert int(expected.abs().max()) < 2**24
    assert y.dtype == torch.float32 and y.shape == expected.shape
    assert torch.equal(y.to(torch.int64), expected)


def assert_close(y: Tensor, expected: Tensor) -> None:
    """float32, and 1e-5 of the largest float64 value, everywhere."""
    assert y.dtype == torch.float32 and y.shape == expected.shape
    assert_near(y, expected, 1e-5)


def assert_near(y: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """The largest error is at most ``tolerance`` of the largest float64 value."""
    error = float((y.double().cpu() - expected).abs().max())
    assert error <= tolerance * float(expected.abs().max()), error


def assert_steps(q: Tensor, expected: Tensor, storage: torch.dtype = torch.int8) -> None:
    """At most one step apart, in fewer than 0.1 % of the elements."""
    assert q.dtype == storage and q.shape == expected.shape
    difference = (numerics.signed(q).int() - expected.int()).abs()
    assert int(difference.max()) <= 1
    assert int(difference.sum()) < max(1.0, 1e-3 * difference.numel())


def assert_as_close_as_torch(y: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice plain PyTorch's largest error in the same dtype, both against float64."""
    assert y.dtype == plain.dtype and y.shape == exact.shape
    error, plain_error = ((value.cpu().double() - exact).abs().max() for value in (y, plain))
    assert float(error) <= 2 * float(plain_error), (float(error), float(plain_error))
