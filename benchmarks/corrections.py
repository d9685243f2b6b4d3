"""What correcting the quantisation noise gains on the bundled model: every method, with eta 0 and 1, DDIM 20.

python -m benchmarks.corrections    sections "sweep ..." (256 images, one seed) and "gate ..." (2,048 images, three
seeds: no correction beside the best one), written to benchmarks/results/quality-corrections-mnist32.json
"""

from __future__ import annotations

import functools
import sys

from benchmarks import sections
from benchmarks.fidelity import UNCLAMPED, Contestant, Setting

RESULTS = "quality-corrections-mnist32.json"
COLUMNS = (
    "section", "weights", "activations", "plan", "eta", "correction", "seed", "psnr_db", "ssim", "latent_error",
    "frechet_to_float", "class_accuracy",
)  # fmt: skip
PRECISIONS = ("w8a8", "w4a8", "w4a4", "w4a8-mixed")
METHODS = ("none", "ptqd", f"ptqd{UNCLAMPED}", "mmse", "ner", "ner+ibc")
WITH_VARIANCE = ("none+vsc", "ptqd+vsc", f"ptqd+vsc{UNCLAMPED}", "mmse+vsc", "ner+ibc+vsc")  # acts with eta > 0 only
GATE_SEEDS = (1, 2, 3)  # of the images; calibration draws from seed 0, the noise is measured on seed 10,000


def plan(quick: bool) -> list[sections.Section]:
    """Sweeps first, gates last."""
    setting = functools.cache(lambda eta: Setting(eta, quick))
    samples, gate_samples = (2, 2) if quick else (256, 2048)

    def section(name: str, eta: float, contestants: list[Contestant], count: int, seed: int) -> sections.Section:
        return sections.Section(name, lambda: setting(eta).rows(contestants, count, seed), seconds=600)

    found = []
    for eta in (0.0, 1.0):
        methods = METHODS + (WITH_VARIANCE if eta else ())
        for precision in PRECISIONS:
            contestants = [Contestant(precision, method) for method in methods]
            found.append(section(f"sweep eta {eta:g} {precision}", eta, contestants, samples, 1))
    for seed in GATE_SEEDS:
        contestants = [Contestant(precision, method) for precision in PRECISIONS for method in ("none", "mmse")]
        found.append(section(f"gate seed {seed}", 0.0, contestants, gate_samples, seed))
    return found[:1] if quick else found


if __name__ == "__main__":
    sys.exit(sections.command(__doc__, plan, RESULTS, "quality", "Corrections of the bundled model", COLUMNS))
