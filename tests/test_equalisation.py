"""Channel equalisation: the factors that are found, the float network they leave alone, and the integers they make."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from networks import SAMPLES, relative
from safetensors.torch import load_file
from torch import Tensor

import qdiff_engine as qe
from qdiff_engine import equalisation, numerics, quantization
from qdiff_engine.alignment.training import AlignmentSettings
from qdiff_engine.calibration.calibration import Calibration
from qdiff_engine.equalisation import Reader, candidates, output_errors, search, with_factors
from qdiff_engine.graph.factors import FACTORS, LIMIT, channel_axis, factor_keys, readers
from qdiff_engine.graph.interpret import flatten_conditioning, run_float, simulate
from qdiff_engine.quantization import equalised, quantize
from qdiff_engine.recipe import Recipe
from qdiff_engine.rounding import nearest
from qdiff_engine.runtime import artifact, lowering, summary
from qdiff_engine.runtime.artifact_config import ArtifactError
from qdiff_engine.runtime.replay import ReplayedProgram

NAMES = ["scale-shift", "sd", "patches"]


def random_factors(calibration: Calibration) -> dict[str, Tensor]:
    """Factors in [1/4, 4] for every site that can have any."""
    generator, factors = torch.Generator().manual_seed(3), {}
    shapes = {node.kwargs["site"]: node for node in calibration.capture.graph.nodes if "site" in node.kwargs}
    for site in sorted(equalisation._aligned_sites(calibration)):
        node = shapes[site]
        channels = int(node.shape[channel_axis(node.op, len(node.shape))])
        factors[site] = (4 * torch.rand(channels, generator=generator) - 2).exp2()
    return factors


@functools.cache
def divided(name: str) -> Calibration:
    """A case with factors at every site that can have any, and the statistics of what its quantisers then see."""
    calibration = networks.calibration(name)
    factors = random_factors(calibration)
    return equalisation._observed(with_factors(calibration, factors), set(factors), lambda: None)


@functools.cache
def quantised(name: str, recipe: str) -> qe.IntegerUNet:
    return quantize(networks.network(name), divided(name), Recipe.named(recipe, equalise="on"))


@pytest.mark.parametrize("name", NAMES)
def test_the_float_network_stays_the_same(name: str) -> None:
    """In float64: every layer behind a site has absorbed what the site divides by, segments and merged readers too."""
    plain, factored = networks.calibration(name).capture, divided(name).capture
    sites = {node.kwargs["site"] for node in factored.graph.nodes if node.kwargs.get(FACTORS) is not None}
    assert len(sites) >= len(readers(plain.graph)) - 3  # all but the network's input and grouped convolutions
    for step in networks.trajectory(name)[:2]:
        inputs: dict[str, Any] = {"sample": step.sample, "timestep": torch.full((SAMPLES,), int(step.timestep))}
        inputs |= flatten_conditioning(networks.conditioning(name, SAMPLES))
        expected = run_float(plain.graph, plain.constants, inputs, dtype=torch.float64)
        actual = run_float(factored.graph, factored.constants, inputs, dtype=torch.float64)
        assert relative(actual, expected) < 1e-6  # the weights are absorbed in float32
        assert relative(actual, expected) > 0


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", NAMES)
def test_the_engine_equals_the_simulation(name: str, recipe: str) -> None:
    model, given = quantised(name, recipe), networks.conditioning(name, SAMPLES)
    for step in networks.trajectory(name)[1:3]:
        inputs = networks.flat_inputs(model, step.sample, step.timestep, given)
        simulated = simulate(model.graph, model.constants, model.weights, model.table, inputs)
        engine = relative(model(step.sample, step.timestep, **given)[0], simulated)
        assert engine < 0.5 * relative(simulated, step.prediction), (engine, relative(simulated, step.prediction))


@pytest.mark.parametrize("name", NAMES)
def test_floating_activations_are_divided_too(name: str) -> None:
    """Mode A16: x / c in floating point times the integer weights, equal to the float64 simulation."""
    model, given = quantised(name, "w8a16"), networks.conditioning(name, SAMPLES)
    step = networks.trajectory(name)[1]
    inputs = networks.flat_inputs(model, step.sample, step.timestep, given)
    simulated = simulate(model.graph, model.constants, model.weights, model.table, inputs)
    assert relative(model(step.sample, step.timestep, **given)[0], simulated) < 1e-5


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name, recipe", [("patches", "w4a4"), ("patches", "w8a16"), ("scale-shift", "w8a8")])
def test_a_gpus_program_divides_too(name: str, recipe: str) -> None:
    """The recorded step's kernels in Triton's interpreter, the table at fixed addresses, against the simulation."""
    model, step = quantised(name, recipe), networks.trajectory(name)[1]
    parts = (model.graph, model.weights, model.constants, model.table)
    program = ReplayedProgram(*parts, torch.device("cpu"), "triton")
    sample = step.sample[:2].contiguous(memory_format=torch.channels_last)
    inputs = networks.flat_inputs(model, sample, step.timestep, networks.conditioning(name, 2))
    simulated = simulate(model.graph, model.constants, model.weights, model.table, inputs)
    engine = relative(program.run(inputs, step.timestep, model.table.row(step.timestep)), simulated)
    quantisation = relative(simulated, step.prediction[:2])
    assert engine < (1e-5 if recipe == "w8a16" else 0.5 * quantisation), (engine, quantisation)


@pytest.mark.parametrize("lower", [lowering.lower_for_cpu, lowering.lower_for_gpu])
def test_quantisers_with_factors_are_not_joined_to_other_kernels(lower: Any) -> None:
    """Epilogues, attention and copies take one scale: a site with factors keeps a node that has them."""
    model = quantised("sd", "w8a8")
    factored = {node.kwargs["site"] for node in model.graph.nodes if node.kwargs.get(FACTORS) is not None}
    operators = ("quantize", "groupnorm_silu_quantize", "layernorm_quantize")
    kept = {n.kwargs["site"] for n in lower(model.graph).nodes if n.op in operators and n.kwargs.get(FACTORS)}
    assert factored and kept == factored
    joined = {n.kwargs["site"] for n in lower(networks.integer_model("sd").graph).nodes if n.op in operators}
    assert factored - joined  # without factors some of them would be


def layer(channels: int = 6, outputs: int = 5, taps: int = 1, samples: int = 64, bits: int = 4) -> Reader:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, channels, taps, generator=generator)
    return Reader(weight, torch.randn(samples, channels, taps, generator=generator), bits)


ROWS, BITS, W4A4 = torch.tensor([0, 1]), torch.tensor([4, 4], dtype=torch.uint8), Recipe.named("w4a4")


def test_candidates_are_the_formula() -> None:
    first, second = layer(taps=3), layer(outputs=2)
    found = candidates([first, second])
    assert len(found) == 2 * len(equalisation.EXPONENTS)
    x = torch.maximum(first.inputs.abs().amax((0, 2)), second.inputs.abs().amax((0, 2))).double()
    w = torch.maximum(first.weight.abs().amax((0, 2)), second.weight.abs().amax((0, 2))).double()

    def mean_size(name: str) -> torch.Tensor:
        squares = [getattr(part, name).square().mean((0, 2)) for part in (first, second)]
        return ((squares[0] + squares[1]) / 2).sqrt().double()

    sizes = ((x, w), (mean_size("inputs"), mean_size("weight")))
    kinds = [(a, b, p, q) for a, b in sizes for p, q in equalisation.EXPONENTS]
    for factors, (a, b, p, q) in zip(found, kinds, strict=True):
        expected = a**p / b**q
        torch.testing.assert_close(factors.double(), expected / expected.log().mean().exp(), rtol=1e-5, atol=0)


def test_dead_channels_have_no_factor_and_wild_ones_stay_in_bounds() -> None:
    part = layer()
    part.inputs[:, 0], part.weight[:, 1] = 0, 0
    part.inputs[:, 2] *= 1e12
    found = candidates([part])
    assert len(found) == 2 * len(equalisation.EXPONENTS)
    for factors in found:
        assert factors[0] == factors[1] == 1
        assert bool(((factors >= 1 / LIMIT) & (factors <= LIMIT)).all())
    part.inputs.zero_()
    assert candidates([part]) == [] and search([part], ROWS, BITS, W4A4) is None


def test_the_error_is_that_of_the_integers() -> None:
    """Against the definition: a row's affine from min/max of its own samples, both operands as integers."""
    part, factors = layer(), torch.tensor([1.0, 2.0, 0.3, 1.0, 5.0, 1.0])
    recipe = dataclasses.replace(W4A4, observer="minmax")
    expected = 0.0
    weight = nearest((part.weight * factors[:, None]).flatten(1), 4, (part.inputs / factors[:, None]).flatten(1))
    for half in (slice(0, 32), slice(32, 64)):
        x = (part.inputs[half] / factors[:, None]).flatten(1)
        scale, zero_point = numerics.affine_from_range(x.min(), x.max(), 4)
        q = numerics.quantize(x, float(scale), int(zero_point), 4)
        y = numerics.dequantize(q, float(scale), int(zero_point)) @ weight.dequantize().T
        expected += float((y - part.inputs[half].flatten(1) @ part.weight.flatten(1).T).square().sum())
    (found,) = output_errors([part], [factors], torch.arange(2), ROWS, BITS, recipe)
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_loud_channel_is_equalised_and_even_ones_are_left_alone() -> None:
    part = layer(channels=16, outputs=32, samples=256)
    assert search([Reader(part.weight.sign(), part.inputs.sign(), 4)], ROWS, BITS, W4A4) is None
    part.inputs[:, 3] *= 64
    part.weight[:, 3] /= 64
    found = search([part], ROWS, BITS, W4A4)
    assert found is not None and found[3] > 8 * found[[*range(3), *range(4, 16)]].max()
    before, after = output_errors([part], [torch.ones(16), found], torch.arange(2), ROWS, BITS, W4A4)
    assert after < 0.1 * before


