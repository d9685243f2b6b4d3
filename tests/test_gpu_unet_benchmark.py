"""The GPU benchmark of whole networks, on tiny ones on the CPU: a captured graph is the function again."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from torch import nn

import qdiff_engine as qe
from benchmarks import bounds, gpu_unet, graphs, models, results_file, synthetic
from benchmarks.ceilings import Ceilings
from qdiff_engine import baselines
from qdiff_engine.graph.operators import FLOAT_OPS
from qdiff_engine.sampling import predict

CPU = torch.device("cpu")
LIMITS = Ceilings(copy_gbps=1.0, int8_tops=1.0, fp16_tops=0.5, bf16_tops=0.5)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> gpu_unet.Bench:
    monkeypatch.setattr(baselines, "cuda_graph", lambda function: function)
    monkeypatch.setattr(gpu_unet, "_TIMED_SECONDS", 0.0)
    return gpu_unet.Bench(
        CPU,
        LIMITS,
        make=networks.network,
        shape=lambda name: networks.CASES[name].shape,
        conditioning=networks.conditioning,
    )


@pytest.mark.parametrize("name", ["unet2d", "sdxl"])
@pytest.mark.parametrize("precision, bound", [("w8a8", 0.1), ("w4a4", 0.5), ("w8a16", 0.02)])
def test_synthetic_models_resemble_their_networks(name: str, precision: str, bound: float) -> None:
    case, unet = networks.CASES[name], networks.network(name)
    network = synthetic.ranged(unet, case.shape, case.conditioning, CPU)
    model = synthetic.integer_model(network, precision, CPU)
    x, given = networks.normal(2, *case.shape), networks.conditioning(name, 2)
    with torch.no_grad():
        expected = predict(unet, x, torch.full((2,), 500), given)
    assert networks.relative(model(x, 500, **given).sample, expected) < bound
    assert model.table.timesteps == synthetic.TIMESTEPS and set(model.table.modes) == {"A" + precision.split("a")[1]}


def test_random_networks_are_filled_and_sane() -> None:
    unet = models.random_unet("cifar10")
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307
    x = networks.normal(1, *models.shape_of("cifar10"))
    with torch.no_grad():
        output = predict(unet, x, torch.tensor([500]), models.conditioning_of("cifar10", 1))
    assert output.shape == x.shape and 0.05 < float(output.std()) < 5
    with pytest.raises(ValueError, match="model must be one of"):
        models.random_unet("sd3")


@pytest.mark.parametrize("name, millions", [("sd15", 859.5), ("sdxl", 2567.5)])
def test_the_large_networks_have_their_size(name: str, millions: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "to_empty", lambda module, device: module)  # they stay on the meta device
    monkeypatch.setattr(models, "filled", lambda unet: unet)
    unet = models.random_unet(name)
    assert abs(sum(p.numel() for p in unet.parameters()) / 1e6 - millions) < 0.1
    given = models.conditioning_of(name, 2)
    x = torch.empty(2, *models.shape_of(name), device="meta")
    on_meta = baselines.moved(given, torch.device("meta"))
    assert predict(unet, x, torch.full((2,), 500, device="meta"), on_meta).shape == x.shape


def test_a_kept_graph_is_the_captured_one(tmp_path: Path) -> None:
    """sdxl: linears stored as they are, 1x1 convolutions flattened; bit for bit the same model."""
    case, unet, store = networks.CASES["sdxl"], networks.network("sdxl"), tmp_path / "sdxl.json"
    models_ = [
        synthetic.integer_model(synthetic.ranged(unet, case.shape, case.conditioning, CPU, store), "w4a8", CPU)
        for _ in range(2)
    ]
    x, given = networks.normal(2, *case.shape), networks.conditioning("sdxl", 2)
    first, second = (model(x, 333, **given).sample for model in models_)
    assert store.exists() and torch.equal(first, second)
    with pytest.raises(ValueError, match="another network"):
        graphs.captured(networks.network("sd"), case.shape, case.conditioning, store)


MADE = {"arange": (3,), "ones": ((2,),), "zeros": ((2,),), "full": ((2,), 0.5), "scalar_tensor": (1,)}


@pytest.mark.parametrize("name, arguments", MADE.items())
def test_made_tensors_follow_the_device(name: str, arguments: tuple) -> None:
    """A graph knows no devices: what its operators make of nothing must land where the rest of it runs."""
    expected = getattr(torch.ops.aten, name)(*arguments, dtype=torch.float32)
    assert torch.equal(FLOAT_OPS[name](*arguments, dtype=torch.float32), expected)
    with torch.device("meta"):
        assert FLOAT_OPS[name](*arguments, dtype=torch.float32).is_meta


def test_rows_of_a_network(bench: gpu_unet.Bench) -> None:
    with torch.no_grad():
        rows = gpu_unet.network_rows(bench, "sd", 2, ("w8a8", "w4a8"))
    results_file.check({"machine": dict.fromkeys(("gpu", *results_file.MACHINE_KEYS), 1), "rows": rows}, "unet")
    assert [row["precision"] for row in rows] == ["w8a8", "w4a8"]
    for row in rows:
        assert row["parameters"] == "random" and row["batch"] == 2
        assert set(row["speedup"]) == set(row["baselines"]) == {"torch-fp16", "torch-fp16-graph"}
        assert 0 < row["relative_error"] < 0.5 and row["bound_ms"] > 0 and row["median_ms"] > 0
    assert rows[1]["weight_bytes"] < rows[0]["weight_bytes"] < rows[0]["float_weight_bytes"]
    assert rows[1]["gbops"] < rows[0]["gbops"]


def test_a_precision_with_an_insane_output_leaves_the_others_their_rows(
    bench: gpu_unet.Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, seen = gpu_unet.check_outputs, []

    def judged(*arguments: Any) -> float:
        seen.append(arguments)
        if len(seen) == 1:
            raise ValueError("the output is not sane")
        return real(*arguments)

    monkeypatch.setattr(gpu_unet, "check_outputs", judged)
    with torch.no_grad():
        rows = gpu_unet.network_rows(bench, "unet2d", 2, ("w4a4", "w8a8"))
    assert [row["precision"] for row in rows] == ["w8a8"]
    assert "unet2d, batch 2, w4a4 is left out: the output is not sane" in capsys.readouterr().err


def test_timesteps_are_parts_of_one_schedule(bench: gpu_unet.Bench) -> None:
    """A model on a GPU then reads them once, as those of a sampler, and no call waits for the device."""
    steps = [item.timestep for item in bench.inputs("unet2d", 3)]
    assert [step.tolist() for step in steps] == [[t] * 3 for t in synthetic.TIMESTEPS]
    assert len({id(step._base) for step in steps}) == 1 and steps[0]._base is not None


def test_a_mode_switch_is_a_difference_of_times(bench: gpu_unet.Bench) -> None:
    with torch.no_grad():
        (row,) = gpu_unet.mode_rows(bench, "unet2d")
    results_file.check({"machine": dict.fromkeys(("gpu", *results_file.MACHINE_KEYS), 1), "rows": [row]}, "unet")
    assert set(row["stay_ms"]) == {"A8", "A4"} and math.isfinite(row["mode_switch_ms"])


def test_what_cannot_be_compiled_is_absent(bench: gpu_unet.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> baselines.Baselines:
        raise ImportError("No module named 'torchao'")

    monkeypatch.setattr(gpu_unet, "torchao_contestant", missing)
    rows = gpu_unet.compiled_rows(bench, "unet2d", 1, "torchao-int8", ("w8a8",))
    assert [row["baselines_absent"] for row in rows] == [{"torchao-int8": "No module named 'torchao'"}]
    monkeypatch.setattr(gpu_unet, "compiled_contestant", lambda unet, inputs: lambda i: predict(unet, *inputs[i]))
    with torch.no_grad():
        rows = gpu_unet.compiled_rows(bench, "unet2d", 1, "torch-fp16-compile", ("w8a8",))
    assert set(rows[0]["speedup"]) == {"torch-fp16-compile"}


def test_baselines_of_later_sections_join_their_rows() -> None:
    key = {"model": "sd15", "batch": 2, "precision": "w8a8"}
    fast = {"torch-fp16": {"median": 2.0}}
    rows = [{**key, "median_ms": 1.0, "baselines": fast, "baselines_absent": {"torch-fp16-compile": "slow"},
             "speedup": {"torch-fp16": 2.0}}]  # fmt: skip
    slow = {"torch-fp16-compile": {"median": 1.5}}
    new = [{**key, "baselines": slow, "baselines_absent": {"torchao-int8": "missing"},
            "speedup": {"torch-fp16-compile": 1.5}}]  # fmt: skip
    (row,) = gpu_unet.merged(rows, new)
    assert row["median_ms"] == 1.0 and row["baselines"] == {**fast, **slow}
    assert row["speedup"] == {"torch-fp16": 2.0, "torch-fp16-compile": 1.5}
    assert row["baselines_absent"] == {"torchao-int8": "missing"}
    assert len(gpu_unet.merged(rows, [{**rows[0], "batch": 8}])) == 2
    with pytest.raises(LookupError, match="measure that first"):
        gpu_unet.merged([], new)


class One(nn.Module):
    """A single convolution: the last layer, whose input is quantised to 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.only(x) + 0 * t.float()[:, None, None, None].expand(-1, 6, 1, 1)


