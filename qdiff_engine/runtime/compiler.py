"""Lowered graph -> flat list of instructions for one backend, run without allocation of graph objects or dispatch.

An instruction is a closure ``(values, row)``; ``values`` is a list with one slot per graph value, and ``row`` the
constants of the calibrated row that serves the timestep. Slots are emptied after their last reader.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..graph.factors import FACTORS, channel_axis, divided
from ..graph.interpret import activate
from ..graph.ir import Const, Graph, Node, Ref, map_leaves, sizes
from ..graph.operators import FACTORY_OPS, FLOAT_OPS, INTEGER_OPS
from ..tables import Table
from ..weights import QuantizedWeight
from .features import features_axis
from .float_layers import float_layer, layer_names, linear_by_sample, placed_as
from .lifetimes import Lifetimes

Values = list[Any]
_WRITTEN_ELSEWHERE = frozenset({"quantized_copy", "group_statistics"})  # by the GroupNorm or the product they follow


@dataclass(frozen=True)
class Row:
    """A table row: (scale, zero point, bits) per site, and the output's affine correction a e + b.

    The scale is a number, or a device's tensor (s, 1 / s, z) that holds the zero point too. Where the layer that makes
    the output folds the correction, ``output_shift`` is a bias + b, all that is left of its own bias.
    """

    sites: tuple[tuple[Any, int, int], ...]
    output_scale: Tensor | None
    output_shift: Tensor | None


Instruction = Callable[[Values, Row], None]


def make_rows(table: Table, output_bias: Tensor | None = None) -> tuple[Row, ...]:
    """The table as plain numbers; an identity correction is None, so that it costs nothing.

    Args:
        output_bias: as of `Compiler`.
    """
    rows = []
    for r in range(len(table.timesteps)):
        sites = zip(table.scale[r].tolist(), table.zero_point[r].tolist(), table.bits[r].tolist(), strict=True)
        a, b = table.output_scale[r], table.output_shift[r]
        rows.append(Row(tuple(sites), *((a, folded(a, b, output_bias)) if table.corrects(r) else (None, None))))
    return tuple(rows)


def folded(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a bias + b, float32 [C] or [R, C]: what a corrected layer adds; b where it has no bias to fold."""
    return b if bias is None else a * bias.cpu() + b


