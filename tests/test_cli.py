"""The command line: keys of --json, one-line errors, exit statuses, resuming; on tiny settings."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import networks
import pytest
import safetensors.torch
import torch
from commands import DEMO, TINY, Run, loaded, refused, start

import qdiff_engine as qe
from qdiff_engine import equalisation
from qdiff_engine.calibration.calibration import _Recorder
from qdiff_engine.cli.demo import Settings, is_finished
from qdiff_engine.cli.doctor import judge, judge_gpus
from qdiff_engine.cli.options import scheduler_of
from qdiff_engine.cli.output import _MENDS, describe
from qdiff_engine.ops import extension


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder, JSON object) of a calibration that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calibrated")
    process = start("calibrate", "demo", *TINY, "--out", "deep/art", "--json", folder=folder)
    out, error = process.communicate(timeout=300)
    return folder / "deep" / "art", loaded((process.returncode, out, error))


def test_calibrate_then_inspect(run: Run, calibrated: tuple[Path, dict[str, Any]]) -> None:
    target, data = calibrated
    assert set(data) == {"artifact", "seconds", "layers_quantized", "layers_float", "plan", "align", "agreement"}
    assert data["artifact"] == str(target) and [p.name for p in target.parent.iterdir()] == ["art"]
    shown = loaded(run("inspect", target, "--json"))
    assert set(shown) == {"schema_version", "recipe", "size_bytes", "float_size_bytes", "rows", "plan", "layers"}
    assert shown["size_bytes"] == sum(p.stat().st_size for p in target.iterdir())
    assert shown["rows"] == 6 and set(shown["plan"][0]) == {"timestep", "mode"}
    layers = shown["layers"]
    assert all(set(row) == {"name", "op", "shape", "weight_bits", "quantized", "reason"} for row in layers)
    assert all((row["reason"] is None) == row["quantized"] for row in layers)
    assert sum(row["quantized"] for row in layers) == data["layers_quantized"]
    assert sum(not row["quantized"] for row in layers) == data["layers_float"] > 0
    shapes = {row["name"]: row["shape"] for row in layers}
    assert shapes["conv_in"] == [32, 1, 3, 3] and shapes["up_blocks.2.resnets.0.conv_shortcut"][1] == 96


def test_inspect_measures_where_it_is_told_to(run: Run, artifact: Path) -> None:
    shown = loaded(run("inspect", artifact, "--tune", "--batch", "1", "--json"))
    measured = [row for row in shown["layers"] if "integer_ms" in row]
    assert measured and all(row["integer_ms"] > 0 < row["float_ms"] for row in measured)
    assert all(set(row) >= {"measured_with", "quantized", "reason"} for row in measured)
    status, out, _ = run("inspect", artifact, "--tune", "--batch", "1")
    assert status == 0 and "integer ms" in out and "float ms" in out
    refused(run("inspect", artifact, "--device", "cuda"), "--tune")


def test_what_an_interrupted_save_left_is_inspected_too(run: Run, artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "art.previous")
    shown = loaded(run("inspect", tmp_path / "art", "--json"))
    assert shown == loaded(run("inspect", artifact, "--json"))
    assert loaded(run("bops", tmp_path / "art", "--json")) == loaded(run("bops", artifact, "--json"))


def test_a_path_is_printed_as_it_is(run: Run, artifact: Path, tmp_path: Path) -> None:
    """Square brackets in it are no markup."""
    target = tmp_path / "[bold]" / "o[" / "x].png"
    target.parent.mkdir(parents=True)
    status, out, _ = run("sample", artifact, "--n", 1, "--steps", 2, "--out", target)
    assert status == 0 and target.exists() and "[bold]/o[/x].png" in out.replace("\n", "")


def test_options_are_heard(run: Run, tmp_path: Path) -> None:
    told = ["--steps", 3, "--samples", 1, "--recipe", "w4a8", "--seed", 5, "--eta", 0.5, "--observer", "percentile"]
    told += ["--rows", "static", "--edges", "a8", "--weights", "nearest"]
    loaded(run("calibrate", "demo", *told, "--out", tmp_path / "a", "--json"))
    model = qe.load(tmp_path / "a")
    assert (model.key["seed"], model.key["eta"]) == (5, 0.5)
    changes: dict[str, Any] = {"observer": "percentile", "rows": "static", "edges": "a8", "weights": "nearest"}
    assert model.recipe == qe.Recipe.named("w4a8", **changes)
    for seed, eta in ((7, 0.0), (8, 0.0), (7, 1.0)):
        out = tmp_path / f"{seed}-{eta}.safetensors"
        loaded(run("sample", tmp_path / "a", "--n", 1, "--seed", seed, "--eta", eta, "--out", out, "--json"))
        expected = qe.sample(model, scheduler_of(model.key), (1, 1, 32, 32), 3, seed, eta=eta)
        assert torch.equal(safetensors.torch.load_file(out)["samples"], expected)


def test_seeds_of_more_than_64_bits(run: Run, artifact: Path, tmp_path: Path) -> None:
    refused(run("sample", artifact, "--seed", 2**70, "--out", tmp_path / "x.png"), "seed must be at most")


def test_sample_writes_the_same_grid_for_any_batch(run: Run, artifact: Path, tmp_path: Path) -> None:
    for batch in (2, 4):
        data = loaded(run("sample", artifact, "--n", 4, "--out", tmp_path / f"{batch}.png", "--batch", batch, "--json"))
        assert {key: data[key] for key in ("images", "finite")} == {"images": 4, "finite": True}
        assert data["seconds"] > 0
    assert (tmp_path / "2.png").read_bytes() == (tmp_path / "4.png").read_bytes()
    assert (tmp_path / "2.png").read_bytes().startswith(b"\x89PNG")


def test_sample_writes_tensors(run: Run, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    loaded(run("sample", artifact, "--n", 2, "--steps", 2, "--sampler", "ddpm", "--out", out, "--json"))
    assert safetensors.torch.load_file(out)["samples"].shape == (2, 1, 32, 32)


def test_compare(run: Run, artifact: Path) -> None:
    data = loaded(run("compare", artifact, "--reference", "demo", "--n", 2, "--json"))
    assert {"psnr_db", "psnr_db_min", "step_sqnr_db", "latent_error", "finite", "samples"} <= set(data)
    assert {"ssim", "frechet_to_float", "frechet_note", "class_accuracy", "class_entropy"} <= set(data)
    assert len(data["step_sqnr_db"]) == len(data["latent_error"]) == 3 and data["samples"] == 2
    assert data["psnr_db"] >= data["psnr_db_min"] > 10 and data["finite"]


def test_compare_with_a_named_extractor(
    run: Run, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_features.py").write_text("from torch import nn\n\nmeans = nn.AvgPool2d(32)\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["compare", artifact, "--reference", "demo", "--n", 3, "--json", "--features"]
    data = loaded(run(*arguments, "my_features:means"))
    assert data["frechet_to_float"] > 0 and "rough below 10 samples" in data["frechet_note"]
    assert data["class_accuracy"] is None and 0 < data["ssim"] < 1
    data = loaded(run(*arguments, "digits"))
    assert data["frechet_to_float"] is None and "more than 32 samples" in data["frechet_note"]
    assert 0 <= data["class_accuracy"] <= 1
    assert loaded(run(*arguments, "none"))["class_accuracy"] is None


def test_report(run: Run, artifact: Path, tmp_path: Path) -> None:
    arguments = ["report", artifact, "--reference", "demo", "--n", 2, "--out", tmp_path / "new" / "page", "--json"]
    data = loaded(run(*arguments))
    path = tmp_path / "new" / "page" / "index.html"
    assert data["page"] == str(path) and data["bytes"] == path.stat().st_size
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]
    compared = loaded(run("compare", artifact, "--reference", "demo", "--n", 2, "--json"))
    assert data["comparisons"] == {"integers": compared}
    assert f"{compared['psnr_db']:.2f} dB" in path.read_text()
    refused(run("report", artifact, "--reference", "demo", "--out", path), "index.html")


@pytest.mark.parametrize(
    ("plan", "serves", "shares"),
    [("snr:share=0.5", "distribution", (0.5, 0.5)), ("budget:0.75:A4,A8", "fidelity", (0.5, 0.5))],
)
def test_calibrate_chooses_a_plan(
    plan: str, serves: str, shares: tuple[float, float], run: Run, tmp_path: Path
) -> None:
    target = tmp_path / "art"
    tiny = ["--steps", "4", "--samples", "1", "--observer", "minmax", "--recipe", "w4a8"]
    data = loaded(run("calibrate", "demo", *tiny, "--plan", plan, "--out", target, "--json"))["plan"]
    assert data["serves"] == serves and (data["shares"]["A4"], data["shares"]["A8"]) == shares
    assert data["switchable_fraction"] == 0.75
    shown = loaded(run("inspect", target, "--json"))
    assert sorted(row["mode"] for row in shown["plan"]) == ["A4", "A4", "A8", "A8"]
    assert shown["recipe"]["plan"] == plan
    assert loaded(run("bops", target, "--json"))["switchable_fraction"] == 0.75


def test_calibrate_equalises(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equalisation, "EXPONENTS", ((0.5, 0.5),))
    monkeypatch.setattr(equalisation, "_VECTORS", 64)
    target = tmp_path / "art"
    tiny = ["--steps", "3", "--samples", "1", "--observer", "minmax", "--recipe", "w4a4"]
    loaded(run("calibrate", "demo", *tiny, "--equalise", "on", "--out", target, "--json"))
    assert loaded(run("inspect", target, "--json"))["recipe"]["equalise"] == "on"
    assert '"channel_inverse":"$' in (target / "graph.json").read_text().replace(" ", "")
    assert loaded(run("sample", target, "--n", 1, "--steps", 3, "--out", tmp_path / "x.png", "--json"))["finite"]


def test_bops_of_a_model_and_of_an_artifact(run: Run, artifact: Path) -> None:
    data = loaded(run("bops", artifact, "--json"))
    assert set(data) == {"total_gbops", "float_gbops", "ratio", "switchable_fraction", "layers"}
    assert set(data["layers"][0]) == {"name", "macs", "weight_bits", "activation_bits", "gbops"}
    assert loaded(run("bops", "demo", "--recipe", "w4a8", "--json")) == data


def test_bench(run: Run, artifact: Path) -> None:
    data = loaded(run("bench", artifact, "--reference", "demo", "--batch", 2, "--repetitions", 2, "--json"))
    assert set(data["engine_ms"]) == {"median", "p05", "p95"} and data["batch"] == 2
    assert set(data["speedup"]) == set(data["baselines"]) and "torch-fp32" in data["baselines"]
    assert {"device", "weight_bytes", "peak_memory_bytes"} <= set(data)


def test_doctor(run: Run) -> None:
    data = loaded(run("doctor", "--json"))
    assert {"torch", "triton", "cuda", "gpus", "backends"} <= set(data)
    assert all(set(status) == {"available", "reason"} for status in data["backends"].values())
    assert data["verdict"].endswith(".")
    features, exact = data["cpu"]["features"], data["backends"]["onednn"]["available"]
    quick = any(features.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    if data["extension"]["built"] and exact and quick:
        assert data["fast"] and data["verdict"].startswith("Fast for integers")
    assert len(data["gpus"]) == len(data["gpu_details"]) == torch.cuda.device_count()
    assert data["gpu_verdict"].startswith("--device cuda" if data["gpus"] else "No NVIDIA GPU")


def test_doctor_says_whether_integers_are_fast() -> None:
    exact, inexact = ({"onednn": {"available": found, "reason": "it would saturate"}} for found in (True, False))
    for feature in ("avx512_vnni", "avx_vnni", "amx_int8", "dotprod"):
        assert feature in extension.cpu_features() and judge({feature: True}, exact, "")[0]
    assert judge({"avx2": True}, exact, "") == (
        False,
        "Slow for integers: this processor has no 8-bit dot products, though oneDNN is exact here.",
    )
    fast, verdict = judge({"avx512_vnni": True}, inexact, "")
    assert not fast and "it would saturate" in verdict
    fast, verdict = judge({"avx512_vnni": True}, exact, "there is no compiler")
    assert not fast and verdict.startswith("Slower than it could be: there is no compiler")


def test_doctor_says_whether_models_run_on_a_gpu() -> None:
    details = [{"name": "NVIDIA H200"}]
    old = {"available": False, "reason": "NVIDIA T4 has compute capability 7.5, the kernels need 8.0 or newer"}
    none = {"available": False, "reason": "not part of this version"}
    assert "7.5" in judge_gpus(details, {"triton": old, "cuda": none})
    good = {"available": True, "reason": "Triton 3.6.0 on NVIDIA H200"}
    assert judge_gpus(details, {"triton": good, "cuda": none}) == (
        "--device cuda runs models, with triton (Triton 3.6.0 on NVIDIA H200)."
    )


@pytest.mark.parametrize(
    "command", ["demo", "calibrate", "inspect", "sample", "compare", "report", "bops", "bench", "doctor"]
)
def test_help(command: str, run: Run) -> None:
    status, out, error = run(command, "--help")
    assert status == 0 and error == "" and "--json" in out and "--debug" in out


def test_text_output_is_on_standard_output(run: Run, artifact: Path, tmp_path: Path) -> None:
    for arguments in (["inspect", artifact], ["bops", artifact], ["doctor"]):
        status, out, _ = run(*arguments)
        assert status == 0 and len(out.splitlines()) > 3
    few = ["--reference", "demo", "--n", 2]
    for arguments, word in (
        (["compare", artifact, *few], "PSNR"),
        (["report", artifact, *few, "--out", tmp_path / "report"], "index.html"),
        (["bench", artifact, "--reference", "demo", "--batch", 1, "--repetitions", 1], "torch-fp32"),
    ):
        status, out, error = run(*arguments)
        assert status == 0 and word in out, error
    status, out, _ = run()
    assert status == 0 and "calibrate" in out


def test_demo_reports_what_it_made(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, data = demo
    names = {"artifact-w8a8", "artifact-w4a8", "report.json", "samples.png", "ranges.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "report.json").read_text()) == data
    assert [row["precision"] for row in data["rows"]] == ["float32", "w8a8", "w4a8"]
    sizes, ratios = ([row[key] for row in data["rows"]] for key in ("weight_bytes", "bops_ratio"))
    assert sizes == sorted(sizes, reverse=True) and ratios == sorted(ratios)


def test_demo_again_takes_the_finished_artifacts(run: Run, demo: tuple[Path, dict[str, Any]]) -> None:
    folder, data = demo
    model = folder / "artifact-w4a8" / "model.safetensors"
    before = model.stat().st_mtime_ns
    status, out, error = run(*DEMO, "--out", folder)
    assert status == 0 and "finished" in error and "PSNR" in out
    assert model.stat().st_mtime_ns == before
    assert json.loads((folder / "report.json").read_text())["comparisons"] == data["comparisons"]


def test_demo_makes_other_or_damaged_artifacts_again(
    artifact: Path, tmp_path: Path, demo_unet: torch.nn.Module, demo_scheduler: Any
) -> None:
    settings = Settings(steps=3, samples=1, n=2, seed=0)
    assert is_finished(artifact, "w4a8", settings, demo_unet, demo_scheduler)
    assert not is_finished(artifact, "w8a8", settings, demo_unet, demo_scheduler)
    for change in ({"steps": 4}, {"samples": 2}, {"seed": 1}):
        other = dataclasses.replace(settings, **change)
        assert not is_finished(artifact, "w4a8", other, demo_unet, demo_scheduler)
    copy = shutil.copytree(artifact, tmp_path / "copy")
    (copy / "graph.json").write_text("{}")
    assert not is_finished(copy, "w4a8", settings, demo_unet, demo_scheduler)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_interrupted_and_killed_calibration_resumes_to_the_same_bytes(
    run: Run, calibrated: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["calibrate", "demo", *TINY]
    target, partial = tmp_path / "art", tmp_path / "art.partial"
    for count, sent in ((1, signal.SIGINT), (3, signal.SIGKILL)):
        process = start(*arguments, "--out", "art", folder=tmp_path)
        wait_for(partial / f"step-{count:05d}.safetensors", process)
        process.send_signal(sent)
        _, error = process.communicate(timeout=60)
        assert not target.exists()
        if sent == signal.SIGINT:
            assert process.returncode == 130 and str(partial) in error.splitlines()[-1]
            assert "Traceback" not in error
    calls: list[int] = []
    predict = _Recorder.predict
    monkeypatch.setattr(_Recorder, "predict", lambda self, *a, **k: calls.append(1) or predict(self, *a, **k))
    assert run(*arguments, "--out", target)[0] == 0
    assert len(calls) <= 2, "of six steps, four at least were on disk"
    assert not partial.exists()
    for name in ("config.json", "graph.json", "model.safetensors"):
        assert (target / name).read_bytes() == (calibrated[0] / name).read_bytes()


def test_alignment_killed_and_resumed_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    """kill -9 while it learns; what is learnt is in the artifact, and what it did in the result."""
    networks.unet2d().save_pretrained(tmp_path / "model" / "unet")
    networks.ddim().save_pretrained(tmp_path / "model" / "scheduler")
    arguments = ["calibrate", tmp_path / "model", *TINY, "--recipe", "w4a4", "--threads", "1"]
    arguments += ["--align", "accuquant:2", "--align-batch", "1", "--align-iterations"]
    process = start(*arguments, "30", "--out", "killed", folder=tmp_path)
    wait_for(tmp_path / "killed.partial" / "align" / "step-00025.safetensors", process)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed").exists()
    with networks.threads(1):
        done = [run(*arguments, "30", "--out", tmp_path / out, "--json") for out in ("killed", "whole")]
    killed, whole = (loaded(result) for result in done)
    assert all(killed[part] == whole[part] for part in ("align", "agreement"))
    agreement, whole = whole["agreement"], whole["align"]
    assert not (tmp_path / "killed.partial").exists()
    with networks.threads(1):
        again = loaded(run(*arguments, "30", "--align-recompute", "--out", tmp_path / "recomputed", "--json"))
    assert again["align"]["memory_bytes"] < whole["memory_bytes"]
    for name in ("config.json", "graph.json", "model.safetensors"):
        for other in ("whole", "recomputed"):
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / other / name).read_bytes(), (name, other)
    assert all("MB at its peak" in error for _, _, error in done)
    assert (whole["group"], whole["iterations"], whole["batch"]) == (2, 30, 1)
    assert whole["end_error"] < whole["end_error_before"] and whole["memory_bytes"] > 1e5
    layers = loaded(run("inspect", tmp_path / "whole", "--json"))["layers"]
    assert {layer["name"] for layer in agreement} == {row["name"] for row in layers if row["quantized"]}
    assert max(layer["error"] for layer in agreement) < 1e-5
    assert max(layer["furthest"] for layer in agreement) <= 1
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["recipe"]["align"] == "accuquant:2"


def test_alignment_of_no_iterations_is_the_plain_artifact(
    run: Run, calibrated: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    arguments = ["calibrate", "demo", *TINY, "--align", "accuquant:3", "--align-iterations", "0"]
    assert loaded(run(*arguments, "--out", tmp_path / "art", "--json"))["align"] is None
    for name in ("config.json", "graph.json", "model.safetensors"):
        assert (tmp_path / "art" / name).read_bytes() == (calibrated[0] / name).read_bytes()


@pytest.mark.parametrize("code", _MENDS)
def test_system_errors_name_the_cause_and_the_mend(code: int) -> None:
    line = describe(OSError(code, os.strerror(code), "some/place"))
    assert line == f"some/place: {os.strerror(code)}; {_MENDS[code]}"


def test_version(run: Run) -> None:
    status, out, _ = run("--version")
    assert status == 0 and qe.__version__ in out


def test_closed_pipe_is_quiet(artifact: Path, tmp_path: Path) -> None:
    process = start("inspect", artifact, folder=tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 141
