"""Result files: one JSON schema for all benchmarks, written whole, and printed as a table.

A file is ``{"machine": {...}, "rows": [...]}``; a row has the keys of its kind in `KEYS`, and may have more.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
CHANGED = "+changes"  # after a commit whose sources were edited
MACHINE_KEYS = ("torch", "triton", "date", "commit")  # and "cpu" or "gpu"
KEYS = {
    "kernels": (
        "name", "shape", "precision", "median_ms", "p05_ms", "p95_ms", "tops", "gbps", "baseline", "baseline_ms",
        "speedup",
    ),
    "unet": (
        "model", "batch", "precision", "backend", "median_ms", "p05_ms", "p95_ms", "peak_memory_bytes", "weight_bytes",
        "gbops", "speedup",
    ),
    "quality": (
        "model", "weights", "activations", "plan", "eta", "correction", "alignment", "seed", "psnr_db", "ssim",
        "latent_error", "frechet_to_float", "gbops", "calibration_seconds",
    ),
    "sweep": (
        "name", "shape", "precision", "median_ms", "p05_ms", "p95_ms", "tops", "gbps", "baseline", "baseline_ms",
        "speedup",
    ),
    "tune": (
        "name", "shape", "precision", "arch", "m", "n", "k", "k_multiple", "count", "tile", "splits", "descriptors",
        "median_ms",
    ),
}  # fmt: skip
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm")


def machine(device: str = "cpu", commit: str | None = None) -> dict[str, Any]:
    """The machine and software that a run's figures belong to.

    Args:
        device: "cpu" or "cuda".
        commit: of the sources, where they are no git checkout.
    """
    return {
        **(_gpu() if device == "cuda" else {"cpu": _processor()}),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "openvino": _version("openvino"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or head(),
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def slug(gpu: str) -> str:
    """A GPU's name in file names: "NVIDIA H200" -> "h200", "NVIDIA GeForce RTX 4090" -> "rtx-4090"."""
    words = [word for word in re.split(r"[^a-z0-9]+", gpu.lower()) if word not in ("", "nvidia", "geforce", "tesla")]
    return "-".join(words) or "gpu"


def default_path(kind: str, device: str = "cpu") -> Path:
    """Where the rows of ``kind`` go: results/cpu-unet.json, results/h200-unet.json."""
    return RESULTS / f"{slug(torch.cuda.get_device_name()) if device == 'cuda' else 'cpu'}-{kind}.json"


def _processor() -> str:
    """Model name, number of cores and the instruction sets that matter here."""
    fields: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    found = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    if fields.get("cpu family"):  # virtual machines often hide the name, not the numbers
        model += f" (family {fields['cpu family']}, model {fields.get('model')})"
    return f"{model}, {os.cpu_count()} cores, {' '.join(f for f in _FEATURES if f in found) or 'no features listed'}"


def _version(package: str) -> str | None:
    return metadata.version(package) if importlib.util.find_spec(package) is not None else None


def head() -> str | None:
    """Hash of the checked-out commit, marked where the sources differ from it; None outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    found = git("rev-parse", "--verify", "HEAD")
    changed = git("status", "--porcelain", "--", "qdiff_engine", "csrc", "kernels")
    return f"{found}{CHANGED}" if found and changed else found


def write(
    path: Path, kind: str, machine_: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], quiet: bool = False
) -> None:
    """Check the document and put it in place as a whole."""
    document = {"machine": dict(machine_), "rows": [dict(row) for row in rows]}
    check(document, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    if not quiet:
        print(f"wrote {path}")


def kind_of_file(path: Path) -> str:
    """Which schema a result file has, from its name: cpu-unet.json, cpu-kernels.json, quality-mnist32.json."""
    kinds = [kind for kind in KEYS if kind in path.stem]
    if len(kinds) != 1:
        raise ValueError(f"{path.name}: its name must contain one of {', '.join(KEYS)}")
    return kinds[0]


def check(document: Any, kind: str) -> None:
    """Raise ValueError where ``document`` is not a result file of ``kind``."""
    if not isinstance(document, Mapping) or set(document) != {"machine", "rows"}:
        raise ValueError("a result file must be an object with the keys machine and rows")
    missing = [key for key in MACHINE_KEYS if key not in document["machine"]]
    if missing or not {"cpu", "gpu"} & set(document["machine"]):
        raise ValueError(f"machine lacks {', '.join(missing) or 'cpu or gpu'}")
    if not document["rows"]:
        raise ValueError("rows must not be empty")
    for i, row in enumerate(document["rows"]):
        missing = [key for key in KEYS[kind] if key not in row]
        if missing:
            raise ValueError(f"rows[{i}] lacks {', '.join(missing)}")


def show(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print ``rows`` as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console(width=160).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(item)}" for name, item in value.items())
    return "-" if value is None else str(value)


def arguments(description: str | None, results: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: few repetitions, few rows, nothing written")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: as torch chooses)")
    parser.add_argument("--out", type=Path, default=None, help=f"result file (default: benchmarks/results/{results})")
    return parser


def device_arguments(parser: argparse.ArgumentParser, default: str = "cpu") -> None:
    """The options of benchmarks that run section by section on a GPU."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="default: %(default)s")
    section_arguments(parser)


def section_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of benchmarks that run section by section, see `sections.run`."""
    parser.add_argument(
        "--budget-seconds", type=float, default=None, help="stop in time, between sections; the same command goes on"
    )
    parser.add_argument("--sections", default="", help="only sections whose name matches this regular expression")
    parser.add_argument("--afresh", action="store_true", help="forget the rows of an earlier run")
    parser.add_argument("--any-commit", action="store_true", help="go on with the rows of an earlier commit, too")
    parser.add_argument("--commit", default=None, help="of the sources, where they are no git checkout")


def finish(options: argparse.Namespace, results: str, kind: str, machine_: Mapping[str, Any], rows: list) -> None:
    """Write the rows, except those of a smoke run without --out."""
    if options.out is not None or not options.quick:
        write(options.out or RESULTS / results, kind, machine_, rows)
