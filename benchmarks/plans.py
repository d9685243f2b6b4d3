"""Plans of the bundled model: least final error under a budget, the SNR rule, chance, uniform precision.

python -m benchmarks.plans    all rows, written to benchmarks/results/quality-plans-mnist32.json (DDIM 20, 256 images)
"""

from __future__ import annotations

import random
import sys
import time
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
ASKED = (
    (4, "uniform"),  # A8
    (4, "budget:0.5:A4"),
    (4, "budget:0.6:A4,A8"),
    (4, "snr:share=0.8"),
    (4, "random:0.8"),
    (4, "budget:0.6"),
    (4, "budget:0.9:A4,A8"),
    (4, "snr:share=0.2"),
    (4, "random:0.2"),
    (8, "uniform"),
    (8, "budget:1.2:A8,A16"),
)


def plan_of(name: str, rows: int) -> str | tuple[str, ...]:
    """A recipe's plan; "random:SHARE" draws that share of the rows at A4."""
    kind, _, share = name.partition(":")
    if kind != "random":
        return name
    chosen = set(random.Random(0).sample(range(rows), round(float(share) * rows)))
    return tuple("A4" if r in chosen else "A8" for r in range(rows))


def measure(quick: bool) -> list[dict[str, Any]]:
    """All rows: one calibration and one float trajectory serve every plan."""
    demo = demo_model()
    scheduler, steps, samples = ddim(demo.scheduler), 4 if quick else 20, 2 if quick else 256
    start = time.perf_counter()
    calibration = qe.calibrate(demo.unet, scheduler, steps=steps, samples=2 if quick else 64, seed=0)
    calibrated = round(time.perf_counter() - start, 2)
    models, spent = {}, {}
    for bits, name in ASKED[:4] if quick else ASKED:
        start = time.perf_counter()
        recipe = qe.Recipe(weight_bits=bits, plan=plan_of(name, steps))
        models[bits, name] = qe.quantize(demo.unet, calibration, recipe)
        spent[bits, name] = round(time.perf_counter() - start, 2)
        print(f"w{bits} {name}: {spent[bits, name]} s", file=sys.stderr, flush=True)
    named = {str(key): model for key, model in models.items()}
    results = compare_all(named, demo.unet, scheduler, steps=steps, samples=samples, seed=1, batch=32)
    rows = []
    for key, model in models.items():
        result, modes = results[str(key)], model.table.modes
        seconds = {"calibration_seconds": calibrated, "quantization_seconds": spent[key]}
        rows.append(
            {
                **row(model.recipe, model, result, seconds),
                "plan": key[1],
                "modes": " ".join(mode[1:] for mode in modes),
                "switchable_fraction": switchable_fraction(modes),
                "frechet_note": result.perception.frechet_note,
                "class_accuracy": result.perception.class_accuracy,
            }
        )
    return rows


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
