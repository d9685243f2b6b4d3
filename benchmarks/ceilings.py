"""What this machine can do at most, measured: copying memory, and large matrix products of random values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import Contestant, times

_COPY_BYTES = 2 << 30
_SIDE = 8192
_ROUNDS = 20


class Ceilings(NamedTuple):
    """Rates that no kernel exceeds by much."""

    copy_gbps: float  # bytes read plus bytes written
    int8_tops: float  # torch._int_mm
    fp16_tops: float
    bf16_tops: float

    def peak_tops(self, precision: str) -> float:
        """The ceiling of a precision: int8's where both factors are integers, fp16's where activations float."""
        return self.fp16_tops if precision.endswith("a16") or precision.startswith("fp") else self.int8_tops

    def bound_ms(self, operations: float, bytes_: float, precision: str) -> float:
        """The least time for so many operations and bytes: the larger of the two."""
        return max(operations / self.peak_tops(precision) / 1e9, bytes_ / self.copy_gbps / 1e6)


def _copy(device: torch.device, count: int) -> Contestant:
    source = torch.randint(-128, 128, (count,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda i: target.copy_(source)


def measure(device: torch.device, side: int = _SIDE, copy_bytes: int = _COPY_BYTES) -> Ceilings:
    """The rates of ``device``: products of two [side, side] matrices, a copy of ``copy_bytes``."""
    copied, absent = times({"copy": _copy(device, copy_bytes)}, 1, _ROUNDS, device)
    a, b = (torch.randint(-128, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
    x, y = (torch.randn(side, side, device=device) for _ in range(2))
    factors: dict[str, tuple[Tensor, Tensor]] = {
        dtype: (x.to(getattr(torch, dtype)), y.to(getattr(torch, dtype)).t()) for dtype in ("float16", "bfloat16")
    }
    contestants: dict[str, Any] = {"int8": lambda i: torch._int_mm(a, b.t())}
    contestants |= {name: (lambda i, pair=pair: pair[0] @ pair[1]) for name, pair in factors.items()}
    found, failed = times(contestants, 1, _ROUNDS, device)
    if absent or failed:
        raise RuntimeError(f"a ceiling could not be measured: {absent | failed}")
    rate = {name: 2.0 * side**3 / t["median"] / 1e9 for name, t in found.items()}
    gbps = 2.0 * copy_bytes / copied["copy"]["median"] / 1e6
    return Ceilings(*(float(f"{v:.5g}") for v in (gbps, rate["int8"], rate["float16"], rate["bfloat16"])))
