"""Reconstruction: the learning set, streamed inputs, biases, blocks, and weights that are learnt."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import normal, relative
from torch import Tensor, nn

from qdiff_engine import numerics
from qdiff_engine.calibration.calibration import calibrate
from qdiff_engine.graph.interpret import convolve, quantize_rows, simulate
from qdiff_engine.graph.ir import Const, Graph, Node, Ref
from qdiff_engine.memory import SavedBytes
from qdiff_engine.quantization import make_table, quantize
from qdiff_engine.recipe import Recipe
from qdiff_engine.reconstruction import stage
from qdiff_engine.reconstruction.adaround import SoftWeight
from qdiff_engine.reconstruction.blocks import Block, find_blocks
from qdiff_engine.reconstruction.branch import Branch
from qdiff_engine.reconstruction.inputs import SegmentInputs, layer_vectors
from qdiff_engine.reconstruction.layers import bias_shift, layers, round_layer, segments
from qdiff_engine.reconstruction.learning import BlockData, BlockNetwork, learn_rounding
from qdiff_engine.reconstruction.learning_set import learning_set
from qdiff_engine.reconstruction.memory import Memory, estimated, waiting_bytes
from qdiff_engine.reconstruction.placement import mixed_precision
from qdiff_engine.reconstruction.stage import Progress, ReconstructionSettings, reconstruct
from qdiff_engine.rounding import gptq, nearest
from qdiff_engine.runtime.model import IntegerUNet
from qdiff_engine.sampling import Guidance
from qdiff_engine.tables import Table
from qdiff_engine.weights import QuantizedWeight


def quantised(name: str = "unet2d", **fields: Any) -> IntegerUNet:
    return quantize(networks.network(name), networks.calibration(name), Recipe(weight_bits=4, **fields))


def same(a: IntegerUNet, b: IntegerUNet) -> bool:
    """Whether two models hold the same bits."""
    weights = all(
        torch.equal(v.values, w.values) and torch.equal(v.scale, w.scale)
        for layer in a.weights
        for v, w in zip(a.weights[layer], b.weights[layer], strict=True)
    )
    constants = all(torch.equal(value, b.constants[key]) for key, value in a.constants.items())
    weights &= torch.equal(a.table.scale, b.table.scale) and torch.equal(a.table.zero_point, b.table.zero_point)
    return weights and constants and a.constants.keys() == b.constants.keys() and a.weights.keys() == b.weights.keys()


def test_the_learning_set_draws_evenly_what_the_network_received() -> None:
    calibration = networks.calibration("class")
    data, path = learning_set(calibration, 8), calibration.trajectory
    assert data.rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    drawn = set()
    for i, row in enumerate(data.rows.tolist()):
        found = [j for j in range(networks.SAMPLES) if torch.equal(data.inputs["sample"][i], path.samples[row][j])]
        assert len(found) == 1 and float(data.inputs["timestep"][i]) == path.timesteps[row]
        labels = networks.conditioning("class", networks.SAMPLES)["class_labels"]
        assert data.inputs["class_labels"][i] == labels[found[0]]
        drawn.update(found)
    assert drawn == set(range(networks.SAMPLES))
    assert len(learning_set(calibration, 10**6)) == networks.STEPS * networks.SAMPLES
    assert learning_set(calibration, 1).rows.tolist() == [0] and learning_set(calibration, 2).rows.tolist() == [0, 2]


def test_the_learning_set_hears_both_branches_of_guidance() -> None:
    calibration = networks.calibration("class")
    given = Guidance(3.0, {"class_labels": torch.tensor([9])}, calibration.guidance.conditioning)
    labels = learning_set(dataclasses.replace(calibration, guidance=given), 8).inputs["class_labels"]
    assert labels.tolist() == [3, 9, 3, 9, 9, 7, 9, 7], "samples of labels 3, 7, 3, 7, drawn twice: each is heard"


def test_streamed_inputs_equal_their_definition() -> None:
    vectors = normal(3000, 20) * torch.linspace(0.1, 3, 20) + 5
    streamed = SegmentInputs.streamed(vectors.split(128))
    x = vectors.double()
    centred = x - x.mean(0)
    assert streamed.covariance is not None
    assert relative(streamed.covariance, centred.T @ centred / len(x)) < 1e-6
    assert relative(streamed.mean, x.mean(0)) < 1e-6
    assert len(streamed.vectors) == 512


@pytest.mark.parametrize("sizes", [[328] * 50, [16] * 3, [5, 5000, 77, 1, 1, 900] * 4])
def test_streamed_vectors_are_of_all_batches_alike(sizes: list[int]) -> None:
    """The scale search must not hear the last denoising steps alone: a vector in so many, wherever it comes."""
    total = sum(sizes)
    order = torch.arange(float(total))[:, None]
    streamed = SegmentInputs.streamed(order.split(sizes), covariance=False)
    kept = (streamed.vectors + streamed.mean).squeeze(1).round()
    assert len(kept) == min(total, 512)
    apart = kept.diff()
    assert kept[0] == 0 and apart.min() > 0 and total - kept[-1] <= max(1, total / 250)
    assert apart.max() <= 2 * apart.min()


@pytest.mark.parametrize("stride", [1, 2])
def test_layer_vectors_are_all_that_a_small_layer_multiplies(stride: int) -> None:
    geometry = {"stride": (stride,) * 2, "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1, "upsample": 2}
    weight, x = normal(5, 3, 3, 3), normal(4, 3, 6, 7, seed=2)
    y = convolve(x, weight, None, geometry)
    node = Node("n", "int_conv2d", (Ref("x"),), {**geometry, "layer": "n"}, ("B", *y.shape[1:]))
    products = torch.cat(list(layer_vectors(node, 0, weight.shape, list(x.split(3))))) @ weight.flatten(1).T
    expected = y.permute(0, 2, 3, 1).reshape(-1, 5)
    assert products.shape == expected.shape
    in_order = [values[values[:, 0].argsort()] for values in (products, expected)]  # whole rows, told by their first
    torch.testing.assert_close(*in_order, rtol=1e-5, atol=1e-5)


def test_the_bias_takes_up_the_mean_error() -> None:
    weight, x = normal(6, 30), normal(400, 30, seed=2) + normal(30, seed=3)
    layer = round_layer([weight], 4, [SegmentInputs.of(x)], nearest)
    assert layer.shift is not None
    change = x.double() @ (layer.weights[0].dequantize().double() - weight.double()).T
    assert change.mean(0).abs().min() > 1e-3
    assert (change + layer.shift.double()).mean(0).abs().max() < 1e-6
    assert bias_shift([weight], layer.weights, [None]) is None


@pytest.mark.parametrize("name", ["unet2d", "sd", "plain"])
def test_a_quantised_branch_is_the_simulation(name: str) -> None:
    """Node by node over all rows at once, with the stage's weights and biases: what the deployed graph computes."""
    calibration, model = networks.calibration(name), quantised(name, weights="gptq")
    data = learning_set(calibration, 16)
    weights = {layer: tuple(w.dequantize() for w in parts) for layer, parts in model.weights.items()}
    graph = calibration.capture.graph
    biased = Graph(graph.inputs, [dataclasses.replace(node) for node in graph.nodes], graph.output)
    for node, final in zip(biased.nodes, model.graph.nodes, strict=True):
        node.kwargs = {**final.kwargs, "weight": node.kwargs["weight"]} if "weight" in node.kwargs else node.kwargs
    branch = Branch(biased, {**calibration.capture.constants, **model.constants}, data, model.table, weights)
    for node in biased.nodes:
        branch.advance(node)
    for (_, chunk), output in zip(data.chunks(), branch.of(graph.output), strict=True):
        inputs = {key: value[chunk] for key, value in data.inputs.items()}
        expected = simulate(model.graph, model.constants, model.weights, model.table, inputs, dtype=torch.float32)
        assert torch.equal(output, expected)


