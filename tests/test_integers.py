"""Integers are integers: what the kernels receive, exact accumulators, every layer and the whole network in float64."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networks
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from comparing import available
from networks import CASES, SAMPLES, relative, tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qdiff_engine import numerics, ops, reference
from qdiff_engine.graph.interpret import simulate
from qdiff_engine.runtime.lowering import lower_for_cpu
from qdiff_engine.runtime.model import IntegerUNet
from qdiff_engine.runtime.summary import layer_rows

NAMES = ["unet2d", "scale-shift", "sd", "plain", "around", "guided", "patches"]
RECIPES = ["w8a8", "w4a8", "w4a4"]
LAYERS = {"int_conv2d", "int_gemm"}
ENGINE_OPS = LAYERS | {"quantize", "groupnorm_silu_quantize", "layernorm_quantize"}


@dataclass(frozen=True)
class Call:
    """One call of an operator's kernel: cloned operands, since a residual's memory may be reused, and the result."""

    operator: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, ops.Segment):
        return value._replace(q=value.q.clone())
    if isinstance(value, ops.QuantizedCopy):  # an output: the kernel's own, to be read when the call is over
        return value
    return [cloned(v) for v in value] if isinstance(value, list) else value


def calls_of(model: IntegerUNet, name: str, monkeypatch: pytest.MonkeyPatch, backend: str | None = None) -> list[Call]:
    """Every operator call of one forward pass on the calibrated latents, the network's own inputs to each."""
    calls: list[Call] = []
    resolve = ops.resolve

    def spying(operator: str, *place: Any) -> Any:
        kernel = resolve(operator, *place)

        def run(*args: Any, **kwargs: Any) -> Tensor:
            kept, kept_too = [cloned(a) for a in args], {k: cloned(v) for k, v in kwargs.items()}
            output = kernel(*args, **kwargs)
            calls.append(Call(operator, tuple(kept), kept_too, output.clone()))
            return output

        return run

    with monkeypatch.context() as patch:
        patch.setattr(ops, "resolve", spying)
        spied = networks.rebuilt(model, backend)
    step = networks.trajectory(name)[1]
    spied(step.sample, step.timestep, **networks.conditioning(name, SAMPLES))
    return calls


