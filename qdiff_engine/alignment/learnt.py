"""What alignment learns: a step size and a zero point per quantiser and group of rows, the weights' scales, and, if
asked, their rounding.

Everything is held relative to where it starts, so that what has learnt nothing is what it was, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import numerics
from ..graph.interpret import ActivationHook, RunPart, fake_quantize, flatten_conditioning, per_channel, run_float
from ..graph.ir import Node
from ..reconstruction.blocks import find_blocks
from ..runtime.model import IntegerUNet
from ..tables import Table, row_groups
from ..weights import QuantizedWeight
from .rounding import LearntRounding, Originals, with_biases_of

_LIMIT = 3.0  # of |log| of a scale's change: 20 times
_SHARED = 0  # the group of what the prompt alone feeds, which all rows share


class Learnt:
    """scale = scale0 exp(p), zero point = round(z0 + d), weight scale = s0 exp(w); p, d and w start at 0.

    Args:
        model: where to start.
        device, dtype: of the parameters; float64 for checks.
        originals: with them the rounding of the weights is learnt, too; otherwise the integers stay.
    """

    def __init__(
        self,
        model: IntegerUNet,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        originals: Originals | None = None,
    ) -> None:
        table = self.table0 = model.table
        self.weights0, self.dtype, self.device = model.weights, dtype, torch.device(device)
        self.originals = originals
        self.column = {site: i for i, site in enumerate(table.sites)}
        self.bits: list[list[int]] = table.bits.tolist()
        self.scale0 = table.scale.to(device, dtype)
        self.zero_point0 = table.zero_point.to(device, dtype)
        prompt = {n.kwargs["site"] for n in model.graph.nodes if "site" in n.kwargs and n.section == "prompt"}
        self.of_prompt = torch.tensor([site in prompt for site in table.sites], device=device)
        self.group = row_groups(table.modes, model.recipe.row_group())
        zeros = [torch.zeros(len(table.sites), device=device, dtype=dtype) for _ in range(2 * (max(self.group) + 1))]
        self.log_scale, self.shift = (part for part in (zeros[0::2], zeros[1::2]))
        self.fixed: dict[str, list[Tensor]] = {}
        self.rounding: LearntRounding | None = None
        if originals is None:
            self.fixed = {k: [w.dequantize(dtype).to(device) for w in parts] for k, parts in model.weights.items()}
        else:
            self.rounding = LearntRounding(model.weights, originals, self.device, dtype)
        self.log_weight = {
            name: [torch.zeros(len(w.scale), device=device, dtype=dtype) for w in parts]
            for name, parts in model.weights.items()
        }
        for _, parameter in self.named():
            parameter.requires_grad_()
        self._low, self._high = self._bounds()

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) of what is learnt; the name begins with its kind: scale, zero_point, weight or rounding."""
        for g, (log_scale, shift) in enumerate(zip(self.log_scale, self.shift, strict=True)):
            yield f"scale.{g}", log_scale
            yield f"zero_point.{g}", shift
        for name, parts in self.log_weight.items():
            for i, part in enumerate(parts):
                yield f"weight.{name}.{i}", part
        if self.rounding is not None:
            for name, choice in self.rounding.named():
                yield f"rounding.{name}", choice

    def held(self) -> Iterator[Tensor]:
        """What every call reads of the weights, and nobody learns."""
        for parts in self.fixed.values():
            yield from parts
        if self.rounding is not None:
            yield from self.rounding.held()

    def affine(self, row: int) -> tuple[Tensor, Tensor]:
        """(scale, zero point) [S] of a row's quantisers; the rounding of the latter is straight through."""
        g = self.group[row]
        log_scale = torch.where(self.of_prompt, self.log_scale[_SHARED], self.log_scale[g])
        shift = torch.where(self.of_prompt, self.shift[_SHARED], self.shift[g])
        zero_point = self.zero_point0[row] + shift
        rounded = zero_point + (torch.round(zero_point) - zero_point).detach()
        return self.scale0[row] * torch.exp(log_scale), rounded

    def activation(self, row: int) -> ActivationHook:
        """Fake quantisation of every quantiser in a row."""
        scale, zero_point = self.affine(row)

        def hook(site: str, x: Tensor) -> Tensor:
            at = self.column[site]
            bits = self.bits[row][at]
            return x if bits == 16 else fake_quantize(x, scale[at], zero_point[at], bits)

        return hook

    def weight(self, node: Node, segment: int, _: Tensor | None = None) -> Tensor:
        """The weights of a layer's segment with the scales that they start with."""
        layer = node.kwargs["layer"]
        return self.fixed[layer][segment] if self.rounding is None else self.rounding.weight(layer, segment)

    def product(self, node: Node, segment: int, y: Tensor) -> Tensor:
        """A segment's product with the learnt scales: exp(w) y, which needs no gradient of the weights themselves."""
        layer, shape = node.kwargs["layer"], per_channel(node)
        shift = None if self.rounding is None else self.rounding.shift(layer, segment)
        y = y if shift is None else y + shift.reshape(shape)
        return y * torch.exp(self.log_weight[layer][segment]).reshape(shape)

    @torch.no_grad()
    def keep_representable(self) -> None:
        """Bring scales back within a factor of their start, and zero points within the range of their bits."""
        for name, parameter in self.named():
            if name.startswith(("scale.", "weight.")):
                parameter.clamp_(-_LIMIT, _LIMIT)
        for g, shift in enumerate(self.shift):
            torch.clamp(shift, self._low[g], self._high[g], out=shift)

    def _bounds(self) -> tuple[list[Tensor], list[Tensor]]:
        """Least and greatest shift of every group's zero points."""
        bits = self.table0.bits.to(self.device)
        rows = [0 if g == _SHARED else self.group.index(g) for g in range(len(self.shift))]
        low, high = (
            torch.where(bits == 16, 0.0, limit.to(self.dtype) - self.zero_point0)
            for limit in numerics.activation_limits(bits)
        )
        return [low[row] for row in rows], [high[row] for row in rows]

    @torch.no_grad()
    def table(self) -> Table:
        """The table with the learnt scales and zero points."""
        pairs = [self.affine(row) for row in range(len(self.bits))]
        scale, zero_point = (torch.stack(column).cpu() for column in zip(*pairs, strict=True))
        floating = self.table0.bits == 16
        return dataclasses.replace(
            self.table0,
            scale=torch.where(floating, self.table0.scale, scale.float()),
            zero_point=torch.where(floating, self.table0.zero_point, zero_point.to(torch.int32)),
        )

    @torch.no_grad()
    def weights(self) -> dict[str, tuple[QuantizedWeight, ...]]:
        """The integers, or those that were chosen, with the learnt scales."""
        return self._rescaled(self.weights0 if self.rounding is None else self.rounding.quantized())

    @torch.no_grad()
    def constants(self, model: IntegerUNet) -> dict[str, Tensor]:
        """The constants of ``model``, where this started, with biases that take up what new integers change."""
        if self.originals is None:
            return model.constants
        before = self._rescaled(self.weights0)
        return with_biases_of(model.graph, model.constants, before, self.weights(), self.originals)

    def _rescaled(self, weights: dict[str, tuple[QuantizedWeight, ...]]) -> dict[str, tuple[QuantizedWeight, ...]]:
        return {
            name: tuple(
                w.rescaled(torch.exp(log).float().cpu()) for w, log in zip(parts, self.log_weight[name], strict=True)
            )
            for name, parts in weights.items()
        }


