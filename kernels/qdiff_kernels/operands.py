"""The forms of what the products read and write, shared by `int_gemm` and `int_conv2d`, and their checks."""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import packed_width
from .tiles import MAX_CHUNK


def x_bits(x: Tensor) -> int:
    """4 for packed activations, else 8."""
    return 4 if x.dtype == torch.uint8 else 8


def output_form(
    n: int, out_dtype: torch.dtype, out_quantization: Tensor | None, out_bits: int, out_packed: bool
) -> tuple[int, torch.dtype]:
    """(width of a row, dtype) of an output with ``n`` features; raises where packing was asked for in vain."""
    if out_packed:
        if out_quantization is None or out_bits != 4:
            raise ValueError(f"out_packed needs an out_quantization with out_bits=4, got out_bits={out_bits}")
        return packed_width(n), torch.uint8
    return n, torch.int8 if out_quantization is not None else out_dtype


def chunk_of(statistics: Tensor | None, m: int, n: int, device: torch.device, floating: bool) -> int:
    """Rows to a chunk of ``statistics``, 0 without them; raises where they do not fit an output [m, n]."""
    if statistics is None:
        return 0
    chunks = statistics.numel() // (2 * n) if n else 0
    fits = statistics.dtype == torch.float32 and statistics.is_contiguous() and statistics.device == device
    if not fits or not chunks or tuple(statistics.shape[-2:]) != (2, n) or m % chunks:
        found = f"{statistics.dtype} {list(statistics.shape)} strided {statistics.stride()} on {statistics.device}"
        raise ValueError(f"statistics must be dense float32 [chunks, 2, {n}] of {m} rows on {device}, got {found}")
    chunk = m // chunks
    if chunk & (chunk - 1) or chunk > MAX_CHUNK or not floating:
        wanted = f"a floating output, in chunks of a power of two of at most {MAX_CHUNK} rows"
        raise ValueError(f"statistics need {wanted}, got chunks of {chunk}")
    return chunk


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether an offset into one of the tensors needs 64 bits."""
    return any(
        t is not None and sum((size - 1) * abs(step) for size, step in zip(t.shape, t.stride(), strict=True)) >= 1 << 31
        for t in tensors
    )


def check_activations(name: str, x: Tensor, quantization: Tensor | None) -> None:
    """Raises TypeError unless x is int8 or packed uint8 with a quantization, or floating without one."""
    if x.is_floating_point() != (quantization is None) or (
        quantization is not None and x.dtype not in (torch.int8, torch.uint8)
    ):
        wanted = "int8 or packed uint8 with a quantization, or floating without one"
        raise TypeError(f"{name} must be {wanted}, got {x.dtype}")
