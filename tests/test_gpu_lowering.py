"""What a GPU's lowering makes of values: 4-bit integers two to a byte, statistics that products hand to norms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from qdiff_kernels.packing import unpack_rows

import qdiff_engine as qe
from qdiff_engine import ops, reference
from qdiff_engine.graph.ir import Graph, Node, Ref, sizes
from qdiff_engine.quantization import quantize
from qdiff_engine.runtime.compiler import Compiler, Instruction, Row, Values
from qdiff_engine.runtime.features import features_axis
from qdiff_engine.runtime.lowering import lower_for_cpu, lower_for_gpu
from qdiff_engine.runtime.packing import pack_values
from qdiff_engine.runtime.program import Program
from qdiff_engine.runtime.replay import ReplayedProgram, device_rows
from qdiff_engine.runtime.tuning import PRODUCTS, measure, retabled
from qdiff_engine.tables import Table

pytestmark = pytest.mark.usefixtures("interpreter")

CPU = torch.device("cpu")
PLAN = ("A4", "A8", "A16", "A4")
DTYPES = {"A4": ops.PACKED, "A8": torch.int8, "A16": torch.float32}


class Wide(nn.Module):
    """Enough channels to be packed, in every kind of layer; 40 of them are too odd for an image."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.enter = nn.Linear(8, 64), nn.Conv2d(3, 64, 3, padding=1)
        self.norm1, self.conv1 = nn.GroupNorm(8, 64), nn.Conv2d(64, 64, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, 64), nn.Conv2d(64, 64, 3, padding=1)
        self.norm3, self.inward = nn.GroupNorm(8, 64), nn.Linear(64, 96)
        self.norm4, self.wide, self.narrow = nn.LayerNorm(96), nn.Linear(96, 128), nn.Linear(64, 96)
        self.outward = nn.Linear(96, 64)
        self.down, self.up = nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.shortcut, self.norm5 = nn.Conv2d(128, 64, 1), nn.GroupNorm(8, 128)
        self.conv3 = nn.Conv2d(128, 64, 3, padding=1)
        self.norm6, self.grouped = nn.GroupNorm(8, 64), nn.Conv2d(64, 40, 3, padding=1, groups=2)
        self.norm7, self.thin, self.leave = nn.GroupNorm(8, 40), nn.Conv2d(40, 8, 1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = self.enter(x)
        h = self.conv1(F.silu(self.norm1(skip))) + self.time(networks.sinusoids(t))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h))) + skip
        b, c, height, width = h.shape
        rows = self.inward(self.norm3(h).permute(0, 2, 3, 1).reshape(b, height * width, c))
        value, gate = self.wide(self.norm4(rows)).chunk(2, dim=-1)
        rows = rows + self.narrow(value * F.gelu(gate))
        h = self.outward(rows).transpose(1, 2).reshape(b, c, height, width) + h
        both = torch.cat([self.up(F.interpolate(self.down(h), scale_factor=2.0, mode="nearest")), h], dim=1)
        h = self.conv3(F.silu(self.norm5(both))) + self.shortcut(both)
        return self.leave(self.thin(F.silu(self.norm7(self.grouped(F.silu(self.norm6(h)))))))


@functools.cache
def model() -> qe.IntegerUNet:
    torch.manual_seed(0)
    net = networks.randomised(Wide())
    calibration = qe.calibrate(net, networks.ddim(), shape=(3, 8, 8), steps=len(PLAN), samples=2)
    return quantize(net, calibration, qe.Recipe(weight_bits=4, plan=PLAN))


def inputs(unet: qe.IntegerUNet, row: int) -> tuple[dict[str, Tensor], float, int]:
    sample = networks.normal(2, 3, 8, 8, seed=row).contiguous(memory_format=torch.channels_last)
    timestep = unet.table.timesteps[row]
    return networks.flat_inputs(unet, sample, timestep, {}), timestep, row


class Watched:
    """A program in Triton's interpreter that keeps what every node makes."""

    def __init__(
        self, unet: qe.IntegerUNet, *, packed: bool = True, table: Table | None = None, floating: Collection[str] = ()
    ) -> None:
        self.unet, self.graph = unet, lower_for_gpu(unet.graph)
        for node in self.graph.nodes:
            if node.kwargs.get("site") and not packed:
                node.kwargs["packed"] = False
        parts = (unet.graph, unet.weights, unet.constants, table or unet.table, CPU, "triton")
        self.program = Program(*parts, lower=lambda _: self.graph, floating=floating)
        self.program.sections["main"] = [self._kept(run) for run in self.program.sections["main"]]
        self.made: dict[str, Any] = {}

    def _kept(self, instruction: Instruction) -> Instruction:
        def run(values: Values, row: Row) -> None:
            instruction(values, row)
            self.made |= {n: values[slot] for n, slot in self.program.slots.items() if values[slot] is not None}

        return run

    def run(self, row: int) -> Tensor:
        self.made = {}
        return self.program.run(*inputs(self.unet, row))


@functools.cache
def watched(row: int, **options: bool) -> tuple[Watched, Tensor]:
    """The model's run at a row; shared, for the interpreter takes its time."""
    run = Watched(model(), **options)
    return run, run.run(row)