@functools.cache
def loud() -> tuple[torch.nn.Module, Calibration, list[qe.IntegerUNet]]:
    """A network with some channels 20 times as large as they should be, quantised without and with factors."""
    unet = copy.deepcopy(networks.network("unet2d"))
    with torch.no_grad():
        for block in (m for m in unet.modules() if hasattr(m, "norm2") and hasattr(m, "conv2")):
            block.norm2.weight[::8] *= 20
            block.norm2.bias[::8] *= 20
            block.conv2.weight[:, ::8] /= 20
    calibration = qe.calibrate(unet, networks.ddim(), shape=(3, 16, 16), steps=3, samples=2)
    models = [quantize(unet, calibration, Recipe.named("w4a4", equalise=choice)) for choice in ("off", "on")]
    return unet, calibration, models


def test_equalised_models_are_nearer_to_float() -> None:
    unet, calibration, models = loud()
    assert not any(FACTORS in node.kwargs for node in models[0].graph.nodes)
    x, t = calibration.trajectory.samples[1], calibration.trajectory.timesteps[1]
    with torch.no_grad():
        expected = unet(x, t).sample
    off, on = (relative(model(x, t).sample, expected) for model in models)
    assert on < 0.7 * off, (off, on)


def test_an_interrupted_search_resumes_to_the_same_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, calibration, _ = loud()
    recipe, counted, searched = Recipe.named("w4a4", equalise="on"), list[int](), list[int]()
    whole = equalised(calibration, recipe)

    class Stop(Exception):
        pass

    def stop() -> None:
        counted.append(1)
        if len(counted) == 2:
            raise Stop

    with pytest.raises(Stop):
        equalised(calibration, recipe, stop, tmp_path)
    search = equalisation.search
    monkeypatch.setattr(equalisation, "search", lambda *given: searched.append(1) or search(*given))
    resumed = equalised(calibration, recipe, cache_dir=tmp_path)
    sites = len(searched)
    assert sites > 0 and factor_keys(resumed.capture.graph)
    for key in factor_keys(whole.capture.graph):
        assert torch.equal(whole.capture.constants[key], resumed.capture.constants[key])
    equalised(calibration, recipe, cache_dir=tmp_path)
    assert len(searched) == sites, "every site is known"
    equalised(calibration, dataclasses.replace(recipe, weight_bits=8), cache_dir=tmp_path)
    assert len(searched) > 2 * sites - 1, "another recipe's are searched afresh"


