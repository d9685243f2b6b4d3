"""Step sizes that block reconstruction learns: their gradient, their bounds, and what becomes of them."""

from __future__ import annotations

import dataclasses
import math

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import normal
from torch import Tensor

from qdiff_engine import numerics
from qdiff_engine.graph.ir import Const, Node, Ref
from qdiff_engine.quantization import make_table, quantize
from qdiff_engine.recipe import Recipe
from qdiff_engine.reconstruction.adaround import sharpness
from qdiff_engine.reconstruction.blocks import Block
from qdiff_engine.reconstruction.learning import BlockData, BlockNetwork, learn_rounding, mixed
from qdiff_engine.reconstruction.quantizers import RowQuantizer
from qdiff_engine.reconstruction.step_sizes import StepSizes, learnt_table
from qdiff_engine.rounding import gptq
from qdiff_engine.tables import Table, with_learnt


def table(scale: list[float], zero_point: list[int], bits: list[int]) -> Table:
    """One site "s", a row for every entry."""
    rows = len(scale)
    timesteps = tuple(float(rows - r) for r in range(rows))
    modes = tuple(f"A{b}" for b in bits)
    columns = torch.tensor(scale)[:, None], torch.tensor(zero_point, dtype=torch.int32)[:, None]
    identity = torch.ones(rows, 1)
    return Table(
        timesteps, modes, ("s",), *columns, torch.tensor(bits, dtype=torch.uint8)[:, None], identity, 0 * identity
    )


def quantiser(section: str = "main") -> Node:
    return Node("q", "quantize", (Ref("sample"),), {"site": "s", "activation": "none"}, section=section)


def test_gradients_are_those_of_learned_step_size_quantisation() -> None:
    """d/ds = round(v) - v inside and the bound outside; d/dz = 0 inside and -s outside; by hand, s = 0.5, z = 2."""
    start = table([0.5, 0.5], [2, 2], [4, 4])
    steps = StepSizes(start, [quantiser()], rows=1)
    for values in (steps.log_scale, steps.shift):
        values.requires_grad_()
    x = torch.tensor([[0.6, 9.0], [-9.0, 0.1]])  # v = x / s: 1.2 inside, 18 above 7 - 2; -18 below -8 - 2, 0.2 inside
    y = RowQuantizer(start, torch.tensor([0, 1]), steps=steps)("s", x)
    assert y.tolist() == [[0.5, 2.5], [-5.0, 0.0]]
    y.sum().backward()
    by_scale, by_zero_point = steps.log_scale.grad, steps.shift.grad
    assert by_scale is not None and by_zero_point is not None
    expected = [0.5 * ((1 - 1.2) + 5), 0.5 * (-10 + (0 - 0.2))]
    assert by_scale.flatten().tolist() == pytest.approx([0.0, *expected], abs=1e-6)  # group 0 is the prompt's
    assert by_zero_point.flatten().tolist() == pytest.approx([0.0, -0.5, -0.5])


def test_what_learnt_nothing_is_what_it_was() -> None:
    start = table([0.013, 0.7, 1.0], [-3, 5, 0], [8, 4, 16])
    steps = StepSizes(start, [quantiser()], rows=1)
    steps.keep_representable()
    same = learnt_table(start, steps.tensors())
    assert torch.equal(same.scale, start.scale) and torch.equal(same.zero_point, start.zero_point)


def test_scales_and_zero_points_stay_representable() -> None:
    start = table([0.1, 0.1, 0.1], [100, -5, 7], [8, 4, 4])
    steps = StepSizes(start, [quantiser()], rows=1)
    steps.log_scale += 9.0
    steps.shift += torch.tensor([0.0, 90.0, -90.0, 90.0])[:, None]
    steps.keep_representable()
    learnt = learnt_table(start, steps.tensors())
    assert learnt.zero_point.flatten().tolist() == [127, -8, 7]
    assert torch.allclose(learnt.scale, 0.1 * torch.full((3, 1), math.exp(3.0)))


def test_rows_of_a_group_and_all_rows_of_a_prompt_share_a_step() -> None:
    start = table([0.1] * 4, [0] * 4, [4] * 4)
    assert StepSizes(start, [quantiser()], rows=2).group.flatten().tolist() == [1, 1, 2, 2]
    assert StepSizes(start, [quantiser()], rows=0).group.flatten().tolist() == [1, 1, 1, 1]
    assert StepSizes(start, [quantiser("prompt")], rows=1).group.flatten().tolist() == [0, 0, 0, 0]


