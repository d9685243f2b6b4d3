"""Weights with a scale for every group along K: rounding, every product kernel, artifacts, whole networks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from comparing import DEVICE, assert_near, on_device, present, quantization
from qdiff_kernels.int_conv2d import Geometry, int_conv2d
from qdiff_kernels.int_conv2d import Segment as ConvSegment
from qdiff_kernels.int_gemm import int_gemm
from qdiff_kernels.packing import KernelWeight, pack, pack_rows
from qdiff_kernels.tiles import Launch, Tile
from torch import Tensor

import qdiff_engine as qe
from qdiff_engine import numerics, ops, reference
from qdiff_engine.alignment.training import AlignmentSettings
from qdiff_engine.cli import main
from qdiff_engine.ops import plain
from qdiff_engine.recipe import Recipe
from qdiff_engine.rounding import gptq, nearest, search_scale
from qdiff_engine.runtime.artifact_config import ArtifactError, seal
from qdiff_engine.weights import QuantizedWeight

SMALL = Tile(32, 32, 64, 4, 1)
Product = Callable[..., Tensor]


def operands(m: int, n: int, k: int, groups: int, bits: int, x_bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """(q, weight, weight_scale) whose groups differ a hundredfold in scale, so that a mixed-up one shows."""
    low, high = numerics.weight_range(bits)
    weight = torch.randint(low, high + 1, (n, k), dtype=torch.int8)
    scale = torch.logspace(-4, -2, groups) * (torch.rand(n, groups) + 0.5)
    lowest, highest = numerics.activation_range(x_bits)
    return torch.randint(lowest, highest + 1, (m, k), dtype=torch.int8), weight, scale


@pytest.fixture(params=["onednn", "native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that multiplies integers on the CPU."""
    return present(request.param)


def test_the_scale_of_every_weight() -> None:
    values = torch.tensor([[1, 2, 3, 4], [5, 6, 7, -8]], dtype=torch.int8)
    weight = QuantizedWeight(values, torch.tensor([[1.0, 10.0], [0.5, 2.0]]), 4)
    assert weight.dequantize().tolist() == [[1, 2, 30, 40], [2.5, 3, 14, -16]]
    assert weight.rescaled(torch.tensor([2.0, 1.0])).scale.tolist() == [[2, 20], [0.5, 2]]
    assert torch.equal(numerics.quantize_weight(weight.dequantize(), weight.scale, 4), values)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1), (3, 2), (2, 2, 1), (4,)])
def test_scales_that_do_not_fit(shape: tuple[int, ...]) -> None:
    values = torch.ones(2, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"scale must be float32 \[2\], or"):
        QuantizedWeight(values, torch.ones(shape), 8)
    with pytest.raises(TypeError, match=r"weight_scale must be float32 \[2\], or \[2, G\]"):
        ops.pack_gemm(values, torch.ones(shape))


def test_convolutions_have_no_groups_of_scales() -> None:
    values = torch.ones(2, 4, 1, 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="scale must be"):
        QuantizedWeight(values, torch.ones(2, 2), 8)
    with pytest.raises(TypeError, match=r"weight_scale must be float32 \[2\], got"):
        ops.pack_conv2d(values, torch.ones(2, 2))
    assert nearest(torch.randn(2, 128, 1, 1), 4, group=64).scale.shape == (2,)


@pytest.mark.parametrize("rounder", [nearest, gptq])
def test_each_group_has_the_scale_that_its_own_weights_want(rounder: Callable[..., QuantizedWeight]) -> None:
    weight = torch.randn(6, 192) * torch.tensor([1.0, 0.02, 5.0]).repeat_interleave(64)
    inputs = torch.randn(300, 192)
    found = rounder(weight, 4, inputs, group=64)
    for g, (w, x) in enumerate(zip(weight.split(64, 1), inputs.split(64, 1), strict=True)):
        assert torch.equal(found.scale[:, g], search_scale(w.contiguous(), 4, x))
    errors = [(weight - w.dequantize()) @ inputs.T for w in (found, rounder(weight, 4, inputs))]
    assert errors[0].square().mean() < 0.7 * errors[1].square().mean()


@pytest.mark.parametrize(("k", "group"), [(64, 64), (100, 64), (96, 128)])
def test_layers_that_groups_do_not_divide_keep_one_scale(k: int, group: int) -> None:
    weight, inputs = torch.randn(3, k), torch.randn(200, k)
    for rounder in (nearest, gptq):
        found, plain_one = rounder(weight, 4, inputs, group=group), rounder(weight, 4, inputs)
        assert torch.equal(found.values, plain_one.values) and torch.equal(found.scale, plain_one.scale)


