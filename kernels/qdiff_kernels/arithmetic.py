"""Rounding, quantising and activation functions inside kernels.

A quantised tensor comes with its *quantization*, float32 [3] on the device: (s, float32(1 / s), z). Kernels read it
from memory, so that one captured CUDA graph serves every row of the table. ``ASM`` is the constexpr that lets a kernel
use inline assembly; the interpreter has none, and takes the plain branch, which gives the same integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

ASSEMBLY = not triton.knobs.runtime.interpret  # what launchers pass as ASM


@triton.jit
def round_half_even(x, ASM: tl.constexpr):
    """The integer nearest to float32 x, ties to the even one, as int32; |x| < 2^31."""
    if ASM:
        return tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
    below = tl.floor(x)
    rest = x - below  # exact
    integer = below.to(tl.int32)
    return integer + ((rest > 0.5) | ((rest == 0.5) & (integer % 2 != 0))).to(tl.int32)


@triton.jit
def quantize_value(x, inverse, zero_point, BITS: tl.constexpr, ASM: tl.constexpr):
    """q = clamp(round_half_even(x * inverse) + z, -2^(b-1), 2^(b-1) - 1) as int8; x and inverse float32, z int32.

    The product is clamped before it is rounded: the bounds are integers, so the result is the same and fits an int32.
    """
    low: tl.constexpr = -(1 << (BITS - 1))
    high: tl.constexpr = (1 << (BITS - 1)) - 1
    bounded = tl.minimum(tl.maximum(x * inverse, (low - zero_point).to(tl.float32)), (high - zero_point).to(tl.float32))
    q = round_half_even(bounded, ASM) + zero_point
    if ASM:  # two saturating packs instead of a shift and a permute for every byte
        return tl.inline_asm_elementwise(
            "{ .reg .b32 high; cvt.pack.sat.s8.s32.b32 high, $4, $3, 0; cvt.pack.sat.s8.s32.b32 $0, $2, $1, high; }",
            "=r,r,r,r,r",
            [q],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return q.to(tl.int8)


@triton.jit
def paired_nibbles(low, high, ASM: tl.constexpr):
    """Two int8 values in [-8, 7] as one uint8: low in its lower half, high in its upper one."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 low, high; and.b32 low, $1, 0x0F0F0F0F; shl.b32 high, $2, 4; "
            "and.b32 high, high, 0xF0F0F0F0; or.b32 $0, low, high; }",
            "=r,r,r",
            [low, high],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    return ((low & 0xF) | (high << 4)).to(tl.uint8, bitcast=True)


@triton.jit
def silu(x):
    """x / (1 + exp(-x)) of float32 x."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x):
    """x (1 + erf(x / sqrt 2)) / 2 of float32 x."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """x (1 + tanh(u)) / 2 = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3), of float32 x."""
    u = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))