def test_a_recipe_must_say_that_its_calibration_is_equalised() -> None:
    unet, calibration, _ = loud()
    once = equalised(calibration, Recipe.named("w4a4", equalise="on"))
    with pytest.raises(ValueError, match="calibration is equalised, and recipe has equalise='off'"):
        qe.quantize(unet, once, Recipe.named("w4a4"))


def test_equalising_again_changes_nothing() -> None:
    _, calibration, models = loud()
    recipe = Recipe.named("w4a4", equalise="on")
    counted: list[int] = []
    once = equalised(calibration, recipe, on_step=lambda: counted.append(1))
    assert equalised(once, recipe) is once and equalised(calibration, Recipe.named("w4a4")) is calibration
    assert 0 < len(counted) <= equalisation.progress_steps(calibration)
    again = quantize(loud()[0], once, recipe)
    x = calibration.trajectory.samples[0]
    assert torch.equal(again(x, 500).sample, models[1](x, 500).sample)  # found again, bit for bit


@pytest.mark.parametrize("plan, width", [("budget:0.75:A4,A8", 4), ("budget:1:A8,A16", 8), ("uniform", 8)])
def test_a_plan_still_to_be_measured_is_served_at_its_fewest_bits(
    plan: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(quantization, "equalise", lambda _, recipe, bits, *more: seen.append(bits))
    calibration = networks.calibration("unet2d")
    equalised(calibration, Recipe.named("w4a8", plan=plan, equalise="on"))
    assert seen[0].shape == (len(calibration.timesteps), len(calibration.sites))
    assert int(seen[0].min()) == width


def test_factors_survive_saving(tmp_path: Path) -> None:
    model = loud()[2][1]
    model.save_pretrained(tmp_path / "art")
    keys = factor_keys(model.graph)
    stored = load_file(tmp_path / "art" / "model.safetensors")
    assert keys and all(stored[f"constant.{key}"].dtype == torch.float32 for key in keys)
    assert summary.float_bytes(model) == summary.float_bytes(loud()[2][0])  # factors are no parameters
    x = networks.normal(2, 3, 16, 16)
    assert torch.equal(qe.load(tmp_path / "art")(x, 250).sample, model(x, 250).sample)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 2 * LIMIT, 0.5 / LIMIT])
