"""What learning the weights' rounding and the step sizes gains on the bundled model, DDIM 20, and W4A4 with DDIM 50.

python -m benchmarks.reconstruction    256 images, one seed, written to
                                        benchmarks/results/quality-reconstruction-mnist32.json
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

from benchmarks import sections
from benchmarks.fidelity import BEST, Contestant, Setting

RESULTS = "quality-reconstruction-mnist32.json"
COLUMNS = (
    "section", "weights", "activations", "rounding", "weight_group", "equalise", "step_sizes", "alignment",
    "align_rounding", "pairs", "learn_pairs", "correction", "steps", "psnr_db", "latent_error", "frechet_to_float",
    "class_accuracy", "confident_share", "confident_accuracy", "calibration_seconds", "calibration_memory_bytes",
)  # fmt: skip
PRECISIONS = ("w4a8", "w4a4")
GROUPS = (1, 2, 5, 10)
LEARN_PAIRS = ("every", "uniform:260", "gaussian:260", "density:260")  # "every" is 256 of them
AGAIN = (252, 256, 264, 268)  # other counts draw other pairs: what chance does
PAIRS = ("every", "uniform:160", "gaussian:160", "density:160")  # of 1,280 (x_t, t); as many iterations on each
SEED = 1  # of the images; calibration draws from seed 0


def rounded(precision: str, weights: str) -> list[Contestant]:
    """Rounding alone, with scales for groups of inputs, and behind channel equalisation."""
    changes: tuple[dict[str, Any], ...] = ({}, {"weight_group": 64}, {"equalise": "on"})
    return [Contestant(precision, weights=weights, **change) for change in changes]


def aligned(precision: str) -> list[Contestant]:
    """Learnt rounding, then every group size."""
    return [Contestant(precision, weights="adaround", align=f"accuquant:{group}") for group in GROUPS]


def rounding_along(precision: str) -> list[Contestant]:
    """Rounding learnt along with alignment, from GPTQ's integers and from AdaRound's."""
    starts = (("gptq", 5), ("adaround", 5), ("adaround", 10))
    return [
        Contestant(precision, weights=weights, align=f"accuquant:{group}", align_rounding="along")
        for weights, group in starts
    ]


def corrected(contestants: list[Contestant]) -> list[Contestant]:
    """Each contestant without and with the best correction."""
    return [c for one in contestants for c in (one, dataclasses.replace(one, correction=BEST))]


def plan(quick: bool) -> list[sections.Section]:
    """The cheap ones before the dear ones."""
    setting = functools.cache(lambda steps: Setting(0.0, quick, steps))

    def section(name: str, contestants: list[Contestant], steps: int = 20) -> sections.Section:
        return sections.Section(name, lambda: setting(steps).rows(contestants, 2 if quick else 256, SEED), seconds=600)

    found = []
    for precision in PRECISIONS:
        both = rounded(precision, "nearest") + rounded(precision, "gptq")
        found.append(section(f"{precision} rounded", corrected(both)))
    for precision in PRECISIONS:
        learnt = [Contestant(precision, weights="adaround", step_sizes=steps) for steps in ("observed", "learnt")]
        found.append(section(f"{precision} learnt", corrected(learnt + aligned(precision))))
        found.append(section(f"{precision} rounding learnt along", corrected(rounding_along(precision))))
    many = [Contestant("w4a4", weights=weights) for weights in ("nearest", "gptq")]
    many.append(Contestant("w4a4", weights="adaround", align="accuquant:5"))
    found.append(section("w4a4 50 steps", corrected(many), steps=50))
    longer = [Contestant("w4a4", weights="adaround", align=f"accuquant:{group}") for group in (10, 25)]
    found.append(section("w4a4 longer groups of 50 steps", corrected(longer), steps=50))
    for precision in PRECISIONS:  # rounding on as many pairs, then alignment of it on the whole set and on parts of it
        sets = [Contestant(precision, weights="gptq", learn_pairs=pairs) for pairs in LEARN_PAIRS]
        sets += [Contestant(precision, weights="gptq", align="accuquant:5", pairs=pairs) for pairs in PAIRS]
        found.append(section(f"{precision} calibration sets", sets))
    kinds = [pairs.partition(":")[0] for pairs in LEARN_PAIRS[1:]]
    again = [Contestant("w4a8", weights="gptq", learn_pairs=f"{kind}:{count}") for kind in kinds for count in AGAIN]
    found.append(section("w4a8 calibration sets drawn again", again))
    return found[:2] if quick else found


if __name__ == "__main__":
    sys.exit(sections.command(__doc__, plan, RESULTS, "quality", "Reconstruction of the bundled model", COLUMNS))
