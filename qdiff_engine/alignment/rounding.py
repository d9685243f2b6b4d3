"""Rounding learnt along with the step sizes: which of its two neighbouring integers each weight becomes.

AdaRound's question, asked of the end of a group of denoising steps. Weights are integers all the time, not relaxed, so
that the step sizes are learnt for what will run: W(v) = s (floor + [v >= 0]); in gradients [v >= 0] counts as v itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.ir import Graph
from ..reconstruction.adaround import SoftWeight, neighbours
from ..reconstruction.inputs import SegmentInputs
from ..reconstruction.layers import bias_shift, layers
from ..weights import QuantizedWeight

Weights = Mapping[str, Sequence[QuantizedWeight]]  # of every layer's K segments


@dataclass(frozen=True)
class Originals:
    """What layers' integers stand for, by K segment: the float weights, and what these multiply, where known."""

    weights: Mapping[str, Sequence[Tensor]]
    inputs: Mapping[str, Sequence[SegmentInputs | None]]


class LearntRounding:
    """W(v) x + (W_0 - W(v)) E[x], with the integers W(v) that the choices v stand for: a layer's mean output stays.

    Args:
        start: the integers W_0 that learning begins at.
        device, dtype: of the choices.
    """

    def __init__(self, start: Weights, originals: Originals, device: torch.device, dtype: torch.dtype) -> None:
        self.chosen: dict[str, list[SoftWeight]] = {}
        self.means: dict[str, list[Tensor]] = {}
        self.mean_outputs: dict[str, list[Tensor]] = {}  # W_0 E[x]
        for layer, parts in start.items():
            pairs = zip(originals.weights[layer], parts, strict=True)
            self.chosen[layer] = [_choosing(w.to(device), q.to(device), dtype) for w, q in pairs]
            known = [x.mean.to(device, dtype) for x in originals.inputs[layer] if x is not None]
            if len(known) == len(parts):
                self.means[layer] = known
                with torch.no_grad():
                    self.mean_outputs[layer] = [
                        _mean_output(self.weight(layer, i), mean) for i, mean in enumerate(known)
                    ]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """(layer and segment, choices v)."""
        for layer, parts in self.chosen.items():
            for i, weight in enumerate(parts):
                yield f"{layer}.{i}", weight.choice

    def held(self) -> Iterator[Tensor]:
        """What every call reads and nobody learns."""
        for parts in self.chosen.values():
            for weight in parts:
                yield from (weight.floor, weight.scale)
        for vectors in (*self.means.values(), *self.mean_outputs.values()):
            yield from vectors

    def weight(self, layer: str, segment: int) -> Tensor:
        """W(v)."""
        weight = self.chosen[layer][segment]
        held = weight.choice.detach()
        return weight.value((held >= 0) + (weight.choice - held))

    def shift(self, layer: str, segment: int) -> Tensor | None:
        """(W_0 - W(v)) E[x], [N]; None where the layer's inputs are not known."""
        if layer not in self.means:
            return None
        return self.mean_outputs[layer][segment] - _mean_output(self.weight(layer, segment), self.means[layer][segment])

    def quantized(self) -> dict[str, tuple[QuantizedWeight, ...]]:
        """The integers of every layer, with the scales of the start, on the CPU."""
        return {layer: tuple(weight.rounded().to("cpu") for weight in parts) for layer, parts in self.chosen.items()}


def _choosing(weight: Tensor, start: QuantizedWeight, dtype: torch.dtype) -> SoftWeight:
    """The integers of ``start``, the other choice of each being its neighbour towards the float ``weight``."""
    floor, upward = neighbours(weight, start)
    return SoftWeight(floor.to(dtype), (upward - 0.5).to(dtype).requires_grad_(), start.scale, start.bits)


def _mean_output(weight: Tensor, mean: Tensor) -> Tensor:
    """W E[x]; no matrix product, which mixed precision would round more than the choices change it."""
    return (weight.flatten(1) * mean).sum(1)


def with_biases_of(
    graph: Graph, constants: Mapping[str, Tensor], before: Weights, after: Weights, originals: Originals
) -> dict[str, Tensor]:
    """The constants with biases that keep each layer's mean output: b' = b + (W_before - W_after) E[x]."""
    changed = dict(constants)
    for node in layers(graph):
        layer, bias = node.kwargs["layer"], node.kwargs["bias"]
        shift = bias_shift([w.dequantize() for w in before[layer]], after[layer], originals.inputs[layer])
        if shift is not None:
            changed[bias.key] = changed[bias.key] + shift
    return changed