class Dispatched(TorchDispatchMode):
    """Counts the ATen and oneDNN operators that run, by name and operand dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, tuple[torch.dtype, ...]]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = tuple(t.dtype for t in tensors([*args, kwargs or {}]))
        self.calls[str(function).split(".")[1], operands] += 1
        return function(*args, **(kwargs or {}))

    def named(self, *names: str) -> Counter[tuple[torch.dtype, ...]]:
        counts: Counter[tuple[torch.dtype, ...]] = Counter()
        for (name, operands), count in self.calls.items():
            if name in names:
                counts[operands] += count
        return counts


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
@pytest.mark.parametrize("name", NAMES)
def test_layers_receive_integers(name: str, recipe: str) -> None:
    """oneDNN gets uint8 activations and packed int8 weights; the only float layers are those listed with a reason."""
    available("onednn")
    model = networks.rebuilt(networks.integer_model(name, recipe))
    step = networks.trajectory(name)[1]
    with Dispatched() as seen:
        model(step.sample, step.timestep, **networks.conditioning(name, SAMPLES))
    nodes = [node for node in lower_for_cpu(model.graph).nodes if node.op in LAYERS]
    floating = sum(len(node.args) for node in nodes if node.kwargs["edge"] == "first")
    integer = seen.named("qconv2d_pointwise", "qlinear_pointwise")
    assert integer.total() == sum(len(node.args) for node in nodes) - floating
    assert {operands[:2] for operands in integer} == {(torch.uint8, torch.int8)}
    listed = Counter(row["op"] for row in layer_rows(model) if not row["quantized"])
    assert all(row["reason"] for row in layer_rows(model) if not row["quantized"])
    linears = seen.named("linear", "addmm", "mm", "_linear")
    assert listed["linear"] <= linears.total() <= listed["linear"] * SAMPLES  # the time section's go sample by sample
    assert seen.named("conv2d", "convolution", "mkldnn_convolution").total() == floating + listed["conv2d"]
    assert floating == (2 if name == "guided" else 1)  # the latents, and what is concatenated with them
    assert seen.named("conv_transpose2d").total() == listed["conv_transpose2d"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_are_integers_of_the_recipe(recipe: str) -> None:
    """4-bit layers hold [-8, 7]; the first and the last layer have 8 bits."""
    model = networks.integer_model("sd", recipe)
    bits = {}
    for node in model.graph.nodes:
        if node.op in LAYERS:
            for weight in model.weights[node.kwargs["layer"]]:
                assert weight.values.dtype == torch.int8
                low, high = numerics.weight_range(weight.bits)
                assert low <= int(weight.values.min()) < 0 < int(weight.values.max()) <= high
                bits[node.kwargs["layer"], node.kwargs["edge"]] = weight.bits
    assert {b for (_, edge), b in bits.items() if edge} == {8}
    assert {b for (_, edge), b in bits.items() if not edge} == {8 if recipe == "w8a8" else 4}


def floating_convolution(segment: ops.Segment) -> Tensor:
    """Mode A16 in float64: the activation itself times the dequantised weights."""
    w = segment.weight
    dequantised = w.values.double() * w.scale.double()[:, None, None, None]
    x = reference.place(segment.q.double(), 1, w.padding, 0.0)
    return F.conv2d(x, dequantised, None, w.stride, 0, w.dilation, w.groups)


def expected_output(call: Call) -> Tensor:
    """A layer's output in float64 from the operands that it received."""
    extra = {k: v for k, v in call.kwargs.items() if k not in ("reuse_residual",)}
    if call.operator == "int_gemm":
        q, weight, scale, zero_point, bias = call.args
        if q.is_floating_point():
            y = F.linear(q.double(), weight.values.double() * weight.scale.double()[:, None])
            return sum((t.double() for t in (bias, extra.get("residual")) if t is not None), y)
        return reference.int_gemm(q, weight.values, weight.scale, scale, zero_point, bias, **extra)
    if call.operator == "attention":
        q, k, v = (x.double() for x in call.args[:3])
        return F.scaled_dot_product_attention(q, k, v, scale=call.args[3])
    segments, bias = call.args
    w = segments[0].weight
    geometry = {"stride": w.stride, "padding": w.padding, "dilation": w.dilation, "groups": w.groups}
    if segments[0].q.is_floating_point():
        y = sum((floating_convolution(s) for s in segments), bias.double()[:, None, None])
        assert extra.keys() == {"temb", "residual", "output_scale"}
        assert extra["residual"] is None and extra["output_scale"] is None
        return y if extra["temb"] is None else y + extra["temb"].double()[:, :, None, None]
    parts = [(s.q, s.weight.values, s.weight.scale, s.scale, s.zero_point) for s in segments]
    return reference.int_conv2d(parts, bias, **geometry, **extra)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_layer_fed_the_engines_own_input(name: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers equal the float64 reference to 1e-5; quantised values differ by one step in < 0.1 % of the elements."""

    def count(q: Tensor, expected: Tensor) -> None:
        nonlocal differing, elements
        steps = (numerics.signed(q).int() - expected.int()).abs()
        assert int(steps.max()) <= 1
        differing, elements = differing + int(steps.sum()), elements + steps.numel()

    model = networks.integer_model(name, recipe)
    calls = calls_of(model, name, monkeypatch)
    counted = Counter(call.operator for call in calls if call.operator != "attention")
    # the first layer's input stays floating: nothing is called for it
    counted["quantize"] += int((model.table.bits[1] == 16).sum())
    assert counted == Counter(node.op for node in lower_for_cpu(model.graph).nodes if node.op in ENGINE_OPS)
    differing = elements = 0
    for call in calls:
        if call.operator in {*LAYERS, "attention"}:
            expected = expected_output(call)
            if call.kwargs.get("output") is not None:
                count(call.output, numerics.quantize(expected.float(), *call.kwargs["output"]))
                continue
            error = float((call.output.double() - expected).abs().max())
            assert error <= 1e-5 * float(expected.abs().max()), call.operator
            continue
        keywords = {k: v for k, v in call.kwargs.items() if k not in ("storage", "copies")}
        for x, copy in zip((call.args[0], call.kwargs.get("x2")), call.kwargs.get("copies", ()), strict=False):
            if copy is not None:
                count(copy.out, numerics.quantize(x, copy.scale, copy.zero_point, copy.bits))
        expected = getattr(reference, call.operator)(*call.args, **keywords)
        assert call.output.dtype == call.kwargs["storage"] or call.args[-3] is None
        count(call.output, expected)
    assert differing < 1e-3 * elements


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_accumulators_are_exact(recipe: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With unit scales and no bias a layer's output is its accumulator: equal to the reference, integer by integer."""
    for call in calls_of(networks.integer_model("sd", recipe), "sd", monkeypatch):
        if call.operator == "int_gemm":
            q, weight = call.args[0], ops.pack_gemm(call.args[1].values, torch.ones(len(call.args[1].scale)))
            actual = ops.int_gemm(q, weight, 1.0, 0, backend=backend)
            expected = reference.gemm_accumulators(q, weight.values)
        elif call.operator == "int_conv2d" and not call.args[0][0].q.is_floating_point():
            segment = call.args[0][-1]
            w = segment.weight
            geometry = {"stride": w.stride, "padding": w.padding, "dilation": w.dilation, "groups": w.groups}
            unit = ops.pack_conv2d(w.values, torch.ones_like(w.scale), **geometry)
            actual = ops.int_conv2d([ops.Segment(segment.q, unit, 1.0, 0)], backend=backend)
            expected = reference.conv2d_accumulators(segment.q, w.values, **geometry)
        else:
            continue
        assert int(expected.abs().max()) < 2**24  # float32 holds every integer up to there
        assert torch.equal(actual.to(torch.int64), expected)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_end_to_end_against_the_simulation(name: str, recipe: str) -> None:
    """The engine is nearer to the float64 simulation than the simulation is to the float network, in every row."""
    model, given = networks.integer_model(name, recipe), networks.conditioning(name, SAMPLES)
    for step in networks.trajectory(name):
        inputs = networks.flat_inputs(model, step.sample, step.timestep, given)
        simulated = simulate(model.graph, model.constants, model.weights, model.table, inputs)
        engine = relative(model(step.sample, step.timestep, **given)[0], simulated)
        quantisation = relative(simulated, step.prediction)
        print(
            f"{name} {recipe} t={step.timestep:g}: engine to simulation {engine:.2e}, simulation to float "
            f"{quantisation:.2e} ({20 * math.log10(quantisation / max(engine, 1e-12)):.0f} dB apart)"
        )
        assert engine < quantisation


def test_every_case_is_covered() -> None:
    """The networks above contain every fusion: a class-conditional or SDXL network adds float sections only."""
    fused = Counter()
    for name in NAMES:
        for node in networks.integer_model(name).graph.nodes:
            fused[node.op] += node.op in ENGINE_OPS
            for key in ("temb", "residual", "segments", "norm_scale"):
                fused[key] += node.kwargs.get(key) is not None
            fused["upsample"] += node.kwargs.get("upsample", 1) > 1
            fused[str(node.kwargs.get("activation"))] += 1
    expected = {*ENGINE_OPS, "temb", "residual", "segments", "norm_scale", "upsample", "geglu", "silu", "none"}
    assert {key for key in expected if not fused[key]} == set()
    assert set(NAMES) <= set(CASES)


_RUN_ELSEWHERE = """
import sys
if sys.argv[3] == "hidden":
    sys.modules["qdiff_engine._C"] = None  # the import of the extension fails
import torch, safetensors.torch
from qdiff_engine import load, ops
torch.set_num_threads(1)
given = safetensors.torch.load_file(sys.argv[1] + ".in")
output = load(sys.argv[1])(given.pop("sample"), float(sys.argv[2]), return_dict=False, **given)[0]
safetensors.torch.save_file({"output": output}, sys.argv[1] + ".out")
print(ops.chosen("int_conv2d"), ops.chosen("quantize"))
"""


@pytest.mark.parametrize("machine", ["no VNNI", "hidden", "no VNNI and hidden"])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_slower_machines_are_exact(recipe: str, machine: str, tmp_path: Path) -> None:
    """A CPU without VNNI, an install without the extension, or both: other kernels, the same numbers."""
    if "VNNI" in machine and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("ONEDNN_MAX_CPU_ISA restricts x86 processors only")
    model, step, folder = networks.integer_model("sd", recipe), networks.trajectory("sd")[1], tmp_path / "artifact"
    given = networks.conditioning("sd", SAMPLES)
    model.save_pretrained(folder)
    safetensors.torch.save_file({"sample": step.sample.contiguous(), **given}, f"{folder}.in")
    hidden = "hidden" if "hidden" in machine else "shown"
    environment = dict(os.environ, **({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"} if "VNNI" in machine else {}))
    command = [sys.executable, "-c", _RUN_ELSEWHERE, str(folder), str(step.timestep), hidden]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    convolution, quantiser = done.stdout.split()
    assert quantiser == ("torch" if hidden == "hidden" else "native")
    if "VNNI" in machine:
        assert convolution == ("torch" if hidden == "hidden" else "native")
    output = safetensors.torch.load_file(f"{folder}.out")["output"]
    inputs = networks.flat_inputs(model, step.sample, step.timestep, given)
    simulated = simulate(model.graph, model.constants, model.weights, model.table, inputs)
    distance = relative(output, simulated)
    print(f"{machine}, {recipe}: to the simulation {distance:.2e}")
    assert distance < relative(simulated, step.prediction)
