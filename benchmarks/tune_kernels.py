"""What `tune` runs on the GPU: the product kernels with a given launch, checked against the default one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from qdiff_kernels.int_conv2d import Geometry, Segment, int_conv2d, pack_order
from qdiff_kernels.int_gemm import int_gemm
from qdiff_kernels.packing import pack
from qdiff_kernels.tiles import Launch
from torch import Tensor

from benchmarks.gpu_kernels import PRECISIONS, activations, integers, quantization
from benchmarks.shapes import Conv, Gemm
from benchmarks.timing import cache_bytes, set_count, times
from qdiff_engine import numerics

Runner = Callable[[int, Launch | None], Tensor]  # (input set, launch)


def runner(shape: Gemm | Conv, precision: str, device: torch.device, sets: int) -> Runner:
    """The kernel at a shape, on random operands, with bias and float16 out."""
    weight_bits, bits = PRECISIONS[precision]
    return (_conv if isinstance(shape, Conv) else _gemm)(shape, weight_bits, bits, device, sets)  # type: ignore[operator]


def _gemm(shape: Gemm, weight_bits: int, bits: int, device: torch.device, sets: int) -> Runner:
    x, at = activations((shape.m, shape.k), bits, device, sets), quantization(device)
    scale, bias = torch.rand(shape.n, device=device) * 1e-3, torch.randn(shape.n, device=device)
    weights = [pack(integers((shape.n, shape.k), weight_bits, device), scale, weight_bits) for _ in range(sets)]
    return lambda i, launch: int_gemm(x[i], weights[i], at, bias, launch=launch)


def _conv(shape: Conv, weight_bits: int, bits: int, device: torch.device, sets: int) -> Runner:
    size = (shape.size, shape.size)
    x, at = activations((shape.batch, shape.cin, *size), bits, device, sets), quantization(device)
    scale, bias = torch.rand(shape.cout, device=device) * 1e-3, torch.randn(shape.cout, device=device)
    segments = []
    for image in x:
        values = integers((shape.cout, shape.cin, 3, 3), weight_bits, device)
        classes = numerics.border_classes(values.cpu(), size, (1, 1), (1, 1, 1, 1), (1, 1))
        packed = pack(pack_order(values), scale, weight_bits, classes.sums.to(device))
        segments.append(Segment(image, packed, at))
    index, geometry = classes.index.flatten().to(torch.int32).to(device), Geometry((3, 3), padding=(1, 1, 1, 1))
    return lambda i, launch: int_conv2d([segments[i]], geometry, index, bias, launch=launch)


def compile_one(job: tuple[Gemm | Conv, str, Launch]) -> None:
    """Run a kernel once in a process of its own, which leaves it in Triton's cache."""
    shape, precision, launch = job
    device = torch.device("cuda")
    try:
        runner(shape, precision, device, 1)(0, launch)
        torch.cuda.synchronize(device)
    except Exception as error:  # `times_of` meets it again, and leaves the launch out
        print(f"{launch}: {type(error).__name__}")


def times_of(
    shape: Gemm | Conv, precision: str, options: Sequence[Launch], device: torch.device, rounds: int
) -> dict[Launch, float]:
    """Median milliseconds of every launch that runs.

    Raises:
        ValueError: a launch gives another result than the default one.
    """
    n = shape.n if isinstance(shape, Gemm) else shape.cout
    moved = shape.m * shape.k / (9 if isinstance(shape, Conv) else 1) + n * shape.k + 2 * shape.m * n
    sets = min(16, set_count(moved, cache_bytes(device)))
    run = runner(shape, precision, device, sets)
    expected = run(0, None)
    found: dict[Launch, float] = {}
    for launch in options:
        try:
            y = run(0, launch)
        except Exception as error:  # Triton's own types for "does not fit" differ between versions
            print(f"{shape} {launch}: {type(error).__name__}, no candidate")
            continue
        if not torch.equal(y, expected):
            raise ValueError(f"{launch} gives another result than the default launch")
        contestants: dict[str, Any] = {"it": lambda i, launch=launch: run(i, launch)}
        timed, absent = times(contestants, sets, rounds, device)
        if not absent:
            found[launch] = timed["it"]["median"]
    return found