def packed_sites(graph: Graph) -> dict[str, Node]:
    return {node.kwargs["site"]: node for node in graph.nodes if node.kwargs.get("packed")}


def test_what_is_packed() -> None:
    """All but the first and the last layers' input, 40 channels of an image, and what only eight bits can hold."""
    graph = model().graph
    sites = {node.kwargs["site"] for node in graph.nodes if node.kwargs.get("site")}
    assert sites - set(packed_sites(lower_for_gpu(graph))) == {"enter", "grouped", "thin", "leave"}
    assert not packed_sites(lower_for_cpu(graph))


def quantised_for(
    shape: tuple[Any, ...], *layouts: tuple[Any, ...], section: str = "main", layer: str = "int_gemm", more: str = ""
) -> Graph:
    """quantize -> layout changes (operator, arguments, shape) -> a layer; ``more`` reads what is quantised as well."""
    graph = Graph({"x": shape}, [Node("q", "quantize", (Ref("x"),), {"site": "s", "activation": "none"}, shape)], "y")
    for i, (op, arguments, after) in enumerate(layouts):
        graph.nodes.append(Node(f"layout{i}", op, (Ref(graph.nodes[-1].name), *arguments), {}, after))
    last = graph.nodes[-1]
    graph.nodes.append(Node("y", layer, (Ref(last.name),), {"site": None, "groups": 1}, last.shape))
    if more:
        graph.nodes.append(Node("more", more, (Ref("q"),), {}, shape))
    for node in graph.nodes:
        node.section = section
    return graph


ROWS, IMAGE = ("B", 16, 64), ("B", 64, 4, 4)
LINES = ("reshape", ([-1, 16, 64],), ROWS)


@pytest.mark.parametrize(
    "graph, packed",
    [
        (quantised_for(ROWS), True),
        (quantised_for(ROWS, section="prompt"), False),
        (quantised_for(ROWS, more="relu"), False),
        (quantised_for(("B", 16, 33)), True),
        (quantised_for(("B", 16, 31)), False),
        (quantised_for(("B", 4, 4, 64)), False),
        (quantised_for(IMAGE, layer="int_conv2d"), True),
        (quantised_for(("B", 96, 4, 4), layer="int_conv2d"), False),
        (quantised_for(IMAGE, ("permute", ([0, 2, 3, 1],), ("B", 4, 4, 64)), LINES), True),
        (quantised_for(IMAGE, ("reshape", ([-1, 64, 16],), ("B", 64, 16)), ("transpose", (1, 2), ROWS)), True),
        (quantised_for(IMAGE, ("flatten", (1,), ("B", 1024))), False),
        (quantised_for(ROWS, ("view", ([-1, 16, 4, 16],), ("B", 16, 4, 16))), False),
        (quantised_for(ROWS, ("transpose", (1, 2), ("B", 64, 16))), False),
    ],
)
def test_what_can_be_packed(graph: Graph, packed: bool) -> None:
    """Features that stay whole and where the layer looks for them, of the latents, if that takes fewer bytes."""
    pack_values(graph)
    assert graph.nodes[0].kwargs["packed"] is packed
    layouts = [node for node in graph.nodes if node.name.startswith("layout")]
    assert all((node.op == "quantized_layout") is packed for node in layouts)


def test_layout_changes_count_the_bytes_of_packed_features() -> None:
    graph = quantised_for(IMAGE, ("permute", ([0, 2, 3, 1],), ("B", 4, 4, 64)), LINES)
    pack_values(graph)
    assert [node.kwargs["of_bytes"][1:] for node in graph.nodes[1:3]] == [([0, 2, 3, 1],), ((-1, 16, 32),)]
    assert [node.kwargs["op"] for node in graph.nodes[1:3]] == ["permute", "reshape"]


def test_packed_values_are_half_as_large_in_the_rows_that_have_four_bits() -> None:
    for row, mode in enumerate(PLAN[:3]):
        run, _ = watched(row)
        stored = {site: run.made[node.name] for site, node in packed_sites(run.graph).items()}
        assert {value.dtype for value in stored.values()} == {DTYPES[mode]}
        for site, node in packed_sites(run.graph).items() if mode == "A4" else ():
            features = node.shape[features_axis(node)]
            share = Fraction(64, 96) if features == 96 else Fraction(1, 2)  # whole blocks of 64
            assert stored[site].numel() == share * math.prod(sizes(node.shape, 2)), site


def test_packing_changes_no_bit() -> None:
    """Every value of a row in mode A4, of products, norms and floating operators alike."""
    (packed, y), (plain, expected) = watched(0), watched(0, packed=False)
    assert torch.equal(y, expected)
    compared = 0
    for name, value in plain.made.items():
        other = packed.made[name]
        if isinstance(value, Tensor) and other.dtype != ops.PACKED:
            assert torch.equal(other, value), name
            compared += 1
    assert compared > 2 * len(packed_sites(packed.graph))


