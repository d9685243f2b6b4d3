"""What `align` hands back: learnt scales over the same integers, resumable, and what the simulation promised."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from aligning import FILES, GUIDED, NAME, calibrated, quantised
from networks import SAMPLES, STEPS, ddim, normal, relative
from torch import Tensor

import qdiff_engine as qe
from qdiff_engine.alignment import training
from qdiff_engine.alignment.agreement import layer_agreement
from qdiff_engine.alignment.alignment import end_errors, settings_of
from qdiff_engine.alignment.learnt import Learnt, Simulation
from qdiff_engine.alignment.memory import Memory
from qdiff_engine.alignment.path import FloatNetwork, Moment, OwnSteps, float_path
from qdiff_engine.alignment.training import AlignmentSettings, Progress, group_starts
from qdiff_engine.calibration.calibration import Calibration
from qdiff_engine.graph.interpret import simulate
from qdiff_engine.recipe import Recipe
from qdiff_engine.runtime.model import IntegerUNet, load
from qdiff_engine.samplers import Stepper


def test_a_step_that_is_not_differentiable_is_refused() -> None:
    class Detached(type(ddim())):  # type: ignore[misc]
        def step(self, model_output: Tensor, *args: Any, **keywords: Any) -> Any:
            return super().step(model_output.detach(), *args, **keywords)

    stepper = Stepper(Detached(**{k: v for k, v in ddim().config.items() if not k.startswith("_")}), 4, 0.0, 0, 2)
    assert stepper.coefficients is None
    moment = Moment(0, normal(2, 3, 4, 4), range(2), stepper.scheduler)
    with pytest.raises(ValueError, match="Detached's step is not differentiable"):
        OwnSteps(stepper, 0).advance(moment, normal(2, 3, 4, 4).requires_grad_())


def test_learning_nothing_changes_nothing() -> None:
    """At the start the tables and scales are the model's, bit for bit, and the simulation is the one of `simulate`."""
    model = networks.integer_model("sd", "w4a8")
    learnt = Learnt(model)
    table, weights = learnt.table(), learnt.weights()
    assert torch.equal(table.scale, model.table.scale) and torch.equal(table.zero_point, model.table.zero_point)
    for name, parts in model.weights.items():
        for old, new in zip(parts, weights[name], strict=True):
            assert torch.equal(old.scale, new.scale) and torch.equal(old.values, new.values)
    step, given = networks.trajectory("sd")[1], networks.conditioning("sd", SAMPLES)
    inputs = networks.flat_inputs(model, step.sample, step.timestep, given)
    learnt64 = Learnt(model, dtype=torch.float64)
    with torch.no_grad():
        simulated = Simulation(model, learnt64)(step.sample, inputs["timestep"], **given)
    expected = simulate(model.graph, model.constants, model.weights, model.table, inputs)
    assert relative(simulated, expected) < 1e-3  # ties, divided here and multiplied there


def test_groups_of_steps_do_not_overlap() -> None:
    assert group_starts(7, 3) == [(0, 3), (3, 3), (6, 1)] and group_starts(4, 5) == [(0, 4)]


@pytest.fixture(scope="module")
def aligned() -> tuple[IntegerUNet, IntegerUNet, Calibration, list[Progress], list[Memory]]:
    calibration, told, memory = networks.calibration("sd"), [], []
    model = quantised(calibration, "sd", rows="group:2", weights="nearest")
    settings = AlignmentSettings(
        group=2, iterations=60, batch=2, scale_rate=0.05, zero_point_rate=0.2, weight_rate=0.02
    )
    new = qe.align(model, calibration, settings, on_start=memory.append, on_iteration=told.append)
    return model, new, calibration, told, memory


