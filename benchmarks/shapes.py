"""The layers that take the time in real UNets at batch 2 (CIFAR-10: batch 16), and how often a pass has each."""

from __future__ import annotations

from typing import NamedTuple


class Gemm(NamedTuple):
    """A linear layer: [m, k] x [k, n]; with ``geglu``, n counts values and gates."""

    model: str
    count: int
    m: int
    n: int
    k: int
    geglu: bool = False


class Conv(NamedTuple):
    """A 3x3 convolution, stride 1, padding 1, of ``size`` x ``size`` pixels."""

    model: str
    count: int
    batch: int
    cin: int
    cout: int
    size: int

    @property
    def m(self) -> int:
        """Rows of the implicit product: output pixels of the batch."""
        return self.batch * self.size**2

    @property
    def k(self) -> int:
        """Its inner size."""
        return 9 * self.cin


class Image(NamedTuple):
    """What a GroupNorm reads."""

    model: str
    batch: int
    channels: int
    size: int


GEMMS = (
    Gemm("sdxl", 372, 2048, 1280, 1280),
    Gemm("sdxl", 60, 2048, 10240, 1280),
    Gemm("sdxl", 60, 2048, 1280, 5120),
    Gemm("sdxl", 10, 8192, 5120, 640),
    Gemm("sdxl", 60, 2048, 10240, 1280, geglu=True),
    Gemm("sd15", 16, 8192, 320, 320),
    Gemm("sd15", 16, 512, 1280, 1280),
)
CONVS = (
    Conv("sdxl", 10, 2, 1280, 1280, 32),
    Conv("sdxl", 7, 2, 320, 320, 128),
    Conv("sdxl", 6, 2, 640, 640, 64),
    Conv("sd15", 7, 2, 320, 320, 64),
    Conv("sd15", 7, 2, 1280, 1280, 16),
    Conv("sd15", 6, 2, 640, 640, 32),
    Conv("sd15", 11, 2, 1280, 1280, 8),
    Conv("cifar10", 9, 16, 128, 128, 32),
    Conv("cifar10", 9, 16, 256, 256, 16),
    Conv("cifar10", 9, 16, 256, 256, 8),
    Conv("cifar10", 9, 16, 256, 256, 4),
)
NORMS = tuple(
    Image("sdxl", 2, channels, size)
    for channels, size in ((320, 128), (960, 128), (640, 64), (1920, 64), (1280, 32), (2560, 32))
)
ROWS = ((8192, 640), (2048, 1280))  # tokens x features of SDXL's LayerNorms
SWEEP_ROWS = tuple(2**i for i in range(5, 16))  # of a product with 1280 x 1280 weights
SWEEP_BATCHES = (1, 2, 4, 8, 16, 32)  # of a 640-channel convolution at 32 x 32 pixels
