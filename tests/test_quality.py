"""SSIM, Fréchet distances and class figures against cases worked out by hand; the bundled classifier."""

from __future__ import annotations

import gzip
import importlib
import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from networks import normal
from torch import Tensor, nn

import qdiff_engine as qe
from qdiff_engine.digits import CLASSES, FEATURES, WEIGHTS, digit_classifier
from qdiff_engine.evaluation import extractor_named
from qdiff_engine.graph.capture import hash_parameters
from qdiff_engine.models import DEMO_HASH
from qdiff_engine.quality import (
    Perception,
    class_diversity,
    class_entropy,
    extract,
    frechet_distance,
    perceive,
    structural_similarity,
)


def whitened(n: int, width: int, seed: int) -> Tensor:
    """float64 [n, width] with mean exactly 0 and covariance exactly the identity."""
    x = normal(n, width, seed=seed).double()
    q = torch.linalg.qr(x - x.mean(0)).Q
    return q * math.sqrt(n - 1)


def test_frechet_distance_of_two_gaussians_by_hand() -> None:
    """Diagonal covariances: |m - m'|^2 + sum (s - s')^2."""
    mean, other = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 0.0, 2.0])
    s, t = torch.tensor([1.0, 3.0, 0.2]), torch.tensor([2.0, 0.5, 0.2])
    x, y = whitened(50, 3, 1) * s + mean, whitened(40, 3, 2) * t + other
    expected = float((mean - other).square().sum() + (s - t).square().sum())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-12)
    turned = torch.linalg.qr(normal(3, 3, seed=4).double()).Q  # a rotation of both changes nothing
    assert frechet_distance(x @ turned, y @ turned) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    x = normal(200, 5, seed=1).double() @ normal(5, 5, seed=2).double()
    y = normal(300, 5, seed=3).double() @ normal(5, 5, seed=4).double() + 1
    a, b = torch.cov(x.T), torch.cov(y.T)
    trace = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * trace
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    x = normal(100, 4, seed=1)
    x = torch.cat([x, x[:, :1]], 1)  # one feature twice: a singular covariance
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_independent_draws_is_what_the_rule_says() -> None:
    """2 F / n from the means and F (F + 1) / (2 n) from the covariances: the bias that few samples leave."""
    n, width = 160, 16
    draws = [frechet_distance(normal(n, width, seed=2 * i), normal(n, width, seed=2 * i + 1)) for i in range(20)]
    expected = 2 * width / n + width * (width + 1) / (2 * n)
    assert sum(draws) / len(draws) == pytest.approx(expected, rel=0.1)
    assert expected == pytest.approx(width * (width + 5) / (2 * n))


def test_frechet_distance_needs_more_samples_than_features() -> None:
    with pytest.raises(ValueError, match="4 features needs more than 4 samples, got 4"):
        frechet_distance(normal(4, 4), normal(50, 4))
    with pytest.raises(ValueError, match="needs more than 1 samples, got 1"):
        frechet_distance(normal(1, 1), normal(50, 1))
    with pytest.warns(UserWarning, match="rough below 40 samples, got 39"):
        frechet_distance(normal(39, 4), normal(50, 4))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(torch.full((50, 2), math.nan), normal(50, 2))
    with pytest.raises(ValueError, match=r"\[50, 2\] and \[50, 3\]"):
        frechet_distance(normal(50, 2), normal(50, 3))


def test_ssim_of_constant_images_by_hand() -> None:
    """Without variance only the means count: (2 m m' + c1) / (m^2 + m'^2 + c1)."""
    a, b, c1 = 0.5, -0.25, (0.01 * 2) ** 2
    images, reference = torch.full((2, 3, 16, 16), a), torch.full((2, 3, 16, 16), b)
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert structural_similarity(images, reference) == pytest.approx([expected] * 2, rel=1e-12)


def test_ssim_of_a_picture_of_one_window_by_hand() -> None:
    x, y = normal(1, 1, 3, 3).double() / 3, normal(1, 1, 3, 3, seed=2).double() / 3
    kernel = torch.exp(-torch.tensor([-1.0, 0, 1]).double().square() / (2 * 1.5**2))
    w = torch.outer(kernel, kernel) / kernel.sum() ** 2
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, cov = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert structural_similarity(x, y) == pytest.approx([float(expected)], rel=1e-9)


def test_ssim_of_equal_and_of_noisier_images() -> None:
    reference = normal(3, 1, 32, 32).clamp(-1, 1) * 0.5
    noise = normal(3, 1, 32, 32, seed=2)
    equal, near, far = (structural_similarity(reference + s * noise, reference) for s in (0, 0.05, 0.5))
    assert equal == pytest.approx([1.0] * 3, abs=1e-12)
    assert all(1 > a > b > 0 for a, b in zip(near, far, strict=True))
    scaled = structural_similarity(40 * (reference + 0.05 * noise), 40 * reference, pixels=False)
    assert scaled == pytest.approx(structural_similarity(reference + 0.05 * noise, reference, pixels=False), rel=1e-6)
    ones = torch.ones(1, 1, 16, 16)
    assert structural_similarity(5 * ones, ones) == pytest.approx([1.0]), "pixels are clamped"
    with pytest.raises(ValueError, match=r"\[3, 1, 32, 32\]"):
        structural_similarity(reference[:1], reference)


