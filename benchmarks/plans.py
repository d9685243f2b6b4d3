"""Plans of the bundled model: least final error under a budget, the SNR rule, chance, uniform precision.

python -m benchmarks.plans    all rows, written to benchmarks/results/quality-plans-mnist32.json (DDIM 20, 256 images)

"row:R" runs one row alone at A4, on images of their own: what each step's precision is worth, for the same image (PSNR)
and for images as good (Fréchet distance). "frechet:SHARE" has that share of rows at A4, where it cost the latter least.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import qdiff_engine as qe
from benchmarks import results_file
from benchmarks.quality import row
from qdiff_engine.evaluation import compare_all
from qdiff_engine.measuring import thread_count
from qdiff_engine.models import ddim, demo_model
from qdiff_engine.plan_requests import switchable_fraction

RESULTS = "quality-plans-mnist32.json"
COLUMNS = (
    "weights", "plan", "modes", "switchable_fraction", "psnr_db", "ssim", "latent_error", "frechet_to_float",
    "class_accuracy", "gbops", "quantization_seconds",
)  # fmt: skip
ASKED = (  # (recipe, plan)
    ("w4a8", "uniform"),
    ("w4a4", "uniform"),
    ("w4a8", "budget:0.6:A4,A8"),
    ("w4a8", "snr:share=0.8"),
    ("w4a8", "random:0.8"),
    ("w4a8", "frechet:0.8"),
    ("w4a8", "budget:0.9:A4,A8"),
    ("w4a8", "snr:share=0.2"),
    ("w4a8", "random:0.2"),
    ("w4a8", "frechet:0.2"),
    ("w8a8", "uniform"),
    ("w8a8", "budget:1.2:A8,A16"),
)


SEED, ROW_SEED = 1, 2  # of the images


def plan_of(name: str, rows: int, worth: Sequence[int] = ()) -> str | tuple[str, ...]:
    """A recipe's plan; "random:SHARE", "frechet:SHARE" and "row:R" name the rows at A4.

    ``worth``: the rows, those first that should be at A4 first.
    """
    kind, _, value = name.partition(":")
    if kind == "row":
        chosen = {int(value)}
    elif kind == "random":
        chosen = set(random.Random(0).sample(range(rows), round(float(value) * rows)))
    elif kind == "frechet":
        chosen = set(worth[: round(float(value) * rows)])
    else:
        return name
    return tuple("A4" if r in chosen else "A8" for r in range(rows))


class Plans:
    """The bundled model under one sampler: one calibration and one rounding of the weights serve every plan."""

    def __init__(self, quick: bool, cache: Path) -> None:
        demo, self.cache = demo_model(), cache
        self.unet, self.scheduler, self.steps = demo.unet, ddim(demo.scheduler), 4 if quick else 20
        self.samples = 2 if quick else 256
        start = time.perf_counter()
        self.calibration = qe.calibrate(demo.unet, self.scheduler, steps=self.steps, samples=2 if quick else 64, seed=0)
        self.calibrated = round(time.perf_counter() - start, 2)

    def rows(self, asked: Sequence[tuple[str, str]], seed: int, worth: Sequence[int] = ()) -> list[dict[str, Any]]:
        """One row for each (recipe, plan); all share one float trajectory."""
        models, spent = {}, {}
        for key in asked:
            start = time.perf_counter()
            recipe = qe.Recipe.named(key[0], plan=plan_of(key[1], self.steps, worth))
            models[key] = qe.quantize(self.unet, self.calibration, recipe, cache_dir=self.cache / key[0])
            spent[key] = round(time.perf_counter() - start, 2)
            print(f"{' '.join(key)}: {spent[key]} s", file=sys.stderr, flush=True)
        named = {str(key): model for key, model in models.items()}
        settings: dict[str, Any] = {"steps": self.steps, "samples": self.samples, "seed": seed}
        results = compare_all(named, self.unet, self.scheduler, batch=32, step_sqnr=False, **settings)
        return [
            {
                **row(model.recipe, model, results[str(key)], {"calibration_seconds": self.calibrated}),
                "quantization_seconds": spent[key],
                "plan": key[1],
                "seed": seed,
                "modes": " ".join(mode[1:] for mode in model.table.modes),
                "switchable_fraction": switchable_fraction(model.table.modes),
                "frechet_note": results[str(key)].perception.frechet_note,
                "class_accuracy": results[str(key)].perception.class_accuracy,
            }
            for key, model in models.items()
        ]


def measure(quick: bool) -> list[dict[str, Any]]:
    """Single rows first, then the plans, one of which follows from them."""
    with tempfile.TemporaryDirectory() as folder:
        plans = Plans(quick, Path(folder))
        singles = plans.rows([("w4a8", f"row:{r}") for r in range(plans.steps)], ROW_SEED)
        costs = [single["frechet_to_float"] or 0.0 for single in singles]
        worth = sorted(range(plans.steps), key=costs.__getitem__)
        return plans.rows(ASKED[:4] if quick else ASKED, SEED, worth) + singles


def main() -> None:
    """The command."""
    options = results_file.arguments(__doc__, RESULTS).parse_args()
    with thread_count(options.threads):
        machine = results_file.machine()
        rows = measure(options.quick)
    results_file.show("Plans of the bundled model", rows, COLUMNS)
    results_file.finish(options, RESULTS, "quality", machine, rows)


if __name__ == "__main__":
    main()
