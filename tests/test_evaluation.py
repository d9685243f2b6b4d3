"""The comparison's figures against cases whose answer is known, and against sampling both models apart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdiff_engine as qe
from qdiff_engine.evaluation import LIMIT_DB, compare_all, decibels, image_psnr

SHAPE = (1, 32, 32)


class Scaled(nn.Module):
    """A network whose prediction is off by a known factor."""

    def __init__(self, unet: nn.Module, factor: float) -> None:
        super().__init__()
        self.unet, self.factor = unet, factor

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.factor * self.unet(sample, timestep, return_dict=False)[0]


class Labelled(nn.Module):
    """Predicts a fraction of the latents that depends on the label."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return sample * (0.1 * class_labels.float())[:, None, None, None]


def test_a_model_equals_itself(demo_unet: nn.Module, demo_scheduler: Any) -> None:
    report = qe.compare(demo_unet, demo_unet, demo_scheduler, steps=3, samples=2)
    assert report.psnr == (LIMIT_DB, LIMIT_DB)
    assert report.step_sqnr_db == [LIMIT_DB] * 3
    assert report.latent_error == [0.0] * 3
    assert torch.equal(report.images, report.float_images) and report.finite


def test_sqnr_is_measured_on_the_float_inputs(demo_unet: nn.Module, demo_scheduler: Any) -> None:
    report = qe.compare(Scaled(demo_unet, 1.01), demo_unet, demo_scheduler, SHAPE, steps=3, samples=2)
    assert report.step_sqnr_db == pytest.approx([40.0] * 3, abs=1e-3)


def test_latents_and_images_are_those_of_sampling_apart(demo_unet: nn.Module, demo_scheduler: Any) -> None:
    model = Scaled(demo_unet, 1.05)
    report = qe.compare(model, demo_unet, demo_scheduler, SHAPE, steps=3, samples=3, seed=5, batch=2)
    expected = qe.sample(demo_unet, demo_scheduler, (3, *SHAPE), steps=3, seed=5, batch=2)
    actual = qe.sample(model, demo_scheduler, (3, *SHAPE), steps=3, seed=5, batch=2)
    assert torch.equal(report.float_images, expected) and torch.equal(report.images, actual)
    assert report.latent_error[-1] == pytest.approx(float((actual - expected).norm() / expected.norm()), rel=1e-5)
    mse = (actual.clamp(-1, 1) - expected.clamp(-1, 1)).square().flatten(1).mean(1)
    psnr = [10 * math.log10(4 / float(value)) for value in mse]
    assert list(report.psnr) == pytest.approx(psnr, rel=1e-5)
    assert report.psnr_db == pytest.approx(sum(psnr) / 3) and report.psnr_db_min == pytest.approx(min(psnr))


def test_the_json_object(demo_unet: nn.Module, demo_scheduler: Any) -> None:
    report = qe.compare(Scaled(demo_unet, 0.9), demo_unet, demo_scheduler, SHAPE, steps=2, samples=2)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert {"psnr_db", "psnr_db_min", "step_sqnr_db", "latent_error", "finite", "samples"} <= set(data)
    assert {"ssim", "frechet_to_float", "frechet_note", "class_accuracy", "class_entropy"} <= set(data)
    assert len(data["step_sqnr_db"]) == len(data["latent_error"]) == 2 and data["samples"] == 2


def test_models_share_one_float_trajectory(demo_unet: nn.Module, demo_scheduler: Any) -> None:
    seen: list[str] = []
    models = {"a": Scaled(demo_unet, 1.01), "b": Scaled(demo_unet, 1.1)}
    reports = compare_all(
        models, demo_unet, demo_scheduler, SHAPE, steps=2, samples=2, on_step=lambda name, _: seen.append(name)
    )
    assert seen == ["float"] * 2 + ["a"] * 2 + ["b"] * 2
    alone = qe.compare(models["b"], demo_unet, demo_scheduler, SHAPE, steps=2, samples=2)
    assert reports["b"].to_dict() == alone.to_dict()
    short = compare_all(models, demo_unet, demo_scheduler, SHAPE, steps=2, samples=2, step_sqnr=False)["b"]
    assert short.to_dict() == {**alone.to_dict(), "step_sqnr_db": []}


