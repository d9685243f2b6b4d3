"""quantize: q[..., k] = clamp(round_half_even(activation(x[..., k]) * inv) + z), inv = float32(inv_s * inv_c[k]).

Nearest upsampling and a border of value z are written in the same pass. The fused norms share the checks, the block
sizes and `source_pixels`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .accumulate import low_column
from .arithmetic import ASSEMBLY, gelu, gelu_tanh, paired_nibbles, quantize_value, silu
from .packing import packed_width

ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "geglu")
FLOATING = (torch.float16, torch.bfloat16, torch.float32)
Padding = tuple[int, int, int, int]


@triton.jit
def source_pixels(
    pixels, height, width, out_height, out_width, top, left, UPSAMPLE: tl.constexpr, PLACED: tl.constexpr
):
    """(pixel of x, whether it exists) for pixels of the upsampled and padded output, counted through the batch."""
    if not PLACED:
        return pixels, pixels >= 0
    else:
        column = pixels % out_width - left
        line = pixels // out_width
        row = line % out_height - top
        inside = (row >= 0) & (row < height * UPSAMPLE) & (column >= 0) & (column < width * UPSAMPLE)
        return (line // out_height * height + row // UPSAMPLE) * width + column // UPSAMPLE, inside


@triton.jit
def quantised_block(
    x, source, feature, features, inside, quantization, channel_inverse, ACTIVATION: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """q of the features [1, C] of rows that start at ``source`` [P, 1]; outside, what 0 quantises to."""
    # every activation of 0 is 0 and quantises to z, which is what the border holds
    inside &= feature < features
    if ACTIVATION == "geglu":
        at = x + 2 * source + feature
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        value *= gelu(tl.load(at + features, mask=inside, other=0.0).to(tl.float32))
    else:
        value = tl.load(x + source + feature, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        value = silu(value)
    elif ACTIVATION == "gelu":
        value = gelu(value)
    elif ACTIVATION == "gelu_tanh":
        value = gelu_tanh(value)
    inverse = tl.load(quantization + 1)
    if channel_inverse is not None:
        inverse = inverse * tl.load(channel_inverse + feature, mask=feature < features, other=0.0)
    zero_point = tl.load(quantization + 2).to(tl.int32)
    return quantize_value(value, inverse, zero_point, BITS, ASM)


@triton.jit
def _quantize_kernel(
    x,
    quantization,
    channel_inverse,
    out,
    pixels,
    features,
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    PLACED: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ASM: tl.constexpr,
):
    row = tl.cdiv(features, 64) * 32 if PACKED else features
    blocks = tl.cdiv(row, BLOCK_C)
    pixel = (tl.program_id(0) // blocks * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    column = (tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    source, inside = source_pixels(pixel, height, width, out_height, out_width, top, left, UPSAMPLE, PLACED)
    inside &= pixel < pixels
    source = source.to(tl.int64) * features
    feature = low_column(column) if PACKED else column
    q = quantised_block(
        x, source, feature, features, inside, quantization, channel_inverse, ACTIVATION, BITS, ASM
    )  # fmt: skip
    if PACKED:
        high = quantised_block(
            x, source, feature + 32, features, inside, quantization, channel_inverse, ACTIVATION, BITS, ASM
        )
        q = paired_nibbles(q, high, ASM)
    tl.store(out + pixel.to(tl.int64) * row + column, q, mask=(pixel < pixels) & (column < row))


def quantize(
    x: Tensor,
    quantization: Tensor,
    bits: int,
    *,
    activation: str = "none",
    channel_inverse: Tensor | None = None,
    upsample: int = 1,
    padding: Padding = (0, 0, 0, 0),
    packed: bool = False,
) -> Tensor:
    """q[..., k] = clamp(round_half_even(activation(x[..., k]) * inv) + z), inv = float32(inv_s * inv_c[k]).

    Args:
        x: float16, bfloat16 or float32; [N, C, H, W] with features along C, or any other rank with features last.
        quantization: float32 [3] on the device, (s, 1 / s, z).
        bits: 4 or 8.
        activation: "none", "silu", "gelu", "gelu_tanh", or "geglu": 2F features -> F, value * gelu(gate).
        channel_inverse: float32 [F], 1 / c of channel equalisation.
        upsample: integer factor of nearest-neighbour upsampling, 4-D only.
        padding: (top, bottom, left, right) pixels of value z around the (upsampled) image, 4-D only.
        packed: two values of 4 bits to a byte (`packing`).

    Returns:
        int8 [N, F, H', W'] channels_last, or [..., F] contiguous; packed: uint8, with packed_width(F) in F's place.

    Raises:
        TypeError, ValueError: an argument's type or shape; the message names it.
    """
    check_floating("x", x)
    check_quantization(quantization, bits, x.device)
    check_packed(packed, bits)
    check_placement(x, upsample, padding)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    rows = x.movedim(1, -1).contiguous() if x.dim() == 4 else x.contiguous()
    features = rows.shape[-1] if rows.dim() else 0
    if activation == "geglu":
        if features % 2:
            raise ValueError(f"x must have an even number of features for geglu, got {list(x.shape)}")
        features //= 2
    if not rows.dim() or (rows.numel() and not features):
        raise ValueError(f"x must have features along an axis, got {list(x.shape)}")
    check_vector("channel_inverse", channel_inverse, features, x.device, (torch.float32,))
    height, width = rows.shape[1:3] if x.dim() == 4 else (1, 1)
    out_height, out_width = placed_size(height, width, upsample, padding)
    row = packed_width(features) if packed else features
    shape = (len(rows), out_height, out_width, row) if x.dim() == 4 else (*rows.shape[:-1], row)
    out = torch.empty(shape, dtype=torch.uint8 if packed else torch.int8, device=x.device)
    if out.numel():
        pixels = out.numel() // row
        block_p, block_c = block_shape(pixels, row)
        grid = (triton.cdiv(pixels, block_p) * triton.cdiv(row, block_c),)
        _quantize_kernel[grid](
            rows, quantization, channel_inverse, out, pixels, features, height, width, out_height, out_width,
            padding[0], padding[2], ACTIVATION=activation, BITS=bits, UPSAMPLE=upsample,
            PLACED=upsample > 1 or any(padding), PACKED=packed, BLOCK_P=block_p, BLOCK_C=block_c, ASM=ASSEMBLY,
        )  # fmt: skip
    return out.movedim(-1, 1) if x.dim() == 4 else out


def block_shape(pixels: int, *features: int, elements: int = 2048) -> tuple[int, int]:
    """(pixels, features) of one program's block: about ``elements`` of them, few of them past the end.

    Args:
        features: the widths that blocks of features have to cover, each on its own.
    """
    padded = {block: sum(triton.cdiv(width, block) * block for width in features) for block in (256, 128, 64, 32)}
    block_c = min(padded, key=lambda block: (padded[block], -block))
    return min(max(elements // block_c, 1), max(triton.next_power_of_2(pixels), 512 // block_c)), block_c


def placed_size(height: int, width: int, upsample: int, padding: Padding) -> tuple[int, int]:
    """Height and width of an image after upsampling and padding."""
    return height * upsample + padding[0] + padding[1], width * upsample + padding[2] + padding[3]


def check_floating(name: str, x: Tensor) -> None:
    """Raises TypeError unless x is float16, bfloat16 or float32."""
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {x.dtype}")


def check_quantization(quantization: Tensor, bits: int, device: torch.device) -> None:
    """Raises unless quantization is float32 [3] on ``device`` and bits 4 or 8."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    check_vector("quantization", quantization, 3, device, (torch.float32,))


