"""`bench` on a tiny network, its measuring tools, and the committed result files. Nothing here asserts a time."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qdiff_engine as qe
from qdiff_engine import baselines, benchmarking, measuring

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = {
    "device", "batch", "engine_ms", "baselines", "speedup", "weight_bytes", "peak_memory_bytes",
    "integer_floor_ms", "floor_share", "baselines_absent",
}  # fmt: skip


class TinyUNet(nn.Module):
    """Four convolutions, one of them strided and one upsampled, and a time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.time, self.norm = nn.Linear(1, 8), nn.GroupNorm(2, 8)
        self.up, self.leave = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.enter(sample)
        x = self.down(F.silu(self.norm(x))) + self.time(timestep.float()[:, None] / 1000)[:, :, None, None]
        x = self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.leave(F.silu(x))


class HalfUNet(nn.Conv2d):
    """A network that any floating dtype suits."""

    def __init__(self) -> None:
        super().__init__(2, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(sample) * timestep.to(sample.dtype)[:, None, None, None]


@pytest.fixture(scope="module")
def tiny(demo_scheduler: Any) -> tuple[nn.Module, qe.IntegerUNet]:
    torch.manual_seed(0)
    unet = TinyUNet().eval()
    recipe = qe.Recipe.named("w4a8")
    calibration = qe.calibrate(unet, demo_scheduler, recipe, shape=(2, 8, 8), steps=3, samples=2)
    return unet, qe.quantize(unet, calibration, recipe)


@pytest.fixture
def results_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import results_file

    yield results_file


def check_times(times: dict[str, float]) -> None:
    assert set(times) == {"median", "p05", "p95"}
    assert 0 <= times["p05"] <= times["median"] <= times["p95"]


def test_bench_reports_the_contract(tiny: tuple[nn.Module, qe.IntegerUNet]) -> None:
    unet, model = tiny
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    rounds = []
    result = qe_bench(model, unet, batch=3, repetitions=2, threads=1, on_round=lambda *r: rounds.append(r))
    assert set(result) >= CONTRACT
    assert (result["device"], result["batch"], result["threads"]) == ("cpu", 3, 1)
    check_times(result["engine_ms"])
    for times in result["baselines"].values():
        check_times(times)
    assert {"torch-fp32", "torch-bf16"} <= set(result["baselines"]) == set(result["speedup"])
    for name, times in result["baselines"].items():
        assert result["speedup"][name] == pytest.approx(times["median"] / result["plan_ms"], abs=2e-3)
    assert {"openvino-bf16", "openvino-int8"} == set(result["baselines_absent"]) | (
        set(result["baselines"]) - {"torch-fp32", "torch-bf16"}
    )
    assert all(result["baselines_absent"].values()), "every absent baseline has its reason"
    assert result["integer_floor_ms"] > 0
    assert 0 < result["relative_error"] < 0.5
    assert rounds[-1][0] == rounds[-1][1] == len(rounds)
    json.dumps(result)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def qe_bench(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return benchmarking.bench(*args, **{"memory": False, **kwargs})


def test_threads_are_restored(tiny: tuple[nn.Module, qe.IntegerUNet]) -> None:
    before = torch.get_num_threads()
    result = qe_bench(tiny[1], batch=1, repetitions=1, threads=1)
    assert result["threads"] == 1
    assert torch.get_num_threads() == before
    assert result["baselines"] == {} and result["relative_error"] is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the high-water mark is read from Linux's /proc")
def test_peak_memory_is_of_the_child_alone(tiny: tuple[nn.Module, qe.IntegerUNet]) -> None:
    held = torch.ones(256 * 2**20, dtype=torch.uint8)  # 256 MiB that only this process holds
    result = qe_bench(tiny[1], batch=1, repetitions=1, memory=True)
    assert held.numel() + 50 * 2**20 < measuring.high_water_mark()
    assert 50 * 2**20 < result["peak_memory_bytes"] < measuring.high_water_mark()


def test_a_failing_child_is_an_error(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the high-water mark is read from Linux's /proc")
    with pytest.raises(OSError, match="peak memory failed with status"):
        measuring.peak_memory(tmp_path / "nothing", None, [(torch.zeros(1), torch.zeros(1), {})], 1)


def test_weight_bytes_by_hand(tiny: tuple[nn.Module, qe.IntegerUNet]) -> None:
    _, model = tiny
    integers = 8 * 18 + 8 * 72 // 2 + 8 * 72 // 2 + 2 * 72  # the first and the last layer keep 8 bits
    scales = 4 * (8 + 8 + 8 + 2)
    floats = sum(4 * value.numel() for value in model.constants.values())
    assert benchmarking.weight_bytes(model) == integers + scales + floats


def test_integer_calls_are_the_models(tiny: tuple[nn.Module, qe.IntegerUNet]) -> None:
    _, model = tiny
    calls = benchmarking.integer_calls(model, benchmarking.input_sets(model, 3, None, None)[0])
    shapes = [tuple(call().shape) for call in calls]
    assert shapes == [(3, 8, 4, 4), (3, 8, 8, 8), (3, 2, 8, 8)], "the first layer is floating"


def test_a_profile_names_every_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.profiling import OUTSIDE, profile

    model = networks.integer_model("cifar")
    ticks = itertools.count()
    rows = profile(model, (networks.normal(2, 3, 16, 16), 500, {}), 2, clock=lambda: float(next(ticks)))
    calls = {row["kind"]: row["calls"] for row in rows if row["share"] is not None}
    assert sum(calls.values()) == len(model.program.sections["main"]) + 1
    assert {"int_conv2d two segments + residual", "groupnorm_silu_quantize + two inputs + silu", OUTSIDE} <= set(calls)
    assert "quantized_copy" not in calls, "a GroupNorm writes it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"batch": 0}, "batch"), ({"repetitions": 0}, "repetitions"), ({"threads": 0}, "threads")],
)
def test_wrong_arguments(tiny: tuple[nn.Module, qe.IntegerUNet], arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qe_bench(tiny[1], **arguments)


def test_an_insane_output_is_not_timed(tiny: tuple[nn.Module, qe.IntegerUNet]) -> None:
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="from float"):
        qe_bench(tiny[1], TinyUNet().eval(), batch=2, repetitions=1)
    nan = torch.tensor([math.nan])
    with pytest.raises(ValueError, match="not finite"):
        benchmarking.check_outputs(lambda i: nan, None, 1)


def test_float16_contestants_agree(tiny: tuple[nn.Module, qe.IntegerUNet], monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, in half precision on a CPU, a captured graph being the function again."""
    unet, model = tiny
    monkeypatch.setattr(baselines, "cuda_graph", lambda function: function)
    inputs = benchmarking.input_sets(model, 2, None, None)
    with torch.no_grad():
        module = baselines.half_precision(unet, inputs[0])
        assert isinstance(module, baselines._Autocast), "its time embedding is float32 whatever it is cast to"
        assert not isinstance(baselines.half_precision(HalfUNet(), inputs[0]), baselines._Autocast)
        contestants, absent = baselines.gpu_contestants(module, inputs, False)
        assert set(contestants) == {"torch-fp16", "torch-fp16-graph"}
        assert set(absent) == {"torch-fp16-compile", "torchao-int8"} and all(absent.values())
        for i in range(len(inputs)):
            eager, graph = (contestants[name](i) for name in ("torch-fp16", "torch-fp16-graph"))
            assert eager.dtype == torch.float16 and torch.equal(eager, graph)
            expected = measuring.predict(unet, *inputs[i])
            assert float((eager.float() - expected).norm() / expected.norm()) < 0.01


def test_a_contestant_that_fails_is_absent_with_its_reason() -> None:
    def broken() -> measuring.Contestant:
        raise ImportError("No module named 'torchao'")

    def fails(i: int) -> None:
        raise RuntimeError("out of memory\nsee the log")

    contestants, absent = baselines.tried({"a": broken, "b": lambda: fails, "c": lambda: lambda i: i})
    assert set(contestants) == {"c"}
    assert absent == {"a": "No module named 'torchao'", "b": "out of memory"}


def test_contestants_take_turns() -> None:
    order: list[tuple[str, int]] = []
    contestants = {name: lambda i, name=name: order.append((name, i)) for name in "ab"}
    times = measuring.interleaved(contestants, 3, sets=2, warm_up=1)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert order == [(name, i % 2) for i in range(5) for name in "ab"]
    assert measuring.summary([3.0, 1.0, 2.0])["median"] == 2.0


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_committed_results_follow_the_schema(path: Path, results_file: ModuleType) -> None:
    results_file.check(json.loads(path.read_text()), results_file.kind_of_file(path))


def test_the_schema_refuses_what_lacks_keys(results_file: ModuleType, tmp_path: Path) -> None:
    machine = results_file.machine()
    row = dict.fromkeys(results_file.KEYS["kernels"], 1)
    results_file.write(tmp_path / "cpu-kernels.json", "kernels", machine, [row])
    assert json.loads((tmp_path / "cpu-kernels.json").read_text())["rows"] == [row]
    del row["tops"]
    with pytest.raises(ValueError, match="tops"):
        results_file.check({"machine": machine, "rows": [row]}, "kernels")
    with pytest.raises(ValueError, match="commit"):
        results_file.check({"machine": {"cpu": "x"}, "rows": [row]}, "kernels")
    with pytest.raises(ValueError, match="name must contain"):
        results_file.kind_of_file(Path("times.json"))


def test_a_mixed_plan_is_timed_in_every_mode_and_averaged_over_its_rows() -> None:
    calibration, unet = networks.calibration("unet2d"), networks.network("unet2d")
    plan = ("A16", "A8", "A4", "A8")
    model = qe.quantize(unet, calibration, qe.Recipe(plan=plan))
    inputs = benchmarking.input_sets(model, 1, None, None)
    modes = [model.table.modes[model.table.row(float(item.timestep[0]))] for item in inputs]
    assert {mode: modes.count(mode) for mode in plan} == {"A16": 2, "A8": 2, "A4": 2}
    assert inputs[2].timestep != inputs[3].timestep  # both rows of A8
    given = {"A16": 8.0, "A8": 2.0, "A4": 1.0}
    times = [given[modes[(len(modes) + i) % len(modes)]] for i in range(7)]
    medians, average = benchmarking.plan_average(model, inputs, times)
    assert medians == given and average == (8 + 2 + 1 + 2) / 4
    assert benchmarking.plan_average(model, inputs, times[:1]) == ({"A16": 8.0}, 8.0)
    data = qe_bench(model, batch=1, repetitions=6)
    assert set(data["modes_ms"]) == set(plan) and data["switchable_fraction"] == (16 + 8 + 4 + 8) / 32
    assert data["gbops"] == qe.count_bops(model).total / 1e9
    assert data["plan_ms"] == pytest.approx(sum(data["modes_ms"][mode] for mode in plan) / 4, abs=1e-3)