def test_modes_take_turns_over_one_set_of_weights() -> None:
    """A recording of a packed mode and one of a plain mode, replayed in turn, against programs of one mode each."""
    unet, calls = model(), []
    parts = (unet.graph, unet.weights, unet.constants, unet.table, CPU, "triton")
    replayed = ReplayedProgram(*parts, record=lambda function: calls.append(function) or function)
    expected = {0: watched(0, packed=False)[1], 1: watched(1)[1], 3: watched(3, packed=False)[1]}
    for row in (0, 1, 3, 0):
        y = replayed.run(*inputs(unet, row))
        assert torch.equal(y, expected[row]), row
    assert len(calls) == 2, "two rows share the recording of mode A4"


def test_what_is_measured_for_norms() -> None:
    """Norms behind products, through layout changes and a skip concatenation; not behind a convolution in groups."""
    norms = [node for node in lower_for_gpu(model().graph).nodes if node.op == "groupnorm_silu_quantize"]
    found = {node.kwargs["site"]: [ref.name for ref in node.kwargs["statistics"]] for node in norms}
    assert {site: len(parts) for site, parts in found.items()} == {
        "conv1": 1, "conv2": 1, "inward": 1, "conv3": 2, "grouped": 1, "thin": 0
    }  # fmt: skip
    products = {node.kwargs["statistics"]: node for node in lower_for_gpu(model().graph).nodes if node.op in PRODUCTS}
    assert products[found["conv3"][1]].op == "int_gemm", "the linear layer whose rows became pixels again"
    assert products[found["inward"][0]].kwargs["residual"] is not None
    assert products[found["conv2"][0]].kwargs["temb"] is not None


@pytest.mark.parametrize("row", [0, 1, 2])
def test_norms_with_statistics_are_as_exact(row: int) -> None:
    run, _ = watched(row)
    norms = [node for node in run.graph.nodes if node.op == "groupnorm_silu_quantize" and node.kwargs["statistics"]]
    assert len(norms) == 5 and all(ref.name in run.made for node in norms for ref in node.kwargs["statistics"])
    for node in norms:
        assert_exact(run, node, row)


def assert_exact(run: Watched, node: Node, row: int) -> None:
    """Against float64 on the same input: an integer off by one in under 0.1 %, floats within float32's own error."""
    k, parts = node.kwargs, [run.made[part.name] for part in node.args]
    weight, bias = (run.unet.constants[k[name].key] for name in ("weight", "bias"))
    scale, zero_point, bits = run.program.rows[row].sites[run.unet.table.sites.index(k["site"])]
    site = (None, 0, 8) if bits == 16 else (scale, zero_point, bits)
    options = {"silu": k["silu"], "x2": parts[1] if len(parts) > 1 else None}
    expected = reference.groupnorm_silu_quantize(parts[0], k["groups"], weight, bias, k["eps"], *site, **options)
    actual = unpacked(run.made[node.name], expected.shape[1])
    if bits == 16:
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    else:
        steps = (actual.int() - expected.int()).abs()
        assert int(steps.max()) <= 1 and int(steps.sum()) <= 1e-3 * steps.numel(), k["site"]


def unpacked(value: Tensor, channels: int) -> Tensor:
    """The image that was stored, whatever its storage."""
    if value.dtype != ops.PACKED:
        return value
    return unpack_rows(value.view(torch.uint8).movedim(1, -1).contiguous(), channels).movedim(-1, 1)


def test_statistics_are_the_same_in_every_run() -> None:
    again = Watched(model())
    assert torch.equal(again.run(1), watched(1)[1])
    names = [node.name for node in again.graph.nodes if node.op == "group_statistics"]
    assert names and all(torch.equal(again.made[name], watched(1)[0].made[name]) for name in names)


def test_a_norm_behind_a_floating_layer_reads_its_own_statistics() -> None:
    """No kernel of ours wrote any there; the other norms keep theirs."""
    row = 1
    run = Watched(model(), floating={"conv1"}, table=retabled(model().table, {"conv1"}))
    run.run(row)
    (alone,) = (node for node in run.graph.nodes if node.kwargs.get("site") == "conv2")
    missing = [node.name for node in run.graph.nodes if node.op == "group_statistics" and node.name not in run.made]
    assert missing == [ref.name for ref in alone.kwargs["statistics"]]
    assert_exact(run, alone, row)


def test_tuning_measures_packed_layers_as_they_run() -> None:
    """Each product on what it would read in most rows, which is mode A4 here."""
    unet, table = model(), model().table
    compiler = Compiler(lower_for_gpu(unet.graph), unet.weights, unet.constants, table, CPU, "triton", torch.float32)
    results: dict[str, list[Tensor]] = {"integer": [], "float": []}

    def clock(kind: str, works: Sequence[Callable[[], Any]]) -> float:
        results[kind].append(works[0]())
        return 1.0

    timings = measure(compiler, device_rows(table, CPU), table, 2, clock)
    assert set(timings) == {node.kwargs["layer"] for node in unet.graph.nodes if node.op in PRODUCTS}
    assert ops.PACKED in {y.dtype for y in results["integer"]}
    for integer, floating in zip(*results.values(), strict=True):
        assert len(integer) == len(floating) == 2
