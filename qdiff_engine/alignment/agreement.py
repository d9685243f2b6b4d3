"""What was learnt on a simulation runs on integers: the difference between the two, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..calibration.calibration import Calibration
from ..graph.interpret import FloatInterpreter, flatten_conditioning, simulate
from ..graph.ir import Node
from ..runtime.compiler import Compiler, Row, Values, make_rows
from ..runtime.lowering import unrearranged
from ..runtime.model import IntegerUNet
from ..sampling import check_count, conditioning_for, timestep_tensor

_PRODUCTS = ("int_gemm", "int_conv2d")


@dataclass(frozen=True)
class LayerAgreement:
    """One layer on integers beside the simulation of it.

    Args:
        name: the layer's.
        flipped: share of its input's integers that are not the simulation's: a rounding tie seen differently.
        furthest: the largest such difference, in integers; 0 where none is, and 1 where it is rounding only.
        error: max |y - y_simulated| / max |y_simulated| of its output, both fed the same integers.
    """

    name: str
    flipped: float
    furthest: int
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, "flipped": self.flipped, "furthest": self.furthest, "error": self.error}


@torch.no_grad()
def layer_agreement(model: IntegerUNet, inputs: Mapping[str, Tensor]) -> list[LayerAgreement]:
    """Every integer layer and its quantisers, fed what the simulation hands them at that place.

    The kernels are the CPU's own. Fed its own inputs instead, the network spreads each flipped rounding through all
    later layers, which says nothing about any of them.

    Args:
        model: on the CPU, or anywhere: its integers are the same.
        inputs: "sample", "timestep" and the conditioning by the graph's input names, as for `interpret.run_float`.
    """
    lockstep = _Lockstep(model, inputs)
    weights, table = model.weights, model.table
    simulate(model.graph, model.constants, weights, table, inputs, dtype=torch.float32, observe=lockstep.follow)
    return lockstep.found


def calibrated_agreement(model: IntegerUNet, calibration: Calibration, samples: int = 2) -> list[LayerAgreement]:
    """The worst of every layer at the first, the middle and the last step of the calibration's trajectories."""
    trajectory, worst = calibration.trajectory, dict[str, LayerAgreement]()
    samples = min(check_count("samples", samples), len(trajectory.samples[0]))
    given = flatten_conditioning(conditioning_for(calibration.guidance.conditioning, range(samples)))
    for step in sorted({0, len(trajectory.timesteps) // 2, len(trajectory.timesteps) - 1}):
        timestep = timestep_tensor(trajectory.timesteps[step], samples)
        inputs = {"sample": trajectory.samples[step][:samples], "timestep": timestep, **given}
        for layer in layer_agreement(model, inputs):
            known = worst.get(layer.name, layer)
            worst[layer.name] = LayerAgreement(
                layer.name,
                max(known.flipped, layer.flipped),
                max(known.furthest, layer.furthest),
                max(known.error, layer.error),
            )
    return list(worst.values())


class _Lockstep:
    """Runs a node on integers right after the simulation has evaluated it."""

    def __init__(self, model: IntegerUNet, inputs: Mapping[str, Tensor]) -> None:
        graph = unrearranged(model.graph)
        parts = (graph, model.weights, model.constants, model.table)
        self.compiler = Compiler(*parts, torch.device("cpu"), None, torch.float32)
        self.model, self.quantizers = model, graph.quantizer_of()
        self.exact = FloatInterpreter(model.constants, torch.float64)
        self.exact.weight = lambda node, i, _: model.weights[node.kwargs["layer"]][i].dequantize(torch.float64)
        self.index = {node.name: i for i, node in enumerate(graph.nodes)}
        r = model.table.row(float(inputs["timestep"].reshape(-1)[0]))
        row = make_rows(model.table)[r]
        self.row = Row(row.sites, None, None)  # a correction of the output comes after the layers
        self.simulated: dict[str, Any] = dict(inputs)
        self.integers: dict[str, Any] = {}
        self.found: list[LayerAgreement] = []

    def follow(self, node: Node, value: Any) -> None:
        """File the simulation's value, and compare the integers' where the node has any."""
        self.simulated[node.name] = value
        if node.op in _PRODUCTS:
            self.found.append(self._compare(node))
        elif node.name in self.quantizers:
            self.integers[node.name] = self._run(node)

    def _run(self, node: Node) -> Any:
        """The node's value on integers: quantised values are the engine's, all others the simulation's."""
        index = self.index[node.name]
        values: Values = [None] * len(self.compiler.slots)
        for name in node.refs():
            value = self.integers.get(name, self.simulated[name])
            values[self.compiler.slots[name]] = value.clone() if isinstance(value, Tensor) else value
        self.compiler.instruction(index, self.compiler.graph.nodes[index])(values, self.row)
        return values[self.compiler.slots[node.name]]

    def _compare(self, node: Node) -> LayerAgreement:
        """The layer on integers beside its formula in float64, both on the integers that the engine made."""
        flips = list(self._flips(node))
        read = {name: _double(self.simulated[name]) for name in node.refs()}
        read |= {ref.name: self._dequantized(ref.name) for ref in node.args}
        expected = self.exact.evaluate(node, read)
        error = float((self._run(node).double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        elements = sum(steps.numel() for steps in flips)
        flipped = sum(int((steps > 0).sum()) for steps in flips)
        furthest = max((int(steps.max()) for steps in flips), default=0)
        return LayerAgreement(node.kwargs["layer"], flipped / max(elements, 1), furthest, error)

    def _flips(self, node: Node) -> Iterator[Tensor]:
        """|q - q_simulated| of every quantised input."""
        for ref in node.args:
            scale, zero_point, bits = self._affine(ref.name)
            if bits != 16:
                simulated = torch.round(self.simulated[ref.name].double() / scale) + zero_point
                yield (numerics.signed(self.integers[ref.name]).double() - simulated).abs()

    def _affine(self, name: str) -> tuple[float, int, int]:
        return self.row.sites[self.compiler.columns[self.quantizers[name].kwargs["site"]]]

    def _dequantized(self, name: str) -> Tensor:
        scale, zero_point, bits = self._affine(name)
        value = self.integers[name]
        return value.double() if bits == 16 else numerics.dequantize(value, scale, zero_point, torch.float64)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
