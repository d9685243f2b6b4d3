"""Plans of the bundled model: least final error under a budget, the SNR rule, chance, uniform precision.

python -m benchmarks.plans    all rows, written to benchmarks/results/quality-plans-mnist32.json (DDIM 20, 256 images)

"row:R:MODE" runs one row alone at A4 or A16, on images of their own: what each step's precision is worth, for the same
image (PSNR) and for images as good (Fréchet distance). "frechet:SHARE:K" has that share of rows at A4: of all such
plans the one with the K-th least Fréchet distance, as far as the effects of single rows on an image's features add up.
"exchange:FRACTION:K" has K rows at A16 and as many at A4 as bring the plan to that fraction of the bit operations at
A8: of such plans the least that exchanges of two rows' modes find. The plans drawn at random ("random:SHARE:DRAW") tell
how good that prediction is.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import qdiff_engine as qe
from benchmarks import results_file
from benchmarks.quality import row
from qdiff_engine.digits import digit_classifier
from qdiff_engine.evaluation import Comparison, compare_all
from qdiff_engine.measuring import thread_count
from qdiff_engine.models import ddim, demo_model
from qdiff_engine.plan_requests import switchable_fraction
from qdiff_engine.quality import extract, frechet_distance

RESULTS = "quality-plans-mnist32.json"
COLUMNS = (
    "weights", "plan", "modes", "switchable_fraction", "psnr_db", "ssim", "latent_error", "frechet_to_float",
    "frechet_predicted", "class_accuracy", "gbops", "quantization_seconds",
)  # fmt: skip
ASKED = (  # (recipe, plan)
    ("w4a8", "uniform"),
    ("w4a4", "uniform"),
    ("w4a8", "budget:0.6:A4,A8"),
    ("w4a8", "snr:share=0.8"),
    ("w4a8", "random:0.8:0"),
    ("w4a8", "frechet:0.8:1"),
    ("w4a8", "budget:0.9:A4,A8"),
    ("w4a8", "snr:share=0.2"),
    *(("w4a8", f"random:0.2:{draw}") for draw in range(8)),
    *(("w4a8", f"frechet:0.2:{k}") for k in range(1, 9)),
    *(("w4a8", f"exchange:0.9:{k}") for k in range(4)),
    ("w4a8", "budget:0.9"),
    ("w8a8", "uniform"),
    ("w8a8", "budget:1.2:A8,A16"),
)
SEED, ROW_SEED = 1, 2  # of the images
SINGLE = ("A4", "A16")  # what a row runs at alone, the others at A8
STARTS = 20  # of a search by exchanges


@dataclass(frozen=True, eq=False)
class RowEffects:
    """What the features of the same images are in float, with every row at A8, and with one row in another mode.

    Features [n, F], float64; ``single``: one mapping from modes to features for each row.
    """

    in_float: Tensor
    uniform: Tensor
    single: Sequence[Mapping[str, Tensor]]

    def distance(self, modes: Sequence[str]) -> float:
        """Fréchet distance to float of f = f(uniform) + sum over rows not at A8 of (f(row) - f(uniform)), by image."""
        features = self.uniform.clone()
        for alone, mode in zip(self.single, modes, strict=True):
            if mode != "A8":
                features += alone[mode] - self.uniform
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few samples: the rows of the result say so
            return frechet_distance(features, self.in_float)


def at_a4(chosen: Collection[int], rows: int) -> tuple[str, ...]:
    """The modes of a plan that has the ``chosen`` rows at A4 and the others at A8."""
    return tuple("A4" if r in chosen else "A8" for r in range(rows))


@functools.cache
def ranking(effects: RowEffects, count: int) -> list[tuple[float, tuple[str, ...]]]:
    """(distance, modes) of every plan with ``count`` rows at A4 and the others at A8, the least distance first."""
    rows = len(effects.single)
    choices = (at_a4(chosen, rows) for chosen in itertools.combinations(range(rows), count))
    return sorted((effects.distance(modes), modes) for modes in choices)


def by_exchange(effects: RowEffects, fraction: float, floating: int, starts: int = STARTS) -> tuple[str, ...]:
    """Of the plans with ``floating`` rows at A16 and that fraction of A8's bit operations, one of little distance.

    From random plans, the best exchange of two rows' modes as long as one lessens the distance. With ``floating`` 0 the
    result can be compared with `ranking`, which leaves out nothing.

    Raises:
        ValueError: there are not enough rows for as many at A4 as that takes.
    """
    rows = len(effects.single)
    low = round(2 * rows * (1 - fraction)) + 2 * floating  # A16 costs twice A8, A4 half of it
    if not 0 <= low <= rows - floating:
        raise ValueError(f"{floating} of {rows} rows at A16 leave no plan with {fraction} of the bit operations at A8")
    pool = ["A4"] * low + ["A16"] * floating + ["A8"] * (rows - low - floating)
    found = []
    for start in range(starts):
        modes = tuple(random.Random(start).sample(pool, rows))
        reached, before = effects.distance(modes), math.inf
        while reached < before:
            before = reached
            reached, modes = min([(reached, modes), *((effects.distance(other), other) for other in exchanged(modes))])
        found.append((reached, modes))
    return min(found)[1]


def exchanged(modes: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The plan with the modes of two rows exchanged, for every pair that has different ones."""
    for i, j in itertools.combinations(range(len(modes)), 2):
        if modes[i] != modes[j]:
            yield (*modes[:i], modes[j], *modes[i + 1 : j], modes[i], *modes[j + 1 :])


