"""Corrections and measured noise on their way through an artifact, its own and a stranger's."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import networks
import pytest
import safetensors.torch
import torch
from correcting import MODES, NAME, SHAPE, correct, model, noise
from networks import STEPS
from test_artifact_faults import refused, resealed, write

import qdiff_engine as qe
from qdiff_engine.runtime.tensor_file import write_tensors


def test_an_artifact_keeps_corrections_and_noise(tmp_path: Path) -> None:
    corrected = correct("ner+ibc")
    corrected.save_pretrained(tmp_path / "a")
    loaded = qe.load(tmp_path / "a")
    assert loaded.correction is not None and loaded.noise is not None and corrected.correction is not None
    assert (loaded.correction.method, loaded.correction.key) == ("ner+ibc", corrected.correction.key)
    assert loaded.correction.timesteps == corrected.correction.timesteps
    for name in ("input_bias", "sigma_scale", "input_scale"):
        assert torch.equal(getattr(loaded.correction, name), getattr(corrected.correction, name))
    assert (loaded.noise.key, loaded.noise.modes) == (noise().key, MODES)
    assert torch.equal(loaded.noise.sums, noise().sums) and torch.equal(loaded.noise.alpha_bar, noise().alpha_bar)
    loaded.save_pretrained(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    images = [qe.sample(m, networks.ddim(), (2, *SHAPE), steps=STEPS, strict=True) for m in (corrected, loaded)]
    assert torch.equal(*images)
    again = qe.correct(loaded, networks.network(NAME), networks.ddim(), method="mmse", shape=SHAPE)
    assert torch.equal(again.table.output_scale, correct("mmse").table.output_scale), "the saved noise serves again"


def test_an_artifact_without_corrections_has_no_trace_of_them(tmp_path: Path) -> None:
    """What was written before there were corrections still loads: its recipe has no such field either."""
    model().save_pretrained(tmp_path / "a")
    data = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    config = json.loads(data["config.json"])
    assert not {"correction", "noise"} & set(config)
    del config["recipe"]["correct"]
    write(tmp_path / "old", resealed(data, config))
    loaded = qe.load(tmp_path / "old")
    assert loaded.correction is None and loaded.noise is None and loaded.recipe.correct == "none"
    x = networks.normal(1, *SHAPE)
    assert torch.equal(loaded(x, 250).sample, model()(x, 250).sample)


BAD: list[tuple[str, Any, str]] = [
    ("correction", [], "'correction' must hold"),
    ("correction", {"method": "ptqd"}, "'correction' must hold 'method' and 'key' and 'size'"),
    ("correction", {"method": 3, "key": {}, "size": []}, "'correction'.method must be of type str"),
    ("correction", {"method": "rm -rf", "key": {}, "size": []}, "'correction'.method: correct must be none"),
    ("correction", {"method": "ptqd", "key": [], "size": []}, "'correction'.key must be of type dict"),
    ("correction", {"method": "ptqd", "key": {}, "size": ["8"]}, "'correction'.size must hold sizes"),
    ("correction", {"method": "ptqd", "key": {}, "size": [2, 2, 2, 2]}, "'correction'.size must be a list of"),
    ("correction", {"method": "ptqd", "key": {}, "size": []}, "correction.input_bias"),
    ("correction", {"method": "ptqd", "key": {}, "size": [2**40, 1]}, "correction.input_bias"),
    ("noise", {"modes": ["A8"]}, "'noise' must hold 'modes' and 'key'"),
    ("noise", {"modes": [], "key": {}}, "'noise'.modes must hold some of A4, A8, A16"),
    ("noise", {"modes": ["A8", "A8", "A4"], "key": {}}, "'noise'.modes must hold"),
    ("noise", {"modes": ["A8", ["A4"], "A16"], "key": {}}, "'noise'.modes must hold"),
    ("noise", {"modes": ["A4", "A8"], "key": {}}, "noise.sums"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD)
def test_a_strangers_fields_are_checked(field: str, value: Any, message: str, tmp_path: Path) -> None:
    correct("ner+ibc").save_pretrained(tmp_path / "a")
    data = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    config = {**json.loads(data["config.json"]), field: value}
    assert message in refused(write(tmp_path / "b", resealed(data, config)))


def test_a_bias_of_another_size_than_the_networks_is_refused(tmp_path: Path) -> None:
    wrong = correct("none+ibc")
    assert wrong.correction is not None
    wrong.correction = dataclasses.replace(wrong.correction, input_bias=wrong.correction.input_bias[..., :8])
    wrong.save_pretrained(tmp_path)
    assert "'correction'.size must be [] or [16, 16] like the graph's sample, got [16, 8]" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("correction.input_bias", math.nan, "correction: input_bias must be finite"),
        ("correction.input_scale", -1.0, "correction: input_scale must be positive"),
        ("correction.sigma_scale", 2.0, r"correction: sigma_scale must lie in [0, 1]"),
        ("noise.sums", math.inf, "noise: sums must be finite"),
        ("noise.alpha_bar", -1.0, "noise: alpha_bar must lie in [0, 1]"),
    ],
)
def test_a_strangers_tensors_are_checked(name: str, value: float, message: str, tmp_path: Path) -> None:

    correct("ner+ibc").save_pretrained(tmp_path / "a")
    tensors = safetensors.torch.load((tmp_path / "a" / "model.safetensors").read_bytes())
    tensors[name].view(-1)[1] = value
    with open(tmp_path / "a" / "model.safetensors", "wb") as file:
        write_tensors(file, tensors)
    data = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert message in refused(write(tmp_path / "b", resealed(data)))


def test_corrections_of_other_rows_are_refused(tmp_path: Path) -> None:
    corrected = correct("ptqd")
    assert corrected.correction is not None
    rows = tuple(t + 1 for t in corrected.correction.timesteps)
    corrected.correction = dataclasses.replace(corrected.correction, timesteps=rows)
    with pytest.raises(ValueError, match="correction has other rows than the plan"):
        corrected.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