def test_alignment_lowers_the_error_of_the_integers(aligned: Any) -> None:
    """Measured through the runtime, with the same integers; shared ranges and those of the prompt stay shared."""
    model, new, calibration, told, memory = aligned
    before, after = (end_errors(m, calibration, group=2) for m in (model, new))
    print("relative error at the groups' ends", before, "->", after)
    assert sum(after) < 0.8 * sum(before)
    assert new.recipe == dataclasses.replace(model.recipe, align="accuquant:2", align_iterations=60, align_batch=2)
    for name, parts in model.weights.items():
        for old, learnt in zip(parts, new.weights[name], strict=True):
            assert torch.equal(old.values, learnt.values) and bool((learnt.scale > 0).all())
    assert any(
        not torch.equal(o.scale, n.scale)
        for k in model.weights
        for o, n in zip(model.weights[k], new.weights[k], strict=True)
    )
    scale, zero_point = new.table.scale, new.table.zero_point
    assert torch.equal(scale[0::2], scale[1::2]) and torch.equal(zero_point[0::2], zero_point[1::2])
    assert not torch.equal(zero_point, model.table.zero_point)
    floating = model.table.bits == 16
    assert torch.equal(scale[floating], model.table.scale[floating])
    prompt = [n.kwargs["site"] for n in model.graph.nodes if "site" in n.kwargs and n.section == "prompt"]
    columns = [model.table.sites.index(site) for site in prompt]
    assert columns and bool((scale[:, columns] == scale[0, columns]).all())
    assert not torch.equal(scale[0, columns], model.table.scale[0, columns])
    assert [p.iteration for p in told] == list(range(1, 61)) and told[-1].seconds_left == 0
    (found,) = memory
    assert found.total > found.saved > 0


def test_aligned_model_is_an_artifact_like_any_other(aligned: Any, tmp_path: Path) -> None:
    _, new, _, _, _ = aligned
    new.save_pretrained(tmp_path / "artifact")
    loaded = load(tmp_path / "artifact")
    step, given = networks.trajectory("sd")[1], networks.conditioning("sd", SAMPLES)
    assert torch.equal(loaded(step.sample, step.timestep, **given)[0], new(step.sample, step.timestep, **given)[0])
    assert loaded.recipe == new.recipe and new.recipe.align == "accuquant:2"


@pytest.mark.parametrize("name", ["sd", "plain", "guided", "patches"])
def test_simulation_and_integers_differ_by_rounding_only(name: str) -> None:
    """After learning, layer by layer: the same integers but for ties, and outputs to float32's precision."""
    calibration = networks.calibration(name)
    model = qe.align(quantised(calibration, name), calibration, AlignmentSettings(group=2, iterations=6, batch=2))
    for step in networks.trajectory(name):
        given = networks.conditioning(name, SAMPLES)
        rows = layer_agreement(model, networks.flat_inputs(model, step.sample, step.timestep, given))
        assert {row.name for row in rows} == set(model.weights)
        assert max(row.error for row in rows) < 1e-5 and max(row.furthest for row in rows) <= 1
        assert max(row.flipped for row in rows) < 1e-3
        assert json.loads(json.dumps(rows[0].to_dict()))["name"] == rows[0].name


def test_a_layer_that_is_not_the_simulations_is_found() -> None:
    """Weights that the simulation does not have show in their own layer, and in no other."""
    model, step = networks.integer_model("guided", "w4a4"), networks.trajectory("guided")[1]
    inputs = networks.flat_inputs(model, step.sample, step.timestep, networks.conditioning("guided", SAMPLES))
    wrong = copy.copy(model)
    wrong.weights = _Changing(model.weights, victim := list(model.weights)[1])
    found = {row.name: row.error for row in layer_agreement(wrong, inputs)}
    assert found.pop(victim) > 1e-2 and max(found.values()) < 1e-5


class _Changing(dict):
    """Weights whose ``victim`` is another every other time that it is asked for: once for each of two readers."""

    def __init__(self, weights: dict[str, Any], victim: str) -> None:
        super().__init__(weights)
        self.victim, self.asked = victim, 0

    def __getitem__(self, name: str) -> Any:
        parts = super().__getitem__(name)
        if name != self.victim:
            return parts
        self.asked += 1
        return parts if self.asked % 2 else tuple(dataclasses.replace(w, scale=w.scale * 1.1) for w in parts)


def test_the_path_is_the_calibrations_own() -> None:
    """With guidance and noise, too: what the UNet received, and the start of every group."""
    calibration = calibrated(eta=0.5, **GUIDED)
    (moments,) = float_path(calibration, batch=SAMPLES).moments
    for moment, received in zip(moments, calibration.trajectory.samples, strict=False):
        assert torch.equal(moment.latents, received)
    assert len(moments) == STEPS + 1
    assert max(end_errors(FloatNetwork(calibration), calibration, group=3)) < 1e-5