def check_packed(packed: bool, bits: int | None) -> None:
    """Raises ValueError where values other than 4-bit integers are to be packed; bits None: not quantised at all."""
    if packed and bits != 4:
        raise ValueError(f"packed needs a quantization with bits=4, got {'none' if bits is None else bits}")


def check_vector(
    name: str,
    values: Tensor | None,
    length: int,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
) -> None:
    """Raises unless values is None or a dense [length] of one of ``dtypes`` on ``device``."""
    if values is None:
        return
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if values.dtype not in dtypes:
        raise TypeError(f"{name} must be {wanted} [{length}], got {values.dtype}")
    if tuple(values.shape) != (length,) or (length > 1 and values.stride(0) != 1):
        raise ValueError(f"{name} must be dense [{length}], got {list(values.shape)} strided {values.stride()}")
    check_device(name, values, device)


def check_device(name: str, values: Tensor, device: torch.device) -> None:
    """Raises ValueError unless values is on ``device``."""
    if values.device != device:
        raise ValueError(f"{name} must be on {device} like x, got {values.device}")


def check_placement(x: Tensor, upsample: int, padding: Padding) -> None:
    """Raises ValueError unless upsample is a positive integer, padding four natural numbers, and x fits them."""
    if not isinstance(upsample, int) or upsample < 1:
        raise ValueError(f"upsample must be a positive integer, got {upsample!r}")
    if len(padding) != 4 or any(not isinstance(p, int) or p < 0 for p in padding):
        raise ValueError(f"padding must be (top, bottom, left, right), none of them negative, got {padding!r}")
    if x.dim() != 4 and (upsample > 1 or any(padding)):
        raise ValueError(f"x must be [N, C, H, W] to be upsampled or padded, got {list(x.shape)}")


def result_dtype(x: Tensor, quantization: Tensor | None, bits: int, out_dtype: torch.dtype | None) -> torch.dtype:
    """int8 with a quantization, else ``out_dtype`` or x's dtype; raises where the three do not fit together."""
    if quantization is None:
        if out_dtype not in (None, *FLOATING):
            raise TypeError(f"out_dtype must be float16, bfloat16 or float32, got {out_dtype}")
        return out_dtype or x.dtype
    check_quantization(quantization, bits, x.device)
    if out_dtype not in (None, torch.int8):
        raise TypeError(f"out_dtype must be None where a quantization is given, got {out_dtype}")
    return torch.int8


def check_eps(eps: float) -> None:
    """Raises ValueError unless eps is a finite number >= 0."""
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and at least 0, got {eps!r}")
