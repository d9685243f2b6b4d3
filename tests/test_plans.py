"""Plans: what may be asked for, the SNR rule, and budgets against brute force over every plan."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import networks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qdiff_engine as qe
from qdiff_engine.plan_requests import (
    PRESETS,
    PlanRequest,
    expected_modes,
    parse_plan,
    preset_modes,
    switchable_fraction,
)
from qdiff_engine.plans import budget, choice
from qdiff_engine.plans.budget import Effects, best_assignment, block_sizes, measure_effects
from qdiff_engine.plans.choice import PlanChoice, choose, trials, within_budget
from qdiff_engine.plans.snr import SignalToNoise, measure_snr, signal_to_noise, snr_plan, threshold_for
from qdiff_engine.plans.trial import Planned, Sampler, final_errors
from qdiff_engine.quantization import make_table, quantize
from qdiff_engine.recipe import Recipe
from qdiff_engine.runtime.model import load
from qdiff_engine.sampling import prepared

MODES = ("A4", "A8", "A16")


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("uniform", PlanRequest("uniform")),
        ("snr", PlanRequest("snr", share=0.2)),
        ("snr:0.01", PlanRequest("snr", threshold=0.01)),
        ("snr:1e-3", PlanRequest("snr", threshold=1e-3)),
        ("snr:share=0.8", PlanRequest("snr", share=0.8)),
        ("budget:0.6", PlanRequest("budget", fraction=0.6)),
        ("budget:1:A16,A4", PlanRequest("budget", fraction=1, modes=("A4", "A16"))),
        ("preset:imagenet-250", PlanRequest("preset", preset="imagenet-250")),
    ],
)
def test_requests(text: str, request_: PlanRequest) -> None:
    assert parse_plan(text) == request_ == Recipe(plan=text).plan_request()
    assert Recipe.from_dict(json.loads(json.dumps(Recipe(plan=text).to_dict()))) == Recipe(plan=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget:0.49", r"budget:0.49 cannot be reached: over A4, A8, A16 .* 0.5 to 2"),
        ("budget:2.01", "0.5 to 2"),
        ("budget:1.1:A4,A8", "over A4, A8 .* 0.5 to 1"),
        ("budget:0.9:A8,A16", "over A8, A16 .* 1 to 2"),
        ("snr:share=1.5", r"\[0, 1\]"),
        ("preset:cifar", "imagenet-250, imagenet-20, bedrooms-200, churches-200"),
        *((text, "plan must be one of uniform, snr") for text in ("snr:-1", "snr:nan", "snr:", "budget", "A8", "")),
        *((text, "plan must be one of") for text in ("budget:٣", "budget:0.6:A5", "budget:" + "9" * 5000)),
    ],
)
def test_requests_that_cannot_be_met(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(plan=text)


@pytest.mark.parametrize(
    ("name", "last"), [("imagenet-250", 202), ("imagenet-20", 15), ("bedrooms-200", 155), ("churches-200", 146)]
)
def test_presets_are_the_published_steps(name: str, last: int) -> None:
    steps = PRESETS[name][0]
    modes = preset_modes(name, steps)
    assert [steps - 1 - i for i, mode in enumerate(modes) if mode == "A4"] == list(range(steps - 1, last - 1, -1))
    assert set(modes[steps - last :]) == {"A8"} and len(modes) == steps
    assert preset_modes(name, 2 * steps).count("A4") == 2 * modes.count("A4")


def test_a_preset_needs_no_measurement() -> None:
    table = make_table(networks.calibration("unet2d"), Recipe(plan="preset:imagenet-20"))
    assert table.modes == ("A4", "A8", "A8", "A8")


@pytest.mark.parametrize(
    ("plan", "fraction"),
    [("budget:0.6", 0.6), ("budget:1.5", 1.5), ("budget:0.75:A4,A16", 0.75), ("snr:share=0.8", 0.6), ("budget:2", 2)],
)
def test_expected_proportions(plan: str, fraction: float) -> None:
    assert switchable_fraction(expected_modes(parse_plan(plan), "A8")) == pytest.approx(fraction, abs=1e-3)


def test_proportions_that_only_a_calibration_tells() -> None:
    with pytest.raises(ValueError, match="only known after calibration"):
        expected_modes(parse_plan("snr:0.1"), "A8")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_assignment_is_that_of_brute_force(data: st.DataObject) -> None:
    """Least cost among all that fit, and of those the one with most bits."""
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    modes = data.draw(st.sampled_from([MODES, ("A4", "A8"), ("A8", "A16"), ("A4",)]))
    cost = st.integers(-4, 4).map(float)  # small integers, so that there are ties
    costs = torch.tensor([[data.draw(cost) for _ in modes] for _ in sizes], dtype=torch.float64)
    fraction = data.draw(st.sampled_from([0.5, 0.55, 0.6, 0.9, 1.0, 1.3, 2.0]))

    def bits(m: tuple[int, ...]) -> int:
        return sum(size * int(modes[i][1:]) for size, i in zip(sizes, m, strict=True))

    def total(m: tuple[int, ...]) -> float:
        return sum(float(costs[b, i]) for b, i in enumerate(m))

    everything = itertools.product(range(len(modes)), repeat=len(sizes))
    fitting = [m for m in everything if bits(m) <= fraction * 8 * sum(sizes) + 1e-9]
    if not fitting:
        with pytest.raises(ValueError, match="no plan over"):
            best_assignment(costs, sizes, modes, fraction)
        return
    found = best_assignment(costs, sizes, modes, fraction)
    least = min(map(total, fitting))
    assert found in fitting and total(found) == least
    assert bits(found) == max(bits(m) for m in fitting if total(m) == least)


def test_blocks_cover_all_rows() -> None:
    assert block_sizes(3) == (1, 1, 1)
    for rows in (26, 50, 99, 1000):
        sizes = block_sizes(rows)
        assert sum(sizes) == rows and len(sizes) == 25 and max(sizes) - min(sizes) <= 1


def test_more_bits_are_never_called_worse() -> None:
    errors = torch.tensor([[[2.0], [3.0], [1.0]], [[1.0], [3.0], [4.0]]], dtype=torch.float64)
    effects = Effects(MODES, (1, 1), errors)
    assert effects.costs().tolist() == [[2.0, 2.0, 1.0], [1.0, 1.0, 1.0]]


class Still(nn.Module):
    """Predicts no noise."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.zeros_like(sample)


