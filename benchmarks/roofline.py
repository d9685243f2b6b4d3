"""A picture of a kernel result file: how near each kernel comes to what the machine can do.

python -m benchmarks.roofline benchmarks/results/h200-kernels.json --out roofline.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results_file

_MARKS = {"w8a8": "o", "w4a8": "s", "w4a4": "D", "w8a16": "^"}


class Point(NamedTuple):
    """One kernel at one shape."""

    name: str
    precision: str
    label: str
    intensity: float  # operations per byte
    tops: float
    share: float  # of the roof above it


class Bar(NamedTuple):
    """A kernel that multiplies nothing."""

    label: str
    gbps: float


def read(path: Path) -> tuple[dict[str, Any], list[Point], list[Bar]]:
    """(machine, products, memory-bound kernels) of a result file.

    Raises:
        ValueError: it is not a result file of kernels, or has no measured ceilings.
        OSError: it cannot be read.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    results_file.check(document, results_file.kind_of_file(path))
    limits = document["machine"].get("ceilings")
    if not isinstance(limits, Mapping) or not {"copy_gbps", "int8_tops", "fp16_tops"} <= set(limits):
        raise ValueError(f"{path}: machine.ceilings is missing; only results of a GPU have a roof")
    points: dict[tuple, Point] = {}
    bars: dict[tuple, Bar] = {}
    for row in document["rows"]:  # a kernel has one row per baseline
        key = (row["name"], row["shape"], row["precision"])
        if row["tops"]:
            intensity = 1e3 * row["tops"] / row["gbps"]
            share = row["tops"] / roof(intensity, limits, row["precision"])
            points[key] = Point(row["name"], row["precision"], row["shape"], intensity, row["tops"], share)
        elif "tops" in row:
            bars[key] = Bar(f"{row['name']}\n{row['shape']}", row["gbps"])
    return document["machine"], list(points.values()), list(bars.values())


def roof(intensity: float, limits: Mapping[str, float], precision: str) -> float:
    """min(peak, bandwidth x intensity) in TOPS, for ``intensity`` in operations per byte."""
    peak = limits["fp16_tops"] if precision.endswith("a16") else limits["int8_tops"]
    return min(peak, limits["copy_gbps"] * intensity / 1e3)


def draw(machine: Mapping[str, Any], points: list[Point], bars: list[Bar], out: Path) -> None:
    """Products under their roofs on the left; on the right the bandwidth of what multiplies nothing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    limits = machine["ceilings"]
    figure = Figure(figsize=(13, 6) if bars else (9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, width_ratios=(2, 1)) if bars else [figure.subplots()]
    _draw_roofs(axes[0], limits, points)
    names = sorted({point.name for point in points})
    for i, name in enumerate(names):
        for precision, mark in _MARKS.items():
            chosen = [p for p in points if (p.name, p.precision) == (name, precision)]
            if chosen:
                x, y = [p.intensity for p in chosen], [p.tops for p in chosen]
                axes[0].scatter(x, y, marker=mark, color=f"C{i}", label=f"{name} {precision}", alpha=0.8, zorder=3)
    axes[0].set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TOPS")
    axes[0].grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8, loc="lower right")
    if bars:
        ordered = sorted(bars, key=lambda bar: bar.gbps)
        axes[1].barh([bar.label for bar in ordered], [bar.gbps for bar in ordered], color="C7")
        axes[1].axvline(limits["copy_gbps"], color="black", linestyle="--")
        axes[1].set(xlabel="GB/s (dashed: a copy)")
        axes[1].tick_params(axis="y", labelsize=7)
    figure.suptitle(f"{machine.get('gpu') or machine.get('cpu')}, torch {machine['torch']}: kernels under the roof")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def _draw_roofs(axes: Any, limits: Mapping[str, float], points: list[Point]) -> None:
    """One roof per kind of arithmetic, from left of the points to right of them and of the ridge."""
    found = [point.intensity for point in points]
    for precision, name in (("w8a8", "int8"), ("w8a16", "float16")):
        ridge = 1e3 * roof(float("inf"), limits, precision) / limits["copy_gbps"]
        x = [min([*found, ridge]) / 2, ridge, max([*found, ridge]) * 2]
        y = [roof(value, limits, precision) for value in x]
        axes.plot(x, y, color="black", linestyle="-" if name == "int8" else ":", label=f"{name}, measured")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="a kernel result file of a GPU")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    options = parser.parse_args(arguments)
    try:
        machine, points, bars = read(options.results)
        draw(machine, points, bars, options.out)
    except (OSError, ValueError) as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 1
    for point in sorted(points, key=lambda p: p.share):
        print(f"{point.share:6.1%} of the roof: {point.name} {point.precision} {point.label}, {point.tops:.0f} TOPS")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