def test_entropy_of_classes_by_hand() -> None:
    sure = torch.tensor([[1e3, 0.0], [0.0, 1e3]])
    assert class_entropy(sure) == 0 and class_diversity(sure) == pytest.approx(math.log(2))
    unsure = torch.zeros(3, 5)
    assert class_entropy(unsure) == pytest.approx(math.log(5)) == class_diversity(unsure)


class Means(nn.Module):
    """Mean of every channel as features; as logits, which of the first two is larger."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means = images.mean((2, 3))
        return means, 100 * means[:, :2]


def test_perception_clamps_pixels_and_compares_classes() -> None:
    reference = torch.zeros(4, 3, 2, 2)
    reference[:, 0], images = 0.5, torch.zeros(4, 3, 2, 2)
    images[:3, 0], images[3, 1] = 5.0, 0.5  # clamped to 1; the last one changes its class
    seen = perceive(Means(), images, reference)
    assert seen.class_accuracy == 0.75
    assert seen.frechet_to_float is not None and seen.frechet_note is not None and "rough" in seen.frechet_note
    assert seen.class_diversity_float == pytest.approx(0, abs=1e-6)
    assert seen.class_diversity == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    few = perceive(Means(), images[:3], reference[:3])
    assert few.frechet_to_float is None and "more than 3 samples, got 3" in str(few.frechet_note)
    assert float(extract(Means(), images)[0].max()) == 1.0
    assert float(extract(Means(), images, pixels=False)[0].max()) == 5.0


@pytest.mark.parametrize("output", [None, torch.zeros(2), torch.zeros(3, 4), (torch.zeros(2, 4), "logits")])
def test_an_extractor_that_returns_something_else_is_refused(output: Any) -> None:
    with pytest.raises(ValueError, match="the extractor must return"):
        extract(lambda _: output, torch.zeros(2, 1, 4, 4))


def test_bundled_classifier() -> None:
    model, again = digit_classifier(), digit_classifier()
    assert WEIGHTS.stat().st_size < 1e6 and not model.training
    images = normal(5, 1, 32, 32)
    features, logits = model(images)
    assert features.shape == (5, FEATURES) and logits.shape == (5, CLASSES)
    assert torch.equal(logits, again(images)[1])
    with pytest.raises(ValueError, match=r"\[n, 1, 32, 32\]"):
        model(images[:, :, :28, :28])


def test_bundled_classifier_knows_the_bundled_models_digits(demo_unet: nn.Module, demo_scheduler: Any) -> None:
    """Digits sampled in float are clear and varied; noise is not."""
    images = qe.sample(demo_unet, demo_scheduler, (16, 1, 32, 32), steps=20, seed=3)
    _, logits = extract(digit_classifier(), images)
    assert logits is not None
    assert class_entropy(logits) < 0.7 and class_diversity(logits) > 1.5
    assert float(logits.softmax(1).amax(1).median()) > 0.8


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The training script as a module."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "examples")
    yield importlib.import_module("train_classifier")
    for name in ("train_classifier", "train_mnist"):
        del sys.modules[name]


def test_training_script(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """IDX files and an .npz of the same digits give the same weights, which the classifier loads."""
    images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8).numpy()
    labels = torch.randint(0, 10, (20,), dtype=torch.uint8).numpy()
    for part in ("train", "t10k"):
        pixels = struct.pack(">4I", 2051, 20, 28, 28) + images.tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(pixels)
        data = gzip.compress(struct.pack(">2I", 2049, 20) + labels.tobytes())
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(data)
    numpy.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    outs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for source, out in zip((tmp_path, tmp_path / "mnist.npz"), outs, strict=True):
        arguments = ["--data", str(source), "--out", str(out), "--epochs", "2", "--batch", "8"]
        assert script.main(arguments) == 0
        assert "of 20 test images" in capsys.readouterr().out
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert outs[0].stat().st_size == WEIGHTS.stat().st_size
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"no labels")
    assert script.main(["--data", str(tmp_path), "--out", str(outs[0])]) == 1
    assert "not an IDX file of labels" in capsys.readouterr().err


def test_training_shifts_by_whole_pixels(script: Any) -> None:
    images = normal(30, 1, 6, 6)
    moved = script.shifted(images, torch.Generator().manual_seed(0), by=1)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    crops = [padded[:, :, i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    found = [[bool(torch.equal(crop[k], moved[k])) for crop in crops] for k in range(30)]
    assert all(sum(row) == 1 for row in found) and len({row.index(True) for row in found}) > 4


def test_the_classifier_is_the_default_of_the_bundled_network_only(demo_unet: nn.Module) -> None:
    assert hash_parameters(demo_unet) == DEMO_HASH
    assert isinstance(extractor_named("auto", demo_unet), nn.Module)
    assert extractor_named("auto", nn.Conv2d(1, 1, 1)) is None and extractor_named(None, demo_unet) is None
    means = Means()
    assert extractor_named(means, demo_unet) is means
    with pytest.raises(ValueError, match="'digits'"):
        extractor_named("inception", demo_unet)


def test_compare_reports_what_a_named_extractor_sees(demo_unet: nn.Module, demo_scheduler: Any) -> None:
    reports = [
        qe.compare(demo_unet, demo_unet, demo_scheduler, steps=2, samples=3, features=features)
        for features in (Means(), None)
    ]
    assert reports[0].perception.class_accuracy == 1.0 and reports[0].to_dict()["ssim"] == pytest.approx(1)
    assert reports[0].perception.frechet_to_float == pytest.approx(0, abs=1e-9)
    assert isinstance(reports[1].perception, Perception) and reports[1].perception.frechet_to_float is None
