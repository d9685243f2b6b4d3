"""Block reconstruction: the rounding of a block's weights, learnt so that its output is the float network's.

Sources: Li et al., BRECQ (ICLR 2021), blocks and loss; Wei et al., QDrop (ICLR 2022), quantisation dropped at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph.interpret import FloatInterpreter
from ..graph.ir import Node
from ..tables import Table
from ..weights import QuantizedWeight
from .adaround import SoftWeight, sharpness, undecided
from .blocks import Block
from .layers import segments
from .placement import mixed_precision, placed
from .quantizers import RowQuantizer
from .step_sizes import StepSizes

_RATE = 5e-2  # Adam's, of the choices; constant, for the choices are made at the end
_SCALE_RATE, _SHIFT_RATE = 2e-3, 2e-2  # of log step sizes and of zero points; a cosine takes them to zero
DROP = 0.5  # QDrop's probability that a value is left as it is in the float network
_DECISION = 1000.0  # weight of the regulariser, when the error that learning starts from counts 1
_CHECK = 16  # samples that the block evaluates at once where nothing is learnt

Means = dict[str, tuple[Tensor, ...]]  # mean of what each K segment of a layer multiplies
OnIteration = Callable[[float], None]


@dataclass(frozen=True)
class BlockData:
    """What a block receives and should answer, over N samples.

    Args:
        quantized, floating: its entries in the quantised prefix and in the float network. Tensors of all samples have
            their batch, or a multiple of it, first; others are the same for every sample.
        batched: how many values along its first axis an entry has for each sample; absent where it is for all.
        target: the float network's answer; ``rows``: int64 [N], the row of every sample.
    """

    quantized: dict[str, Any]
    floating: dict[str, Any]
    batched: dict[str, int]
    target: Tensor
    rows: Tensor

    def at(self, entries: Mapping[str, Any], samples: Tensor) -> dict[str, Any]:
        """The entries of some samples, int64 [n]."""
        return {
            name: taken(x, samples, self.batched[name]) if name in self.batched else x for name, x in entries.items()
        }


def taken(x: Tensor, samples: Tensor, each: int) -> Tensor:
    """The rows of ``x`` [N * each, ...] that belong to ``samples``."""
    return x[samples] if each == 1 else x.unflatten(0, (-1, each))[samples].flatten(0, 1)


class BlockNetwork:
    """A block that can be evaluated on some of its samples, with weights and biases of the caller's choice."""

    def __init__(
        self,
        block: Block,
        scalars: list[Node],
        constants: Mapping[str, Tensor],
        table: Table,
        device: torch.device | str = "cpu",
    ) -> None:
        self.block, self.scalars, self.table, self.device = block, scalars, table, torch.device(device)
        own = {key for node in (*scalars, *block.nodes) for key in node.consts()}  # of layers beside the exit, too
        self.original = {key: constants[key].to(self.device) for key in own}
        self.constants = dict(self.original)
        self.interpreter = FloatInterpreter(self.constants, torch.float32)
        self.interpreter.device = self.device
        self.steps: StepSizes | None = None

    def evaluate(
        self,
        entries: dict[str, Any],
        rows: Tensor,
        weights: Mapping[str, tuple[Tensor, ...]],
        drop: tuple[float, torch.Generator] | None = None,
        observe: Callable[[Node, int, Tensor], None] | None = None,
    ) -> Tensor:
        """The block's exit. ``drop``: (probability, generator) with which a value's quantisation is left out."""
        self.interpreter.activation = RowQuantizer(self.table, rows, drop, self.steps)
        self.interpreter.weight = lambda node, segment, _: weights[node.kwargs["layer"]][segment]
        self.interpreter.layer_input = observe or (lambda node, segment, x: None)
        values = {name: placed(value, self.device) for name, value in entries.items()}
        for node in (*self.scalars, *self.block.body):
            if node.name not in values:
                values[node.name] = self.interpreter.evaluate(node, values)
        return values[self.block.exit]


