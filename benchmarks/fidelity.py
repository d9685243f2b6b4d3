"""Contestants of the quality benchmarks: quantised models of the bundled network, sampled beside the float one."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import qdiff_engine as qe
from benchmarks import results_file, sections
from benchmarks.quality import row
from qdiff_engine.alignment.training import AlignmentSettings
from qdiff_engine.calibration.calibration import Calibration
from qdiff_engine.calibration.checkpoint import fingerprint
from qdiff_engine.correction.measurement import SEED
from qdiff_engine.digits import digit_classifier
from qdiff_engine.evaluation import Comparison, compare_all
from qdiff_engine.measuring import high_water_mark
from qdiff_engine.models import ddim, demo_model
from qdiff_engine.quality import extract
from qdiff_engine.quantization import equalised

UNCLAMPED = " (k < 0 too)"  # after "ptqd": k may be negative
BEST = "mmse+ibc+ivc"  # beside "ner+ibc+ivc" what gains most in the results of benchmarks.corrections
SURE = 0.9  # probability of a class, from which on the classifier's word counts as confident
_BATCH = 32
_CACHE = Path(tempfile.gettempdir()) / "qdiff-benchmarks-float"  # trajectories of the float network
_LEARNT = Path(tempfile.gettempdir()) / "qdiff-benchmarks-learnt"  # what rounding and alignment found, by commit


@dataclass(frozen=True)
class Contestant:
    """A recipe's name, what is changed in it, and the correction of its noise ("none", "ptqd (k < 0 too)", ...)."""

    precision: str
    correction: str = "none"
    weights: str | None = None
    weight_group: int = 0
    equalise: str = "off"
    align: str = "none"
    align_rounding: str = "fixed"  # or "along": alignment learns the integers, too
    step_sizes: str = "observed"
    pairs: str = "every"  # that alignment learns on
    learn_pairs: str = "every"  # that rounding learns on

    def __str__(self) -> str:
        """The fields that are not the defaults, with the name of those that are numbers."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return ", ".join(value if isinstance(value, str) else f"{name} {value}" for name, value in found.items())

    def recipe(self) -> qe.Recipe:
        """Without alignment, which is a step of its own here, and without correction."""
        changes = {name: getattr(self, name) for name in ("weight_group", "equalise", "step_sizes", "learn_pairs")}
        return qe.Recipe.named(self.precision, **changes, **({} if self.weights is None else {"weights": self.weights}))

    def before(self) -> Contestant | None:
        """The contestant that this one is made from by its last step; None where it is quantised afresh."""
        if self.correction != "none":
            return dataclasses.replace(self, correction="none")
        return None if self.align == "none" else dataclasses.replace(self, align="none", align_rounding="fixed")


def _remembered(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward(sample, timestep)`` that computes each answer once."""
    known: dict[str, Any] = {}

    def remembered(sample: Any, timestep: Any) -> Any:
        key = fingerprint({"sample": sample, "timestep": torch.as_tensor(timestep)})
        if key not in known:
            known[key] = forward(sample, timestep)
        return known[key]

    return remembered


def confidence(result: Comparison) -> dict[str, float | None]:
    """Share of images whose class the classifier is sure of, of these the share with the float image's class; and the
    first share among the float images, for a network may draw what is no digit."""
    classifier = digit_classifier()
    logits, in_float = (extract(classifier, images)[1] for images in (result.images, result.float_images))
    assert logits is not None and in_float is not None
    likely, classes = logits.softmax(1).max(1)
    agreeing = (classes == in_float.argmax(1))[likely >= SURE].double()
    return {
        "confident_share": len(agreeing) / len(logits),
        "confident_accuracy": float(agreeing.mean()) if len(agreeing) else None,
        "float_confident_share": float((in_float.softmax(1).max(1).values >= SURE).double().mean()),
    }


def _record(folder: Path) -> Path:
    """The file beside a folder of learnt things that says how many seconds learning them took."""
    return folder.with_name(f"{folder.name}.json")


@dataclass(frozen=True)
class Cost:
    """What making something took: time, and by how much the process grew at its peak; None where nobody can tell."""

    seconds: float = 0.0
    memory_bytes: int | None = 0

    def then(self, later: Cost) -> Cost:
        """The cost of one thing after another."""
        known = None if None in (self.memory_bytes, later.memory_bytes) else max(self.memory_bytes, later.memory_bytes)
        return Cost(self.seconds + later.seconds, known)

    def first(self, folder: Path | None) -> Cost:
        """What it cost the first time: this time, unless ``folder`` has a record of it."""
        if folder is None:
            return self
        record = _record(folder)
        if not record.exists():
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(dataclasses.asdict(self)))
        return Cost(**json.loads(record.read_text()))


def costed(make: Callable[[], Any]) -> tuple[Any, Cost]:
    """(what ``make`` returns, what that took)."""
    before, start = forget_peak(), time.perf_counter()
    made = make()
    grown = None if before is None else high_water_mark() - before
    return made, Cost(time.perf_counter() - start, grown)