def test_rows_are_quantised_as_the_integers_are() -> None:
    x, scale = normal(4, 6, 5), torch.tensor([0.013, 0.11, 0.2, 0.05])
    zero_point, bits = torch.tensor([3, -2, 1, 0], dtype=torch.int32), torch.tensor([8, 4, 4, 16], dtype=torch.uint8)
    x.requires_grad_()
    y = quantize_rows(x, scale, zero_point, bits)
    for j in range(3):
        z, b = int(zero_point[j]), int(bits[j])
        q = numerics.quantize(x[j].detach(), float(scale[j]), z, b)
        assert torch.equal(y[j].detach(), numerics.dequantize(q, float(scale[j]), z))
    assert torch.equal(y[3], x[3])
    y.sum().backward()
    low, high = numerics.activation_range(4)
    inside = ((x[1] / scale[1]).round() - 2 > low) & ((x[1] / scale[1]).round() - 2 < high)
    assert x.grad is not None and bool((x.grad[1][inside] == 1).all())
    beyond = ((x[1] / scale[1]).round() - 2 < low) | ((x[1] / scale[1]).round() - 2 > high)
    assert bool(beyond.any()) and bool((x.grad[1][beyond] == 0).all())


@pytest.mark.parametrize("name", sorted(networks.CASES))
def test_blocks_hold_every_node_once_in_order(name: str) -> None:
    graph = networks.calibration(name).capture.graph
    blocks = find_blocks(graph)
    assert [node.name for block in blocks for node in block.nodes] == [node.name for node in graph.nodes]
    for block in blocks:
        if block.layers:
            assert block.body[-1].name == block.exit
            assert not {node.name for node in block.body} & set(block.entries)


