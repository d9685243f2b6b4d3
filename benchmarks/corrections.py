"""What correcting the quantisation noise gains on the bundled model: every method, with eta 0 and 1, DDIM 20.

python -m benchmarks.corrections    256 images, one seed, written to benchmarks/results/quality-corrections-mnist32.json
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
PRECISIONS = ("w4a4", "w4a8-mixed", "w4a8")
METHODS = ("none", "ptqd", f"ptqd{UNCLAMPED}", "mmse", "ner", "ner+ibc", "ner+ibc+ivc", "mmse+ibc+ivc")
WITH_VARIANCE = ("none+vsc", "ptqd+vsc", "mmse+vsc", "ner+ibc+ivc+vsc")  # acts with eta > 0 only
SEED = 1  # of the images; calibration draws from seed 0, the noise is measured on seed 10,000


def plan(quick: bool) -> list[sections.Section]:
    """One section for every eta and precision."""
    setting = functools.cache(lambda eta: Setting(eta, quick))

    def section(eta: float, precision: str) -> sections.Section:
        methods = METHODS + (WITH_VARIANCE if eta else ())
        contestants = [Contestant(precision, method) for method in methods]
        name = f"eta {eta:g} {precision}"
        return sections.Section(name, lambda: setting(eta).rows(contestants, 2 if quick else 256, SEED), seconds=600)

    found = [section(eta, precision) for eta in (0.0, 1.0) for precision in PRECISIONS]
    return found[:1] if quick else found


if __name__ == "__main__":
    sys.exit(sections.command(__doc__, plan, RESULTS, "quality", "Corrections of the bundled model", COLUMNS))
