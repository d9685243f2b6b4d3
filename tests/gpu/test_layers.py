"""Every layer of networks on an NVIDIA GPU, fed the very input that the engine feeds it: integers equal, floats near.

Whole networks of two engines drift apart, since one flipped rounding spreads; a layer does not.
"""

from __future__ import annotations

from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qdiff_engine as qe
from qdiff_engine import numerics, ops, reference
from qdiff_engine.graph.interpret import run_float
from qdiff_engine.graph.ir import Node

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and there is none here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["unet2d", "sd", "sdxl", "plain"]
RECIPES = ["w8a8", "w4a8", "w4a4"]

Layer = tuple[Node, list[Tensor]]


def layer_inputs(model: qe.IntegerUNet, name: str, row: int) -> list[Layer]:
    """(node, what each of its K segments multiplies) in one forward pass, in float32 with the integer weights."""
    found: dict[str, Layer] = {}

    def keep(node: Node, segment: int, x: Tensor) -> None:
        found.setdefault(node.name, (node, []))[1].append(x.clone())

    def weight(node: Node, segment: int, _: Tensor) -> Tensor:
        return model.weights[node.kwargs["layer"]][segment].dequantize()

    x, given = networks.normal(2, *model.graph.inputs["sample"][1:]), networks.conditioning(name, 2)
    inputs = networks.flat_inputs(model, x, model.table.timesteps[row], given)
    with torch.no_grad():
        run_float(model.graph, model.constants, inputs, weight=weight, layer_input=keep)
    return list(found.values())


def quantised(model: qe.IntegerUNet, layer: Layer, row: int) -> list[tuple[Tensor, float, int, int]]:
    """(q, scale, zero point, bits) of every segment of a layer; q is the image as upsampled."""
    node, inputs = layer
    sources, parts = model.graph.quantizer_of(), []
    for ref, x in zip(node.args, inputs, strict=True):
        column = model.table.sites.index(sources[ref.name].kwargs["site"])
        bits = int(model.table.bits[row, column])
        scale, zero_point = float(model.table.scale[row, column]), int(model.table.zero_point[row, column])
        if x.dim() == 4:
            x = reference.place(x, node.kwargs.get("upsample", 1), (0, 0, 0, 0), 0.0)
        parts.append((x if bits == 16 else numerics.quantize(x, scale, zero_point, bits), scale, zero_point, bits))
    return parts


def triple(scale: float, zero_point: int) -> Tensor:
    return torch.tensor([scale, numerics.inverse_scale(scale), zero_point], device=DEVICE)


def on_device(x: Tensor) -> Tensor:
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.to(DEVICE).contiguous(memory_format=layout)


def geometry(node: Node) -> dict[str, Any]:
    return {name: node.kwargs[name] for name in ("stride", "padding", "dilation", "groups")}


def multiplied(model: qe.IntegerUNet, node: Node, parts: Any, unit: bool, **options: Any) -> Tensor:
    """The layer on the GPU, without what is fused behind it; with ``unit`` all its scales are 1."""
    packed = []
    for (q, scale, zero_point, bits), weight in zip(parts, model.weights[node.kwargs["layer"]], strict=True):
        scales = torch.ones_like(weight.scale) if unit else weight.scale
        values, scales = weight.values.to(DEVICE), scales.to(DEVICE)
        at = triple(1.0 if unit else scale, zero_point)
        if node.op == "int_gemm":
            run = ops.resolve("int_gemm", DEVICE, "triton")
            return run(on_device(q), ops.pack_gemm(values, scales, weight.bits), at, zero_point, **options)
        conv = ops.pack_conv2d(values, scales, **geometry(node), bits=weight.bits)
        packed.append(ops.Segment(on_device(q), conv, at, zero_point, bits))  # type: ignore[arg-type]
    return ops.resolve("int_conv2d", DEVICE, "triton")(packed, **options)


def expected_of(model: qe.IntegerUNet, node: Node, parts: Any, unit: bool) -> Tensor:
    """The same by `reference`, in float64 on the CPU."""
    weights = model.weights[node.kwargs["layer"]]
    operands = [
        (q, w.values, torch.ones_like(w.scale) if unit else w.scale, 1.0 if unit else scale, zero_point)
        for (q, scale, zero_point, _), w in zip(parts, weights, strict=True)
    ]
    if node.op == "int_gemm":
        return reference.int_gemm(*operands[0])
    return reference.int_conv2d(operands, **geometry(node))


def plain_half(model: qe.IntegerUNet, node: Node, parts: Any) -> Tensor:
    """What torch computes in float16 from the same values on the same device."""
    total: Tensor | None = None
    for (q, scale, zero_point, _), weight in zip(parts, model.weights[node.kwargs["layer"]], strict=True):
        x = on_device(numerics.dequantize(q, scale, zero_point)).half()
        w = weight.dequantize().to(DEVICE).half()
        if node.op == "int_gemm":
            return F.linear(x, w)
        top, bottom, left, right = node.kwargs["padding"]
        settings = (None, node.kwargs["stride"], 0, node.kwargs["dilation"], node.kwargs["groups"])
        y = F.conv2d(F.pad(x, (left, right, top, bottom)), w, *settings)
        total = y if total is None else total + y
    assert total is not None
    return total


def integer_layers(name: str, recipe: str) -> tuple[qe.IntegerUNet, list[tuple[Node, Any]]]:
    model = networks.integer_model(name, recipe)
    found = [(layer[0], quantised(model, layer, 1)) for layer in layer_inputs(model, name, 1)]
    integer = [(node, parts) for node, parts in found if all(bits < 16 for *_, bits in parts)]
    assert len(integer) >= 4
    return model, integer


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_accumulators_are_exact(name: str, recipe: str) -> None:
    model, integer = integer_layers(name, recipe)
    for node, parts in integer:
        expected = expected_of(model, node, parts, unit=True)
        assert float(expected.abs().max()) < 1 << 24, "float32 holds it"
        y = multiplied(model, node, parts, unit=True, out_dtype=torch.float32)
        assert torch.equal(y.cpu().double(), expected), node.name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_halves_are_as_near_as_torchs(name: str, recipe: str) -> None:
    """At most twice the largest error of plain torch in float16, both against float64."""
    model, integer = integer_layers(name, recipe)
    for node, parts in integer:
        exact = expected_of(model, node, parts, unit=False)
        y = multiplied(model, node, parts, unit=False, out_dtype=torch.float16)
        assert y.dtype == torch.float16 and y.shape == exact.shape
        error, plain = (
            float((value.cpu().double() - exact).abs().max()) for value in (y, plain_half(model, node, parts))
        )
        assert error <= 2 * plain, (node.name, error, plain)