def test_float_predictions_are_read_again(demo_unet: nn.Module, demo_scheduler: Any, tmp_path: Path) -> None:
    calls: list[int] = []
    models = {"a": Scaled(demo_unet, 1.01)}

    def compared(seed: int, cache: Path | None) -> dict[str, Any]:
        handle = demo_unet.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
        try:
            setting = {"steps": 2, "samples": 2, "seed": seed, "cache_dir": cache}
            return compare_all(models, demo_unet, demo_scheduler, SHAPE, **setting, step_sqnr=False)["a"].to_dict()
        finally:
            handle.remove()

    first = compared(0, tmp_path / "float")
    assert len(calls) == 4  # two of the float trajectory, two inside the other model
    (tmp_path / "float" / "step-00001.safetensors").unlink()
    assert compared(0, tmp_path / "float") == first and len(calls) == 4 + 3  # as after an interruption
    assert compared(0, tmp_path / "float") == first and len(calls) == 4 + 3 + 2
    assert compared(1, tmp_path / "float") == compared(1, None) and len(calls) == 4 + 3 + 2 + 8


def test_guidance_reaches_both_models(demo_scheduler: Any) -> None:
    labels = {"class_labels": torch.tensor([1, 2])}
    without = {"class_labels": torch.tensor([0])}
    report = qe.compare(
        Labelled(),
        Labelled(),
        demo_scheduler,
        (4, 8, 8),
        steps=2,
        samples=3,
        batch=2,
        guidance_scale=2.0,
        conditioning=labels,
        unconditional=without,
    )
    assert report.latent_error == [0.0, 0.0] and report.step_sqnr_db == [LIMIT_DB, LIMIT_DB]
    expected = qe.sample(
        Labelled(),
        demo_scheduler,
        (3, 4, 8, 8),
        steps=2,
        guidance_scale=2.0,
        conditioning=labels,
        unconditional=without,
    )
    assert torch.equal(report.images, expected)


def test_psnr_of_pixels_by_hand() -> None:
    reference = torch.full((2, 1, 2, 2), 3.0)  # clamped to 1
    images = torch.tensor([1.0, 0.8]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert image_psnr(images, reference, pixels=True) == pytest.approx([LIMIT_DB, 20.0])


def test_psnr_of_latents_has_the_float_range_as_peak() -> None:
    reference = torch.tensor([-4.0, 6.0]).reshape(1, 1, 1, 2)
    assert image_psnr(reference + 1, reference, pixels=False) == pytest.approx([20.0])


@pytest.mark.parametrize(
    ("signal", "noise", "expected"), [(1, 0, LIMIT_DB), (0, 0, LIMIT_DB), (0, 1, -LIMIT_DB), (100, 1, 20)]
)
def test_decibels_have_no_infinities(signal: float, noise: float, expected: float) -> None:
    assert decibels(signal, noise) == pytest.approx(expected)


def test_training_mode_is_put_back(demo_scheduler: Any) -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.dropout(sample)

    net = Dropped().train()
    report = qe.compare(Dropped().eval(), net, demo_scheduler, (4, 4, 4), steps=2, samples=1)
    assert net.training and report.latent_error == [0.0, 0.0]


@pytest.mark.parametrize(
    ("change", "name"), [({"samples": 0}, "samples"), ({"steps": 0}, "steps"), ({"seed": -1}, "seed")]
)
def test_bad_arguments(change: dict[str, int], name: str, demo_unet: nn.Module, demo_scheduler: Any) -> None:
    with pytest.raises(ValueError, match=name):
        qe.compare(demo_unet, demo_unet, demo_scheduler, **{"steps": 2, "samples": 1, **change})


def test_a_prediction_that_is_not_finite_is_refused(demo_unet: nn.Module, demo_scheduler: Any) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        qe.compare(Scaled(demo_unet, math.nan), demo_unet, demo_scheduler, SHAPE, steps=2, samples=1)
