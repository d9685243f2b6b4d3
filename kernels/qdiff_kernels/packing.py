"""How the product kernels want their operands: K-major, weights padded to whole blocks, 4 bits as "split halves".

Two 4-bit values share a byte. A block of 64 along K takes 32 bytes; byte j holds k = j in its low nibble and k = j + 32
in its high one, so that a kernel gets two runs of 32 by a shift and by a mask. It keeps each nibble in the high half of
an int8, 16 times its value: the weight sums carry the 16 and the scales 1/16, both exactly. Activations of mode A4 may
be packed in the same way (uint8, where the plain ones are int8); there the kernel's epilogue takes out the 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64


class KernelWeight(NamedTuple):
    """A weight [N, K] as the kernels read it."""

    values: Tensor  # int8 [N, K'], or uint8 [N, K' / 2] split halves; K' = K rounded up to whole blocks of 64
    scale: Tensor  # float32 [N], or [G, N] with one for each of G groups along K
    sums: Tensor  # int32 [classes, N]: sum over K of the values as the kernel sees them, by border class; or by group
    bits: int
    k: int  # before padding

    @property
    def rows(self) -> int:
        """N."""
        return self.scale.shape[-1]

    @property
    def group(self) -> int:
        """How many of K share a scale; 0: all of them."""
        return 0 if self.scale.dim() == 1 else self.k // self.scale.shape[0]


def pack(values: Tensor, scale: Tensor, bits: int, sums: Tensor | None = None) -> KernelWeight:
    """A `KernelWeight` on the device of ``values``.

    Args:
        values: int8 [N, K].
        scale: float32 [N], or [N, G] for G groups along K, each a multiple of 64.
        bits: 8, or 4 for values in [-8, 7].
        sums: int32 [classes, N] by border class; the sum over all of K, or over each group, by default.
    """
    if values.dtype != torch.int8 or values.dim() != 2:
        raise TypeError(f"values must be int8 [N, K], got {values.dtype} {list(values.shape)}")
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if bits == 4 and values.numel() and (int(values.min()) < -8 or int(values.max()) > 7):
        raise ValueError(f"values must lie in [-8, 7] for 4 bits, got {int(values.min())} .. {int(values.max())}")
    n, k = values.shape
    groups = 1 if scale.dim() == 1 else scale.shape[1]
    if groups > 1 and k % (groups * BLOCK):
        raise ValueError(f"groups along K = {k} must be multiples of {BLOCK}, got {groups} groups")
    if groups > 1 and sums is not None:
        raise ValueError("sums by border class are for convolutions, whose scale is [N]")
    if sums is None:
        sums = values.reshape(n, groups, k // groups).sum(2, dtype=torch.int32).t()
    padded = torch.nn.functional.pad(values, (0, -k % BLOCK))
    scale = scale.to(torch.float32).t().contiguous() if groups > 1 else scale.to(torch.float32).contiguous()
    if bits == 8:
        return KernelWeight(padded.contiguous(), scale, sums.to(torch.int32).contiguous(), 8, k)
    return KernelWeight(pack_rows(values), scale / 16, (16 * sums).to(torch.int32).contiguous(), 4, k)


def pack_rows(values: Tensor) -> Tensor:
    """int8 [..., K] in [-8, 7] -> uint8 [..., packed_width(K)], two to a byte; 0 past the end."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % BLOCK)).view(torch.uint8)
    low, high = padded.unflatten(-1, (-1, 2, BLOCK // 2)).unbind(-2)
    return ((low & 0xF) | (high << 4)).flatten(-2).contiguous()


def unpack_rows(packed: Tensor, k: int) -> Tensor:
    """The inverse of `pack_rows` for rows of ``k`` values."""
    bytes_ = packed.unflatten(-1, (-1, BLOCK // 2))
    nibbles = torch.stack((bytes_ & 0xF, bytes_ >> 4), -2).flatten(-3)
    return ((nibbles ^ 8).view(torch.int8) - 8)[..., :k]


def packed_width(k: int) -> int:
    """Bytes of a packed row of ``k`` values."""
    return -(-k // BLOCK) * (BLOCK // 2)
