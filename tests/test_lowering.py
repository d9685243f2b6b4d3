"""What a GPU's products do beside multiplying, joined at graph level, against the same graph with nothing joined."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qdiff_engine as qe
from qdiff_engine.graph.ir import Graph
from qdiff_engine.quantization import quantize
from qdiff_engine.runtime import lowering
from qdiff_engine.runtime.norm_statistics import measure_for_norms
from qdiff_engine.runtime.program import Program

pytestmark = pytest.mark.usefixtures("interpreter")

CPU = torch.device("cpu")
PLAN = ("A4", "A8", "A16", "A8")
RECIPES = {
    "w8a8": {"weight_bits": 8},
    "w4a8": {"weight_bits": 4},
    "w4 mixed": {"weight_bits": 4, "plan": PLAN},
    "w8 mixed": {"weight_bits": 8, "plan": PLAN},
}


class Chain(nn.Module):
    """Products that feed one another directly: through a view, enlarged, in groups, to a skip concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(8, 16)
        self.enter, self.mix = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.grouped, self.point = nn.Conv2d(16, 32, 3, padding=1, groups=4), nn.Conv2d(32, 16, 1)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)
        self.wide, self.narrow = nn.Linear(16, 48), nn.Linear(24, 16)
        self.up, self.merge = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(32, 16, 1)
        self.leave = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = self.enter(x) + self.time(networks.sinusoids(t))[:, :, None, None]
        h = self.point(self.grouped(self.mix(skip)))
        b, c, height, width = h.shape
        rows = h.permute(0, 2, 3, 1).reshape(b, height * width, c)
        rows = rows + self.second(self.first(rows))
        value, gate = self.wide(rows).chunk(2, dim=-1)
        rows = rows + self.narrow(value * F.gelu(gate))
        h = rows.transpose(1, 2).reshape(b, c, height, width)
        h = self.up(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.leave(self.merge(torch.cat([h, skip], dim=1)))


@functools.cache
def calibrated(name: str) -> tuple[nn.Module, qe.Calibration]:
    if name != "chain":
        return networks.network(name), networks.calibration(name)
    torch.manual_seed(0)
    chain = Chain().eval()
    return chain, qe.calibrate(chain, networks.ddim(), shape=(3, 8, 8), steps=networks.STEPS, samples=2)


@functools.cache
def quantised(name: str, recipe: str) -> qe.IntegerUNet:
    return quantize(*calibrated(name), qe.Recipe(**RECIPES[recipe]))


def nothing_joined(graph: Graph) -> Graph:
    """Merged products, quantisers that enlarge the image themselves, and the norms' statistics as ever."""
    lowered = lowering._prepared(graph)
    lowering._placement_to_quantizers(lowered)
    measure_for_norms(lowered)
    return lowered


def up_to(graph: Graph, output: str) -> Graph:
    """The part of ``graph`` that makes the value ``output``."""
    part = Graph(dict(graph.inputs), list(graph.nodes), output)
    part.prune()
    return part


def run(model: qe.IntegerUNet, graph: Graph, lower: Callable[[Graph], Graph], row: int) -> Tensor:
    """The graph's output in Triton's interpreter, at one row of the table."""
    program = Program(graph, model.weights, model.constants, model.table, CPU, "triton", lower=lower)
    timestep, sample = model.table.timesteps[row], networks.normal(2, *graph.inputs["sample"][1:])
    given = {} if len(graph.inputs) == 2 else networks.conditioning("sd", 2)
    inputs = networks.flat_inputs(model, sample.contiguous(memory_format=torch.channels_last), timestep, given)
    return program.run(inputs, timestep, row)


def joined(graph: Graph) -> dict[str, list[Any]]:
    """The products of the lowered graph that quantise their result, or make it GEGLU."""
    nodes = [node for node in lowering.lower_for_gpu(graph).nodes if node.op in ("int_gemm", "int_conv2d")]
    return {
        "quantised": [node for node in nodes if node.kwargs["site"]],
        "geglu": [node for node in nodes if node.kwargs["geglu"]],
        "upsampled": [node for node in nodes if node.kwargs.get("upsample", 1) > 1],
    }


def test_what_is_joined() -> None:
    chain = {kind: len(nodes) for kind, nodes in joined(quantised("chain", "w8a8").graph).items()}
    # all but the last, and but three that a residual or two quantisers read: enter, point and second
    assert chain == {"quantised": 7, "geglu": 1, "upsampled": 1}
    sd = joined(quantised("sd", "w8a8").graph)
    # GEGLU's projection and the product behind it in four transformers, and the block before the upsampler
    assert {kind: len(nodes) for kind, nodes in sd.items()} == {"quantised": 9, "geglu": 4, "upsampled": 1}
    lowered = lowering.lower_for_gpu(quantised("sd", "w8a8").graph)
    assert not [node for node in lowered.nodes if node.kwargs.get("activation") == "geglu"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["chain", "sd"])
def test_joined_products_equal_separate_ones(name: str, recipe: str) -> None:
    """What every joined product hands on: the same integers, or floats where the row leaves the site floating."""
    model = quantised(name, recipe)
    sites = {node.kwargs["site"] for node in joined(model.graph)["quantised"]}
    quantisers = [node for node in model.graph.nodes if node.op == "quantize" and node.kwargs["site"] in sites]
    assert len(quantisers) == len(sites)
    rows = range(len(PLAN) - 1) if "mixed" in recipe else [0]
    for node in quantisers if name == "chain" else quantisers[:1]:
        column = model.table.sites.index(node.kwargs["site"])
        for row in rows:
            part = up_to(model.graph, node.name)
            expected = run(model, part, nothing_joined, row)
            actual = run(model, part, lowering.lower_for_gpu, row)
            assert actual.dtype == expected.dtype and actual.shape == expected.shape
            if model.table.bits[row, column] == 16:
                assert actual.dtype == torch.float32
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
            else:
                assert actual.dtype == torch.int8
                steps = (actual.int() - expected.int()).abs()
                assert int(steps.max()) <= 1 and int(steps.sum()) <= 1e-3 * steps.numel(), node.name


@pytest.mark.parametrize("name, recipe", [("chain", "w8a8"), ("chain", "w4 mixed"), ("sd", "w4a8")])
def test_the_whole_model_is_the_same(name: str, recipe: str) -> None:
    model = quantised(name, recipe)
    for row in range(len(PLAN) - 1) if "mixed" in recipe else [0]:
        expected = run(model, model.graph, nothing_joined, row)
        actual = run(model, model.graph, lowering.lower_for_gpu, row)
        assert networks.relative(actual, expected) < 1e-5, row


def test_upsampling_inside_the_convolution_is_exact() -> None:
    """The convolution reads each pixel where the enlarged image would hold it: bit for bit."""
    model = quantised("chain", "w8a8")
    (upsampled,) = joined(model.graph)["upsampled"]
    part = up_to(model.graph, upsampled.name)
    assert torch.equal(run(model, part, nothing_joined, 0), run(model, part, lowering.lower_for_gpu, 0))