def test_gptq_makes_errors_good_across_groups() -> None:
    """In float64, by the definition: the best update of all remaining weights after every column."""
    weight, mixing = torch.randn(5, 128), torch.randn(32, 128)
    inputs = torch.randn(400, 32) @ mixing + 0.3 * torch.randn(400, 128)
    found = gptq(weight, 4, inputs, group=64)
    x = inputs.double()
    hessian = x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(128, dtype=torch.float64)
    remaining = torch.argsort((x * x).mean(0), descending=True, stable=True).tolist()
    scales, w, values = found.scale.double().repeat_interleave(64, 1), weight.double(), torch.zeros(5, 128)
    while remaining:
        k = remaining[0]
        values[:, k] = torch.round(w[:, k] / scales[:, k]).clamp(-8, 7).float()
        inverse = torch.linalg.inv(hessian[remaining][:, remaining])
        w[:, remaining] -= ((w[:, k] - values[:, k] * scales[:, k]) / inverse[0, 0])[:, None] * inverse[0]
        remaining = remaining[1:]
    assert (found.values != values).float().mean() <= 0.005


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("m", "n", "k", "groups"), [(1, 1, 2, 2), (7, 33, 128, 2), (17, 5, 90, 3), (2, 40, 640, 10)])
def test_products_equal_the_reference(backend: str, m: int, n: int, k: int, groups: int, bits: int) -> None:
    q, weight, scale = operands(m, n, k, groups, bits)
    bias, residual, output_scale = torch.randn(n), torch.randn(m, n), torch.rand(n) + 0.5
    packed = ops.pack_gemm(weight, scale, bits)
    for zero_point in (-128, 0, 77):
        for stored in (q, numerics.stored(q, torch.uint8)):
            expected = reference.int_gemm(q, weight, scale, 0.03, zero_point)
            assert_near(ops.int_gemm(stored, packed, 0.03, zero_point, backend=backend), expected, 1e-5)
    terms: dict[str, Any] = {"residual": residual, "output_scale": output_scale}
    expected = reference.int_gemm(q, weight, scale, 0.03, 5, bias, **terms)
    before = residual.clone()
    assert_near(ops.int_gemm(q, packed, 0.03, 5, bias, **terms, backend=backend), expected, 1e-5)
    assert torch.equal(residual, before)
    assert_near(ops.int_gemm(q, packed, 0.03, 5, bias, **terms, reuse_residual=True, backend=backend), expected, 1e-5)


