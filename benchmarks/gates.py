"""The comparisons that decide: 2,048 images, three seeds, DDIM 20, each method beside what it has to beat.

python -m benchmarks.gates    one section per setting and seed, written to benchmarks/results/quality-gates-mnist32.json
"""

from __future__ import annotations

import functools
import sys

from benchmarks import sections
from benchmarks.fidelity import BEST, Contestant, Setting

RESULTS = "quality-gates-mnist32.json"
COLUMNS = (
    "section", "weights", "activations", "rounding", "alignment", "correction", "seed", "psnr_db", "latent_error",
    "frechet_to_float", "class_accuracy", "calibration_seconds",
)  # fmt: skip
SEEDS = (1, 2, 3)  # of the images; calibration draws from seed 0, the noise is measured on seed 10,000
CORRECTED = [Contestant(precision, method) for precision in ("w4a4", "w4a8", "w8a8") for method in ("none", BEST)]
MIXED = [Contestant("w4a8-mixed", method) for method in ("none", BEST)]  # at 90 % of W4A8's BOPs
LEARNT_A8 = [Contestant("w4a8", weights="nearest"), Contestant("w4a8", weights="adaround", align="accuquant:5")]
LEARNT_A4 = [Contestant("w4a4", weights="adaround", align=align) for align in ("none", "accuquant:10")]


def plan(quick: bool) -> list[sections.Section]:
    """Corrections of the default recipes and of the plan, then what learning gains, seed by seed."""
    setting = functools.cache(lambda: Setting(0.0, quick))

    def section(name: str, contestants: list[Contestant], seed: int) -> sections.Section:
        images = 2 if quick else 2048
        return sections.Section(f"{name} seed {seed}", lambda: setting().rows(contestants, images, seed), seconds=1500)

    groups = {"corrections": CORRECTED, "plan": MIXED, "learning at A8": LEARNT_A8, "learning at A4": LEARNT_A4}
    found = [section(name, contestants, seed) for name, contestants in groups.items() for seed in SEEDS]
    return found[:1] if quick else found


if __name__ == "__main__":
    sys.exit(sections.command(__doc__, plan, RESULTS, "quality", "Gates of the bundled model", COLUMNS))
