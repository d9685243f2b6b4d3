"""Which kernels are measured on a GPU, in sections, and the command around them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch

from benchmarks import ceilings, gpu_kernels, results_file, sections, shapes
from benchmarks.ceilings import Ceilings
from benchmarks.gpu_kernels import PRECISIONS, Case
from benchmarks.sections import Section

COLUMNS = (
    "name", "shape", "precision", "median_ms", "p05_ms", "p95_ms", "tops", "gbps", "share_of_peak", "baseline",
    "baseline_ms", "speedup",
)  # fmt: skip
_KERNEL_SECONDS, _QUICK = 20.0, 4
SectionMaker = Callable[[Ceilings, int, torch.device], list[Section]]


def _section(name: str, make: Callable[[], Case], limits: Ceilings, rounds: int, device: torch.device) -> Section:
    return Section(name, lambda: gpu_kernels.measure(make(), limits, rounds, device), _KERNEL_SECONDS)


def kernel_sections(limits: Ceilings, rounds: int, device: torch.device) -> list[Section]:
    """Every shape of `shapes` in every precision; W8A8, which matters most, first."""
    made = []
    for precision in PRECISIONS:
        for gemm in shapes.GEMMS:
            label = f"{'int_gemm_geglu' if gemm.geglu else 'int_gemm'} M{gemm.m} N{gemm.n} K{gemm.k} {precision}"
            make = lambda g=gemm, p=precision: gpu_kernels.gemm_case(g, p, device)  # noqa: E731
            made.append(_section(label, make, limits, rounds, device))
        for conv in shapes.CONVS:
            label = f"int_conv2d_3x3 N{conv.batch} C{conv.cin} K{conv.cout} {conv.size}x{conv.size} {precision}"
            make = lambda c=conv, p=precision: gpu_kernels.conv_case(c, p, device)  # noqa: E731
            made.append(_section(label, make, limits, rounds, device))
        if precision == "w8a8":
            made += _norm_sections(limits, rounds, device)
    return made


def _norm_sections(limits: Ceilings, rounds: int, device: torch.device) -> list[Section]:
    made = []
    for image in shapes.NORMS:
        label = f"groupnorm_silu_quantize N{image.batch} C{image.channels} {image.size}x{image.size}"
        make = lambda i=image: gpu_kernels.groupnorm_case(i, device)  # noqa: E731
        made.append(_section(label, make, limits, rounds, device))
    for rows, features in shapes.ROWS:
        make = lambda r=rows, f=features: gpu_kernels.layernorm_case(r, f, device)  # noqa: E731
        made.append(_section(f"layernorm_quantize M{rows} K{features}", make, limits, rounds, device))
    return made


def sweep_sections(limits: Ceilings, rounds: int, device: torch.device) -> list[Section]:
    """One product over its rows, one convolution over its batch: where integers begin to win, and what that costs."""
    made = []
    for precision in ("w8a8", "w4a8"):
        for m in shapes.SWEEP_ROWS:
            gemm = shapes.Gemm("sweep", 1, m, 1280, 1280)
            make = lambda g=gemm, p=precision: gpu_kernels.gemm_case(g, p, device)  # noqa: E731
            made.append(_section(f"int_gemm M{m} {precision}", make, limits, rounds, device))
        for batch in shapes.SWEEP_BATCHES:
            conv = shapes.Conv("sweep", 1, batch, 640, 640, 32)
            make = lambda c=conv, p=precision: gpu_kernels.conv_case(c, p, device)  # noqa: E731
            made.append(_section(f"int_conv2d_3x3 N{batch} {precision}", make, limits, rounds, device))
    return made


def main(options: Namespace, kind: str, make: SectionMaker) -> int:
    """Ceilings, then the sections, then the table; 1 where a section went wrong."""
    start = sections.time.monotonic()
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no NVIDIA GPU here")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cudnn.benchmark = True
    machine = results_file.machine("cuda", options.commit)
    limits = ceilings.measure(device)
    machine["ceilings"] = limits._asdict()
    print(f"{machine['gpu']}: {limits}")
    path = options.out or (None if options.quick else results_file.default_path(kind, "cuda"))
    rounds = 5 if options.quick else options.repetitions
    todo = make(limits, rounds, device)
    with torch.no_grad():
        rows, wrong = sections.run(todo[:_QUICK] if options.quick else todo, options, kind, machine, path, start=start)
    results_file.show(f"{machine['gpu']}, {kind}", rows, COLUMNS)
    for line in wrong:
        print(f"went wrong: {line}")
    return 1 if wrong else 0
