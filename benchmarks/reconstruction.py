"""What learning the weights' rounding and the step sizes gains on the bundled model, DDIM 20.

python -m benchmarks.reconstruction    sections "sweep ..." (256 images, one seed) and "gate ..." (2,048 images, three
seeds), written to benchmarks/results/quality-reconstruction-mnist32.json
"""

from __future__ import annotations

import dataclasses
import functools
import sys

from benchmarks import sections
from benchmarks.fidelity import Contestant, Setting

RESULTS = "quality-reconstruction-mnist32.json"
COLUMNS = (
    "section", "weights", "activations", "rounding", "equalise", "alignment", "correction", "seed", "psnr_db",
    "latent_error", "frechet_to_float", "class_accuracy", "calibration_seconds",
)  # fmt: skip
PRECISIONS = ("w4a8", "w4a4")
GROUPS = (1, 2, 5, 10)
CORRECTION = "mmse"
GATE_SEEDS = (1, 2, 3)  # of the images; calibration draws from seed 0


def rounded(precision: str, weights: str) -> list[Contestant]:
    """Rounding alone, then behind channel equalisation."""
    return [Contestant(precision, weights=weights, equalise=equalise) for equalise in ("off", "on")]


def aligned(precision: str, weights: str) -> list[Contestant]:
    """Every group size."""
    return [Contestant(precision, weights=weights, align=f"accuquant:{group}") for group in GROUPS]


def corrected(contestants: list[Contestant]) -> list[Contestant]:
    """Each contestant without and with the best correction."""
    return [c for one in contestants for c in (one, dataclasses.replace(one, correction=CORRECTION))]


def plan(quick: bool) -> list[sections.Section]:
    """Sweeps first, the cheap ones before the dear ones; gates last."""
    setting = functools.cache(lambda: Setting(0.0, quick))
    samples, gate_samples = (2, 2) if quick else (256, 2048)

    def section(name: str, contestants: list[Contestant], count: int, seed: int) -> sections.Section:
        return sections.Section(name, lambda: setting().rows(contestants, count, seed), seconds=600)

    found = []
    for precision in PRECISIONS:
        plain = rounded(precision, "nearest") + rounded(precision, "gptq")
        found.append(section(f"sweep {precision} rounded", corrected(plain), samples, 1))
        found.append(section(f"sweep {precision} aligned", corrected(aligned(precision, "gptq")), samples, 1))
    for precision in PRECISIONS:
        learnt = rounded(precision, "adaround")[:1] + aligned(precision, "adaround")
        found.append(section(f"sweep {precision} learnt", corrected(learnt), samples, 1))
    for seed in GATE_SEEDS:
        contestants = [
            Contestant(precision, weights=weights, align=align)
            for precision in PRECISIONS
            for weights, align in (("nearest", "none"), ("adaround", "none"), ("adaround", "accuquant:5"))
        ]
        found.append(section(f"gate seed {seed}", contestants, gate_samples, seed))
    return found[:2] if quick else found


if __name__ == "__main__":
    sys.exit(sections.command(__doc__, plan, RESULTS, "quality", "Reconstruction of the bundled model", COLUMNS))
