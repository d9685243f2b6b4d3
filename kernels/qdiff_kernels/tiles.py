"""Tile choices: data per architecture, and the pure function that picks from them."""

from __future__ import annotations

import math
from typing import NamedTuple


class Tile(NamedTuple):
    """One program's share of the output, and how the compiler schedules it."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# shared memory one block may have, in bytes (CUDA C++ programming guide, table of compute capabilities)
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}  # of the largest part

# Largest first: the first one that keeps the multiprocessors busy is taken. None of them spills a register in any
# kernel (tests/compile); which one is fastest has not been measured on a GPU yet.
TILES = {
    80: (Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4), Tile(64, 64, 64, 8, 3)),
    86: (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 8, 3)),
    89: (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 8, 3)),
    90: (Tile(128, 128, 128, 8, 4), Tile(128, 64, 128, 4, 4), Tile(64, 64, 128, 4, 4)),
    100: (Tile(128, 64, 128, 8, 4), Tile(64, 64, 128, 4, 4)),
    120: (Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 8, 3)),
}
# beside them, larger ones: floating activations would need more shared memory than there is
INTEGER_TILES = {90: (Tile(128, 256, 128, 8, 4),)}
# The same for operands that the tensor memory accelerator copies: no thread computes an address.
DESCRIPTOR_TILES = {
    90: (
        Tile(128, 256, 128, 8, 4),
        Tile(128, 128, 128, 8, 4),
        Tile(64, 128, 128, 4, 4),
        Tile(64, 64, 128, 4, 4),
    ),
    100: (
        Tile(128, 256, 128, 8, 3),
        Tile(128, 128, 128, 8, 4),
        Tile(128, 64, 128, 8, 4),
        Tile(64, 64, 128, 4, 4),
    ),
    120: (Tile(128, 128, 128, 8, 3), Tile(128, 64, 128, 4, 3), Tile(64, 64, 128, 4, 3)),
}
NARROW = Tile(128, 16, 64, 4, 4)  # outputs of at most 16 channels: the last convolution
FLOAT32 = Tile(64, 32, 64, 8, 2)  # float32 activations take four bytes a value, and three products of parts of them
FLOAT32_PACKING = Tile(32, 64, 64, 8, 2)  # the same where the result is two values to a byte: 64 columns at least
INTERPRETED = Tile(128, 128, 256, 1, 1)  # the interpreter's time goes by programs and blocks, not by elements
GROUP_M = 8  # tiles of neighbouring rows that run together and share the weights in the L2 cache
DESCRIPTOR_ALIGNMENT = 16  # bytes, of addresses and strides
MAX_CHUNK = 64  # rows whose statistics are written together: no tile of a table is lower
_MAX_SPLITS = 16


class Launch(NamedTuple):
    """A tile, in how many parts the K axis is cut, and whether tensor descriptors or pointers read the operands."""

    tile: Tile
    splits: int
    descriptors: bool = False


def architecture(capability: tuple[int, int]) -> int:
    """The architecture of `TILES` that serves a compute capability: its own, or the newest one before it.

    Raises:
        ValueError: older than 8.0, which has no asynchronous copies and too small a shared memory.
    """
    found = 10 * capability[0] + capability[1]
    served = [known for known in TILES if known <= found]
    if not served:
        raise ValueError(f"compute capability must be at least 8.0, got {capability[0]}.{capability[1]}")
    return max(served)


def choose(
    arch: int, m: int, n: int, k: int, multiprocessors: int | None = None, *, k_multiple: int = 0, alignment: int = 0,
    statistics: bool = False,
) -> Launch:  # fmt: skip
    """The launch of an [m, k] x [k, n] product on an architecture of `TILES`.

    The largest tile that fills three quarters of the multiprocessors; if none does, the smallest, with K cut into parts
    of at least four blocks. Where ``k_multiple`` is given (a convolution's channels), and block_k does not divide it,
    block_k is 64.

    Args:
        arch: a key of `TILES`.
        multiprocessors: of the GPU at hand; the largest part of the architecture by default.
        alignment: of every row of integer operands in bytes, 1 where only pointers can read them; 0 for floating ones.
            Descriptors read rows aligned to 16 bytes, on the architectures that have them.
        statistics: written beside the output; with pointers, the registers for them rule out `INTEGER_TILES`.
    """
    units = multiprocessors or MULTIPROCESSORS[arch]
    descriptors = arch in DESCRIPTOR_TILES and alignment > 0 and alignment % DESCRIPTOR_ALIGNMENT == 0 and n > 16
    table = DESCRIPTOR_TILES[arch] if descriptors else TILES[arch]
    if alignment and not descriptors and not statistics:
        table = INTEGER_TILES.get(arch, ()) + table
    candidates = (NARROW,) if n <= 16 else tuple(tile for tile in table if tile.block_n <= max(64, _ceil_power(n)))
    tile = candidates[-1]
    for candidate in candidates:
        if 4 * _tiles(m, n, candidate) >= 3 * units:
            tile = candidate
            break
    if k_multiple % tile.block_k:
        tile = tile._replace(block_k=64)
    blocks = -(-k // tile.block_k)
    splits = 1
    while splits < _MAX_SPLITS and 2 * splits * _tiles(m, n, tile) <= units and blocks // (2 * splits) >= 4:
        splits *= 2
    return Launch(tile, splits, descriptors)


def paired(tile: Tile) -> Tile:
    """The tile for a program with two accumulators: half as wide and with more warps, so that registers hold both."""
    return tile._replace(block_n=min(tile.block_n, 64), warps=8) if tile.block_n > 32 else tile


def grouped(tile: Tile, group: int) -> Tile:
    """The tile for weights whose groups of K have their own scales: room for a second accumulator, whole blocks."""
    return paired(tile)._replace(block_k=math.gcd(tile.block_k, group))


def _tiles(m: int, n: int, tile: Tile) -> int:
    return -(-m // tile.block_m) * -(-n // tile.block_n)


def _ceil_power(n: int) -> int:
    return 1 << (n - 1).bit_length()
