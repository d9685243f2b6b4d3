"""A captured graph computes what its module computes, for any batch, and knows what depends on what."""

from __future__ import annotations

import copy
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import CASES, normal, relative
from torch import Tensor, nn

from qdiff_engine.graph.capture import capture, hash_parameters
from qdiff_engine.graph.fuse import fuse
from qdiff_engine.graph.interpret import flatten_conditioning, run_float
from qdiff_engine.graph.ir import Const, Graph, from_json, to_json
from qdiff_engine.graph.operators import FLOAT_OPS, OPERATORS


def evaluate(graph: Graph, constants: dict[str, Tensor], x: Tensor, t: int, given: dict[str, Any]) -> Tensor:
    inputs = {"sample": x, "timestep": torch.full((len(x),), t), **flatten_conditioning(given)}
    return run_float(graph, constants, inputs)


@torch.no_grad()
def expected_of(unet: nn.Module, x: Tensor, t: int, given: dict[str, Any]) -> Tensor:
    output = unet(x, torch.full((len(x),), t), **given)
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("name", CASES)
def test_captured_and_fused_graphs_compute_the_module(name: str) -> None:
    """To float32's own accuracy, measured by the module in float64, for batches within and beyond the traced range."""
    case, unet = CASES[name], networks.network(name)
    captured = capture(unet, case.shape, networks.conditioning(name, 2))
    fused, constants = copy.deepcopy(captured.graph), dict(captured.constants)
    fuse(fused, constants)
    assert {node.op for node in captured.graph.nodes} <= set(FLOAT_OPS)
    assert {node.op for node in fused.nodes} & {"int_conv2d", "int_gemm"}
    for batch, t in ((1, 999), (3, 500), (64, 0)):
        x, given = normal(batch, *case.shape), networks.conditioning(name, batch)
        expected = expected_of(unet, x, t, given)
        assert relative(evaluate(captured.graph, captured.constants, x, t, given), expected) < 1e-5
        assert relative(evaluate(fused, constants, x, t, given), expected) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_graphs_survive_serialisation(name: str) -> None:
    graph = networks.calibration(name).capture.graph
    again = from_json(to_json(graph), OPERATORS)
    assert str(again) == str(graph) and to_json(again) == to_json(graph)
    for line in (f"%{graph.output}:", "# main", "int_conv2d(", "quantize("):
        assert line in str(graph)


@pytest.mark.parametrize("name", CASES)
def test_sections_hold_what_they_say(name: str) -> None:
    """time: no path from the latents; prompt: none from the timestep either; and every value is defined before use."""
    graph = networks.calibration(name).capture.graph
    depends = {key: {key} for key in graph.inputs}
    order = ["prompt", "time", "main"]
    sections = [order.index(node.section) for node in graph.nodes]
    assert sections == sorted(sections)
    for node in graph.nodes:
        reads = () if node.op == "sym_size" else node.refs()
        depends[node.name] = set().union(*(depends[key] for key in reads))
        if node.section != "main":
            assert "sample" not in depends[node.name]
        if node.section == "prompt":
            assert "timestep" not in depends[node.name]
    assert any(node.section == "time" for node in graph.nodes)
    text_layers = [n for n in graph.nodes if n.op == "int_gemm" and n.section == "prompt"]
    assert bool(text_layers) == (name in ("sd", "sdxl"))
    assert any(node.op == "int_conv2d" and node.section == "prompt" for node in graph.nodes) == (name == "guided")