def error(weight: Tensor, rounded: Tensor, x: Tensor, found: Table) -> float:
    """Mean squared error of the product through the integers."""
    total = 0.0
    for row in range(2):
        s, z = float(found.scale[row, 0]), int(found.zero_point[row, 0])
        q = numerics.dequantize(numerics.quantize(x[row::2], s, z, 4), s, z)
        total += float((F.linear(q, rounded) - F.linear(x[row::2], weight)).square().mean()) / 2
    return total


def test_learning_finds_a_better_step_than_a_bad_one_for_each_row() -> None:
    weight, x = normal(8, 24), normal(256, 24, seed=2) * torch.tensor([1.0, 3.0]).repeat(128)[:, None]
    start = table([1.5, 1.5], [3, 3], [4, 4])  # too wide for even samples, shifted for all
    product = Node("y", "int_gemm", (Ref("q"),), {"layer": "y", "weight": Const("w"), "bias": None, "residual": None})
    block = Block((quantiser(), product))
    target, rows = F.linear(x, weight), torch.tensor([0, 1]).repeat(128)
    data = BlockData({"sample": x}, {"sample": x}, {"sample": 1}, target, rows)
    errors = {}
    for learn in (False, True):
        network = BlockNetwork(block, [], {"w": weight}, start)
        network.steps = StepSizes(start, block.nodes, rows=1) if learn else None
        weights = {"y": (gptq(weight, 4, x),)}
        generator = torch.Generator().manual_seed(0)
        found = learn_rounding(network, weights, {}, data, 600, generator, drop=0.0)["y"][0].dequantize()
        deployed = start if network.steps is None else learnt_table(start, network.steps.tensors())
        errors[learn] = error(weight, found, x, deployed)
    assert errors[True] < 0.7 * errors[False], errors
    assert float(deployed.scale[0, 0]) < float(deployed.scale[1, 0])


def test_quantisation_is_dropped_at_random() -> None:
    """QDrop: of a block's entries, and of what its quantisers give; and AdaRound's sharpness waits, then falls."""
    generator, zeros, ones = torch.Generator().manual_seed(0), torch.zeros(4, 5000), torch.ones(4, 5000)
    rows = torch.zeros(4, dtype=torch.int64)
    data = BlockData({"e": zeros}, {"e": ones}, {"e": 1}, zeros, rows)  # 0 where quantised, 1 where floating
    for drop in (0.0, 0.5, 1.0):
        assert float(mixed(data, torch.arange(4), drop, generator)["e"].mean()) == pytest.approx(drop, abs=0.02)
    start = table([0.5], [0], [4])
    y = RowQuantizer(start, rows, (0.5, generator))(start.sites[0], 0.1 * ones)  # its integers are 0
    assert float((y != 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert [sharpness(i, 10) for i in (0, 1, 2)] == [None, None, 20.0] and 2 < sharpness(9, 10) < 5


def test_only_the_learnt_precision_takes_what_was_learnt() -> None:
    observed, learnt = table([0.1, 0.2, 1.0], [1, 2, 0], [4, 8, 16]), table([0.3] * 3, [3] * 3, [4] * 3)
    both = with_learnt(observed, learnt)
    assert both.scale.flatten().tolist() == pytest.approx([0.3, 0.2, 1.0]) and both.zero_point.flatten().tolist() == [
        3,
        2,
        0,
    ]
    assert with_learnt(observed, None) is observed


def test_a_models_quantisers_learn_and_stay_valid() -> None:
    network, calibration = networks.network("sd"), networks.calibration("sd")
    recipe = Recipe(weight_bits=4, activation_bits=4, weights="adaround", learn_iterations=3, step_sizes="learnt")
    model = quantize(network, calibration, recipe)
    observed = make_table(calibration, recipe)
    moved = (model.table.scale != observed.scale).any(0)
    quantised = (observed.bits < 16).any(0)
    assert bool((moved <= quantised).all()) and int(moved.sum()) > 0.9 * int(quantised.sum())
    assert torch.equal(model.table.bits, observed.bits)
    prompts = [n.kwargs["site"] for n in model.graph.nodes if "site" in n.kwargs and n.section == "prompt"]
    columns = [model.table.sites.index(site) for site in prompts]
    assert columns and bool((model.table.scale[:, columns] == model.table.scale[:1, columns]).all())
    mixed = quantize(network, calibration, dataclasses.replace(recipe, plan=("A4", "A8") * (len(observed.modes) // 2)))
    eight = make_table(calibration, recipe, ("A4", "A8") * (len(observed.modes) // 2))
    rows = torch.arange(1, len(observed.modes), 2)
    switched = (eight.bits[rows] == 8) & (observed.bits[rows] == 4)
    assert torch.equal(mixed.table.scale[rows][switched], eight.scale[rows][switched])
    assert torch.equal(mixed.table.scale[0::2], model.table.scale[0::2])