class Compiler:
    """Makes instructions of a lowered graph's nodes; layers named in ``floating`` run on dequantised weights.

    ``corrected_layer`` makes the output and folds its correction, ``output_bias`` float32 [C] is its bias.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, tuple[QuantizedWeight, ...]],
        constants: Mapping[str, Tensor],
        table: Table,
        device: torch.device,
        backend: str | None,
        dtype: torch.dtype,
        floating: Collection[str] = (),
    ) -> None:
        self.graph, self.weights, self.device, self.floating_layers = graph, weights, device, frozenset(floating)
        self.constants = {name: value.to(device) for name, value in constants.items()}
        self.dtype = dtype
        self.out: dict[str, Any] = (
            {} if dtype == torch.float32 else {"out_dtype": dtype}
        )  # of products; float32 is every kernel's default
        self.slots = {name: i for i, name in enumerate([*graph.inputs, *(node.name for node in graph.nodes)])}
        self.columns = {site: i for i, site in enumerate(table.sites)}
        self.quantizers = graph.quantizer_of()
        self.storage = ops.storage(device, backend)
        self.kernels = {
            name: ops.resolve(name, device, backend if ops.supports(backend, name) else None)
            for name in sorted(INTEGER_OPS)
        }
        self.lifetimes = Lifetimes(graph)
        self.corrected_layer = self._corrected_layer()
        self.output_bias = None if self.corrected_layer is None else self.value(self.corrected_layer.kwargs["bias"])([])

    def _corrected_layer(self) -> Node | None:
        """The convolution that makes the output, if only a bias is added to it: e' = a e + b folds into it."""
        last = next((node for node in self.graph.nodes if node.name == self.graph.output), None)
        if last is None or last.op != "int_conv2d":
            return None
        return last if last.kwargs["temb"] is None and last.kwargs["residual"] is None else None

    def slots_of(self, names: Iterable[str]) -> list[int]:
        """Where the values with these names are."""
        return [self.slots[name] for name in names]

    def section(self, name: str, among: Collection[str] | None = None) -> list[Instruction]:
        """Instructions of one section, or of its nodes ``among`` some; the main one empties dead slots."""
        instructions = []
        for i, node in enumerate(self.graph.nodes):
            if node.section != name or (among is not None and node.name not in among):
                continue
            if node.op not in _WRITTEN_ELSEWHERE:
                instructions.append(self.instruction(i, node))
            dead = [
                self.slots[value]
                for value in dict.fromkeys(node.refs())
                if name == "main" and self.lifetimes.last_use[value] == i and value != self.graph.output
            ]
            if dead:
                instructions.append(_emptying(dead))
        return instructions

    def instruction(self, index: int, node: Node) -> Instruction:
        if node.op in ("int_gemm", "int_conv2d"):
            stays_floating = not self.floating_layers.isdisjoint(layer_names(node))
            return self.float_product(node) if stays_floating else getattr(self, node.op)(index, node)
        if node.op in INTEGER_OPS:
            return getattr(self, node.op)(node)
        if node.op in ("attention", "quantized_layout"):
            return getattr(self, node.op)(node)
        return self.floating(node, FLOAT_OPS[node.op])

    def value(self, argument: Any) -> Callable[[Values], Any]:
        """Reader of an optional Ref or Const argument."""
        if isinstance(argument, Ref):
            slot = self.slots[argument.name]
            return lambda values: values[slot]
        constant = self.constants[argument.key] if isinstance(argument, Const) else argument
        return lambda values: constant

    def floating(self, node: Node, function: Callable[..., Any]) -> Instruction:
        """A floating-point operator, its arguments resolved as far as they are known."""
        out = self.slots[node.name]
        if node.op == "linear" and node.section != "main":
            function = linear_by_sample

        def known(value: Any) -> Any:
            if not isinstance(value, Const):
                return value
            constant = self.constants[value.key]
            return constant.to(self.dtype) if node.section == "main" and constant.is_floating_point() else constant

        args, kwargs = map_leaves(node.args, known), map_leaves(node.kwargs, known)
        if node.op in FACTORY_OPS and self.device.type != "cpu":
            kwargs = {**kwargs, "device": self.device}
        nested = any(isinstance(a, tuple) for a in args) or kwargs
        if nested:

            def run_nested(values: Values, row: Row) -> None:
                def resolve(v: Any) -> Any:
                    return values[self.slots[v.name]] if isinstance(v, Ref) else v

                values[out] = function(*map_leaves(args, resolve), **map_leaves(kwargs, resolve))

            return run_nested
        plain = [(self.slots[a.name], None) if isinstance(a, Ref) else (-1, a) for a in args]

        def run(values: Values, row: Row) -> None:
            values[out] = function(*[values[slot] if slot >= 0 else a for slot, a in plain])

        return run

    def quantized_layout(self, node: Node) -> Instruction:
        """A layout change of a value that in some modes is packed: of its bytes then."""
        op, read = node.kwargs["op"], self.slots[node.args[0].name]
        plain = self.floating(dataclasses.replace(node, op=op, kwargs={}), FLOAT_OPS[op])
        of_bytes = dataclasses.replace(node, op=op, args=node.kwargs["of_bytes"], kwargs={})
        packed = self.floating(of_bytes, lambda x, *args: FLOAT_OPS[op](x.view(torch.uint8), *args).view(ops.PACKED))

        def run(values: Values, row: Row) -> None:
            (packed if values[read].dtype == ops.PACKED else plain)(values, row)

        return run

    def storages(self, node: Node) -> dict[int, torch.dtype]:
        """Bits -> how a value that ``node`` quantises to so many is stored."""
        return {4: ops.PACKED if node.kwargs.get("packed") else self.storage, 8: self.storage}

    def quantize(self, node: Node) -> Instruction:
        kernel, column, storage = self.kernels["quantize"], self.columns[node.kwargs["site"]], self.storages(node)
        read, out, activation = self.slots[node.args[0].name], self.slots[node.name], node.kwargs["activation"]
        upsample, padding = node.kwargs["upsample"], node.kwargs["padding"]
        placed: dict[str, Any] = {"upsample": upsample, "padding": padding} if len(node.shape) == 4 else {}
        factors, axis = self._factors(node), channel_axis(node.op, len(node.shape))
        if factors is not None:
            placed[FACTORS] = factors

        def run(values: Values, row: Row) -> None:
            scale, zero_point, bits = row.sites[column]
            if bits == 16:
                x = divided(activate(values[read], activation), factors, axis)
                values[out] = placed_as(x.to(self.dtype), upsample, padding)  # a prompt is in float32 till here
            else:
                values[out] = kernel(
                    values[read], scale, zero_point, bits, activation=activation, storage=storage[bits], **placed
                )

        return run

    def _factors(self, node: Node) -> Tensor | None:
        """1 / c of an equalised quantiser's channels."""
        return self.value(node.kwargs.get(FACTORS))([])

    def groupnorm_silu_quantize(self, node: Node) -> Instruction:
        kernel, k, storage = self.kernels["groupnorm_silu_quantize"], node.kwargs, self.storages(node)
        column, out = self.columns[k["site"]], self.slots[node.name]
        weight, bias = self.value(k["weight"])([]), self.value(k["bias"])([])
        read = self.slots[node.args[0].name]
        second = self.value(node.args[1] if len(node.args) > 1 else None)
        pre_add, scale_by, shift_by = (self.value(k[name]) for name in ("pre_add", "norm_scale", "norm_shift"))
        groups, eps, silu, upsample, padding = k["groups"], k["eps"], k["silu"], k["upsample"], k["padding"]
        quantize_inputs, factors = self._copies(node), self._factors(node)
        measured = self.slots_of(ref.name for ref in k["statistics"])

        def run(values: Values, row: Row) -> None:
            scale, zero_point, bits = row.sites[column]
            floating = bits == 16
            bits = 8 if floating else bits
            statistics = [values[slot] for slot in measured]
            known = {"statistics": statistics} if statistics and all(s is not None for s in statistics) else {}
            result = kernel(
                values[read],
                groups,
                weight,
                bias,
                eps,
                None if floating else scale,
                zero_point,
                bits,
                silu=silu,
                x2=second(values),
                pre_add=pre_add(values),
                norm_scale=scale_by(values),
                norm_shift=shift_by(values),
                channel_inverse=factors,
                upsample=1 if floating else upsample,
                padding=(0, 0, 0, 0) if floating else padding,
                copies=quantize_inputs(values, row),
                storage=storage[bits],
                **known,
            )
            values[out] = placed_as(result, upsample, padding) if floating else result

        return run

    def _copies(self, norm: Node) -> Callable[[Values, Row], Sequence[ops.QuantizedCopy | None]]:
        """Allocates what a GroupNorm writes beside its own result: its arguments, quantised for other layers."""
        wanted = [norm.kwargs["copies"].get(i) for i in range(len(norm.args))]
        if not any(wanted):
            return lambda values, row: ()
        storage, plan = self.storage, []
        for ref, name in zip(norm.args, wanted, strict=True):
            column = self.columns[self.graph.node(name).kwargs["site"]] if name else -1
            plan.append((self.slots[ref.name], self.slots.get(name, -1), column))

        def allocate(values: Values, row: Row) -> list[ops.QuantizedCopy | None]:
            copies: list[ops.QuantizedCopy | None] = []
            for read, out, column in plan:
                scale, zero_point, bits = row.sites[column] if out >= 0 else (1.0, 0, 16)
                if bits == 16:
                    copies.append(None)
                    if out >= 0:
                        values[out] = values[read]
                else:
                    q = torch.empty(values[read].shape, dtype=storage, memory_format=torch.channels_last)
                    values[out] = q
                    copies.append(ops.QuantizedCopy(q, scale, zero_point, bits))
            return copies

        return allocate

    def layernorm_quantize(self, node: Node) -> Instruction:
        kernel, storage, eps = self.kernels["layernorm_quantize"], self.storages(node), node.kwargs["eps"]
        column, out, read = self.columns[node.kwargs["site"]], self.slots[node.name], self.slots[node.args[0].name]
        weight, bias = self.value(node.kwargs["weight"])([]), self.value(node.kwargs["bias"])([])
        factors = self._factors(node)
        if factors is not None:  # (n weight + bias) / c, rounded in another order
            weight, bias = factors if weight is None else weight * factors, None if bias is None else bias * factors

        def run(values: Values, row: Row) -> None:
            scale, zero_point, bits = row.sites[column]
            if bits == 16:
                values[out] = kernel(values[read], weight, bias, eps, None, 0, 8, storage=storage[8])
            else:
                values[out] = kernel(values[read], weight, bias, eps, scale, zero_point, bits, storage=storage[bits])

        return run

    def attention(self, node: Node) -> Instruction:
        kernel, storage = ops.resolve("attention", self.device), self.storage
        q, k, v = (self.slots[ref.name] for ref in node.args)
        out, scale, site = self.slots[node.name], node.kwargs["scale"], node.kwargs.get("site")
        column = None if site is None else self.columns[site]

        def run(values: Values, row: Row) -> None:
            quantization = None if column is None or row.sites[column][2] == 16 else row.sites[column]
            values[out] = kernel(values[q], values[k], values[v], scale, output=quantization, storage=storage)

        return run

    def _corrected(self, node: Node) -> Callable[[Row, Tensor | None], tuple[Tensor | None, Tensor | None]]:
        """(bias, output scale) of a row: e' = a e + b is in the constants of the layer that makes the output."""
        if node is not self.corrected_layer:
            return lambda row, bias: (bias, None)
        return lambda row, bias: (bias if row.output_scale is None else row.output_shift, row.output_scale)

    def int_gemm(self, index: int, node: Node) -> Instruction:
        kernel, out, read = self.kernels["int_gemm"], self.slots[node.name], self.slots[node.args[0].name]
        column = self.columns[self.quantizers[node.args[0].name].kwargs["site"]]
        weight, bias = self._gemm_constants(node.kwargs["layer"], node.kwargs["bias"])
        residual = self.value(node.kwargs["residual"])
        reuse, written = self.lifetimes.residual_dies(index, node.kwargs["residual"]), self._written(node)
        measured = self._measured(node)

        def run(values: Values, row: Row) -> None:
            scale, zero_point, bits = row.sites[column]
            affine = (None, None) if bits == 16 else (scale, zero_point)
            values[out] = kernel(
                values[read],
                weight,
                *affine,
                bias,
                residual=residual(values),
                reuse_residual=reuse,
                **written(row),
                **measured(values, len(values[read])),
            )

        return run

    def float_product(self, node: Node) -> Instruction:
        """A layer in floating point, its input too: see `float_layer`."""
        out, slots, k = self.slots[node.name], [self.slots[ref.name] for ref in node.args], node.kwargs
        parts = [part for name in layer_names(node) for part in self.weights[name]]
        layer = float_layer(node, parts, self.device, self.dtype, self.kernels["quantize"])
        biases = [self.value(b)([]) for b in (k["bias"] if isinstance(k["bias"], tuple) else (k["bias"],))]
        constant_bias = None if biases[0] is None else torch.cat(biases)
        if constant_bias is not None and node is not self.corrected_layer:
            constant_bias = constant_bias.to(self.dtype)
        corrected, temb, residual = self._corrected(node), self.value(k.get("temb")), self.value(k["residual"])
        column = self.columns[k["site"]] if k.get("site") else None

        def run(values: Values, row: Row) -> None:
            output = None if column is None or row.sites[column][2] == 16 else row.sites[column]
            terms = (*corrected(row, constant_bias), temb(values), residual(values))
            values[out] = layer([values[slot] for slot in slots], *terms, output)

        return run

    def _written(self, node: Node) -> Callable[[Row], dict[str, Any]]:
        """How a product writes its result: in the program's dtype, or quantised where the lowering joined the two."""
        site, floating = node.kwargs.get("site"), self.out
        if node.kwargs.get("geglu"):
            floating = {**floating, "geglu": True}
        if site is None:
            return lambda row: floating
        column, geglu = self.columns[site], {"geglu": True} if node.kwargs["geglu"] else {}
        storage = self.storages(node)

        def written(row: Row) -> dict[str, Any]:
            output = row.sites[column]
            return floating if output[2] == 16 else {**geglu, "output": output, "storage": storage[output[2]]}

        return written

    def _measured(self, node: Node) -> Callable[[Values, int], dict[str, Any]]:
        """Allocates what a product writes beside the result of so many images, for the GroupNorm that reads it."""
        if node.kwargs["statistics"] is None:
            return lambda values, images: {}
        slot, shape = self.slots[node.kwargs["statistics"]], sizes(node.shape, 1)
        channels = shape[features_axis(node)]
        pixels = prod(shape) // channels

        def allocate(values: Values, images: int) -> dict[str, Any]:
            values[slot] = ops.statistics_for(images, channels, pixels, self.device)
            return {"statistics": values[slot]}

        return allocate

    def _on_device(self, weight: QuantizedWeight) -> QuantizedWeight:
        if self.device.type == "cpu":
            return weight
        return dataclasses.replace(weight, values=weight.values.to(self.device), scale=weight.scale.to(self.device))

    def _gemm_constants(self, layer: Any, bias: Any) -> tuple[ops.GemmWeight, Tensor | None]:
        """Weight and bias of a product, or of several that the lowering merged: then both arguments are tuples."""
        layers, biases = (layer, bias) if isinstance(layer, tuple) else ((layer,), (bias,))
        parts = [self._on_device(self.weights[name][0]) for name in layers]
        bits = max(p.bits for p in parts)
        weight = ops.pack_gemm(torch.cat([p.values for p in parts]), torch.cat([p.scale for p in parts]), bits)
        if self.device.type != "cpu":
            ops.keep_packed(weight)
        if biases[0] is None:
            return weight, None
        return weight, torch.cat([self.value(b)([]) for b in biases])

    def int_conv2d(self, index: int, node: Node) -> Instruction:
        kernel, out, k = self.kernels["int_conv2d"], self.slots[node.name], node.kwargs
        geometry = {name: k[name] for name in ("stride", "padding", "dilation", "groups", "upsample")}
        packed = [self._on_device(w) for w in self.weights[k["layer"]]]
        weights = [ops.pack_conv2d(w.values, w.scale, **geometry, bits=w.bits) for w in packed]
        if self.device.type != "cpu":
            for weight in weights:
                ops.keep_packed(weight)
        columns = [self.columns[self.quantizers[ref.name].kwargs["site"]] for ref in node.args]
        parts = list(zip((self.slots[ref.name] for ref in node.args), weights, columns, strict=True))
        constant_bias, corrected = self.value(k["bias"])([]), self._corrected(node)
        temb, residual = self.value(k["temb"]), self.value(k["residual"])
        reuse, written = self.lifetimes.residual_dies(index, k["residual"]), self._written(node)
        measured = self._measured(node)

        def run(values: Values, row: Row) -> None:
            segments = []
            for slot, weight, column in parts:
                scale, zero_point, bits = row.sites[column]
                if bits == 16:
                    segments.append(ops.Segment(values[slot], weight))
                else:
                    segments.append(ops.Segment(values[slot], weight, scale, zero_point, bits))
            bias, output_scale = corrected(row, constant_bias)
            values[out] = kernel(
                segments,
                bias,
                temb=temb(values),
                residual=residual(values),
                reuse_residual=reuse,
                output_scale=output_scale,
                **written(row),
                **measured(values, len(segments[0].q)),
            )

        return run


def _emptying(slots: list[int]) -> Instruction:
    def run(values: Values, row: Row) -> None:
        for slot in slots:
            values[slot] = None

    return run