class Noisy(nn.Module):
    """What a module may contain that inference does not need, and spellings that mean the same operator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout2d(0.5)
        self.out = nn.Conv2d(12, 2, 1)
        self.register_buffer("table", torch.linspace(0, 1, 1000), persistent=False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        assert sample.shape[1] == 2 and timestep.dim() == 1
        h = self.drop(self.norm(self.conv(sample)))
        h = h + F.dropout(self.table[timestep], 0.3, self.training)[:, None, None, None]
        h = torch.concat([h.clone(), h.swapaxes(2, 3).swapaxes(2, 3).detach()], dim=1)
        return torch.divide(torch.multiply(self.out(h * 1 + 0), 3.0), 2.0).float()


def test_dropout_assertions_and_copies_vanish() -> None:
    net = Noisy()
    net(normal(4, 2, 8, 8), torch.tensor([1, 2, 3, 4]))  # gives the batch norm statistics of its own
    net.train()
    captured = capture(net, (2, 8, 8))
    assert net.training
    operators = {node.op for node in captured.graph.nodes}
    assert not {"dropout", "feature_dropout", "clone", "detach", "concat", "divide", "to"} & operators
    assert {"cat", "div", "batch_norm"} <= operators
    assert sum(node.op == "mul" for node in captured.graph.nodes) == 1  # not the one by 1
    x = normal(3, 2, 8, 8)
    net.eval()
    actual = evaluate(captured.graph, captured.constants, x, 700, {})
    assert relative(actual, expected_of(net, x, 700, {})) < 1e-5
    assert "table" in captured.constants  # a timestep table that no state dict holds


def test_constants_are_exactly_those_that_the_graph_reads() -> None:
    for name in CASES:
        captured = networks.calibration(name).capture
        read = {key for node in captured.graph.nodes for key in node.consts()}
        assert read == set(captured.constants)
        assert all(isinstance(v, Const) for n in captured.graph.nodes for v in [n.kwargs.get("weight")] if v)


class Sizes(nn.Module):
    """Sizes computed from sizes: some follow the batch, some turn out constant."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        batch, channels, height, width = sample.shape
        flat = sample.reshape(batch * channels, height * width)
        again = flat.reshape(batch, -1)  # numel / batch is a constant
        return again.reshape(flat.shape[0] // channels, channels, height, width) * 2


def test_sizes_that_follow_the_batch() -> None:
    captured = capture(Sizes(), (3, 4, 4))
    assert {node.shape for node in captured.graph.nodes if node.op in ("view", "reshape")} >= {("3B", 16), ("B", 48)}
    for batch in (1, 2, 5, 100):
        x = normal(batch, 3, 4, 4)
        assert torch.equal(evaluate(captured.graph, captured.constants, x, 1, {}), x * 2)


def test_precision_and_mode_of_the_module_do_not_matter() -> None:
    """Half-precision modules are captured in float32; the module itself stays as it is."""
    unet = copy.deepcopy(networks.network("plain")).half().train()
    captured = capture(unet, (3, 16, 16))
    assert unet.training and next(unet.parameters()).dtype == torch.float16
    assert {v.dtype for v in captured.constants.values() if v.is_floating_point()} == {torch.float32}
    rounded = copy.deepcopy(unet).float().eval()
    x = normal(2, 3, 16, 16)
    expected = expected_of(rounded, x, 10, {})
    assert relative(evaluate(captured.graph, captured.constants, x, 10, {}), expected) < 1e-5


def test_hash_of_parameters() -> None:
    unet = copy.deepcopy(networks.network("plain"))
    before = hash_parameters(unet)
    assert before == hash_parameters(networks.network("plain")) == capture(unet, (3, 16, 16)).model_hash
    with torch.no_grad():
        unet.mix.bias[0] += 1e-6
    assert hash_parameters(unet) != before


def test_configuration_is_plain_json() -> None:
    config = networks.calibration("sd").capture.config
    assert config["cross_attention_dim"] == 24 and config["block_out_channels"] == [16, 32]
    assert networks.calibration("plain").capture.config == {}


class Lookup(nn.Module):
    """Sorts, which the engine does not."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample.sort(dim=-1).values


class Chooses(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample * 2 if bool(sample.sum() > 0) else sample


class Fixes(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample.reshape(len(sample), -1).reshape(sample.shape)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Lookup(), "operator aten.sort .* is not one the engine knows"),
        (Chooses(), "Chooses cannot be captured by torch.export for shape"),
        (Fixes(), r"its code fixes the batch size, as len\(x\)"),
        (nn.Conv2d(3, 3, 1), "Conv2d cannot be captured by torch.export"),
    ],
)
def test_modules_that_are_refused(net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        capture(net, (3, 4, 4))


def test_wrong_conditioning() -> None:
    unet = networks.network("sd")
    with pytest.raises(TypeError, match="conditioning must map names to tensors with a batch dimension, got int"):
        capture(unet, (4, 8, 8), {"encoder_hidden_states": 3})
    with pytest.raises(ValueError, match="cannot be captured"):
        capture(unet, (4, 8, 8), {"encoder_hidden_states": normal(2, 7, 25)})
    with pytest.raises(ValueError, match="cannot be captured"):
        capture(unet, (4, 8, 8), {"nonsense": normal(2, 7, 24)})