class Off(nn.Module):
    """Predicts, in each row, a mistake in a pixel of that row alone: errors of different rows are uncorrelated."""

    def __init__(self, row: Any, size: tuple[float, ...]) -> None:
        super().__init__()
        self.row, self.size = row, size

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        r = self.row(float(timestep[0]))
        mistake = torch.zeros_like(sample)
        mistake[:, 0, 0, r] = self.size[r]
        return mistake


ROWS = 6


def additive_case() -> tuple[dict[str, nn.Module], Any, Sampler]:
    """Models whose rows' effects add up exactly, of a sampler that clips nothing."""
    scheduler = networks.ddim()
    timesteps = [float(t) for t in prepared(scheduler, ROWS).timesteps]
    sizes = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)).tolist()
    models = {
        mode: Off(timesteps.index, tuple(size * scale for size in sizes))
        for mode, scale in (("A4", 1.0), ("A8", 0.3), ("A16", 0.05))
    }
    sampler = Sampler(scheduler, networks.normal(2, 4, 8, 8), ROWS)
    return dict(models), timesteps.index, sampler


def final_error(models: Any, row: Any, sampler: Sampler, reference: Tensor, modes: Any) -> float:
    return float(final_errors(sampler.run(Planned(models, row, modes)), reference).mean())


@pytest.mark.parametrize("fraction", [0.6, 0.75, 1.0, 1.2])
def test_where_effects_add_up_the_plan_is_the_best_of_all(fraction: float) -> None:
    models, row, sampler = additive_case()
    reference = sampler.run(Still())
    plans = [p for p in itertools.product(MODES, repeat=ROWS) if switchable_fraction(p) <= fraction + 1e-9]
    measured = {plan: final_error(models, row, sampler, reference, plan) for plan in plans}
    least = min(measured.values())
    request = parse_plan(f"budget:{fraction}")
    timesteps = tuple(float(t) for t in prepared(sampler.scheduler, ROWS).timesteps)
    calls: list[int] = []
    found = choose(request, models, row, timesteps, Still(), sampler, lambda: calls.append(1))
    assert measured[found.modes] == pytest.approx(least, rel=1e-4)
    assert found.final_error == pytest.approx(measured[found.modes], rel=1e-4) and found.serves == "fidelity"
    assert len(calls) == trials(request, ROWS)
    costs = measure_effects(models, row, ROWS, Still(), sampler, reference).costs()
    for plan in plans[::37]:  # float carries: contributions are the final error itself
        predicted = sum(float(costs[r, MODES.index(mode)]) for r, mode in enumerate(plan))
        assert predicted == pytest.approx(measured[plan], rel=1e-4)
    uniform = measured.get(("A4",) * ROWS, 0.0)
    around = measure_effects(models, row, ROWS, models["A4"], sampler, reference).costs() - uniform
    for plan in plans[::37]:  # the uniform plan carries: contributions are what a row takes off its error
        predicted = uniform + sum(float(around[r, MODES.index(mode)]) for r, mode in enumerate(plan))
        assert predicted == pytest.approx(measured[plan], rel=1e-3)