def plan_of(name: str, rows: int, effects: RowEffects | None = None) -> str | tuple[str, ...]:
    """A recipe's plan, or the modes that a name of this benchmark stands for (by ``effects``, where it says so)."""
    kind, *values = name.split(":")
    if kind == "row":
        return tuple(values[1] if r == int(values[0]) else "A8" for r in range(rows))
    if kind == "random":
        return at_a4(random.Random(int(values[1])).sample(range(rows), round(float(values[0]) * rows)), rows)
    if kind == "frechet":
        assert effects is not None
        return ranking(effects, round(float(values[0]) * rows))[int(values[1]) - 1][1]
    if kind == "exchange":
        assert effects is not None
        return by_exchange(effects, float(values[0]), int(values[1]))
    return name


class Plans:
    """The bundled model under one sampler: one calibration and one rounding of the weights serve every plan."""

    def __init__(self, quick: bool, cache: Path) -> None:
        demo, self.cache = demo_model(), cache
        self.unet, self.scheduler, self.steps = demo.unet, ddim(demo.scheduler), 4 if quick else 20
        self.samples = 2 if quick else 256
        start = time.perf_counter()
        self.calibration = qe.calibrate(demo.unet, self.scheduler, steps=self.steps, samples=2 if quick else 64, seed=0)
        self.calibrated = round(time.perf_counter() - start, 2)

    def rows(
        self, asked: Sequence[tuple[str, str]], seed: int, effects: RowEffects | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, Comparison]]:
        """One row for each (recipe, plan), and what it was made of; all share one float trajectory."""
        models, spent = {}, {}
        for key in asked:
            start = time.perf_counter()
            recipe = qe.Recipe.named(key[0], plan=plan_of(key[1], self.steps, effects))
            models[key] = qe.quantize(self.unet, self.calibration, recipe, cache_dir=self.cache / key[0])
            spent[key] = round(time.perf_counter() - start, 2)
            print(f"{' '.join(key)}: {spent[key]} s", file=sys.stderr, flush=True)
        named = {" ".join(key): model for key, model in models.items()}
        settings: dict[str, Any] = {"steps": self.steps, "samples": self.samples, "seed": seed}
        results = compare_all(named, self.unet, self.scheduler, batch=32, step_sqnr=False, **settings)
        found = [
            {
                **row(model.recipe, model, results[" ".join(key)], {"calibration_seconds": self.calibrated}),
                "quantization_seconds": spent[key],
                "plan": key[1],
                "seed": seed,
                "modes": " ".join(mode[1:] for mode in model.table.modes),
                "switchable_fraction": switchable_fraction(model.table.modes),
                "frechet_predicted": effects.distance(model.table.modes) if effects and key[0] == "w4a8" else None,
                "frechet_note": results[" ".join(key)].perception.frechet_note,
                "class_accuracy": results[" ".join(key)].perception.class_accuracy,
            }
            for key, model in models.items()
        ]
        return found, results


def row_effects(results: Mapping[str, Comparison], rows: int) -> RowEffects:
    """The features of single rows' images, by the bundled classifier."""
    classifier = digit_classifier()

    def features(name: str) -> Tensor:
        return extract(classifier, results[f"w4a8 {name}"].images)[0]

    in_float = extract(classifier, results["w4a8 uniform"].float_images)[0]
    single = [{mode: features(f"row:{r}:{mode}") for mode in SINGLE} for r in range(rows)]
    return RowEffects(in_float, features("uniform"), single)


def measure(quick: bool) -> list[dict[str, Any]]:
    """Single rows first, then the plans, some of which follow from them."""
    with tempfile.TemporaryDirectory() as folder:
        plans = Plans(quick, Path(folder))
        singles = [("w4a8", "uniform"), *(("w4a8", f"row:{r}:{mode}") for mode in SINGLE for r in range(plans.steps))]
        single_rows, results = plans.rows(singles, ROW_SEED)
        if quick:  # too few images for a Fréchet distance
            return plans.rows(ASKED[:4], SEED)[0] + single_rows
        return plans.rows(ASKED, SEED, row_effects(results, plans.steps))[0] + single_rows


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
