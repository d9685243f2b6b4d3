"""Which integer layers are slower than floating point on this machine: measured, shape by shape; both times are kept.

A layer left in floating point needs floating activations, and layers that share a quantiser share its choice: layers
are decided in groups, by the sum of their times. Only layers that every step runs are measured, each with the terms its
kernel adds, on random values, at the precision that most rows of the table give it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..graph.ir import Graph, Node, Ref, sizes
from ..tables import Table
from .compiler import Compiler, Row, Values
from .float_layers import layer_names

Work = Callable[[], Any]
Clock = Callable[[str, Sequence[Work]], float]  # ("integer" or "float", the same work on several weights) -> ms a call
_ROUNDS, _CALLS = 9, 8
_MOST_COPIES = 64
_HEAD_START = 400_000  # clock cycles, some 200 us
PRODUCTS = ("int_gemm", "int_conv2d")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a layer on integers and in floating point, and which of the two it runs in."""

    integer_ms: float
    float_ms: float
    floating: bool
    measured_with: tuple[str, ...] = ()  # layers of the same input, measured as one product with this one


def host_clock(kind: str, works: Sequence[Work]) -> float:
    """Median milliseconds of one call on the CPU."""
    work = works[0]
    work()
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def cuda_clock(device: torch.device) -> Clock:
    """Median milliseconds of one call inside a CUDA graph, where launching costs what it costs in a recorded step."""
    from .replay import CudaGraphs

    record = CudaGraphs(device)

    def clock(kind: str, works: Sequence[Work]) -> float:
        passes = -(-_CALLS // len(works))

        def several() -> Any:
            for work in [*works] * passes:
                result = work()
            return result

        with torch.cuda.device(device):
            replay = record(several)
            times = []
            for _ in range(_ROUNDS):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(_HEAD_START)  # the device still waits when the replay is launched: no gap is timed
                start.record()
                replay()
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop) / (len(works) * passes))
        return statistics.median(times)

    return clock


@torch.inference_mode()
def measure(compiler: Compiler, rows: list[Row], table: Table, batch: int, clock: Clock) -> dict[str, Timing]:
    """Both times of every integer layer that each step runs, by the layer's name.

    Args:
        compiler: of the lowered graph, with no layer in floating point yet.
        rows: what the program hands its layers in every row of the table.
        table: for the sites' bits.
        batch: samples per call, at least 1.
        clock: measures the same work on several copies of a layer's weights; `host_clock` or that of `cuda_clock`.
    """
    measured: dict[Any, tuple[float, float]] = {}
    times: dict[str, tuple[float, float]] = {}
    products = {
        i: node for i, node in enumerate(compiler.graph.nodes) if node.op in PRODUCTS and node.section == "main"
    }
    for i, node in products.items():
        row = rows[_usual_row(compiler, node, table)]
        key = _shape_key(compiler, node, row, batch)
        if key not in measured:
            measured[key] = _measured(compiler, i, node, row, batch, clock)
        times[node.name] = measured[key]
    timings: dict[str, Timing] = {}
    for group in _groups(compiler, list(products.values())):
        floating = sum(times[node.name][1] for node in group) < sum(times[node.name][0] for node in group)
        for node in group:
            names = layer_names(node)
            for name in names:
                others = tuple(other for other in names if other != name)
                timings[name] = Timing(*times[node.name], floating, others)
    return timings


def floating_sites(graph: Graph, timings: Mapping[str, Timing]) -> set[str]:
    """Quantisers of ``graph`` whose readers all stay in floating point."""
    quantizers = graph.quantizer_of()
    return {
        quantizers[ref.name].kwargs["site"]
        for node in graph.nodes
        if node.op in PRODUCTS and any(timings[n].floating for n in layer_names(node) if n in timings)
        for ref in node.args
    }


def retabled(table: Table, sites: set[str]) -> Table:
    """The table with ``sites`` in floating point in every row."""
    bits = table.bits.clone()
    bits[:, [i for i, site in enumerate(table.sites) if site in sites]] = 16
    return replace(table, bits=bits)


def _sites(compiler: Compiler, node: Node) -> list[int]:
    return [compiler.columns[compiler.quantizers[ref.name].kwargs["site"]] for ref in node.args]


def _usual_row(compiler: Compiler, node: Node, table: Table) -> int:
    """A row with the bits that the layer's input most often has."""
    bits = [tuple(row) for row in table.bits[:, _sites(compiler, node)].tolist()]
    return bits.index(Counter(bits).most_common(1)[0][0])


