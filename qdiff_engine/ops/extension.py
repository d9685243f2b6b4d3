"""The compiled extension `qdiff_engine._C`: whether it is here, and what its kernels are handed.

It is imported on first use, after torch, whose OpenMP threads it shares. Kernels read addresses, so everything they get
is checked here and brought into the layout that they read: float32, channels innermost, on the CPU.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import numerics

_extension: Any = None


def available() -> tuple[bool, str]:
    """Whether the extension can be imported, and what it runs on or why not."""
    try:
        found = kernels()
    except ImportError as error:
        return False, f"qdiff_engine._C cannot be imported ({error}); reinstall with a C++17 compiler to build it"
    features = [name for name, present in found.cpu_features().items() if present]
    return True, f"compiled C++ kernels; this processor has {', '.join(features) or 'no vector extension they use'}"


def cpu_features() -> dict[str, bool]:
    """Instruction sets this processor offers: avx2, avx512, avx512_vnni, avx_vnni, amx_int8, dotprod."""
    return kernels().cpu_features()


_MALLOC_SETTINGS = (
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
)


@functools.cache
def keep_freed_memory() -> bool:
    """Makes the C library of this process reuse up to 1 GiB of freed memory, and says whether it does.

    Otherwise glibc returns every activation of some megabytes to the kernel, and the next layer's result is paged in
    again, one page fault after another. Left alone where an environment variable already says what malloc shall do,
    as MALLOC_TRIM_THRESHOLD_.
    """
    if any(name in os.environ for name in _MALLOC_SETTINGS) or not available()[0]:
        return False
    return kernels().keep_freed_memory()


def kernels() -> Any:
    """The extension.

    Raises:
        ImportError: it was not built, or cannot be loaded here.
    """
    global _extension
    if _extension is None:
        _extension = importlib.import_module("qdiff_engine._C")
    torch.get_num_threads()  # gives a new Python thread torch's thread count instead of OpenMP's own default
    return _extension


def floats(name: str, x: Tensor | None, shape: tuple[int, ...] | None = None) -> Tensor | None:
    """Checks an optional float32 CPU tensor, of the given shape if there is one; returned contiguous then."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        raise TypeError(
            f"{name} must be a float32 tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got {x.device}")
    if shape is None:
        return x
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    return x.contiguous()


def required(name: str, x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """`floats` of a tensor that must be there."""
    checked = floats(name, x, shape)
    if checked is None:
        raise TypeError(f"{name} must be a float32 tensor, got None")
    return checked


def integers(name: str, q: Tensor) -> Tensor:
    """Checks a quantised CPU tensor."""
    if not isinstance(q, Tensor) or q.dtype not in (torch.int8, torch.uint8):
        found = q.dtype if isinstance(q, Tensor) else type(q).__name__
        raise TypeError(f"{name} must be an int8 or uint8 (q + 128) tensor, got {found}")
    if q.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got {q.device}")
    return q


def pointer(x: Tensor | None) -> int:
    """Where a tensor's memory begins; 0 for None."""
    return 0 if x is None else x.data_ptr()


def check_quantizer(scale: float, zero_point: int, bits: int, storage: torch.dtype) -> None:
    """Raise unless these quantise to ``bits`` bits in int8 or uint8."""
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    low, high = numerics.activation_range(bits)
    if not low <= zero_point <= high:
        raise ValueError(f"zero_point must be in [{low}, {high}] for {bits} bits, got {zero_point}")
    if storage not in (torch.int8, torch.uint8):
        raise TypeError(f"storage must be torch.int8 or torch.uint8, got {storage}")


def check_placement(dims: int, upsample: int, padding: Sequence[int]) -> None:
    """Raise unless an x of ``dims`` dimensions can be upsampled and padded so."""
    if upsample < 1:
        raise ValueError(f"upsample must be at least 1, got {upsample}")
    if len(padding) != 4 or min(padding) < 0:
        raise ValueError(f"padding must be (top, bottom, left, right), none negative, got {padding}")
    if dims != 4 and (upsample != 1 or any(padding)):
        raise ValueError(f"upsample and padding need a 4-D x [N, C, H, W], got {dims} dimensions")


def channels_last(x: Tensor) -> Tensor:
    """[N, C, *spatial] as itself, copied where its memory does not have the channels innermost."""
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def empty_channels_last(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty [N, C, *spatial] with its channels innermost."""
    if len(shape) == 4:
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    return torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype).movedim(-1, 1)
