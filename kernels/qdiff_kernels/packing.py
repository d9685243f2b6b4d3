"""How the product kernels want their weights: K-major, padded to whole blocks, int4 as "split halves".

Two int4 values share a byte. A block of 64 along K takes 32 bytes; byte j holds k = j in its low nibble and k = j + 32
in its high one, so that a kernel gets two runs of 32 by a shift and by a mask. It keeps each nibble in the high half of
an int8, 16 times its value: the weight sums carry the 16 and the scales 1/16, both exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64


class KernelWeight(NamedTuple):
    """A weight [N, K] as the kernels read it."""

    values: Tensor  # int8 [N, K'], or uint8 [N, K' / 2] split halves; K' = K rounded up to whole blocks of 64
    scale: Tensor  # float32 [N]
    sums: Tensor  # int32 [classes, N]: sum over K of the values as the kernel sees them, by border class
    bits: int
    k: int  # before padding


def pack(values: Tensor, scale: Tensor, bits: int, sums: Tensor | None = None) -> KernelWeight:
    """A `KernelWeight` on the device of ``values``.

    Args:
        values: int8 [N, K].
        scale: float32 [N].
        bits: 8, or 4 for values in [-8, 7].
        sums: int32 [classes, N] by border class; the sum over all of K by default.
    """
    if values.dtype != torch.int8 or values.dim() != 2:
        raise TypeError(f"values must be int8 [N, K], got {values.dtype} {list(values.shape)}")
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if bits == 4 and values.numel() and (int(values.min()) < -8 or int(values.max()) > 7):
        raise ValueError(f"values must lie in [-8, 7] for 4 bits, got {int(values.min())} .. {int(values.max())}")
    n, k = values.shape
    if sums is None:
        sums = values.sum(1, dtype=torch.int32)[None]
    padded = torch.nn.functional.pad(values, (0, -k % BLOCK))
    scale = scale.to(torch.float32).contiguous()
    if bits == 8:
        return KernelWeight(padded.contiguous(), scale, sums.to(torch.int32).contiguous(), 8, k)
    low, high = padded.view(torch.uint8).reshape(n, -1, 2, BLOCK // 2).unbind(2)
    packed = ((low & 0xF) | (high << 4)).reshape(n, -1)
    return KernelWeight(packed.contiguous(), scale / 16, (16 * sums).to(torch.int32).contiguous(), 4, k)
