"""Networks and samplers that few people write: what runs stays close to float, the rest is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import normal, relative
from torch import Tensor, nn

import qdiff_engine as qe

SHAPE = (3, 8, 8)


class Small(nn.Module):
    """enter -> body with an embedding [B, 8] of the timestep -> leave."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.inner, self.norm, self.time = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(1, 8)

    def embedding(self, t: Tensor) -> Tensor:
        return self.time(t.float()[:, None] / 1000)

    def body(self, h: Tensor, t: Tensor) -> Tensor:
        return self.inner(F.silu(self.norm(h))) + self.embedding(t)[:, :, None, None]

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.leave(F.silu(self.body(self.enter(x), t)))


class ScalarTime(Small):
    """Adds one number per sample, which is no time embedding of its channels."""

    def body(self, h: Tensor, t: Tensor) -> Tensor:
        return self.inner(F.silu(self.norm(h))) + t.float()[:, None, None, None] / 1000


class ScalarScale(Small):
    def body(self, h: Tensor, t: Tensor) -> Tensor:
        gain = t.float()[:, None, None, None] / 1000
        return F.silu(self.norm(self.inner(h)) * (1 + gain) + self.embedding(t)[:, :, None, None])


class Halves(Small):
    """Treats the two halves of an image as samples of their own, and so repeats the embedding along the batch."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        b, c, height, width = x.shape
        halves = x.reshape(b, c, 2, height // 2, width).transpose(1, 2).reshape(2 * b, c, height // 2, width)
        h = self.enter(halves) * (1 + self.embedding(t).repeat_interleave(2, 0)[:, :, None, None])
        return self.leave(F.silu(h)).reshape(b, 2, c, height // 2, width).transpose(1, 2).reshape(x.shape)


class SharedConv1d(Small):
    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Conv1d(8, 8, 1)

    def body(self, h: Tensor, t: Tensor) -> Tensor:
        return self.along(F.silu(self.along(h.flatten(2)))).reshape(h.shape)


@pytest.mark.parametrize("kind", [Small, ScalarTime, ScalarScale, Halves, SharedConv1d])
def test_it_runs_close_to_float_for_any_batch(kind: type[nn.Module]) -> None:
    net = networks.randomised(kind())
    calibration = qe.calibrate(net, networks.ddim(), shape=SHAPE, steps=3, samples=4)
    model = qe.quantize(net, calibration, qe.Recipe.named("w8a8"))
    t = int(calibration.timesteps[0])
    for batch in (1, 2, 3):
        x = normal(batch, *SHAPE)
        with torch.no_grad():
            expected = net(x, torch.full((batch,), t))
        assert relative(model(x, t).sample, expected) < 0.05


class Dictionary(Small):
    def forward(self, x: Tensor, t: Tensor) -> Any:
        return {"sample": super().forward(x, t)}


class HalfInside(Small):
    def body(self, h: Tensor, t: Tensor) -> Tensor:
        return super().body(h, t).to(torch.float16).to(torch.float32)


class Shouting(Small):
    def forward(self, x: Tensor, t: Tensor, Label: Tensor) -> Any:
        return super().forward(x, t) + Label[:, None, None, None]


@pytest.mark.parametrize(
    ("kind", "conditioning", "message"),
    [
        (Dictionary, None, "forward must return a tensor, a tuple or an object with .sample, got .*dict"),
        (HalfInside, None, "cannot be captured: a graph argument .* cannot be serialised: torch.float16"),
        (Shouting, {"Label": torch.ones(2)}, "lower-case letters, digits and '_'; torch.export calls 'label'"),
    ],
)
def test_what_cannot_be_captured_is_refused_before_any_work(kind: Any, conditioning: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qe.calibrate(kind().eval(), networks.ddim(), shape=SHAPE, steps=2, samples=2, conditioning=conditioning)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("DPMSolverMultistepScheduler", {}),  # lambda_min_clipped is -inf
        ("EDMEulerScheduler", {}),  # the network receives the logarithm of a noise level, less than 0
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ],
)
def test_samplers_of_every_schedule(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    import diffusers

    from qdiff_engine.cli.options import scheduler_of

    scheduler, net = getattr(diffusers, kind)(**settings), networks.randomised(Small())
    calibration = qe.calibrate(net, scheduler, shape=SHAPE, steps=4, samples=2)
    model = qe.quantize(net, calibration, qe.Recipe.named("w8a8"))
    images = qe.sample(model, scheduler, (2, *SHAPE), steps=4)
    assert bool(torch.isfinite(images).all())
    model.save_pretrained(tmp_path / "a")
    loaded = qe.load(tmp_path / "a")
    assert torch.equal(images, qe.sample(loaded, scheduler_of(loaded.key), (2, *SHAPE), steps=4))


def test_samplers_without_a_noise_level_are_refused() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(TypeError, match="FlowMatchEulerDiscreteScheduler without 'scale_model_input'"):
        qe.calibrate(Small().eval(), FlowMatchEulerDiscreteScheduler(), shape=SHAPE, steps=2, samples=2)
