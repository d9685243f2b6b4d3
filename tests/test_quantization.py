"""Recipes become tables and integers: modes, plans, edges, rows, rounding; corrections fold into the last layer."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import networks
import pytest
import torch
from networks import SAMPLES, relative
from torch import Tensor

import qdiff_engine as qe
from qdiff_engine import ops
from qdiff_engine.graph.interpret import run_float, simulate
from qdiff_engine.quantization import make_table, quantize
from qdiff_engine.recipe import Recipe
from qdiff_engine.runtime.model import IntegerUNet, load
from qdiff_engine.tables import Table

NAME = "sd"  # has every operator, and layers of the prompt


def quantised(name: str = NAME, **fields: Any) -> IntegerUNet:
    return quantize(networks.network(name), networks.calibration(name), Recipe(**fields))


def errors(model: IntegerUNet, name: str = NAME) -> list[float]:
    """Relative L2 distance to the float network in every row."""
    given = networks.conditioning(name, SAMPLES)
    return [relative(model(s.sample, s.timestep, **given)[0], s.prediction) for s in networks.trajectory(name)]


def bits_of(table: Table, row: int = 0) -> dict[str, int]:
    return dict(zip(table.sites, table.bits[row].tolist(), strict=True))


def edge_sites(model: IntegerUNet, edge: str) -> set[str]:
    """Sites that feed the first or the last layer."""
    sources = model.graph.quantizer_of()
    return {
        sources[ref.name].kwargs["site"]
        for node in model.graph.nodes
        if node.kwargs.get("edge") == edge
        for ref in node.args
    }


def prompt_sites(model: IntegerUNet) -> set[str]:
    return {n.kwargs["site"] for n in model.graph.nodes if "site" in n.kwargs and n.section == "prompt"}


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_mode_sets_the_bits_of_every_site(bits: int) -> None:
    model = quantised(activation_bits=bits)
    first, last, prompt = edge_sites(model, "first"), edge_sites(model, "last"), prompt_sites(model)
    assert first and last and prompt
    for row in range(len(model.table.timesteps)):
        for site, width in bits_of(model.table, row).items():
            expected = 16 if site in first else max(bits, 8) if site in last | prompt else bits
            assert width == expected, site
    assert set(model.table.modes) == {f"A{bits}"}


def test_more_bits_are_nearer_to_float() -> None:
    a4, a8, a16 = (errors(quantised(activation_bits=bits)) for bits in (4, 8, 16))
    for worst, middle, best in zip(a4, a8, a16, strict=True):
        assert 0 < best < middle < worst < 0.5


@pytest.mark.parametrize("name", ["sd", "scale-shift", "around"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a16_is_float_arithmetic_on_the_dequantised_weights(name: str, bits: int) -> None:
    model = quantised(name, weight_bits=bits, activation_bits=16)
    given = networks.conditioning(name, SAMPLES)
    for step in networks.trajectory(name):
        inputs = networks.flat_inputs(model, step.sample, step.timestep, given)

        def dequantised(node: Any, segment: int, weight: Any) -> Tensor:
            return model.weights[node.kwargs["layer"]][segment].dequantize(torch.float64)  # noqa: B023

        expected = run_float(model.graph, model.constants, inputs, weight=dequantised, dtype=torch.float64)
        plain = run_float(model.graph, model.constants, inputs, weight=lambda n, i, w: dequantised(n, i, w).float())
        actual = model(step.sample, step.timestep, **given)[0]
        assert relative(actual, expected) <= 2 * relative(plain, expected) + 1e-7


def test_a_plan_names_the_mode_of_every_row() -> None:
    plan = ("A16", "A4", "A8", "A4")
    model = quantised(plan=plan)
    assert model.table.modes == plan
    uniform = {mode: errors(quantised(activation_bits=int(mode[1:]))) for mode in ("A4", "A8")}
    mixed = errors(model)
    for row in (1, 2, 3):
        assert mixed[row] == uniform[plan[row]][row]
    assert mixed[0] < uniform["A8"][0]


def test_a_mixed_plan_survives_saving(tmp_path: Any) -> None:
    model = quantised(plan=("A16", "A4", "A8", "A4"), weight_bits=4)
    model.save_pretrained(tmp_path / "artifact")
    loaded = load(tmp_path / "artifact")
    assert loaded.recipe == model.recipe and errors(loaded) == errors(model)


@pytest.mark.parametrize("plan", [("A8",), ("A8",) * 5])
def test_a_plan_of_the_wrong_length_is_refused(plan: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"plan names {len(plan)} rows, the calibration has 4"):
        quantised(plan=plan)


def test_edges_a8_quantises_the_first_layers_input() -> None:
    model, floating = quantised(edges="a8", activation_bits=4), quantised(activation_bits=4)
    first = edge_sites(model, "first")
    assert {bits_of(model.table)[site] for site in first} == {8}
    assert {bits_of(floating.table)[site] for site in first} == {16}
    differing = {s for s in model.table.sites if bits_of(model.table)[s] != bits_of(floating.table)[s]}
    assert differing == first
    assert {bits_of(quantised(edges="a8", activation_bits=16).table)[site] for site in first} == {16}


def test_rows_share_ranges() -> None:
    calibration = networks.calibration(NAME)
    step, pairs, static, all_of_them = (
        make_table(calibration, Recipe(rows=rows)).scale for rows in ("step", "group:2", "static", "group:9")
    )
    assert torch.equal(static, static[:1].expand_as(static)) and torch.equal(static, all_of_them)
    assert torch.equal(pairs[0], pairs[1]) and torch.equal(pairs[2], pairs[3])
    assert not torch.equal(pairs[0], pairs[2])
    assert len({tuple(row.tolist()) for row in step}) == len(step)
    minmax = [make_table(calibration, Recipe(rows=rows, observer="minmax")).scale for rows in ("step", "static")]
    used = make_table(calibration, Recipe()).bits[0] == 8
    assert bool((minmax[1][0] >= minmax[0].amax(0) * (1 - 1e-6))[used].all())  # one range holds those of all rows


def test_observers() -> None:
    """Searched ranges lie inside min/max ones, and the error is small with every observer."""
    calibration = networks.calibration(NAME)
    scales = {o: make_table(calibration, Recipe(observer=o)).scale for o in ("minmax", "percentile", "mse")}
    assert bool((scales["percentile"] <= scales["minmax"] * (1 + 1e-6)).all())
    assert bool((scales["mse"] <= scales["minmax"] * (1 + 1e-6)).all()) and bool(
        (scales["mse"] < scales["minmax"]).any()
    )
    for observer in scales:
        assert max(errors(quantised(observer=observer))) < 0.07


def test_prompt_layers_share_one_affine() -> None:
    """Keys and values of the text are computed once, so every row quantises the text alike."""
    table, sites = quantised(plan=("A4", "A8", "A16", "A8")).table, prompt_sites(quantised())
    columns = [table.sites.index(site) for site in sites]
    for value in (table.scale, table.zero_point, table.bits):
        assert torch.equal(value[:, columns], value[:1, columns].expand(4, -1))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_rounding_of_weights(rounding: str) -> None:
    model, again = (quantised(weight_bits=4, weights=rounding) for _ in range(2))
    assert 0.005 < max(errors(model)) < 0.25
    for layer, parts in model.weights.items():
        for one, other in zip(parts, again.weights[layer], strict=True):
            assert torch.equal(one.values, other.values) and torch.equal(one.scale, other.scale)


def test_gptq_is_nearer_than_nearest() -> None:
    gptq, nearest = (errors(quantised(weight_bits=4, weights=weights)) for weights in ("gptq", "nearest"))
    assert sum(gptq) < sum(nearest)


def corrected(name: str) -> tuple[IntegerUNet, IntegerUNet]:
    """A model, and the same one with another random affine correction of its output in every row."""
    model = networks.rebuilt(networks.integer_model(name))
    shape = model.table.output_scale.shape
    table = dataclasses.replace(
        model.table,
        output_scale=1 + 0.3 * networks.normal(*shape, seed=5),
        output_shift=0.5 * networks.normal(*shape, seed=6),
    )
    return model, networks.rebuilt(model, table=table)


@pytest.mark.parametrize("name", ["sd", "unet2d", "plain", "around", "patches"])
def test_output_correction_is_the_affine_map_of_the_output(name: str) -> None:
    """e' = a e + b in every row, also where a residual around the network keeps it out of the last layer."""
    model, changed = corrected(name)
    given = networks.conditioning(name, SAMPLES)
    for row, step in enumerate(networks.trajectory(name)):
        a, b = changed.table.output_scale[row], changed.table.output_shift[row]
        plain = model(step.sample, step.timestep, **given)[0].double()
        expected = a.double()[:, None, None] * plain + b.double()[:, None, None]
        actual = changed(step.sample, step.timestep, **given)[0]
        assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        inputs = networks.flat_inputs(changed, step.sample, step.timestep, given)
        simulated = simulate(changed.graph, changed.constants, changed.weights, changed.table, inputs)
        assert relative(actual, simulated) < 0.03