def test_the_reference_is_the_sum_of_its_groups() -> None:
    q, weight, scale = operands(3, 4, 6, 2, 8)
    w = torch.stack([weight[:, k] * scale[:, k // 3].double() for k in range(6)], 1)
    assert_near(reference.int_gemm(q, weight, scale, 0.1, 7), 0.1 * (q.double() - 7) @ w.T, 1e-12)


def test_floating_activations(backend: str) -> None:
    _, weight, scale = operands(1, 12, 128, 2, 4)
    x, terms = torch.randn(2, 5, 128), {"residual": torch.randn(2, 5, 12), "output_scale": torch.rand(12) + 0.5}
    w = weight.double() * scale.double().repeat_interleave(64, 1) * terms["output_scale"].double()[:, None]
    y = ops.int_gemm(x, ops.pack_gemm(weight, scale, 4), None, None, **terms, backend=backend)
    assert_near(y, x.double() @ w.T + terms["residual"].double(), 1e-5)


def test_wrong_operands_are_refused_as_without_groups(backend: str) -> None:
    _, weight, scale = operands(1, 4, 128, 2, 8)
    with pytest.raises(ValueError, match=r"q must be \[\.\.\., 128\]"):
        ops.int_gemm(torch.zeros(2, 64, dtype=torch.int8), ops.pack_gemm(weight, scale), 1.0, 0, backend=backend)


def kernel_weight(weight: Tensor, scale: Tensor, bits: int) -> KernelWeight:
    """On the device, packed for the Triton kernels."""
    return on_device(pack(weight, scale, bits))


@pytest.mark.parametrize(("bits", "x_bits"), [(8, 8), (4, 8), (4, 4), (8, 4)])
@pytest.mark.parametrize(("k", "group"), [(128, 64), (384, 128)])
@pytest.mark.parametrize("splits", [1, 2])
def test_triton_product(bits: int, x_bits: int, k: int, group: int, splits: int) -> None:
    m, n = 33, 40
    q, weight, scale = operands(m, n, k, k // group, bits, x_bits)
    bias, residual = torch.randn(n), torch.randn(m, n)
    expected = reference.int_gemm(q, weight, scale, 0.037, 5, bias, residual=residual)
    x = (pack_rows(q) if x_bits == 4 else q).to(DEVICE)
    options: dict[str, Any] = {"residual": residual.to(DEVICE), "launch": Launch(SMALL, splits)}
    product = kernel_weight(weight, scale, bits)
    y = int_gemm(x, product, quantization(0.037, 5), bias.to(DEVICE), out_dtype=torch.float32, **options)
    assert_near(y, expected)
    step = float(expected.abs().max()) / 100
    out = {"out_quantization": quantization(step, -3)}
    integers = int_gemm(x, product, quantization(0.037, 5), bias.to(DEVICE), **out, **options)
    steps = integers.cpu().int() - numerics.quantize(expected.float(), step, -3, 8).int()
    assert int(steps.abs().max()) <= 1 and int(steps.abs().sum()) <= 2


@pytest.mark.parametrize("descriptors", [False, True])
def test_triton_geglu(descriptors: bool) -> None:
    m, n, k = 17, 48, 256
    q, weight, scale = operands(m, 2 * n, k, 2, 4)
    bias = torch.randn(2 * n)
    value, gate = reference.int_gemm(q, weight, scale, 0.037, 5, bias).chunk(2, dim=-1)
    launch = Launch(SMALL, 1, descriptors)
    activation = quantization(0.037, 5)
    options: dict[str, Any] = {"geglu": True, "out_dtype": torch.float32, "launch": launch}
    y = int_gemm(q.to(DEVICE), kernel_weight(weight, scale, 4), activation, bias.to(DEVICE), **options)
    assert_near(y, value * F.gelu(gate))


def test_triton_floating_activations() -> None:
    _, weight, scale = operands(1, 20, 192, 3, 4)
    x = torch.randn(9, 192)
    y = int_gemm(x.to(DEVICE), kernel_weight(weight, scale, 4), None, out_dtype=torch.float32)
    w = weight.double() * scale.double().repeat_interleave(64, 1)
    assert_near(y, x.double() @ w.T, 1e-5)


def test_the_engine_s_gpu_route() -> None:
    """`ops.int_gemm` on the Triton backend, with everything that it fuses behind a product."""
    q, weight, scale = operands(6, 32, 128, 2, 4)
    bias, output_scale = torch.randn(32), torch.rand(32) + 0.5
    packed = ops.pack_gemm(weight.to(DEVICE), scale.to(DEVICE), 4)
    expected = reference.int_gemm(q, weight, scale, 0.03, 5, bias, output_scale=output_scale)
    terms: dict[str, Any] = {"output_scale": output_scale.to(DEVICE), "backend": "triton"}
    assert_near(ops.int_gemm(q.to(DEVICE), packed, 0.03, 5, bias.to(DEVICE), **terms), expected)
    value, gate = expected.chunk(2, dim=-1)
    gated = value * F.gelu(gate)
    step = float(gated.abs().max()) / 100
    y = ops.int_gemm(q.to(DEVICE), packed, 0.03, 5, bias.to(DEVICE), **terms, geglu=True, output=(step, 1, 8))
    steps = y.cpu().int() - numerics.quantize(gated.float(), step, 1, 8).int()
    assert int(steps.abs().max()) <= 1 and int(steps.abs().sum()) <= 2


def test_convolution_kernels_refuse_groups() -> None:
    grouped = kernel_weight(torch.ones(4, 128, dtype=torch.int8), torch.ones(4, 2), 8)
    segment = ConvSegment(torch.zeros(1, 128, 2, 2, dtype=torch.int8, device=DEVICE), grouped, quantization(1.0, 0))
    with pytest.raises(ValueError, match="without groups, got"):
        int_conv2d([segment], Geometry((1, 1)))
    with pytest.raises(ValueError, match="by border class"):
        pack(torch.ones(4, 128, dtype=torch.int8), torch.ones(4, 2), 8, torch.ones(1, 4, dtype=torch.int32))


def test_triton_groups_are_whole_blocks() -> None:
    with pytest.raises(ValueError, match="multiples of 64, got 4 groups"):
        pack(torch.ones(3, 128, dtype=torch.int8), torch.ones(3, 4), 8)


@pytest.fixture(scope="module")
def models() -> dict[int, qe.IntegerUNet]:
    """The bundled network at W4A8, by group size."""
    calibration = networks.bundled_calibration()
    unet = networks.bundled_unet()
    return {
        group: qe.quantize(unet, calibration, Recipe.named("w4a8", weight_group=group, weights="nearest"))
        for group in (0, 64)
    }


def linears(model: qe.IntegerUNet) -> dict[str, QuantizedWeight]:
    """The weights of linear layers by name."""
    return {name: parts[0] for name, parts in model.weights.items() if parts[0].values.dim() == 2}


def test_every_wide_enough_linear_layer_gets_groups(models: dict[int, qe.IntegerUNet]) -> None:
    shapes = {w.values.shape[1]: tuple(w.scale.shape[1:]) for w in linears(models[64]).values()}
    assert shapes == {64: (), 128: (2,)}
    assert all(w.scale.dim() == 1 for w in linears(models[0]).values())
    convolutions = set(models[64].weights) - set(linears(models[64]))
    for name in convolutions:
        for grouped, single in zip(models[64].weights[name], models[0].weights[name], strict=True):
            assert torch.equal(grouped.values, single.values) and torch.equal(grouped.scale, single.scale)
    assert qe.count_bops(models[64]).total == qe.count_bops(models[0]).total


def test_a_network_with_groups_computes_what_its_artifact_does(
    models: dict[int, qe.IntegerUNet], tmp_path: Path
) -> None:
    model, step = models[64], networks.normal(2, 1, 32, 32)
    model.save_pretrained(tmp_path / "artifact")
    loaded = qe.load(tmp_path / "artifact")
    y = model(step, 500)[0]
    assert loaded.recipe.weight_group == 64 and torch.equal(loaded(step, 500)[0], y)
    for backend in ("native", "torch"):
        if ops.backends()[backend]["available"]:
            # floats are added in another order there, and a value on the edge of a quantiser's step falls across it
            assert networks.relative(networks.rebuilt(model, backend)(step, 500)[0], y) < 0.01


def test_scales_of_other_groups_than_the_recipe_names_are_refused(
    models: dict[int, qe.IntegerUNet], tmp_path: Path
) -> None:
    models[64].save_pretrained(tmp_path / "artifact")
    config = json.loads((tmp_path / "artifact" / "config.json").read_text())
    for group in (0, 128):
        wrong = config | {"recipe": {**config["recipe"], "weight_group": group}}
        files = {"graph.json": (tmp_path / "artifact" / "graph.json").read_bytes()}
        files["model.safetensors"] = (tmp_path / "artifact" / "model.safetensors").read_bytes()
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        wrong.pop("sha256")
        (tmp_path / "artifact" / "config.json").write_bytes(seal(wrong, digests))
        with pytest.raises(ArtifactError, match=r"weight\..*scale0"):
            qe.load(tmp_path / "artifact")


@pytest.mark.parametrize("weights", ["gptq", "adaround"])
def test_learnt_weights_and_alignment_keep_groups(weights: str) -> None:
    calibration = networks.bundled_calibration()
    recipe = Recipe.named("w4a8", weight_group=64, weights=weights, learn_iterations=2, learn_samples=10)
    learnt = qe.quantize(networks.bundled_unet(), calibration, recipe)
    shapes = {w.values.shape[1]: tuple(w.scale.shape[1:]) for w in linears(learnt).values()}
    assert shapes == {64: (), 128: (2,)}
    aligned = qe.align(learnt, calibration, AlignmentSettings(group=2, iterations=2, batch=2))
    for name, weight in linears(aligned).items():
        before = linears(learnt)[name]
        assert torch.equal(weight.values, before.values) and weight.scale.shape == before.scale.shape
        if weight.scale.dim() == 2:
            ratio = weight.scale / before.scale
            assert torch.allclose(ratio[:, :1], ratio, rtol=1e-5) and bool((ratio != 1).any())
    assert aligned.recipe == dataclasses.replace(recipe, align="accuquant:2", align_iterations=2, align_batch=2)


def test_the_command_line_takes_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["calibrate", "demo", "--recipe", "w4a8", "--steps", "3", "--samples", "1", "--weights", "nearest"]
    assert main([*arguments, "--weight-group", "64", "--out", str(tmp_path / "a")]) == 0
    assert {w.scale.dim() for w in linears(qe.load(tmp_path / "a")).values()} == {1, 2}
    assert main([*arguments, "--weight-group", "32", "--out", str(tmp_path / "b")]) == 2
    assert "'32' is not one of" in capsys.readouterr().err


def test_plain_products_are_exact() -> None:
    """Unit scales leave integers: the float32 sum of groups is the exact sum."""
    q, weight, _ = operands(5, 6, 256, 4, 8)
    y = plain.int_gemm(q, ops.pack_gemm(weight, torch.ones(6, 4)), 1.0, -128)
    assert torch.equal(y.to(torch.int64), (q.to(torch.int64) + 128) @ weight.to(torch.int64).T)
