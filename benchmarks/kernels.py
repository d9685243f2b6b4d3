"""The engine's kernels at shapes of real UNets: on a CPU beside torch in float32 and bfloat16, on a GPU its libraries.

python -m benchmarks.kernels                  all rows, written to benchmarks/results/cpu-kernels.json
python -m benchmarks.kernels --device cuda    the same for the GPU: benchmarks/results/h200-kernels.json on an H200
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import results_file
from qdiff_engine import ops
from qdiff_engine.measuring import interleaved, summary, thread_count

RESULTS = "cpu-kernels.json"
COLUMNS = (
    "name", "shape", "precision", "median_ms", "p05_ms", "p95_ms", "tops", "gbps", "baseline", "baseline_ms", "speedup",
)  # fmt: skip
CONVOLUTIONS = ((8, 128, 128, 32), (8, 256, 256, 16), (8, 512, 256, 16), (8, 256, 256, 8), (2, 320, 320, 64))
GEMMS = ((2048, 256, 256), (2048, 320, 320), (2048, 1280, 1280), (512, 1280, 5120))  # M, N, K
IMAGES = ((8, 128, 32), (8, 256, 32), (8, 256, 16), (2, 320, 64))  # batch, channels, pixels a side
SCALE, ZERO_POINT = 0.02, 3
_SETS = 3


@dataclass(frozen=True)
class Case:
    """A kernel at one shape: the engine's call, float baselines, and what one call computes and moves."""

    name: str
    shape: str
    run: Callable[[int], Tensor]
    baselines: dict[str, Callable[[int], Tensor]]
    operations: float  # multiplications and additions; 0 where memory is what counts
    bytes: float  # read and written once


