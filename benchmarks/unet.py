"""Forward passes of whole UNets: the integer engine beside torch and OpenVINO, in one run.

python -m benchmarks.unet            all rows, written to benchmarks/results/cpu-unet.json
python -m benchmarks.unet --profile  where the milliseconds go, by kind of instruction
python -m benchmarks.unet --device cuda    CIFAR-10, SD 1.5 and SDXL on a GPU: benchmarks/results/h200-unet.json
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

import qdiff_engine as qe
from benchmarks import models, results_file
from benchmarks.profiling import profile
from qdiff_engine.benchmarking import bench, input_sets
from qdiff_engine.measuring import thread_count

RESULTS = "cpu-unet.json"
COLUMNS = (
    "model", "batch", "precision", "backend", "median_ms", "p05_ms", "p95_ms", "integer_floor_ms", "speedup",
    "peak_memory_bytes", "weight_bytes", "gbops",
)  # fmt: skip


def row(name: str, precision: str, model: qe.IntegerUNet, result: dict[str, Any]) -> dict[str, Any]:
    """A result of `bench` as a row of the result file."""
    engine = result["engine_ms"]
    kept = (
        "integer_floor_ms", "floor_share", "baselines", "baselines_absent", "relative_error", "peak_memory_bytes",
        "baseline_peak_memory_bytes", "weight_bytes", "speedup", "threads", "repetitions",
    )  # fmt: skip
    return {
        "model": name,
        "parameters": "random",
        "batch": result["batch"],
        "precision": precision,
        "backend": result["device"],
        "median_ms": engine["median"],
        "p05_ms": engine["p05"],
        "p95_ms": engine["p95"],
        "gbops": round(qe.count_bops(model).total / 1e9, 3),
        "float_weight_bytes": None,
        **{key: result[key] for key in kept},
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every precision and batch size; the baselines are timed again beside each."""
    unet = models.cifar10_unet()
    float_bytes = sum(p.numel() * p.element_size() for p in unet.parameters())
    integer = models.quantized(unet, ["w8a8"] if options.quick else ["w8a8", "w4a8"])
    rows = []
    for precision, model in integer.items():
        for batch in (8,) if options.quick else (8, 1):
            repetitions = 3 if options.quick else options.repetitions
            result = bench(
                model, unet, batch=batch, repetitions=repetitions, threads=options.threads, memory=not options.quick
            )
            rows.append(row("cifar10", precision, model, result) | {"float_weight_bytes": float_bytes})
            print(f"cifar10 {precision} batch {batch}: {result['engine_ms']['median']:.1f} ms", file=sys.stderr)
    return rows


def show_profile(options: argparse.Namespace) -> None:
    """Print the time of every kind of instruction; with --threads 1 it is CPU time, steady on a busy machine."""
    (model,) = models.quantized(models.cifar10_unet(), [options.precision]).values()
    inputs = input_sets(model, options.batch, None, None)[0]
    single = torch.get_num_threads() == 1
    clock = time.thread_time if single else time.perf_counter
    rows = profile(model, inputs, 3 if options.quick else options.repetitions, clock)
    total = sum(line["ms"] for line in rows if line["share"] is not None)
    title = (
        f"cifar10 {options.precision} batch {options.batch} (random weights): {total:.1f} ms "
        f"{'of CPU time on one thread' if single else f'on {torch.get_num_threads()} threads'}"
    )
    results_file.show(title, rows, ("kind", "calls", "ms", "share"))


def main() -> int:
    """The command; exit status 1 where a GPU's section went wrong."""
    parser = results_file.arguments(__doc__, RESULTS)
    results_file.device_arguments(parser)
    parser.add_argument("--repetitions", type=int, default=20, help="timed rounds")
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead; nothing is written")
    parser.add_argument("--precision", default="w8a8", help="of --profile")
    parser.add_argument("--batch", type=int, default=8, help="of --profile")
    parser.add_argument(
        "--graphs", type=Path, default=None, help="of --device cuda: folder that keeps captured graphs between runs"
    )
    options = parser.parse_args()
    if options.device == "cuda":
        from benchmarks import gpu_unet

        return gpu_unet.main(options)
    with thread_count(options.threads):
        if options.profile:
            show_profile(options)
            return 0
        machine = results_file.machine()
        rows = measure(options)
    results_file.show("UNets (random weights)", rows, COLUMNS)
    for name, reason in rows[0]["baselines_absent"].items():
        print(f"not compared with {name}: {reason}")
    results_file.finish(options, RESULTS, "unet", machine, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
