"""``qdiff doctor``: what this machine and this install offer, and what that means for integers."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from typing import Any

import click

from .options import Command, pass_output
from .output import Output

_FAST = {
    "amx_int8": "AMX multiplies 8-bit integers in tiles",
    "avx512_vnni": "AVX-512 VNNI multiplies 8-bit integers four at a time",
    "avx_vnni": "AVX-VNNI multiplies 8-bit integers four at a time",
    "dotprod": "the Arm dot-product instructions multiply 8-bit integers four at a time",
}


@click.command(cls=Command)
@pass_output
def doctor(output: Output) -> None:
    """Report versions, backends and processor features, and whether integers are fast here."""
    data = examine()
    output.result(data, lambda console: _show(console, data))


def examine() -> dict[str, Any]:
    """torch, triton, cuda, gpus, backends {name: {available, reason}}, cpu, extension, fast, verdict, gpu_verdict."""
    import torch

    from .. import ops
    from ..ops import extension

    built, reason = extension.available()
    features = extension.cpu_features() if built else {}
    backends = ops.backends()
    details = [_gpu(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]
    fast, verdict = judge(features, backends, "" if built else reason)
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "gpus": [gpu["name"] for gpu in details],
        "gpu_details": details,
        "backends": backends,
        "cpu": {
            "name": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "features": features,
        },
        "extension": {"built": built, "reason": reason},
        "chosen": {operator: ops.chosen(operator, "cpu") for operator in ("int_conv2d", "groupnorm_silu_quantize")},
        "fast": fast,
        "verdict": verdict,
        "gpu_verdict": judge_gpus(details, backends),
    }


def _gpu(properties: Any) -> dict[str, Any]:
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }


def judge_gpus(details: list[dict[str, Any]], backends: dict[str, dict[str, Any]]) -> str:
    """One sentence: whether models run on this machine's GPUs, and with what, or why not."""
    if not details:
        return "No NVIDIA GPU that torch sees; models run on the CPU."
    kernels = {name: backends[name] for name in ("triton", "cuda")}
    usable = [f"{name} ({status['reason']})" for name, status in kernels.items() if status["available"]]
    if usable:
        return f"--device cuda runs models, with {' and '.join(usable)}."
    return f"--device cuda cannot be used: {'; '.join(status['reason'] for status in kernels.values())}."


def judge(features: dict[str, bool], backends: dict[str, dict[str, Any]], trouble: str) -> tuple[bool, str]:
    """(whether integers run at full speed here, one sentence that says why)."""
    exact = backends["onednn"]["available"]
    if trouble:
        return False, f"Slower than it could be: {trouble}. Results are the same."
    reasons = [text for name, text in _FAST.items() if features.get(name)]
    if not exact:
        return False, f"Slow for integers, but exact: {backends['onednn']['reason']}; the engine's own kernels run."
    if not reasons:
        return False, "Slow for integers: this processor has no 8-bit dot products, though oneDNN is exact here."
    return True, f"Fast for integers: {reasons[0]}, through oneDNN, and the fused C++ kernels are built."


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _show(console: Any, data: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("backend", "available", "why", show_lines=False)
    table.columns[2].overflow = "fold"
    for name, status in data["backends"].items():
        table.add_row(name, "yes" if status["available"] else "no", status["reason"])
    cpu = data["cpu"]
    features = ", ".join(name for name, present in cpu["features"].items() if present) or "none known"
    console.print(f"torch {data['torch']}, triton {data['triton'] or 'absent'}, CUDA {data['cuda'] or 'none'}")
    for gpu in data["gpu_details"]:
        facts = f"compute capability {gpu['capability']}, {gpu['memory_bytes'] / 1e9:.0f} GB"
        console.print(f"GPU: {gpu['name']}, {facts}, {gpu['multiprocessors']} multiprocessors", soft_wrap=True)
    console.print(data["gpu_verdict"], soft_wrap=True)
    console.print(f"CPU: {cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads; {features}", soft_wrap=True)
    console.print(table)
    console.print(data["verdict"], soft_wrap=True)