def test_bad_factors_are_refused(value: float) -> None:
    model = loud()[2][1]
    key = next(node.kwargs[FACTORS].key for node in model.graph.nodes if node.kwargs.get(FACTORS) is not None)
    right = model.constants[key]
    wrong = right.clone()
    wrong[1] = value
    with pytest.raises(ArtifactError, match=f"model.safetensors: constant.{key}"):
        artifact.check_agreement(_artifact(model, {**model.constants, key: wrong}))
    with pytest.raises(ArtifactError, match=f"constant.{key} must be torch.float32"):
        artifact.check_agreement(_artifact(model, {**model.constants, key: right[1:]}))


def _artifact(model: qe.IntegerUNet, constants: dict[str, Tensor]) -> artifact.Artifact:
    return artifact.Artifact(model.graph, model.weights, constants, model.table, model.recipe)


def test_factors_belong_to_quantisers() -> None:
    model = loud()[2][1]
    nodes = [copy.copy(node) for node in model.graph.nodes]
    first = next(node for node in nodes if node.op == "int_conv2d")
    first.kwargs = {**first.kwargs, FACTORS: 3}
    graph = dataclasses.replace(model.graph, nodes=nodes)
    with pytest.raises(ArtifactError, match="must name the factors of a quantiser"):
        artifact.check_agreement(dataclasses.replace(_artifact(model, model.constants), graph=graph))


def test_alignment_chooses_between_integers_of_the_divided_weights() -> None:
    name, settings = "scale-shift", AlignmentSettings(group=2, iterations=2, batch=2, rounding=True)
    plain = quantize(networks.network(name), networks.calibration(name), Recipe.named("w8a8"))
    for model, other in ((quantised(name, "w8a8"), networks.calibration(name)), (plain, divided(name))):
        with pytest.raises(ValueError, match=r"not equalised as the model is.*equalised\(calibration, model.recipe\)"):
            qe.align(model, other, settings)
    model = quantised(name, "w8a8")
    assert not torch.equal(qe.align(model, divided(name), settings).table.scale, model.table.scale)
