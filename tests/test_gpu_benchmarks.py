"""The GPU benchmarks without a GPU: their cases in Triton's interpreter, their bookkeeping with a fake clock."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from benchmarks import ceilings, gpu_kernels, gpu_sections, results_file, sections, shapes, timing
from benchmarks.ceilings import Ceilings
from benchmarks.sections import Section

CPU = torch.device("cpu")
LIMITS = Ceilings(copy_gbps=4000.0, int8_tops=1000.0, fp16_tops=700.0, bf16_tops=700.0)
MACHINE = {"gpu": "NVIDIA Test", "torch": "2", "triton": "3", "date": "today", "commit": "abc"}
interpreted = pytest.mark.usefixtures("interpreter")  # on a GPU the benchmark itself checks its cases


def row(**changes: Any) -> dict[str, Any]:
    return {**dict.fromkeys(results_file.KEYS["kernels"], 1), **changes}


def options(**changes: Any) -> Namespace:
    return Namespace(**{"budget_seconds": None, "sections": "", "afresh": False, "any_commit": False, **changes})


def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a second per call."""
    monkeypatch.setattr(gpu_kernels, "set_count", lambda *_: 2)
    monkeypatch.setattr(timing, "_WARM_UP", 0)


class Clock:
    """Seconds that pass only when a section says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def section(self, name: str, seconds: float, log: list[str]) -> Section:
        def measure() -> list[dict[str, Any]]:
            log.append(name)
            self.now += seconds
            return [row(name=name)]

        return Section(name, measure, seconds)


def test_a_gpu_has_a_short_name() -> None:
    names = ["NVIDIA H200", "NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB", "Tesla T4"]
    assert [results_file.slug(name) for name in names] == ["h200", "rtx-4090", "a100-sxm4-80gb", "t4"]
    assert results_file.default_path("unet").name == "cpu-unet.json"
    assert all(results_file.kind_of_file(Path(f"h200-{kind}.json")) == kind for kind in results_file.KEYS)


def test_a_commit_can_be_told() -> None:
    assert results_file.machine(commit="1234")["commit"] == "1234"


def test_a_budget_ends_a_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    path, clock, log = tmp_path / "x-kernels.json", Clock(), []
    todo = [clock.section(name, 40.0, log) for name in "abc"]
    rows, wrong = sections.run(todo, options(budget_seconds=100.0), "kernels", dict(MACHINE), path, clock=clock)
    assert log == ["a", "b"] and [r["section"] for r in rows] == ["a", "b"] and not wrong
    document = json.loads(path.read_text())
    assert document["machine"]["sections"] == {"a": 40.0, "b": 40.0}
    rows, _ = sections.run(todo, options(budget_seconds=100.0), "kernels", dict(MACHINE), path, clock=clock)
    assert log == ["a", "b", "c"] and [r["name"] for r in rows] == ["a", "b", "c"]
    assert [r["name"] for r in json.loads(path.read_text())["rows"]] == ["a", "b", "c"]


def test_rows_of_another_commit_are_not_added_to(tmp_path: Path) -> None:
    path, clock, log = tmp_path / "x-kernels.json", Clock(), []
    todo = [clock.section("a", 1.0, log)]
    sections.run(todo, options(), "kernels", dict(MACHINE), path, clock=clock)
    sections.run(todo, options(), "kernels", {**MACHINE, "commit": "def"}, path, clock=clock)
    sections.run(todo, options(afresh=True), "kernels", {**MACHINE, "commit": "def"}, path, clock=clock)
    assert log == ["a"] * 3 and len(json.loads(path.read_text())["rows"]) == 1


def test_rows_of_another_commit_stay_beside_new_ones_if_asked(tmp_path: Path) -> None:
    path, clock, log = tmp_path / "x-kernels.json", Clock(), []
    todo = [clock.section("a", 1.0, log), clock.section("b", 1.0, log)]
    sections.run(todo[:1], options(), "kernels", dict(MACHINE), path, clock=clock)
    sections.run(todo, options(any_commit=True), "kernels", {**MACHINE, "commit": "def"}, path, clock=clock)
    commits = [(row["section"], row["commit"]) for row in json.loads(path.read_text())["rows"]]
    assert log == ["a", "b"] and commits == [("a", MACHINE["commit"]), ("b", "def")]
    sections.run(todo, options(any_commit=True), "kernels", {**MACHINE, "torch": "0"}, path, clock=clock)
    assert log == ["a", "b"] * 2


def test_a_wrong_section_is_told_and_measured_again(tmp_path: Path) -> None:
    path, clock, log = tmp_path / "x-kernels.json", Clock(), []

    def fail() -> list[dict[str, Any]]:
        log.append("bad")
        raise ValueError("the kernel is wrong: 7 steps off\nmore")

    todo = [Section("bad", fail), clock.section("good", 1.0, log)]
    rows, wrong = sections.run(todo, options(), "kernels", dict(MACHINE), path, clock=clock)
    assert [r["name"] for r in rows] == ["good"]
    assert wrong == ["bad: ValueError: the kernel is wrong: 7 steps off"]
    sections.run(todo, options(), "kernels", dict(MACHINE), path, clock=clock)
    assert log == ["bad", "good", "bad"]


def test_only_matching_sections_run() -> None:
    clock, log = Clock(), []
    todo = [clock.section(name, 1.0, log) for name in ("gemm w8a8", "conv w8a8", "conv w4a8")]
    sections.run(todo, options(sections="conv.*w8"), "kernels", dict(MACHINE), None, clock=clock)
    assert log == ["conv w8a8"]


@pytest.mark.skipif(not hasattr(sections.signal, "SIGALRM"), reason="time limits are signals of POSIX")
def test_a_section_without_end_is_ended(tmp_path: Path) -> None:
    """Alone in the budget it is recorded as absent; after others it waits for the next run."""

    def endless() -> list[dict[str, Any]]:
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # what must not swallow the end
                continue

    log: list[str] = []
    endless_section, quick = Section("endless", endless, 0.0), Clock().section("quick", 0.2, log)
    machine = dict(MACHINE)
    sections.run([endless_section, quick], options(budget_seconds=0.3), "kernels", machine, tmp_path / "a-kernels.json")
    assert machine["absent"] == {"endless": "did not finish in 0 s"} and not log

    def slow() -> list[dict[str, Any]]:
        time.sleep(0.2)
        return [row()]

    machine, path = dict(MACHINE), tmp_path / "b-kernels.json"
    todo = [Section("slow", slow, 0.0), endless_section]
    sections.run(todo, options(budget_seconds=0.6), "kernels", machine, path)
    assert machine["absent"] == {} and list(machine["sections"]) == ["slow"]


def test_input_sets_outgrow_the_cache() -> None:
    assert timing.set_count(16e6, 60e6) == 12 and timing.set_count(1.0, 60e6) == 64 and timing.set_count(1e9, 60e6) == 2


def test_contestants_are_timed_per_call_and_failures_named() -> None:
    calls: dict[str, list[int]] = {"a": [], "b": []}

    def fail(i: int) -> None:
        raise RuntimeError("no such kernel\nand so on")

    contestants = {name: (lambda i, name=name: calls[name].append(i)) for name in calls}
    found, absent = timing.times({**contestants, "c": fail}, 3, 2, CPU)
    assert set(found) == {"a", "b"} and absent == {"c": "no such kernel"}
    assert all(0 <= t["p05"] <= t["median"] <= t["p95"] for t in found.values())
    assert calls["a"] == calls["b"] == [0, 1, 2] * 6, "once to warm up, three untimed rounds, two timed ones"


def test_ceilings_are_rates() -> None:
    limits = ceilings.measure(CPU, side=256, copy_bytes=1 << 20)
    assert all(rate > 0 for rate in limits)
    assert LIMITS.peak_tops("w4a8") == 1000 and LIMITS.peak_tops("w8a16") == 700
    assert LIMITS.bound_ms(2e12, 1.0, "w8a8") == 2.0 and LIMITS.bound_ms(1.0, 8e9, "w8a8") == 2.0


@interpreted
@pytest.mark.parametrize("precision", gpu_kernels.PRECISIONS)
def test_kernel_cases_are_right(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few_calls(monkeypatch)
    for case in (
        gpu_kernels.gemm_case(shapes.Gemm("t", 1, 34, 40, 72), precision, CPU),
        gpu_kernels.gemm_case(shapes.Gemm("t", 1, 17, 32, 64, geglu=True), precision, CPU),
        gpu_kernels.conv_case(shapes.Conv("t", 1, 1, 16, 8, 5), precision, CPU),
        gpu_kernels.conv_case(shapes.Conv("t", 1, 1, 64, 8, 3), precision, CPU),
    ):
        rows = gpu_kernels.measure(case, LIMITS, 1, CPU)
        assert {r["baseline"] for r in rows} >= {"cublas-fp16"} or {r["baseline"] for r in rows} >= {"cudnn-fp16"}
        assert ("int_mm" in case.baselines) == (case.name == "int_gemm" and precision != "w8a16")
        for r in rows:
            assert set(results_file.KEYS["kernels"]) <= set(r) and r["checked"] and r["tops"] > 0
            assert r["bound_ms"] > 0 and 0 < r["share_of_peak"] < 1
            if r["baseline_ms"] is not None:
                assert r["speedup"] == pytest.approx(r["baseline_ms"] / r["median_ms"], abs=2e-3)
        results_file.check({"machine": MACHINE, "rows": rows}, "kernels")


@interpreted
def test_norm_cases_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    few_calls(monkeypatch)
    for case in (
        gpu_kernels.groupnorm_case(shapes.Image("t", 1, 64, 6), CPU),
        gpu_kernels.layernorm_case(5, 96, CPU),
    ):
        rows = gpu_kernels.measure(case, LIMITS, 1, CPU)
        assert rows and all(r["tops"] is None and r["gbps"] > 0 for r in rows)


@interpreted
def test_the_baseline_of_int_mm_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    few_calls(monkeypatch)
    case = gpu_kernels.gemm_case(shapes.Gemm("t", 1, 34, 40, 72), "w8a8", CPU)
    torch.testing.assert_close(case.baselines["int_mm"](1), case.run(1), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(case.baselines["cublas-fp16"](1), case.run(1), rtol=2e-2, atol=2e-2)


@interpreted
def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    few_calls(monkeypatch)
    case = gpu_kernels.gemm_case(shapes.Gemm("t", 1, 34, 40, 72), "w8a8", CPU)
    right = case.run

    def wrong(i: int) -> torch.Tensor:
        y = right(i).clone()
        y[3, 5] += 0.05
        return y

    with pytest.raises(ValueError, match="the kernel is wrong"):
        gpu_kernels.within_half_precision(wrong(0), right(0).double(), True)
    q = torch.zeros(100, dtype=torch.int8)
    with pytest.raises(ValueError, match="2 steps off"):
        gpu_kernels.rarely_a_step(q + 2, q)
    with pytest.raises(ValueError, match="1 steps off"):
        gpu_kernels.rarely_a_step(q + 1, q)
    nan = torch.full((2,), float("nan"), dtype=torch.float16)
    with pytest.raises(ValueError, match="not timed"):
        gpu_kernels.within_half_precision(nan, torch.zeros(2).double(), True)

    def refuse(*_: Any) -> None:
        raise ValueError("the kernel is wrong")

    monkeypatch.setattr(gpu_kernels, "within_half_precision", refuse)
    monkeypatch.setattr(gpu_kernels, "times", lambda *_: pytest.fail("timed"))
    with pytest.raises(ValueError, match="the kernel is wrong"):
        gpu_kernels.measure(gpu_kernels.gemm_case(shapes.Gemm("t", 1, 34, 40, 72), "w8a8", CPU), LIMITS, 1, CPU)


def test_every_shape_and_precision_has_its_section() -> None:
    made = gpu_sections.kernel_sections(LIMITS, 1, CPU)
    names = [section.name for section in made]
    assert len(set(names)) == len(names)
    products = len(gpu_kernels.PRECISIONS) * (len(shapes.GEMMS) + len(shapes.CONVS))
    assert len(names) == products + len(shapes.NORMS) + len(shapes.ROWS)
    for wanted in ("M2048 N10240 K1280 w8a8", "M2048 N1280 K5120 w4a4", "N2 C320 K320 128x128 w4a8", "C1280 K1280 8x8"):
        assert any(wanted in name for name in names), wanted
    sweep = [section.name for section in gpu_sections.sweep_sections(LIMITS, 1, CPU)]
    assert len(set(sweep)) == len(sweep) == 2 * (len(shapes.SWEEP_ROWS) + len(shapes.SWEEP_BATCHES))