def _groups(compiler: Compiler, products: list[Node]) -> Iterator[list[Node]]:
    """Products that share a quantiser, directly or through others."""
    groups: list[tuple[set[int], list[Node]]] = []
    for node in products:
        sites, members = set(_sites(compiler, node)), [node]
        for group in [g for g in groups if g[0] & sites]:
            groups.remove(group)
            sites, members = sites | group[0], [*group[1], *members]
        groups.append((sites, members))
    return (members for _, members in groups)


def _shape_key(compiler: Compiler, node: Node, row: Row, batch: int) -> tuple[Any, ...]:
    """What a layer's time depends on."""
    k = node.kwargs
    weights = tuple((tuple(w.values.shape), w.bits) for name in layer_names(node) for w in compiler.weights[name])
    operands = tuple(_operand_shape(compiler, ref, batch) for ref in node.args)
    bits = tuple(row.sites[column][2] for column in _sites(compiler, node))
    geometry = tuple(k.get(name) for name in ("stride", "padding", "dilation", "groups", "upsample"))
    written = row.sites[compiler.columns[k["site"]]][2] if k["site"] else None
    terms = tuple(k.get(name) is not None for name in ("bias", "temb", "residual"))
    packed = tuple(compiler.quantizers[ref.name].kwargs.get("packed", False) for ref in node.args)
    forms = (written, k["geglu"], k.get("packed", False), k["statistics"] is not None)
    return (node.op, operands, weights, bits, packed, geometry, forms, terms)


def _operand_shape(compiler: Compiler, ref: Ref, batch: int) -> tuple[int, ...]:
    """Shape of a layer's input as its quantiser writes it: enlarged and padded where the lowering told it to."""
    node = compiler.graph.node(ref.name)
    shape = sizes(node.shape, batch)
    if len(shape) != 4 or "padding" not in node.kwargs or node.op in PRODUCTS:
        return shape
    top, bottom, left, right = node.kwargs["padding"]
    height, width = (size * node.kwargs["upsample"] for size in shape[2:])
    return (*shape[:2], height + top + bottom, width + left + right)


def _measured(compiler: Compiler, index: int, node: Node, row: Row, batch: int, clock: Clock) -> tuple[float, float]:
    """(milliseconds on integers, in floating point) of one layer."""
    times = []
    for kind in ("integer", "float"):
        layers = [
            compiler.instruction(index, node) if kind == "integer" else compiler.float_product(node)
            for _ in range(_copies(compiler, node, kind))
        ]
        values: Values = [None] * len(compiler.slots)
        for ref, column in zip(node.args, _sites(compiler, node), strict=True):
            shape, bits = _operand_shape(compiler, ref, batch), 16 if kind == "float" else row.sites[column][2]
            stored = compiler.dtype if bits == 16 else compiler.storages(compiler.quantizers[ref.name])[bits]
            if stored == ops.PACKED:
                axis = 1 if node.op == "int_conv2d" else len(shape) - 1
                shape = (*shape[:axis], ops.packed_width(shape[axis]), *shape[axis + 1 :])
            values[compiler.slots[ref.name]] = _operand(compiler, shape, stored)
        for name in ("temb", "residual"):
            if isinstance(term := node.kwargs.get(name), Ref):
                values[compiler.slots[term.name]] = _operand(compiler, _shape(compiler, term, batch), compiler.dtype)
        times.append(clock(kind, [_work(layer, values, row, compiler.slots[node.name]) for layer in layers]))
    return times[0], times[1]


def _copies(compiler: Compiler, node: Node, kind: str) -> int:
    """Copies of a layer's weights, three times a GPU's cache together: a step's other weights drive them out of it."""
    if compiler.device.type != "cuda":
        return 1
    parts = [part for name in layer_names(node) for part in compiler.weights[name]]
    width = compiler.dtype.itemsize
    size = sum(part.values.numel() * (part.bits / 8 if kind == "integer" else width) for part in parts)
    cache = torch.cuda.get_device_properties(compiler.device).L2_cache_size
    return max(1, min(_MOST_COPIES, math.ceil(3 * cache / size)))


def _work(layer: Callable[[Values, Row], None], values: Values, row: Row, out: int) -> Work:
    def work() -> Any:
        layer(values, row)
        return values[out]

    return work


def _shape(compiler: Compiler, ref: Ref, batch: int) -> tuple[int, ...]:
    inputs = compiler.graph.inputs
    return sizes(inputs[ref.name] if ref.name in inputs else compiler.graph.node(ref.name).shape, batch)


def _operand(compiler: Compiler, shape: tuple[int, ...], stored: torch.dtype) -> Tensor:
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    if stored.is_floating_point:
        return torch.randn(shape, device=compiler.device, dtype=stored).contiguous(memory_format=order)
    value = torch.randint(0, 16, shape, dtype=torch.uint8, device=compiler.device).contiguous(memory_format=order)
    return value.view(stored) if stored == ops.PACKED else value.to(stored)
