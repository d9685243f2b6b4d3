"""The corrections that decide, at 50 steps: DDIM with eta 0 and 1, 256 images, the contestants of benchmarks.gates.

python -m benchmarks.more_steps    one section per eta and seed, written to
                                   benchmarks/results/quality-ddim50-mnist32.json
"""

from __future__ import annotations

import functools
import sys

from benchmarks import sections
from benchmarks.fidelity import Setting
from benchmarks.gates import CORRECTED, MIXED, SEEDS

RESULTS = "quality-ddim50-mnist32.json"
COLUMNS = (
    "section", "weights", "activations", "plan", "steps", "eta", "correction", "seed", "psnr_db", "latent_error",
    "frechet_to_float", "class_accuracy", "calibration_seconds",
)  # fmt: skip


def plan(quick: bool) -> list[sections.Section]:
    """One section per seed and eta; the first seed of both before the others."""
    setting = functools.cache(lambda eta: Setting(eta, quick, steps=50))

    def section(eta: float, seed: int) -> sections.Section:
        def measure() -> sections.Rows:
            return setting(eta).rows(CORRECTED + MIXED, 2 if quick else 256, seed)

        return sections.Section(f"eta {eta:g} seed {seed}", measure, seconds=1500)

    found = [section(eta, seed) for seed in SEEDS for eta in (0.0, 1.0)]
    return found[:1] if quick else found


if __name__ == "__main__":
    sys.exit(sections.command(__doc__, plan, RESULTS, "quality", "DDIM 50 of the bundled model", COLUMNS))
