"""Rounding, step sizes and alignment learnt on an NVIDIA GPU, beside the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networks
import pytest
import torch
from aligning import GUIDED, calibrated, quantised

import qdiff_engine as qe
from qdiff_engine.alignment.alignment import end_errors
from qdiff_engine.alignment.training import Progress
from qdiff_engine.reconstruction.stage import Progress as Learning

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and there is none here")


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """cuDNN multiplies float32 in TF32 unless told not to; the CPU does not."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    yield
    convolutions.fp32_precision = before


def share_of_equal_integers(a: qe.IntegerUNet, b: qe.IntegerUNet) -> float:
    pairs = [(v.values, w.values) for name in a.weights for v, w in zip(a.weights[name], b.weights[name], strict=True)]
    return sum(int((v == w).sum()) for v, w in pairs) / sum(v.numel() for v, _ in pairs)


@pytest.mark.parametrize("name", ["unet2d", "sd"])
def test_gptq_rounds_as_the_cpu_does(name: str) -> None:
    """But for ties that float32 sums in another order decide otherwise."""
    arguments: tuple[Any, ...] = (networks.network(name), networks.calibration(name), qe.Recipe.named("w4a8"))
    on_cpu, on_gpu = (qe.quantize(*arguments, device=device) for device in ("cpu", "cuda"))
    assert share_of_equal_integers(on_cpu, on_gpu) > 0.98


@pytest.mark.parametrize("name", ["unet2d", "sd"])
def test_learnt_rounding_lowers_the_loss_as_on_the_cpu(name: str) -> None:
    recipe = qe.Recipe.named("w4a4", weights="adaround", learn_iterations=100, step_sizes="learnt")
    ends = []
    for device in ("cpu", "cuda"):
        told: list[Learning] = []
        model = qe.quantize(
            networks.network(name), networks.calibration(name), recipe, device=device, on_progress=told.append
        )
        assert all(w.values.device.type == "cpu" for parts in model.weights.values() for w in parts)
        last = [p.loss for p in told if p.iteration > 90 and p.loss is not None]
        ends.append(sum(last) / len(last))
    assert ends[1] == pytest.approx(ends[0], rel=0.15)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", ["plain", "guided", "dpm"])
def test_alignment_learns_what_it_learns_on_the_cpu(case: str, recompute: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    given: dict[str, dict[str, Any]] = {"guided": GUIDED, "dpm": {"scheduler": diffusers.DPMSolverMultistepScheduler()}}
    calibration = calibrated(**given.get(case, {}))
    model = quantised(calibration)
    settings = qe.AlignmentSettings(group=2, iterations=20, batch=2, recompute=recompute)
    told: dict[str, list[Progress]] = {"cpu": [], "cuda": []}
    aligned = {
        device: qe.align(model, calibration, settings, device=device, on_iteration=seen.append)
        for device, seen in told.items()
    }
    assert told["cuda"][0].loss == pytest.approx(told["cpu"][0].loss, rel=0.05)
    errors = {device: sum(end_errors(found, calibration, 2)) for device, found in aligned.items()}
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.1)
    assert errors["cuda"] < sum(end_errors(model, calibration, 2))