def test_blocks_are_the_residual_branches() -> None:
    found = [
        tuple(node.kwargs["layer"].removeprefix("down_blocks.1.") for node in block.layers)
        for block in find_blocks(networks.calibration("unet2d").capture.graph)
    ]
    assert ("resnets.0.conv1", "resnets.0.conv2", "resnets.0.conv_shortcut") in found
    assert tuple(f"attentions.0.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")) in found
    assert ("conv_in",) in found and ("conv_out",) in found
    assert ("down_blocks.0.downsamplers.0.conv",) in found


def single_layer(weight: Tensor, x: Tensor) -> tuple[BlockNetwork, BlockData]:
    """A block of one linear layer without quantised activations, and its inputs and answers."""
    node = Node("y", "int_gemm", (Ref("sample"),), {"layer": "y", "weight": Const("w"), "bias": None, "residual": None})
    empty, identity = torch.zeros(1, 0), torch.ones(1, 1)
    table = Table((0.0,), ("A8",), (), empty, empty.int(), empty.to(torch.uint8), identity, 0 * identity)
    entries, target = {"sample": x}, F.linear(x, weight)
    data = BlockData(entries, entries, {"sample": 1}, target, torch.zeros(len(x), dtype=torch.int64))
    return BlockNetwork(Block((node,)), [], {"w": weight}, table), data


def learnt(weight: Tensor, x: Tensor, start: QuantizedWeight, iterations: int, **more: Any) -> QuantizedWeight:
    """AdaRound of a single layer."""
    network, data = single_layer(weight, x)
    generator = torch.Generator().manual_seed(0)
    return learn_rounding(network, {"y": (start,)}, {}, data, iterations, generator, **more)["y"][0]


def output_error(weight: Tensor, rounded: QuantizedWeight, x: Tensor) -> Tensor:
    """Mean squared error [N] of every output."""
    return ((weight - rounded.dequantize()).double() @ x.double().T).square().mean(1)


def test_adaround_finds_what_a_search_of_all_roundings_finds() -> None:
    ups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)))  # [64, 6]
    already = 0
    for seed in range(4):
        mixing = torch.eye(6) + 0.3 * normal(6, 6, seed=seed + 20)
        weight, x = normal(2, 6, seed=seed), normal(64, 6, seed=seed + 10) @ mixing
        scale = weight.abs().amax(1) / 6.5  # not one that suits nearest rounding
        start = QuantizedWeight(numerics.quantize_weight(weight, scale, 4), scale, 4)
        candidates = (torch.floor(weight / scale[:, None])[:, None] + ups).clamp(-8, 7) * scale[:, None, None]
        errors = ((candidates - weight[:, None]).double() @ x.double().T).square().mean(2)  # [2, 64]
        best = errors.amin(1)
        found = output_error(weight, learnt(weight, x, start, 400, drop=0.0), x)
        assert torch.allclose(found, best, rtol=1e-6)
        already += int((output_error(weight, start, x) < best * (1 + 1e-6)).sum())
    assert already <= 4, "nearest rounding would do"


