"""The Triton products and norms on an NVIDIA GPU at the sizes of real UNets, which an interpreter cannot do.

References are float64 on the GPU itself. The same kernels at small and ugly sizes: tests/test_kernels_*.py, which use
the GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from qdiff_kernels.groupnorm_silu_quantize import groupnorm_silu_quantize
from qdiff_kernels.int_conv2d import Geometry, Segment, int_conv2d, pack_order
from qdiff_kernels.int_gemm import int_gemm
from qdiff_kernels.packing import pack
from torch import Tensor

from benchmarks import shapes
from qdiff_engine import numerics, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and there is none here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = [(8, 8), (4, 8), (4, 4)]  # of weights and activations
CHANNELS_LAST = torch.channels_last
ZERO_POINT = 5
GEMMS = sorted({(g.m, g.n, g.k) for g in shapes.GEMMS}) + [(2 * 77, 1280, 2048), (2, 1280, 320), (4096, 4, 2880)]


def integers(shape: tuple[int, ...], low: int, high: int) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8, device=DEVICE)


def quantization(scale: float) -> Tensor:
    return torch.tensor([scale, numerics.inverse_scale(scale), ZERO_POINT], device=DEVICE)


def assert_rounded_once(y: Tensor, exact: Tensor) -> None:
    """float16 of a value that float32 terms as large as the largest result leave uncertain."""
    allowed = exact.abs() * torch.finfo(torch.float16).eps / 2 + 1e-6 * float(exact.abs().max())
    assert y.dtype == torch.float16 and bool(((y.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("weight_bits, bits", BITS)
@pytest.mark.parametrize("m, n, k", GEMMS)
def test_int_gemm(m: int, n: int, k: int, weight_bits: int, bits: int) -> None:
    q = integers((m, k), *numerics.activation_range(bits))
    weight = integers((n, k), *numerics.weight_range(weight_bits))
    accumulators = (q.double() - ZERO_POINT) @ weight.double().t()
    y = int_gemm(q, pack(weight, torch.ones(n, device=DEVICE), weight_bits), quantization(1.0), out_dtype=torch.float32)
    assert torch.equal(y, accumulators.float()), "float32 rounds the exact accumulator once, if at all"
    scale, bias, residual = torch.rand(n, device=DEVICE) * 1e-3, torch.randn(n, device=DEVICE), torch.randn(m, n).half()
    residual = residual.to(DEVICE)
    y = int_gemm(q, pack(weight, scale, weight_bits), quantization(0.02), bias, residual=residual)
    assert_rounded_once(y, accumulators * (0.02 * scale.double()) + bias.double() + residual.double())


@pytest.mark.parametrize("weight_bits, bits", BITS)
@pytest.mark.parametrize("shape", shapes.CONVS, ids=lambda c: f"N{c.batch}-C{c.cin}-{c.size}")
def test_int_conv2d(shape: shapes.Conv, weight_bits: int, bits: int) -> None:
    n, c, size = shape.batch, shape.cin, shape.size
    q = integers((n, c, size, size), *numerics.activation_range(bits)).contiguous(memory_format=CHANNELS_LAST)
    weight = integers((shape.cout, c, 3, 3), *numerics.weight_range(weight_bits))
    scale, bias = torch.rand(shape.cout, device=DEVICE) * 1e-3, torch.randn(shape.cout, device=DEVICE)
    accumulators = F.conv2d(q.double() - ZERO_POINT, weight.double(), padding=1)
    classes = numerics.border_classes(weight.cpu(), (size, size), (1, 1), (1, 1, 1, 1), (1, 1))
    index = classes.index.flatten().to(torch.int32).to(DEVICE)
    sums = classes.sums.to(DEVICE)
    geometry, ones = Geometry((3, 3), padding=(1, 1, 1, 1)), torch.ones_like(scale)
    segment = Segment(q, pack(pack_order(weight), ones, weight_bits, sums), quantization(1.0))
    y = int_conv2d([segment], geometry, index, out_dtype=torch.float32)
    # float64 convolutions may be computed by transforms: their last digits are not exact, the integers they mean are
    assert torch.equal(y, accumulators.round().float())
    segment = Segment(q, pack(pack_order(weight), scale, weight_bits, sums), quantization(0.02))
    y = int_conv2d([segment], geometry, index, bias)
    exact = accumulators * (0.02 * scale.double())[:, None, None] + bias.double()[:, None, None]
    assert_rounded_once(y, exact)


@pytest.mark.parametrize("shape", shapes.NORMS, ids=lambda i: f"C{i.channels}-{i.size}")
def test_groupnorm_silu_quantize(shape: shapes.Image) -> None:
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, device=DEVICE).half()
    x = (x * 2 + 3).contiguous(memory_format=CHANNELS_LAST)
    weight, bias = (torch.randn(shape.channels, device=DEVICE).half() for _ in range(2))
    q = groupnorm_silu_quantize(x, 32, weight, bias, 1e-5, quantization(0.02))
    expected = reference.groupnorm_silu_quantize(x, 32, weight, bias, 1e-5, 0.02, ZERO_POINT, 8)
    steps = (q.int() - expected.int()).abs()
    assert int(steps.max()) <= 1 and float(steps.double().mean()) < 1e-3
