"""The quality benchmarks' contestants: made step by step, every one of them valid; sections that can be told apart."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import corrections, gates, more_steps, plans, reconstruction
from benchmarks.fidelity import UNCLAMPED, Contestant, Cost, costed
from qdiff_engine.plan_requests import switchable_fraction
from qdiff_engine.recipe import check_align, check_correct


def test_a_contestant_is_made_by_its_last_step_from_another() -> None:
    whole = Contestant(
        "w4a8", correction="mmse", weights="gptq", equalise="on", align="accuquant:2", align_rounding="along"
    )
    aligned = dataclasses.replace(whole, correction="none")
    rounded = dataclasses.replace(aligned, align="none", align_rounding="fixed")
    assert whole.before() == aligned and aligned.before() == rounded and rounded.before() is None
    recipe = whole.recipe()
    assert (recipe.weight_bits, recipe.weights, recipe.equalise, recipe.align) == (4, "gptq", "on", "none")
    assert Contestant("w4a8").recipe().weights == "gptq"  # the recipe's own


def test_costs_are_of_the_first_time(tmp_path: Path) -> None:
    mib = 2**20
    _, cost = costed(lambda: torch.ones(64 * mib))  # 256 MiB, let go at once
    assert cost.memory_bytes is not None and 250 * mib < cost.memory_bytes < 300 * mib
    _, later = costed(lambda: torch.ones(16 * mib))
    assert later.memory_bytes is not None and 60 * mib < later.memory_bytes < 110 * mib
    both = cost.then(later)
    assert both == Cost(cost.seconds + later.seconds, cost.memory_bytes)
    assert cost.then(Cost(1.0, None)).memory_bytes is None
    folder = tmp_path / "learnt" / "w4a4"
    assert cost.first(folder) == cost == later.first(folder)
    assert later.first(None) == later


@pytest.mark.parametrize("benchmark_module", [corrections, gates, more_steps, reconstruction])
def test_sections_have_names_of_their_own(benchmark_module: ModuleType) -> None:
    names = [section.name for section in benchmark_module.plan(False)]
    assert len(set(names)) == len(names) > len(benchmark_module.plan(True)) > 0


def test_plans_that_the_benchmark_makes_itself() -> None:
    assert plans.plan_of("row:1:A4", 3) == ("A8", "A4", "A8")
    assert plans.plan_of("row:2:A16", 3) == ("A8", "A8", "A16")
    drawn = plans.plan_of("random:0.2:0", 20)
    assert drawn == plans.plan_of("random:0.2:0", 20) and drawn.count("A4") == 4 and len(drawn) == 20
    assert drawn != plans.plan_of("random:0.2:1", 20)
    assert plans.plan_of("budget:0.9", 20) == "budget:0.9"


def row_effects(at_a4: Sequence[float], at_a16: Sequence[float]) -> plans.RowEffects:
    """Rows that move one feature of every image by so much at A4, and at A16."""
    features = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).double()

    def moved(shift: float) -> torch.Tensor:
        return features + torch.tensor([shift, 0.0, 0.0], dtype=torch.float64)

    single = [{"A4": moved(low), "A16": moved(high)} for low, high in zip(at_a4, at_a16, strict=True)]
    return plans.RowEffects(features, features, single)


def test_rows_whose_effects_cancel_are_found() -> None:
    effects = row_effects((0.5, 4.0, 1.0, -3.9), (0.0, 0.0, 0.0, 0.3))
    for modes, shift in (("8 4 8 8", 4.0), ("4 8 4 8", 1.5), ("4 4 4 4", 1.6), ("4 8 8 16", 0.8)):
        # equal covariances: the squared distance of the means is left
        assert effects.distance([f"A{bits}" for bits in modes.split()]) == pytest.approx(shift**2)
    assert plans.plan_of("frechet:0.5:1", 4, effects) == ("A8", "A4", "A8", "A4")
    assert plans.plan_of("frechet:0.25:1", 4, effects) == ("A4", "A8", "A8", "A8")
    assert plans.plan_of("frechet:0.5:2", 4, effects) == ("A4", "A8", "A4", "A8")


def test_exchanges_find_what_trying_all_plans_finds() -> None:
    draw = random.Random(3)
    effects = row_effects([draw.gauss(0, 1) for _ in range(8)], [draw.gauss(0, 0.3) for _ in range(8)])
    found = plans.plan_of("exchange:0.75:0", 8, effects)
    assert found.count("A4") == 4 and effects.distance(found) == pytest.approx(plans.ranking(effects, 4)[0][0])
    found = plans.by_exchange(effects, 1.0, 1)
    assert sorted(found) == sorted(["A16"] + ["A4"] * 2 + ["A8"] * 5) and switchable_fraction(found) == 1.0
    least = min(effects.distance(modes) for modes in set(itertools.permutations(found)))
    assert effects.distance(found) == pytest.approx(least)
    with pytest.raises(ValueError, match="3 of 8 rows at A16 leave no plan"):
        plans.by_exchange(effects, 0.75, 3)


def test_every_contestant_is_a_valid_recipe() -> None:
    corrected = [Contestant("w4a8", method) for method in corrections.METHODS + corrections.WITH_VARIANCE]
    learnt = reconstruction.corrected(reconstruction.rounded("w4a4", "nearest") + reconstruction.aligned("w4a4"))
    learnt += reconstruction.rounding_along("w4a4")
    for contestant in (*corrected, *learnt, *gates.CORRECTED, *gates.MIXED, *gates.LEARNT_A8, *gates.LEARNT_A4):
        contestant.recipe()
        check_align(contestant.align)
        check_correct(contestant.correction.removesuffix(UNCLAMPED))
    assert {c.align for c in learnt} == {"none", *(f"accuquant:{m}" for m in reconstruction.GROUPS)}