def test_choices_begin_at_the_integers_they_are_given() -> None:
    weight, x = normal(8, 40), normal(300, 40, seed=2)
    for start in (nearest(weight, 4, x), gptq(weight, 4, x)):
        soft = SoftWeight.of(weight, start)
        assert torch.equal(soft.rounded().values, start.values)
        halfway = (weight + start.dequantize()) / 2
        within = (soft.value(soft.upward()) - halfway).abs() <= 0.02 * start.scale[:, None]
        near = (weight - start.dequantize()).abs() < 0.95 * start.scale[:, None]
        near &= (start.values > -8) & (start.values < 7)  # at the ends of the range there is no neighbour beyond
        assert bool(within[near].all()) and near.float().mean() > 0.5


def test_gptq_and_adaround_lessen_the_error_of_every_layer_of_the_bundled_network() -> None:
    """Against nearest rounding of every 4-bit layer, on vectors that it multiplies and none of the three has seen."""
    calibration = networks.bundled_calibration()
    constants, gains = calibration.capture.constants, {"gptq": [], "adaround": []}
    for node in (node for node in layers(calibration.capture.graph) if not node.kwargs.get("edge")):
        errors = dict.fromkeys(("nearest", *gains), 0.0)
        for i, part in enumerate(segments(node, constants)):
            weight, x = part.flatten(1), calibration.inputs[f"{node.kwargs['layer']}:{i}"].float()
            x = (x - x.mean(0))[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
            fit, held_out = x[:1536], x[1536:]
            found = {"nearest": nearest(weight, 4, fit), "gptq": gptq(weight, 4, fit)}
            found["adaround"] = learnt(weight, fit, found["nearest"], 200, drop=0.0)
            for method, rounded in found.items():
                errors[method] += float(output_error(weight, rounded, held_out).mean())
        for method, values in gains.items():
            values.append(errors["nearest"] / errors[method])
    for method, values in gains.items():
        print(f"{method}: error of nearest / its own, least {min(values):.2f}, median {statistics.median(values):.2f}")
        assert len(values) == 93 and min(values) > 1.0 and statistics.median(values) > 1.5, (method, sorted(values))


def test_without_iterations_adaround_is_the_plain_path() -> None:
    assert same(quantised(weights="adaround", learn_iterations=0), quantised(weights="nearest"))


def test_the_same_seed_learns_the_same_bits() -> None:
    first, second = (quantised(weights="adaround", learn_iterations=3) for _ in range(2))
    assert same(first, second)
    assert not same(first, quantised(weights="gptq"))


class Gated(nn.Module):
    """h + a(h) b(h): the product of two layers, of which a block ends in one, is added up by no epilogue."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = F.silu(self.first(sample)) + torch.cos(timestep.float() / 1000).reshape(-1, 1, 1, 1)
        return self.last(h + self.a(h) * self.b(h))


def test_layers_that_a_blocks_exit_does_not_read_are_rounded_too() -> None:
    torch.manual_seed(0)
    network = Gated().eval()
    calibration = calibrate(network, networks.ddim(), shape=(2, 8, 8), steps=2, samples=2)
    told: list[Memory] = []
    recipe = Recipe(weight_bits=4, weights="adaround", learn_iterations=2)
    model = quantize(network, calibration, recipe, on_start=told.append)
    assert set(model.weights) == {"first", "a", "b", "last"} and told[0].learning > 0


_KILLED = """
import os, signal, sys, networks
from qdiff_engine.quantization import quantize
from qdiff_engine.recipe import Recipe
blocks = []
def stop(progress):
    blocks.extend([progress.block] * (progress.loss is not None))
    if progress.iteration == 2 and len(set(blocks)) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
recipe = Recipe(weight_bits=4, weights="adaround", learn_iterations=3, step_sizes="learnt")
quantize(networks.network("unet2d"), networks.calibration("unet2d"), recipe, on_progress=stop, cache_dir=sys.argv[1])
"""


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Killed twice in the middle of a block, then finished: as if it had never stopped."""
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for blocks in (3, 2):
        command = [sys.executable, "-c", _KILLED, str(tmp_path), str(blocks)]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    kept = len(list((tmp_path / "weights").glob("step-*.safetensors")))
    assert kept == 3, "two blocks, then one more"
    told: list[Progress] = []
    recipe = Recipe(weight_bits=4, weights="adaround", learn_iterations=3, step_sizes="learnt")
    network, calibration = networks.network("unet2d"), networks.calibration("unet2d")
    resumed = quantize(network, calibration, recipe, on_progress=told.append, cache_dir=tmp_path)
    every = [i for i, block in enumerate(find_blocks(calibration.capture.graph)) if block.layers]
    assert sorted({p.block for p in told if p.loss is not None}) == every[kept:]
    assert sum(p.advanced for p in told) == 3 * len(every), "a progress bar ends full"
    assert same(resumed, quantised(weights="adaround", learn_iterations=3, step_sizes="learnt"))


@pytest.mark.parametrize("name", ["unet2d", "sd"])
def test_memory_is_told_before_it_is_taken(name: str) -> None:
    """What waits, against the values that a branch really holds; what backward keeps grows with the batch alone."""
    calibration = networks.calibration(name)
    graph, constants = calibration.capture.graph, calibration.capture.constants
    data, table = learning_set(calibration, 8), make_table(calibration, Recipe())
    branch, most = Branch(graph, constants, data, table), 0
    for node in graph.nodes:
        branch.advance(node)
        held = [v for values in branch.values for key, v in values.items() if key not in graph.inputs]
        most = max(most, sum(4 * v.numel() for v in held if isinstance(v, Tensor)))
    expected = len(data) * waiting_bytes(graph)
    assert most <= expected < 1.5 * most
    told: list[Memory] = []
    settings = ReconstructionSettings("adaround", iterations=1, samples=8)
    with SavedBytes().counting() as saved:
        reconstruct(calibration, table, settings, on_start=told.append)
    (memory,) = told
    assert 0.3 * memory.learning < saved.peak < 1.1 * memory.learning, "what a real batch of a real block keeps"
    assert memory.waiting == 2 * expected and memory.entries > 0
    greedy, more = (
        estimated(graph, constants, find_blocks(graph), table, learning_set(calibration, count), learns)
        for count, learns in ((8, False), (16, True))
    )
    assert greedy.waiting == expected and greedy.learning == greedy.entries == 0
    inputs = max(part[0].numel() for node in layers(graph) for part in segments(node, constants))
    assert greedy.hessian == more.hessian == memory.hessian == 40 * inputs**2
    assert (more.waiting, more.entries, more.learning) == (2 * memory.waiting, 2 * memory.entries, memory.learning)


def told_and_saved(**changes: Any) -> tuple[int, int]:
    """Bytes that learning is told to take, and those that backward passes really keep, checked to be near."""
    calibration, told = networks.calibration("unet2d"), list[Memory]()
    settings = ReconstructionSettings("adaround", iterations=1, samples=8, **changes)
    with SavedBytes().counting() as saved:
        reconstruct(calibration, make_table(calibration, Recipe()), settings, on_start=told.append)
    assert 0.3 * told[0].learning < saved.peak < 1.1 * told[0].learning
    return told[0].learning, saved.peak


def test_smaller_batches_keep_less_for_backward() -> None:
    kept = [told_and_saved(batch=batch)[0] for batch in (2, 4, 8)]
    assert kept[0] < kept[1] < kept[2]


def test_learnt_step_sizes_keep_more_for_backward() -> None:
    (told, saved), (more_told, more_saved) = (told_and_saved(step_groups=groups) for groups in (None, 1))
    assert saved < more_saved and told < more_told
    assert more_told - told == pytest.approx(more_saved - saved, rel=0.5)


def test_products_are_mixed_inside_and_as_they_were_outside() -> None:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    with pytest.raises(ZeroDivisionError), mixed_precision():
        assert products.fp32_precision == "tf32"
        _ = 1 / 0
    assert products.fp32_precision == before


def test_equalised_weights_are_not_taken_from_other_work(tmp_path: Path) -> None:
    """With floating activations no scale tells the two apart: the factors do."""
    network, calibration = networks.network("unet2d"), networks.calibration("unet2d")
    plain, even = (Recipe.named("w4a16", equalise=equalise, learn_samples=8) for equalise in ("off", "on"))
    before = quantize(network, calibration, plain, cache_dir=tmp_path)
    expected = quantize(network, calibration, even)
    assert set(expected.constants) > set(before.constants), "factors"
    assert same(quantize(network, calibration, even, cache_dir=tmp_path), expected)


def test_running_out_of_memory_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError

    calibration = networks.calibration("unet2d")
    monkeypatch.setattr(stage, "round_layer", fails)
    with pytest.raises(
        OSError, match="not enough memory to round weights with 4 samples; lower learn_samples.*learn_batch"
    ) as found:
        reconstruct(calibration, make_table(calibration, Recipe()), ReconstructionSettings("gptq", samples=4))
    assert found.value.errno == errno.ENOMEM
    with pytest.raises(OSError, match=r"with 6 samples; lower the number of learn_pairs \(--learn-pairs\)"):
        reconstruct(calibration, make_table(calibration, Recipe()), ReconstructionSettings("gptq", pairs="uniform:6"))


def test_the_learning_set_is_as_large_as_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the number that is told is what fits, as many of each of four steps, or as many as are selected."""
    calibration = networks.calibration("unet2d")
    each = 2 * waiting_bytes(calibration.capture.graph)
    monkeypatch.setattr(stage, "_MEMORY", 5 * each)
    for pairs, fitting in (("every", 4), ("uniform:9", 5)):
        told: list[Memory] = []
        settings = ReconstructionSettings("gptq", samples=9, pairs=pairs)
        reconstruct(calibration, make_table(calibration, Recipe()), settings, on_start=told.append)
        weights = sum(w.numel() for n in layers(calibration.capture.graph)
                      for w in segments(n, calibration.capture.constants))  # fmt: skip
        assert told[0].samples == fitting and told[0].rounded == 5 * weights
        assert told[0].total == told[0].rounded + told[0].waiting + told[0].hessian


class Embedded(nn.Module):
    """A time embedding without an axis for samples: the timestep of the first serves all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.inner, self.time = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(4, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        waves = torch.cos(timestep[0].float() / 1000 * torch.arange(4))
        h = F.silu(self.first(sample) + self.time(waves)[:, None, None])
        return self.last(h + self.inner(h))


def test_values_that_batches_cannot_have_are_refused() -> None:
    """GPTQ hears one timestep after the other; blocks learn on samples of many."""
    torch.manual_seed(0)
    network = Embedded().eval()
    calibration = calibrate(network, networks.ddim(), shape=(2, 8, 8), steps=2, samples=2)
    assert set(quantize(network, calibration, Recipe.named("w4a8")).weights) == {"first", "inner", "last"}
    with pytest.raises(ValueError, match="'adaround' cannot learn on samples of several timesteps.* use 'gptq'"):
        quantize(network, calibration, Recipe.named("w4a8", weights="adaround", learn_iterations=2))


def test_arguments_are_checked_first() -> None:
    with pytest.raises(ValueError, match="method must be gptq or adaround, got 'best'"):
        ReconstructionSettings("best")
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        ReconstructionSettings("adaround")
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        ReconstructionSettings("gptq", samples=0)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        ReconstructionSettings("gptq", batch=0)
    for name in ("learn_samples", "learn_batch", "align_batch"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
            Recipe(**{name: 0})
    for name in ("learn_iterations", "align_iterations"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 0, got -1"):
            Recipe(**{name: -1})
    with pytest.raises(ValueError, match="step_sizes 'learnt' needs weights 'adaround'.* got 'gptq'"):
        Recipe(weights="gptq", step_sizes="learnt")
    with pytest.raises(ValueError, match="align_pairs must be 'every'.* got 'all'"):
        Recipe(align_pairs="all")
    with pytest.raises(ValueError, match=r"align_rounding must be one of \[False, True\], got 1"):
        Recipe(align_rounding=1)  # type: ignore[arg-type]
