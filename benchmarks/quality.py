"""Fidelity of the integer models to the bundled float network: same seeds, DDIM 50 steps, eta 0, 32 images.

python -m benchmarks.quality    all rows, written to benchmarks/results/quality-mnist32.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import qdiff_engine as qe
from benchmarks import results_file
from qdiff_engine.evaluation import Comparison, compare_all
from qdiff_engine.measuring import thread_count
from qdiff_engine.models import ddim, demo_model

RESULTS = "quality-mnist32.json"
COLUMNS = (
    "weights", "activations", "rounding", "weight_group", "equalise", "observer", "rows", "edges", "psnr_db",
    "psnr_db_min", "ssim", "latent_error", "gbops", "gbops_ratio", "quantization_seconds",
)  # fmt: skip
SEED = 1  # of the images; the calibration draws from seed 0, so no image was calibrated on
PRECISIONS = ("w8a8", "w4a8", "w4a4", "w8a16")
CHANGES = (  # one choice at a time; what is a recipe's default already is left out
    {"observer": "minmax"},
    {"observer": "percentile"},
    {"rows": "group:5"},
    {"rows": "static"},
    {"edges": "a8"},
    {"weights": "nearest"},
    {"weights": "gptq"},
    {"weight_group": 64},
    {"equalise": "on"},
)


def recipes(quick: bool) -> Iterator[qe.Recipe]:
    """The defaults of every precision, then each change to those with integer activations."""
    for name in PRECISIONS[: 1 if quick else None]:
        default = qe.Recipe.named(name)
        yield default
        if default.activation_bits < 16 and not quick:
            changed = (qe.Recipe.named(name, **change) for change in CHANGES)
            yield from (recipe for recipe in changed if recipe != default)


def row(recipe: qe.Recipe, model: qe.IntegerUNet, result: Comparison, seconds: dict[str, float]) -> dict[str, Any]:
    """One row of the result file; a stage that was not run is "none", a measure that was not taken None."""
    bops = qe.count_bops(model)
    return {
        "model": "mnist32",
        "weights": f"int{recipe.weight_bits}",
        "activations": f"a{recipe.activation_bits}",
        "rounding": recipe.weights,
        "weight_group": recipe.weight_group,
        "equalise": recipe.equalise,
        "plan": recipe.plan,
        "observer": recipe.observer,
        "rows": recipe.rows,
        "edges": recipe.edges,
        "eta": 0.0,
        "correction": "none",
        "alignment": "none",
        "seed": SEED,
        "steps": len(result.timesteps),
        "samples": result.samples,
        "psnr_db": round(result.psnr_db, 3),
        "psnr_db_min": round(result.psnr_db_min, 3),
        "ssim": round(sum(result.ssim) / result.samples, 5),
        "latent_error": round(result.latent_error[-1], 6),
        "step_sqnr_db_min": round(min(result.step_sqnr_db), 3) if result.step_sqnr_db else None,
        "frechet_to_float": result.perception.frechet_to_float,
        "gbops": round(bops.total / 1e9, 4),
        "gbops_ratio": round(bops.ratio, 2),
        **seconds,
    }


def measure(quick: bool) -> list[dict[str, Any]]:
    """All rows: one calibration and one float trajectory serve every recipe."""
    demo = demo_model()
    scheduler, steps, samples = ddim(demo.scheduler), 3 if quick else 50, 2 if quick else 32
    start = time.perf_counter()
    calibration = qe.calibrate(demo.unet, scheduler, steps=steps, samples=2 * samples, seed=0)
    calibrated = time.perf_counter() - start
    print(f"calibrated in {calibrated:.1f} s", file=sys.stderr)
    asked, models, seconds = list(recipes(quick)), {}, {}
    for recipe in asked:
        start = time.perf_counter()
        models[str(recipe)] = qe.quantize(demo.unet, calibration, recipe)
        seconds[str(recipe)] = round(time.perf_counter() - start, 2)
    results = compare_all(models, demo.unet, scheduler, steps=steps, samples=samples, seed=SEED)
    spent = {
        name: {"calibration_seconds": round(calibrated, 2), "quantization_seconds": s} for name, s in seconds.items()
    }
    return [row(recipe, models[str(recipe)], results[str(recipe)], spent[str(recipe)]) for recipe in asked]


def main() -> None:
    """The command."""
    options = results_file.arguments(__doc__, RESULTS).parse_args()
    with thread_count(options.threads):
        machine = results_file.machine()
        rows = measure(options.quick)
    results_file.show("Fidelity to float, bundled model", rows, COLUMNS)
    results_file.finish(options, RESULTS, "quality", machine, rows)


if __name__ == "__main__":
    main()