class Simulation:
    """The quantised network with learnt scales, in differentiable floating point, called like a UNet.

    Args:
        recompute: keep for the backward pass what one block of layers hands to later ones only, and compute the rest
            again there: less memory for more time, the same gradient.
    """

    def __init__(self, model: IntegerUNet, learnt: Learnt, recompute: bool = False) -> None:
        self.graph, self.learnt, self.row = model.graph, learnt, model.table.row
        self.constants = {name: value.to(learnt.device) for name, value in model.constants.items()}
        self.parts = [block.nodes for block in find_blocks(self.graph)] if recompute else None
        self.run_part: RunPart = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

    def forward(self, sample: Tensor, timestep: Tensor, **conditioning: Any) -> Tensor:
        """The simulated prediction in the dtype of what is learnt."""
        learnt, row = self.learnt, self.row(float(timestep.reshape(-1)[0]))
        inputs = {"sample": sample, "timestep": timestep, **flatten_conditioning(conditioning)}
        inputs = {name: value.to(learnt.device) for name, value in inputs.items()}
        return run_float(
            self.graph,
            self.constants,
            inputs,
            activation=learnt.activation(row),
            weight=learnt.weight,
            product=learnt.product,
            dtype=learnt.dtype,
            parts=self.parts,
            run_part=self.run_part,
        )

    __call__ = forward
