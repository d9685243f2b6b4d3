"""Integer models of random networks, quick enough for billions of parameters: good for timing, for nothing else.

A calibration would sample trajectories on the CPU. Here one float pass on the device gives every quantiser its range,
for all rows, and weights are rounded to nearest on their largest value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qdiff_engine as qe
from benchmarks import graphs
from qdiff_engine import numerics
from qdiff_engine.graph.capture import Capture
from qdiff_engine.graph.interpret import flatten_conditioning, run_float
from qdiff_engine.graph.ir import Node
from qdiff_engine.quantization import layers, plan_of, site_bits, without_weights
from qdiff_engine.tables import Table
from qdiff_engine.weights import QuantizedWeight

TIMESTEPS = (999.0, 666.0, 333.0, 0.0)
_KEY = {"model_hash": "random", "scheduler": {"num_train_timesteps": 1000}}


@dataclass
class Ranged:
    """A captured network with the range of every quantiser's input."""

    capture: Capture
    sites: tuple[str, ...]
    ranges: Tensor  # float32 [S, 2], on the CPU
    kept: dict[int, dict[str, tuple[QuantizedWeight, ...]]] = field(default_factory=dict)  # by weight bits

    def weights(self, recipe: qe.Recipe, device: torch.device) -> dict[str, tuple[QuantizedWeight, ...]]:
        """Integer weights for a recipe: rounded on ``device`` once, and kept on the CPU, so that models own theirs."""
        if recipe.weight_bits not in self.kept:
            graph, parameters = self.capture.graph, self.capture.constants
            self.kept[recipe.weight_bits] = {
                node.kwargs["layer"]: _rounded(node, parameters, recipe, device) for node in layers(graph)
            }
        return self.kept[recipe.weight_bits]


@torch.no_grad()
def ranged(
    unet: nn.Module, shape: tuple[int, ...], given: Mapping[str, Any], device: torch.device, store: Path | None = None
) -> Ranged:
    """Capture ``unet``, and run one sample in the middle of the schedule in float32 on ``device``.

    Args:
        unet: in float32 on the CPU.
        given: its keyword arguments for at least one sample.
        store: file that keeps the captured graph.
    """
    captured = graphs.captured(unet, shape, given, store)
    found: dict[str, Tensor] = {}

    def observe(site: str, x: Tensor) -> Tensor:
        found[site] = torch.stack(x.aminmax())
        return x

    one = {name: value[:1].to(device) for name, value in flatten_conditioning(given).items()}
    sample = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2)).to(device)
    inputs = {"sample": sample, "timestep": torch.full((1,), 500, device=device), **one}
    constants = {name: value.to(device) for name, value in captured.constants.items()}
    with torch.device(device):  # where operators such as arange make their results
        output = run_float(captured.graph, constants, inputs, activation=observe)
    if not bool(output.isfinite().all()):
        raise ValueError("the random network's output is not finite; it cannot be timed honestly")
    sites = tuple(node.kwargs["site"] for node in captured.graph.nodes if "site" in node.kwargs)
    return Ranged(captured, sites, torch.stack([found[site] for site in sites]).float().cpu())


@torch.no_grad()
def integer_model(
    network: Ranged,
    precision: str,
    device: torch.device,
    plan: str | tuple[str, ...] = "uniform",
    backend: str | None = None,
) -> qe.IntegerUNet:
    """The integer model of a named recipe on ``device``; ``plan`` may name the modes of `TIMESTEPS`."""
    recipe = qe.Recipe.named(precision, plan=plan)
    parameters, bare = network.capture.constants, without_weights(network.capture.graph)
    constants = {key: parameters[key] for key in sorted({key for node in bare.nodes for key in node.consts()})}
    return qe.IntegerUNet(
        graph=bare,
        weights=network.weights(recipe, device),
        constants=constants,
        table=_table(network, recipe),
        recipe=recipe,
        key=_KEY,
        model_config=network.capture.config,
        device=device,
        backend=backend,
    )


def _rounded(
    node: Node, parameters: Mapping[str, Tensor], recipe: qe.Recipe, device: torch.device
) -> tuple[QuantizedWeight, ...]:
    """Each channel to nearest, on its largest value.

    Raises:
        ValueError: a recipe with groups of inputs, which these weights do not have.
    """
    if recipe.weight_group:
        raise ValueError(f"weight_group must be 0 here, got {recipe.weight_group}")
    bits = 8 if node.kwargs.get("edge") else recipe.weight_bits
    weight = parameters[node.kwargs["weight"].key].to(device)
    parts = weight.split(list(node.kwargs["segments"]), 1) if len(node.args) > 1 else (weight,)
    rounded = []
    for part in parts:
        scale = part.flatten(1).abs().amax(1).clamp(min=1e-12) / numerics.weight_range(bits)[1]
        rounded.append(QuantizedWeight(numerics.quantize_weight(part, scale, bits).cpu(), scale.cpu(), bits))
    return tuple(rounded)


def _table(network: Ranged, recipe: qe.Recipe) -> Table:
    graph, sites, rows = network.capture.graph, network.sites, len(TIMESTEPS)
    modes = plan_of(recipe, rows)
    bits = site_bits(graph, sites, modes, recipe.edges)
    scale, zero_point = torch.ones(rows, len(sites)), torch.zeros(rows, len(sites), dtype=torch.int32)
    for width in (4, 8):
        s, z = numerics.affine_from_range(network.ranges[:, 0], network.ranges[:, 1], width)
        at = bits == width
        scale, zero_point = torch.where(at, s, scale), torch.where(at, z, zero_point)
    channels = int(graph.node(graph.output).shape[1])
    return Table(
        TIMESTEPS, modes, sites, scale, zero_point, bits, torch.ones(rows, channels), torch.zeros(rows, channels)
    )