def learn_rounding(
    network: BlockNetwork,
    start: Mapping[str, tuple[QuantizedWeight, ...]],
    means: Means,
    data: BlockData,
    iterations: int,
    generator: torch.Generator,
    batch: int = 8,
    drop: float = DROP,
    on_iteration: OnIteration | None = None,
) -> dict[str, tuple[QuantizedWeight, ...]]:
    """Integer weights of the block's layers that least change its output; the scales stay those of ``start``.

    L = |y - y_hat|^2 / |y - y_start|^2 + 1000 mean(1 - |2 h - 1|^b), over random batches, with Adam. A layer's
    bias follows its relaxed weights, b' = b + (W - W_soft) E[x] with ``means``, as it will once they are integers.
    The network's ``steps``, where it has some, learn along.

    Args:
        start: the integers that the choices begin at, which the first term is measured against.
        batch: samples per iteration.
        drop: probability with which an element stays as it is in the float network: at the block's entries, and at
            its quantisers.
        on_iteration: called with the loss's first term, for progress.
    """
    parts = {node.kwargs["layer"]: segments(node, network.constants) for node in network.block.layers}
    soft = {
        layer: tuple(SoftWeight.of(part, w.to(network.device)) for part, w in zip(own, start[layer], strict=True))
        for layer, own in parts.items()
    }
    means = {layer: tuple(mean.to(network.device) for mean in own) for layer, own in means.items()}
    choices = [weight.choice for weights in soft.values() for weight in weights]
    count = sum(choice.numel() for choice in choices)
    unit = reference_error(network, start, means, data)
    optimizer = torch.optim.Adam([{"params": choices, "lr": _RATE}, *step_parameters(network.steps)])
    samples = batches(len(data.rows), batch, generator)
    with torch.enable_grad(), mixed_precision():
        for iteration in range(iterations):
            picked = next(samples)
            upward = {layer: [w.upward() for w in weights] for layer, weights in soft.items()}
            relaxed = {
                layer: tuple(w.value(h) for w, h in zip(soft[layer], upward[layer], strict=True)) for layer in soft
            }
            shift_biases(network, parts, relaxed, means)
            entries = mixed(data, picked, drop, generator)
            output = network.evaluate(entries, data.rows[picked], relaxed, (drop, generator))
            target = taken(data.target, picked, len(data.target) // len(data.rows)).to(network.device)
            error = (output - target).square().mean() / unit
            b = sharpness(iteration, iterations)
            loss = error
            if b is not None:
                loss = (
                    loss
                    + _DECISION / count * torch.stack([undecided(h, b) for hs in upward.values() for h in hs]).sum()
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for kind in optimizer.param_groups[1:]:
                kind["lr"] = kind["rate"] * 0.5 * (1 + math.cos(math.pi * iteration / iterations))
            optimizer.step()
            if network.steps is not None:
                network.steps.keep_representable()
            if on_iteration is not None:
                on_iteration(float(error.detach()))
    return {layer: tuple(weight.rounded().to("cpu") for weight in weights) for layer, weights in soft.items()}


def step_parameters(steps: StepSizes | None) -> list[dict[str, Any]]:
    """Adam's groups of what quantisers learn."""
    if steps is None or not steps.sites:
        return []
    rated = ((steps.log_scale, _SCALE_RATE), (steps.shift, _SHIFT_RATE))
    return [{"params": [values.requires_grad_()], "rate": rate} for values, rate in rated]


def shift_biases(
    network: BlockNetwork,
    parts: Mapping[str, tuple[Tensor, ...]],
    weights: Mapping[str, tuple[Tensor, ...]],
    means: Means,
) -> None:
    """Give the network's layers the biases that go with ``weights``: b' = b + sum over segments of (W - W') E[x]."""
    for node in network.block.layers:
        layer, bias = node.kwargs["layer"], node.kwargs["bias"]
        if layer in means and bias is not None:
            changes = zip(parts[layer], weights[layer], means[layer], strict=True)
            network.constants[bias.key] = network.original[bias.key] + sum(
                (w - v).flatten(1) @ mean for w, v, mean in changes
            )


@torch.no_grad()
def reference_error(
    network: BlockNetwork, start: Mapping[str, tuple[QuantizedWeight, ...]], means: Means, data: BlockData
) -> Tensor:
    """Mean squared error of the block's output with the integers of ``start``."""
    weights = {layer: tuple(w.dequantize().to(network.device) for w in own) for layer, own in start.items()}
    parts = {node.kwargs["layer"]: segments(node, network.constants) for node in network.block.layers}
    shift_biases(network, parts, weights, means)
    total = torch.zeros((), dtype=torch.float64)
    each = len(data.target) // len(data.rows)
    for picked in torch.arange(len(data.rows)).split(_CHECK):
        output = network.evaluate(data.at(data.quantized, picked), data.rows[picked], weights)
        total += (output.cpu() - taken(data.target, picked, each)).double().square().sum()
    return (total / data.target.numel()).float().clamp(min=torch.finfo(torch.float32).tiny).to(network.device)


def mixed(data: BlockData, samples: Tensor, drop: float, generator: torch.Generator) -> dict[str, Any]:
    """The entries of some samples, each element the float network's with probability ``drop``."""
    quantized, floating = data.at(data.quantized, samples), data.at(data.floating, samples)
    for name, x in quantized.items():
        if name in data.batched and x.is_floating_point() and drop > 0:
            keep = torch.rand(x.shape, generator=generator) < drop
            quantized[name] = torch.where(keep, floating[name], x)
    return quantized


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless random batches of ``size`` samples; none comes again before the others that fill whole batches."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order.split(size) if count <= size else order[: count - count % size].split(size)