def test_zero_iterations_are_the_plain_path(tmp_path: Path) -> None:
    """The artifact's three files are the plain one's, byte for byte."""
    calibration = networks.calibration(NAME)
    plain = quantised(calibration)
    untouched = qe.align(plain, calibration, AlignmentSettings(group=2, iterations=0))
    for model, folder in ((plain, "a"), (untouched, "b")):
        model.save_pretrained(tmp_path / folder)
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_all_stages_without_iterations_are_the_plain_path(tmp_path: Path) -> None:
    """Learnt rounding, learnt step sizes and alignment at once: the same graph and tensors, byte for byte."""
    learnt = {"weights": "adaround", "learn_iterations": 0, "step_sizes": "learnt", "align_iterations": 0}
    quantised(networks.calibration(NAME), weights="nearest").save_pretrained(tmp_path / "plain")
    quantised(networks.calibration(NAME), align="accuquant:2", **learnt).save_pretrained(tmp_path / "learnt")
    for file in set(FILES) - {"config.json"}:  # which has the recipe
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "learnt" / file).read_bytes()


def test_quantize_aligns_where_the_recipe_says_so() -> None:
    """As `align` does afterwards, on rows of the plan that was chosen."""
    calibration, asked = networks.calibration(NAME), {"align_iterations": 2, "align_batch": 2, "align_rounding": True}
    asked |= {"align_pairs": "uniform:9"}
    at_once = quantised(calibration, align="accuquant:3", **asked)
    settings = AlignmentSettings(group=3, iterations=2, batch=2, rounding=True, pairs="uniform:9")
    after = qe.align(quantised(calibration), calibration, settings)
    assert at_once.recipe == after.recipe == Recipe.named("w4a4", align="accuquant:3", **asked)
    assert torch.equal(at_once.table.scale, after.table.scale)
    for name, parts in at_once.weights.items():
        assert all(torch.equal(a.values, b.values) for a, b in zip(parts, after.weights[name], strict=True))
    assert settings_of(Recipe(align="accuquant:5")) == AlignmentSettings()  # both have the same defaults
    assert not torch.equal(at_once.table.scale, quantised(calibration).table.scale)


_ALIGN = """
import os, signal, sys, torch, networks, qdiff_engine as qe
from test_alignment import resumable
torch.set_num_threads(1)
seen = []
def told(progress):
    seen.append(progress.iteration)
    if progress.iteration == int(sys.argv[2]):
        print(seen[0], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
resumable(sys.argv[1], told)
"""


def resumable(folder: str | Path | None, told: Callable[[Progress], None]) -> IntegerUNet:
    """The run that is killed: its state is written every 3 of 24 iterations."""
    training.SAVE_EVERY = 3
    calibration = networks.calibration(NAME)
    settings = AlignmentSettings(group=2, iterations=24, batch=2)
    return qe.align(quantised(calibration), calibration, settings, cache_dir=folder, on_iteration=told)


def test_killed_alignment_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 twice, between two states on disk and right after one; what follows starts at the last of them."""
    monkeypatch.setattr(training, "SAVE_EVERY", training.SAVE_EVERY)
    work, told = tmp_path / "work", list[Progress]()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for stop, first in ((8, 1), (19, 7)):
        command = [sys.executable, "-c", _ALIGN, str(work), str(stop)]
        killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, f"{first}\n"), killed.stderr
    with networks.threads(1):
        resumable(work, told.append).save_pretrained(tmp_path / "resumed")
        resumable(None, lambda _: None).save_pretrained(tmp_path / "whole")
    assert [p.iteration for p in told] == list(range(19, 25))
    for file in FILES:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()


def test_work_of_other_settings_is_not_resumed(tmp_path: Path) -> None:
    calibration = networks.calibration(NAME)
    model, counts = quantised(calibration), []
    for seed in (0, 0, 1):
        told: list[Progress] = []
        settings = AlignmentSettings(group=2, iterations=3, batch=2, seed=seed)
        qe.align(model, calibration, settings, cache_dir=tmp_path / "work", on_iteration=told.append)
        counts.append(len(told))
    assert counts == [3, 0, 3]


def test_quantize_resumes_alignment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in alignment, it goes on there, with the weights that it had; every iteration is told once."""

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.iteration == 8:
            raise Stop

    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    calibration, told, layers = networks.calibration(NAME), list[Progress](), list[str]()
    recipe = Recipe.named("w4a4", align="accuquant:2", align_iterations=15, align_batch=2)
    arguments: tuple[Any, ...] = (networks.network(NAME), calibration, recipe)
    with pytest.raises(Stop):
        qe.quantize(*arguments, cache_dir=tmp_path, on_align=stop)
    resumed = qe.quantize(*arguments, cache_dir=tmp_path, on_align=told.append, on_layer=layers.append)
    assert [p.iteration for p in told] == list(range(7, 16)) and sum(p.advanced for p in told) == 15
    whole = qe.quantize(*arguments)
    assert torch.equal(resumed.table.scale, whole.table.scale) and layers == list(whole.weights)
    assert not torch.equal(whole.table.scale, quantised(calibration).table.scale)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["align", "weights"]


