"""What only a GPU's kernels read and write: packed 4-bit activations, statistics for a GroupNorm, packed weights.

Two 4-bit values to a byte halve what moves between kernels. Such a tensor has the dtype `PACKED`, and bytes in the
features' place. The kernels' own forms are those of `qdiff_kernels.packing` and `qdiff_kernels.group_statistics`.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .operands import ConvWeight, GemmWeight

PACKED = torch.int4  # type: ignore[attr-defined]  # missing from its stubs


def packed_width(features: int) -> int:
    """Bytes of a row of 4-bit values that is stored `PACKED`."""
    return importlib.import_module("qdiff_kernels.packing").packed_width(features)


def packs(features: int, whole: bool = False) -> bool:
    """Whether rows of ``features`` 4-bit values get shorter; ``whole``: and hold nothing else, as images must."""
    width = packed_width(features)
    return 2 * width == features if whole else width < features


def statistics_for(images: int, channels: int, pixels: int, device: torch.device) -> Tensor | None:
    """Memory for the statistics that a product writes beside its result; None where it is better to read that again.

    float32 [images, chunks, 2, channels]: mean and squared deviations of every chunk of pixels.
    """
    return importlib.import_module("qdiff_kernels.group_statistics").statistics_for(images, channels, pixels, device)


def keep_packed(weight: GemmWeight | ConvWeight) -> None:
    """Leave on the device only the form of a weight that its kernels read; for weights that nobody else holds."""
    importlib.import_module(f"{__package__}.triton_kernels").keep_packed(weight)