def forget_peak() -> int | None:
    """Let the high-water mark of this process start from what it holds now, in bytes; None where that cannot be."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free but not given back would hide growth
        Path("/proc/self/clear_refs").write_text("5")
        return high_water_mark()
    except (AttributeError, OSError):
        return None


class Setting:
    """The bundled network under one sampler, and its contestants, each made once, when first asked for."""

    def __init__(self, eta: float, quick: bool, steps: int = 20) -> None:
        demo = demo_model()
        self.eta, self.quick, self.unet, self.scheduler = eta, quick, demo.unet, ddim(demo.scheduler)
        self.steps, self.noise_samples, self.calibration_samples = (3, 2, 2) if quick else (steps, 256, 64)
        self.costs: dict[Contestant, Cost] = {}
        self.model, self.noise = functools.cache(self._model), functools.cache(self._noise)
        self.prepared = functools.cache(lambda recipe: equalised(self.calibration, recipe))

    @functools.cached_property
    def calibration(self) -> Calibration:
        """One for all; the float trajectories that noise is measured on are known afterwards, and cost nobody time."""
        samples = self.calibration_samples
        found = qe.calibrate(self.unet, self.scheduler, steps=self.steps, samples=samples, seed=0, eta=self.eta)
        self.unet.forward = _remembered(self.unet.forward)  # from here on it runs float trajectories, often the same
        qe.sample(
            self.unet, self.scheduler, (self.noise_samples, *found.shape), self.steps, SEED, eta=self.eta, batch=_BATCH
        )
        return found

    def _noise(self, contestant: Contestant) -> tuple[Any, Cost]:
        """(the noise of a contestant, what measuring it took): each correction of it pays for that."""
        model, samples = self.model(contestant), self.noise_samples
        return costed(lambda: qe.measure_noise(model, self.unet, self.scheduler, samples=samples, batch=_BATCH))

    def _model(self, contestant: Contestant) -> qe.IntegerUNet:
        before, spent, folder = contestant.before(), Cost(), self._folder(contestant)
        if before is None:
            make = functools.partial(self._quantized, contestant, folder)
        else:
            self.model(before)
            spent = self.costs[before]
            if contestant.correction != "none":
                spent = spent.then(self.noise(before)[1])
            make = functools.partial(self._next, contestant, before, folder)
        model, cost = costed(make)
        self.costs[contestant] = spent.then(cost.first(folder))
        print(f"eta {self.eta:g}, {contestant}: {self.costs[contestant]}", file=sys.stderr, flush=True)
        return model

    def _folder(self, contestant: Contestant) -> Path | None:
        """Where what a contestant learns is kept for the next run at the same commit; empty after one cut short."""
        commit = results_file.head()
        if self.quick or commit is None or commit.endswith(results_file.CHANGED) or contestant.correction != "none":
            return None
        folder = _LEARNT / commit / re.sub(r"\W+", "-", f"eta {self.eta:g} steps {self.steps} {contestant}")
        if not _record(folder).exists():
            shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _quantized(self, contestant: Contestant, folder: Path | None) -> qe.IntegerUNet:
        recipe = contestant.recipe()
        if self.quick:
            recipe = dataclasses.replace(recipe, learn_iterations=2)
        return qe.quantize(self.unet, self.prepared(recipe), recipe, cache_dir=folder)

    def _next(self, contestant: Contestant, before: Contestant, folder: Path | None) -> qe.IntegerUNet:
        model = self.model(before)
        if contestant.correction == "none":
            group = int(contestant.align.partition(":")[2])
            fewer = {"iterations": 2} if self.quick else {}
            rounding = contestant.align_rounding == "along"
            settings = AlignmentSettings(group=group, pairs=contestant.pairs, rounding=rounding, **fewer)
            return qe.align(model, self.prepared(contestant.recipe()), settings, cache_dir=folder)
        method, clamp = contestant.correction.removesuffix(UNCLAMPED), not contestant.correction.endswith(UNCLAMPED)
        return qe.correct(model, self.unet, self.scheduler, self.noise(before)[0], method, clamp=clamp, batch=_BATCH)

    def rows(self, contestants: Sequence[Contestant], samples: int, seed: int) -> sections.Rows:
        """One row for each; all share one float trajectory.

        "calibration_seconds" and "calibration_memory_bytes" (by which the process grew) are of what follows the float
        trajectories: rounding, learning, correcting.
        """
        _ = self.calibration  # first: whatever else calls the network finds its float trajectories remembered
        models = {str(contestant): self.model(contestant) for contestant in contestants}
        settings: dict[str, Any] = {"steps": self.steps, "samples": samples, "seed": seed, "eta": self.eta}
        setting = f"eta-{self.eta:g}-steps-{self.steps}-samples-{samples}-seed-{seed}"
        cache = None if self.quick else _CACHE / setting
        results = compare_all(
            models, self.unet, self.scheduler, batch=_BATCH, step_sqnr=False, cache_dir=cache, **settings
        )
        found = []
        for contestant in contestants:
            model, result = models[str(contestant)], results[str(contestant)]
            cost = self.costs[contestant]
            seconds = {"calibration_seconds": round(cost.seconds, 2)}
            found.append(
                {
                    **row(model.recipe, model, result, seconds),
                    "eta": self.eta,
                    "correction": contestant.correction,
                    "step_sizes": contestant.step_sizes,
                    "alignment": contestant.align,
                    "align_rounding": contestant.align_rounding,
                    "pairs": contestant.pairs,
                    "learn_pairs": contestant.learn_pairs,
                    "seed": seed,
                    "latent_errors": [round(error, 5) for error in result.latent_error],
                    "class_accuracy": result.perception.class_accuracy,
                    **confidence(result),
                    "calibration_memory_bytes": cost.memory_bytes,
                }
            )
        return found