def _images(batch: int, channels: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    images = [torch.randn(batch, channels, size, size) for _ in range(_SETS)]
    return [image.contiguous(memory_format=torch.channels_last).to(dtype) for image in images]


def _integers(x: Tensor) -> Tensor:
    return ops.quantize(x, SCALE, ZERO_POINT, 8, storage=ops.storage())


def _bytes(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def convolution(batch: int, cin: int, cout: int, size: int, bits: int) -> Case:
    """3x3, stride 1, padding 1, with bias. The bits of the weights change their storage, not the CPU's kernel."""
    limit = 127 if bits == 8 else 7
    values = torch.randint(-limit, limit + 1, (cout, cin, 3, 3), dtype=torch.int8)
    weight_scale, bias = torch.rand(cout) * 1e-3 + 1e-4, torch.randn(cout)
    packed = ops.pack_conv2d(values, weight_scale, padding=(1, 1, 1, 1))
    floats = _images(batch, cin, size)
    q = [_integers(x) for x in floats]
    weight = (values.float() * weight_scale[:, None, None, None]).contiguous(memory_format=torch.channels_last)
    halves, weight_16, bias_16 = [x.bfloat16() for x in floats], weight.bfloat16(), bias.bfloat16()
    output = torch.empty(batch, cout, size, size)
    run = ops.resolve("int_conv2d")
    return Case(
        "int_conv2d_3x3",
        f"N{batch} C{cin} K{cout} {size}x{size}",
        lambda i: run([ops.Segment(q[i], packed, SCALE, ZERO_POINT)], bias),
        {
            "torch-fp32": lambda i: F.conv2d(floats[i], weight, bias, padding=1),
            "torch-bf16": lambda i: F.conv2d(halves[i], weight_16, bias_16, padding=1),
        },
        2.0 * output.numel() * cin * 9,
        _bytes(q[0], values, output),
    )


def gemm(m: int, n: int, k: int) -> Case:
    """A linear layer with bias."""
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    weight_scale, bias = torch.rand(n) * 1e-3 + 1e-4, torch.randn(n)
    packed = ops.pack_gemm(values, weight_scale)
    floats = [torch.randn(m, k) for _ in range(_SETS)]
    q = [_integers(x) for x in floats]
    weight = values.float() * weight_scale[:, None]
    halves, weight_16, bias_16 = [x.bfloat16() for x in floats], weight.bfloat16(), bias.bfloat16()
    run = ops.resolve("int_gemm")
    return Case(
        "int_gemm",
        f"M{m} N{n} K{k}",
        lambda i: run(q[i], packed, SCALE, ZERO_POINT, bias),
        {
            "torch-fp32": lambda i: F.linear(floats[i], weight, bias),
            "torch-bf16": lambda i: F.linear(halves[i], weight_16, bias_16),
        },
        2.0 * m * n * k,
        _bytes(q[0], values) + 4.0 * m * n,
    )


def groupnorm(batch: int, channels: int, size: int) -> Case:
    """GroupNorm of 32 groups, SiLU, and (the engine only) quantisation."""
    floats = _images(batch, channels, size)
    halves = [x.bfloat16() for x in floats]
    weight, bias = torch.randn(channels), torch.randn(channels)
    weight_16, bias_16 = weight.bfloat16(), bias.bfloat16()
    run, storage = ops.resolve("groupnorm_silu_quantize"), ops.storage()
    return Case(
        "groupnorm_silu_quantize",
        f"N{batch} C{channels} {size}x{size}",
        lambda i: run(floats[i], 32, weight, bias, 1e-5, SCALE, ZERO_POINT, 8, storage=storage),
        {
            "torch-fp32": lambda i: F.silu(F.group_norm(floats[i], 32, weight, bias, 1e-5)),
            "torch-bf16": lambda i: F.silu(F.group_norm(halves[i], 32, weight_16, bias_16, 1e-5)),
        },
        0.0,
        5.0 * floats[0].numel(),
    )


def quantizer(batch: int, channels: int, size: int) -> Case:
    """float32 to integers; the same arithmetic in torch's operators, in place where it can be, is the baseline."""
    floats = _images(batch, channels, size)
    run, storage = ops.resolve("quantize"), ops.storage()

    def in_torch(x: Tensor) -> Tensor:
        return (x * (1.0 / SCALE)).round_().add_(ZERO_POINT).clamp_(-128, 127).to(torch.int8)

    return Case(
        "quantize",
        f"N{batch} C{channels} {size}x{size}",
        lambda i: run(floats[i], SCALE, ZERO_POINT, 8, storage=storage),
        {"torch-fp32": lambda i: in_torch(floats[i])},
        0.0,
        5.0 * floats[0].numel(),
    )


def cases(quick: bool) -> Iterator[tuple[str, Case]]:
    """(precision, case), made one at a time to keep memory small."""
    count = 1 if quick else None
    for bits, precision in ((8, "w8a8"), (4, "w4a8")):
        for batch, cin, cout, size in CONVOLUTIONS[:count]:
            yield precision, convolution(batch, cin, cout, size, bits)
    for m, n, k in GEMMS[:count]:
        yield "w8a8", gemm(m, n, k)
    for make in (groupnorm, quantizer):
        for batch, channels, size in IMAGES[:count]:
            yield "a8", make(batch, channels, size)


def check(case: Case) -> None:
    """The integer result must resemble the float one before either is timed."""
    result = case.run(0)
    if not result.is_floating_point():
        return
    expected = case.baselines["torch-fp32"](0)
    error = float((result - expected).norm() / expected.norm())
    if not error < 0.1:
        raise ValueError(f"{case.name} {case.shape} is {error:.2g} (relative L2) from float: not timed")


def measure(precision: str, case: Case, rounds: int) -> list[dict[str, Any]]:
    """One row per baseline."""
    check(case)
    times = interleaved({"engine": case.run, **case.baselines}, rounds, sets=_SETS, warm_up=5)
    engine = summary(times["engine"])
    median = engine["median"]
    common = {
        "name": case.name,
        "shape": case.shape,
        "precision": precision,
        "median_ms": median,
        "p05_ms": engine["p05"],
        "p95_ms": engine["p95"],
        "tops": round(case.operations / median / 1e9, 3) if case.operations else None,
        "gbps": round(case.bytes / median / 1e6, 2),
    }
    rows = []
    for name in case.baselines:
        baseline = summary(times[name])["median"]
        rows.append(common | {"baseline": name, "baseline_ms": baseline, "speedup": round(baseline / median, 3)})
    return rows


def main() -> int:
    """The command; exit status 1 where a GPU's section went wrong."""
    parser = results_file.arguments(__doc__, RESULTS)
    results_file.device_arguments(parser)
    parser.add_argument("--repetitions", type=int, default=50, help="timed rounds")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.device == "cuda":
        from benchmarks import gpu_sections

        return gpu_sections.main(options, "kernels", gpu_sections.kernel_sections)
    with thread_count(options.threads), torch.inference_mode():
        machine = results_file.machine()
        rounds = 3 if options.quick else options.repetitions
        rows = [row for precision, case in cases(options.quick) for row in measure(precision, case, rounds)]
    results_file.show("CPU kernels", rows, COLUMNS)
    results_file.finish(options, RESULTS, "kernels", machine, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
