"""The corrections that decide, at 50 steps: DDIM with eta 0 and 1, the contestants of benchmarks.gates.

python -m benchmarks.more_steps    256 images, one seed, written to benchmarks/results/quality-ddim50-mnist32.json
"""

from __future__ import annotations

import sys

from benchmarks import sections
from benchmarks.fidelity import Setting
from benchmarks.gates import CORRECTED, MIXED

RESULTS = "quality-ddim50-mnist32.json"
COLUMNS = (
    "section", "weights", "activations", "plan", "steps", "eta", "correction", "seed", "psnr_db", "latent_error",
    "frechet_to_float", "class_accuracy", "calibration_seconds",
)  # fmt: skip
SEED = 1  # of the images


def plan(quick: bool) -> list[sections.Section]:
    """One section for every eta."""

    def section(eta: float) -> sections.Section:
        def measure() -> sections.Rows:
            return Setting(eta, quick, steps=50).rows(CORRECTED + MIXED, 2 if quick else 256, SEED)

        return sections.Section(f"eta {eta:g} seed {SEED}", measure, seconds=1500)

    found = [section(eta) for eta in (0.0, 1.0)]
    return found[:1] if quick else found


if __name__ == "__main__":
    sys.exit(sections.command(__doc__, plan, RESULTS, "quality", "DDIM 50 of the bundled model", COLUMNS))