def test_bounds_by_hand() -> None:
    """1 GB/s or 1 TOPS, whichever takes longer."""
    model: qe.IntegerUNet = synthetic.integer_model(synthetic.ranged(One(), (4, 8, 8), {}, CPU), "w8a8", CPU)
    outputs, inputs, weights = 3 * 6 * 64, 3 * 4 * 64, 6 * 36
    assert bounds.forward_bound_ms(model, 3, LIMITS) == pytest.approx((2 * outputs + inputs + weights) / 1e6)
    slow = LIMITS._replace(int8_tops=1e-6)
    assert bounds.forward_bound_ms(model, 3, slow) == pytest.approx(2 * outputs * 36 / 1e-6 / 1e9)
    for bits, size in ((4, 0.5), (16, 2)):
        changed = {"bits": torch.full_like(model.table.bits, bits), "zero_point": model.table.zero_point.clamp(-8, 7)}
        other = model.with_table(dataclasses.replace(model.table, **changed))
        expected = (2 * outputs + size * inputs + weights) / 1e6
        assert bounds.forward_bound_ms(other, 3, LIMITS) == pytest.approx(expected)


def test_sections_are_named_once() -> None:
    names = [section.name for section in gpu_unet.unet_sections(gpu_unet.Bench(CPU, LIMITS))]
    assert len(names) == len(set(names)) == 3 * 4 * 3 + 3 and names[0] == "cifar10 batch 1"
