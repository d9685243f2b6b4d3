"""The picture of latent errors, from a result file made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import latent_errors, results_file

MACHINE = {"cpu": "made up", "torch": "0", "triton": "0", "date": "never", "commit": None}


def row(**given: Any) -> dict[str, Any]:
    plain = {"weights": "int4", "activations": "a4", "eta": 0.0, "rounding": "gptq", "latent_errors": [0.1, 0.2]}
    plain["plan"] = "uniform"
    return {
        **dict.fromkeys(results_file.KEYS["quality"], 1),
        "correction": "none",
        "alignment": "none",
        **plain,
        **given,
    }


def test_what_is_special_about_a_row() -> None:
    assert latent_errors.label(row()) == "gptq"
    errors = latent_errors.curves([row(), row(seed=2, latent_errors=[0.3, 0.6]), row(plan="budget:0.9")])
    assert errors == {"gptq": pytest.approx([0.2, 0.4]), "gptq, budget:0.9": [0.1, 0.2]}
    special = row(
        rounding="adaround",
        weight_group=64,
        equalise="on",
        step_sizes="learnt",
        alignment="accuquant:5",
        align_rounding="along",
        correction="mmse",
    )
    label = "adaround, groups of 64, equalised, learnt steps, accuquant:5, rounding along, mmse"
    assert latent_errors.label(special) == label


def test_a_panel_for_every_precision_and_eta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(), row(correction="mmse"), row(activations="a8"), row(latent_errors=None)]
    rows += [row(eta=1.0, latent_errors=[0.1, 0.2, 0.3])]
    found = latent_errors.panels(rows)
    panels = {"W4A4, eta 0, 2 steps": 2, "W4A8, eta 0, 2 steps": 1, "W4A4, eta 1, 3 steps": 1}
    assert {name: len(own) for name, own in found.items()} == panels
    path, picture = tmp_path / "quality.json", tmp_path / "pictures" / "errors.png"
    path.write_text(json.dumps({"machine": MACHINE, "rows": rows}))
    assert latent_errors.main([str(path), "--out", str(picture)]) == 0
    assert Image.open(picture).size == (3 * 880, 660)
    path.write_text(json.dumps({"machine": MACHINE, "rows": [row(latent_errors=None)]}))
    assert latent_errors.main([str(path), "--out", str(picture)]) == 1
    assert "no row has latent_errors" in capsys.readouterr().err
    assert latent_errors.main([str(tmp_path / "none.json"), "--out", str(picture)]) == 1
