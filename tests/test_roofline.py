"""The roofline picture, from a result file made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results_file, roofline

LIMITS = {"copy_gbps": 4000.0, "int8_tops": 1000.0, "fp16_tops": 700.0, "bf16_tops": 700.0}
MACHINE = {"gpu": "made up", "torch": "0", "triton": "0", "date": "never", "commit": None, "ceilings": LIMITS}


def row(name: str, precision: str, tops: float | None, gbps: float, baseline: str) -> dict[str, Any]:
    given = {"name": name, "shape": "M1 N2 K3", "precision": precision, "tops": tops, "gbps": gbps}
    return {**dict.fromkeys(results_file.KEYS["kernels"], 1), **given, "baseline": baseline}


def results(folder: Path, **machine: Any) -> Path:
    path = folder / "made-up-kernels.json"
    rows = [
        row("int_gemm", "w8a8", 500.0, 1000.0, "int_mm"),
        row("int_gemm", "w8a8", 500.0, 1000.0, "cublas-fp16"),
        row("int_gemm", "w8a16", 350.0, 500.0, "cublas-fp16"),
        row("int_conv2d_3x3", "w4a8", 100.0, 1000.0, "cudnn-fp16"),
        row("groupnorm_silu_quantize", "a8", None, 2000.0, "torch-fp16"),
    ]
    path.write_text(json.dumps({"machine": {**MACHINE, **machine}, "rows": rows}))
    return path


def test_points_lie_under_their_roofs(tmp_path: Path) -> None:
    _, points, bars = roofline.read(results(tmp_path))
    found = {(p.name, p.precision): p for p in points}
    assert len(points) == 3 and [bar.gbps for bar in bars] == [2000.0]
    gemm, floating, conv = found["int_gemm", "w8a8"], found["int_gemm", "w8a16"], found["int_conv2d_3x3", "w4a8"]
    assert (gemm.intensity, gemm.share) == (500.0, 0.5), "compute-bound"
    assert (floating.intensity, floating.share) == (700.0, 0.5), "its roof is float16's"
    assert (conv.intensity, conv.share) == (100.0, 0.25), "memory-bound: 4 TB/s at 100 operations per byte"


@pytest.mark.parametrize("name, start", [("roofline.png", b"\x89PNG"), ("below/roofline.svg", b"<?xml")])
def test_the_picture_is_drawn(tmp_path: Path, name: str, start: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / name
    assert roofline.main([str(results(tmp_path)), "--out", str(out)]) == 0
    data = out.read_bytes()
    assert data.startswith(start) and len(data) > 10_000
    assert "50.0% of the roof: int_gemm w8a8 M1 N2 K3, 500 TOPS" in capsys.readouterr().out


def test_results_without_ceilings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main([str(results(tmp_path, ceilings=None)), "--out", str(tmp_path / "x.png")]) == 1
    assert "ceilings is missing" in capsys.readouterr().err and not (tmp_path / "x.png").exists()
    assert roofline.main([str(tmp_path / "no-kernels.json"), "--out", str(tmp_path / "x.png")]) == 1