def mode_models(name: str, recipe: Recipe) -> dict[str, Any]:
    calibration = networks.calibration(name)
    model = quantize(networks.network(name), calibration, recipe)
    return {mode: networks.rebuilt(model, table=make_table(calibration, recipe, mode)) for mode in MODES}


@pytest.mark.parametrize("fraction", [0.625, 0.75, 1.25])
def test_on_a_network_the_plan_is_near_the_best_of_all(fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Effects do not add up exactly there: the chosen plan's error is within a tenth of the best of all 81."""
    calibration = networks.calibration("unet2d")
    models, row = mode_models("unet2d", Recipe(weight_bits=8)), make_table(calibration, Recipe()).row
    sampler = Sampler(calibration.scheduler, networks.normal(4, 3, 16, 16), networks.STEPS)
    reference = sampler.run(networks.network("unet2d"))
    plans = [p for p in itertools.product(MODES, repeat=4) if switchable_fraction(p) <= fraction + 1e-9]
    measured = {plan: final_error(models, row, sampler, reference, plan) for plan in plans}
    request = parse_plan(f"budget:{fraction}")
    found = choose(request, models, row, calibration.timesteps, networks.network("unet2d"), sampler)
    assert measured[found.modes] <= 1.1 * min(measured.values())
    assert measured[found.modes] < sorted(measured.values())[len(measured) // 2]


def test_rows_that_the_sampler_never_visits_have_no_effect() -> None:
    models, row, sampler = additive_case()
    reference = sampler.run(Still())
    effects = measure_effects(models, row, ROWS + 2, Still(), sampler, reference)
    assert bool((effects.errors[ROWS:] == 0).all()) and bool((effects.errors[:ROWS] > 0).all())


def test_signal_to_noise_of_the_bundled_schedule(demo_scheduler: Any) -> None:
    timesteps = [float(t) for t in prepared(demo_scheduler, 50).timesteps]
    values = signal_to_noise(demo_scheduler, timesteps)
    assert values == tuple(sorted(values)) and values[0] == pytest.approx(6e-5, rel=0.05)
    assert signal_to_noise(demo_scheduler, [480.0, 260.0, 0.0]) == pytest.approx((0.1, 1.0, 1e4), rel=0.15)
    with pytest.raises(ValueError, match="0 to 999"):
        signal_to_noise(demo_scheduler, [1000.0])
    with pytest.raises(ValueError, match="alphas_cumprod, which int lacks"):
        signal_to_noise(3, [0.0])


RATIOS = SignalToNoise((0.01, 0.1, 1.0, 100.0), {"A4": (4.0, 3.0, 5.0, 2.0), "A8": (40.0, 30.0, 50.0, 20.0)})


@pytest.mark.parametrize(
    ("threshold", "modes"),
    [
        (0.0, "4444"),
        (0.01, "4444"),
        (0.1, "4448"),
        (10.0, "4488"),
        (30.0, "4888"),
        (100.0, "4888"),
        (1e3, "8888"),
    ],
)
def test_snr_rule_by_hand(threshold: float, modes: str) -> None:
    """Critical thresholds SNRq / SNRf of A4: 400, 30, 5, 0.02; a row at its own critical threshold is not above it."""
    assert snr_plan(RATIOS, threshold) == tuple(f"A{mode}" for mode in modes)


@pytest.mark.parametrize("count", range(5))
def test_the_threshold_gives_the_share(count: int) -> None:
    threshold = threshold_for(RATIOS, count / 4)
    assert snr_plan(RATIOS, threshold).count("A4") == count
    if count == 2:
        assert threshold == pytest.approx(math.sqrt(30 * 5))


def test_thresholds_of_extreme_ratios() -> None:
    """No signal at all is A4 at any threshold, no noise at all is A8 at any above 0; equal rows stay together."""
    ends = SignalToNoise((0.0, 1.0, math.inf), {"A4": (2.0, 2.0, 2.0), "A8": (9.0, 9.0, 9.0)})
    assert [snr_plan(ends, threshold_for(ends, share)).count("A4") for share in (1 / 3, 2 / 3, 1)] == [1, 2, 3]
    assert snr_plan(ends, 1e9) == ("A4", "A8", "A8")
    equal = SignalToNoise((1.0, 1.0), {"A4": (2.0, 2.0), "A8": (9.0, 9.0)})
    assert snr_plan(equal, threshold_for(equal, 0.5)) == ("A8", "A8")


def test_thresholds_are_above_ratios_that_round_down() -> None:
    """1 / 49 * 49 < 1 and sqrt(3) * sqrt(3) < 3 in floating point."""
    one = SignalToNoise((49.0, 49.0), {"A4": (1.0, 1.0), "A8": (9.0, 9.0)})
    three = SignalToNoise((1.0, 1.0), {"A4": (3.0, 3.0), "A8": (9.0, 9.0)})
    assert 1 / 49 * 49 < 1 and math.sqrt(3) * math.sqrt(3) < 3
    for snr, share in ((one, 0.0), (one, 0.5), (three, 0.5)):
        assert snr_plan(snr, threshold_for(snr, share)) == ("A8", "A8")


def test_measured_ratios_are_those_of_the_norms() -> None:
    unet, (_, _, sampler) = networks.network("unet2d"), additive_case()

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return (1 + self.factor) * unet(sample, timestep).sample

    noise = networks.normal(3, 3, 16, 16)
    sampler = Sampler(sampler.scheduler, noise, ROWS, batch=2)
    _, path = sampler.path(unet)
    timesteps = [step.timestep for step in path]
    found = measure_snr({"A8": Scaled(0.02), "A4": Scaled(0.5)}, timesteps.index, timesteps, sampler, path)
    assert list(found.quantised) == ["A4", "A8"]
    assert found.quantised["A4"] == pytest.approx([2.0] * ROWS, rel=1e-5)
    assert found.quantised["A8"] == pytest.approx([50.0] * ROWS, rel=1e-3)


@pytest.mark.parametrize(
    ("plan", "counts"),
    [
        ("snr:share=0.5", {"A4": 2, "A8": 2}),
        ("snr:0", {"A4": 4}),
        ("budget:0.75:A4,A8", {"A4": 2, "A8": 2}),
        ("budget:2", {"A16": 4}),
    ],
)
def test_quantize_chooses_the_plan(plan: str, counts: dict[str, int], tmp_path: Any) -> None:
    chosen: list[PlanChoice] = []
    recipe = Recipe(weight_bits=4, plan=plan)
    unet, calibration = networks.network("sd"), networks.calibration("sd")
    model = quantize(unet, calibration, recipe, on_plan=chosen.append)
    modes = model.table.modes
    assert {mode: modes.count(mode) for mode in set(modes)} == counts and chosen[0].modes == modes
    assert quantize(unet, calibration, recipe).table.modes == modes
    explicit = quantize(unet, calibration, Recipe(weight_bits=4, plan=modes))
    for field in ("scale", "zero_point", "bits"):
        assert torch.equal(getattr(model.table, field), getattr(explicit.table, field))
    model.save_pretrained(tmp_path / "artifact")
    loaded = load(tmp_path / "artifact")
    assert loaded.recipe.plan == plan and loaded.table.modes == modes
    data = json.loads(json.dumps(chosen[0].to_dict(), allow_nan=False))
    assert data["switchable_fraction"] == switchable_fraction(modes)
    assert qe.count_bops(model).switchable_fraction == switchable_fraction(modes)


def test_trial_models_have_the_ranges_of_a_mixed_plan() -> None:
    """A row at A16 beside others keeps the prompt's integers, as it will in the plan."""
    calibration, recipe = networks.calibration("sd"), Recipe(weight_bits=4)
    mixed = make_table(calibration, recipe, ("A16", "A4", "A8", "A16"))
    for r, mode in enumerate(mixed.modes):
        alone = make_table(calibration, recipe, mode)
        for field in ("scale", "zero_point", "bits"):
            assert torch.equal(getattr(mixed, field)[r], getattr(alone, field)[r])


def test_a_calibration_without_its_scheduler_measures_no_plan() -> None:
    import dataclasses

    calibration = dataclasses.replace(networks.calibration("unet2d"), scheduler=None)
    with pytest.raises(ValueError, match="no scheduler"):
        quantize(networks.network("unet2d"), calibration, Recipe(plan="snr"))


def test_the_mixed_recipe() -> None:
    recipe = Recipe.named("w4a8-mixed")
    assert (recipe.weight_bits, recipe.activation_bits) == (4, 8)
    model = quantize(networks.network("unet2d"), networks.calibration("unet2d"), recipe)
    assert model.table.modes.count("A4") == 1 and model.table.modes.count("A8") == 3  # 0.875 of 0.9 can be spent
    assert budget.MAX_BLOCKS >= 4 and choice.TRIAL_SAMPLES >= networks.SAMPLES


def test_within_budget_expands_blocks() -> None:
    errors = torch.zeros(2, 2, 1, dtype=torch.float64)
    errors[0, 0], errors[1, 0] = 5.0, 1.0  # A4 hurts in the first block
    effects = Effects(("A4", "A8"), (2, 3), errors)
    assert within_budget(effects, 0.7) == ("A8", "A8", "A4", "A4", "A4")