def test_divergence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration, model = networks.calibration(NAME), networks.integer_model(NAME, "w4a4")
    monkeypatch.setattr(training, "accumulate_gradient", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="diverged at iteration 0: lower its learning rates"):
        qe.align(model, calibration, AlignmentSettings(group=2, iterations=9, batch=2))


def test_bad_arguments() -> None:
    calibration, model = networks.calibration(NAME), networks.integer_model(NAME, "w4a4")
    for settings, message in (
        ({"group": STEPS + 1}, f"group must be at most the sampler's {STEPS} steps, got {STEPS + 1}"),
        ({"group": 0}, "group must be at least 1"),
        ({"iterations": -1}, "iterations must be at least 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"scale_rate": float("nan")}, "scale_rate must be a finite number"),
        ({"pairs": "density:999"}, f"pairs must be at most the calibration's {STEPS * SAMPLES}, got 999"),
    ):
        with pytest.raises(ValueError, match=message):
            qe.align(model, calibration, AlignmentSettings(**{"group": 2, **settings}))
    for name in ("rounding", "recompute"):
        with pytest.raises(TypeError, match=f"{name} must be a bool, got int"):
            qe.align(model, calibration, AlignmentSettings(group=2, **{name: 1}))
    with pytest.raises(TypeError, match="settings must be AlignmentSettings, got dict"):
        qe.align(model, calibration, {"group": 2})  # type: ignore[arg-type]
    for device in ("banana", "cuda:99"):
        with pytest.raises(ValueError, match="device"):
            qe.align(model, calibration, AlignmentSettings(group=2), device=device)
    other = dataclasses.replace(calibration, key={**calibration.key, "eta": 0.5})
    with pytest.raises(ValueError, match="calibration is not the one"):
        qe.align(model, other, AlignmentSettings(group=2))
    too_long = Recipe.named("w4a4", align=f"accuquant:{STEPS + 1}")
    with pytest.raises(ValueError, match=f"group must be at most the sampler's {STEPS} steps"):
        qe.quantize(networks.network(NAME), calibration, too_long, on_layer=lambda _: pytest.fail("before any work"))
    with pytest.raises(TypeError, match="model must be an IntegerUNet, got str"):
        qe.align("model", calibration)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="calibration must come from"):
        qe.align(model, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="calibration is not the one"):
        qe.align(model, networks.calibration("plain"), AlignmentSettings(group=2))
    shifted = dataclasses.replace(model.table, output_shift=model.table.output_shift + 1)
    with pytest.raises(ValueError, match="corrected already; align it first"):
        qe.align(model.with_table(shifted), calibration)
    for wrong in ("accuquant", "accuquant:0", "accuquant:-1", "multi:2", 2, None):
        with pytest.raises(ValueError, match="align must be 'none' or 'accuquant:M'"):
            Recipe(align=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_names_the_setting(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise error

    calibration, model = networks.calibration(NAME), networks.integer_model(NAME, "w4a4")
    monkeypatch.setattr(training, "accumulate_gradient", fails)
    for batch, recompute, mend in (
        (3, False, r"set recompute \(--align-recompute\), or lower batch \(--align-batch\)$"),
        (1, False, r"set recompute \(--align-recompute\)$"),
        (3, True, r"lower batch \(--align-batch\)$"),
        (1, True, "batch is 1 already: use a device with more memory$"),
    ):
        with pytest.raises(OSError, match=f"not enough memory to align {batch} samples at a time; {mend}") as found:
            qe.align(model, calibration, AlignmentSettings(2, iterations=2, batch=batch, recompute=recompute))
        assert found.value.errno == errno.ENOMEM
    monkeypatch.setattr(training, "accumulate_gradient", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        qe.align(model, calibration, AlignmentSettings(group=2, iterations=2, batch=3))
