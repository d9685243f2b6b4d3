"""How the distance to the float latents grows over the denoising steps: one line per contestant of a quality file.

python -m benchmarks.latent_errors benchmarks/results/quality-reconstruction-mnist32.json --out latent-errors.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results_file

_LABEL = (
    "rounding", "weight_group", "plan", "equalise", "step_sizes", "alignment", "align_rounding", "pairs", "learn_pairs",
    "correction",
)  # fmt: skip
_PLAIN = {
    "weight_group": 0,
    "plan": "uniform",
    "equalise": "off",
    "step_sizes": "observed",
    "alignment": "none",
    "align_rounding": "fixed",
    "pairs": "every",
    "learn_pairs": "every",
    "correction": "none",
}


def label(row: Mapping[str, Any]) -> str:
    """What is special about a row: "gptq, accuquant:5, mmse"; the seed of its images is not."""
    named = {
        "weight_group": f"groups of {row.get('weight_group')}",
        "equalise": "equalised",
        "step_sizes": "learnt steps",
        "align_rounding": "rounding along",
    }
    return ", ".join(named.get(key, str(row[key])) for key in _LABEL if key in row and row[key] != _PLAIN.get(key))


def panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows with errors by step, by their precision, eta and number of steps.

    Raises:
        ValueError: no row has any.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("latent_errors"):
            precision = f"W{row['weights'].removeprefix('int')}{row['activations'].upper()}"
            name = f"{precision}, eta {row['eta']:g}, {len(row['latent_errors'])} steps"
            found.setdefault(name, []).append(row)
    if not found:
        raise ValueError("no row has latent_errors; benchmarks.corrections, .reconstruction and .gates write them")
    return found


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The errors by step of every contestant, the mean over its seeds."""
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        found.setdefault(label(row), []).append(row["latent_errors"])
    return {name: [sum(step) / len(step) for step in zip(*runs, strict=True)] for name, runs in found.items()}


def draw(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """One panel per precision and eta."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found = panels(rows)
    figure = Figure(figsize=(8 * len(found), 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (panel, own) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for i, (name, errors) in enumerate(curves(own).items()):
            line = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3], "label": name}
            axes.plot(range(1, len(errors) + 1), errors, **line)
        axes.set(title=panel, xlabel="denoising steps done", ylabel="|x - x_hat| / |x|", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="a quality result file")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    options = parser.parse_args(arguments)
    try:
        document = json.loads(options.results.read_text(encoding="utf-8"))
        results_file.check(document, "quality")
        draw(document["rows"], options.out)
    except (OSError, ValueError) as error:
        print(f"latent_errors: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
