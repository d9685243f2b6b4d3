"""What correcting the quantisation noise gains on the bundled model: every method, with eta 0 and 1, DDIM 20.

python -m benchmarks.corrections    sections "sweep ..." (256 images, one seed) and "gate ..." (2,048 images, three
seeds: no correction beside the best one), written to benchmarks/results/quality-corrections-mnist32.json
"""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

import qdiff_engine as qe
from benchmarks import results_file, sections
from benchmarks.quality import row
from qdiff_engine.calibration.calibration import Calibration
from qdiff_engine.evaluation import compare_all
from qdiff_engine.measuring import thread_count
from qdiff_engine.models import ddim, demo_model

RESULTS = "quality-corrections-mnist32.json"
COLUMNS = (
    "section", "weights", "activations", "plan", "eta", "correction", "seed", "psnr_db", "ssim", "latent_error",
    "frechet_to_float", "class_accuracy",
)  # fmt: skip
PRECISIONS = ("w8a8", "w4a8", "w4a4", "w4a8-mixed")
METHODS = ("none", "ptqd", "ptqd (k < 0 too)", "mmse", "ner", "ner+ibc")
WITH_VARIANCE = ("none+vsc", "ptqd+vsc", "ptqd+vsc (k < 0 too)", "mmse+vsc", "ner+ibc+vsc")  # acts with eta > 0 only
GATE_SEEDS = (1, 2, 3)  # of the images; calibration draws from seed 0, the noise is measured on seed 10,000
_UNCLAMPED = " (k < 0 too)"
_BATCH = 32


class Setting:
    """The bundled network under one sampler, and its quantised and corrected models, made when first asked for."""

    def __init__(self, eta: float, quick: bool) -> None:
        demo = demo_model()
        self.eta, self.unet, self.scheduler = eta, demo.unet, ddim(demo.scheduler)
        self.steps, self.noise_samples, self.calibration_samples = (3, 2, 2) if quick else (20, 256, 64)
        self.seconds: dict[tuple[str, str], float] = {}
        self.model, self.noise = functools.cache(self._model), functools.cache(self._noise)

    @functools.cached_property
    def calibration(self) -> Calibration:
        """One for all precisions."""
        samples = self.calibration_samples
        return qe.calibrate(self.unet, self.scheduler, steps=self.steps, samples=samples, seed=0, eta=self.eta)

    def _noise(self, precision: str) -> Any:
        model = self.model(precision, "none")
        return qe.measure_noise(model, self.unet, self.scheduler, samples=self.noise_samples, batch=_BATCH)

    def _model(self, precision: str, correction: str) -> qe.IntegerUNet:
        start = time.perf_counter()
        if correction == "none":
            model = qe.quantize(self.unet, self.calibration, qe.Recipe.named(precision))
        else:
            method, clamp = correction.removesuffix(_UNCLAMPED), not correction.endswith(_UNCLAMPED)
            plain, noise = self.model(precision, "none"), self.noise(precision)
            model = qe.correct(plain, self.unet, self.scheduler, noise, method, clamp=clamp, batch=_BATCH)
        self.seconds[precision, correction] = round(time.perf_counter() - start, 2)
        print(f"eta {self.eta:g} {precision} {correction}: {self.seconds[precision, correction]} s", file=sys.stderr)
        return model


def rows(setting: Setting, contestants: list[tuple[str, str]], samples: int, seed: int) -> sections.Rows:
    """One row for each (precision, correction); all share one float trajectory."""
    models = {pair: setting.model(*pair) for pair in contestants}
    results = compare_all(
        {str(pair): model for pair, model in models.items()},
        setting.unet,
        setting.scheduler,
        steps=setting.steps,
        samples=samples,
        seed=seed,
        eta=setting.eta,
        batch=_BATCH,
        step_sqnr=False,
    )
    found = []
    for (precision, correction), model in models.items():
        result, seconds = results[str((precision, correction))], setting.seconds[precision, correction]
        found.append(
            {
                **row(model.recipe, model, result, {"calibration_seconds": seconds}),
                "eta": setting.eta,
                "correction": correction,
                "seed": seed,
                "class_accuracy": result.perception.class_accuracy,
            }
        )
    return found


def plan(quick: bool) -> list[sections.Section]:
    """Sweeps first, gates last."""
    setting = functools.cache(lambda eta: Setting(eta, quick))
    samples, gate_samples = (2, 2) if quick else (256, 2048)

    def section(name: str, eta: float, contestants: list[tuple[str, str]], count: int, seed: int) -> sections.Section:
        return sections.Section(name, lambda: rows(setting(eta), contestants, count, seed), seconds=600)

    found = []
    for eta in (0.0, 1.0):
        methods = METHODS + (WITH_VARIANCE if eta else ())
        for precision in PRECISIONS:
            pairs = [(precision, method) for method in methods]
            found.append(section(f"sweep eta {eta:g} {precision}", eta, pairs, samples, 1))
    for seed in GATE_SEEDS:
        pairs = [(precision, method) for precision in PRECISIONS for method in ("none", "mmse")]
        found.append(section(f"gate seed {seed}", 0.0, pairs, gate_samples, seed))
    return found[:1] if quick else found


def main() -> int:
    """The command."""
    parser = results_file.arguments(__doc__, RESULTS)
    results_file.section_arguments(parser)
    options = parser.parse_args()
    path = options.out or (None if options.quick else results_file.RESULTS / RESULTS)
    with thread_count(options.threads):
        machine = results_file.machine(commit=options.commit)
        found, wrong = sections.run(plan(options.quick), options, "quality", machine, path)
    results_file.show("Corrections of the bundled model", found, COLUMNS)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