def test_output_correction_costs_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    resolve = ops.resolve

    def counting(operator: str, *place: Any) -> Any:
        kernel = resolve(operator, *place)

        def run(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(operator)
            return kernel(*args, **kwargs)

        return run

    monkeypatch.setattr(ops, "resolve", counting)
    step, counts = networks.trajectory(NAME)[0], []
    for model in corrected(NAME):
        calls.clear()
        model(step.sample, step.timestep, **networks.conditioning(NAME, SAMPLES))
        assert len(model.program.sections["main"]) > len(calls) > 0
        counts.append((list(calls), len(model.program.sections["main"])))
    assert counts[0] == counts[1] and model.program.folds_correction


def test_a_correction_survives_saving(tmp_path: Any) -> None:
    _, changed = corrected(NAME)
    changed.save_pretrained(tmp_path / "artifact")
    assert errors(load(tmp_path / "artifact")) == errors(changed)


def test_wrong_arguments() -> None:
    unet, calibration = networks.network(NAME), networks.calibration(NAME)
    other = copy.deepcopy(unet)
    with torch.no_grad():
        next(other.parameters())[0] += 1
    with pytest.raises(ValueError, match="not the one that was calibrated"):
        quantize(other, calibration, Recipe())
    with pytest.raises(TypeError, match="recipe must be a Recipe, got str"):
        quantize(unet, calibration, "w8a8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="calibration must come from"):
        quantize(unet, {}, Recipe())  # type: ignore[arg-type]
    assert qe.quantize is quantize
