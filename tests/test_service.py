"""A model in somebody else's program: threads, autocast, parameters that train on, and what pipelines ask of it."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator

import networks
import numpy
import pytest
import torch
from networks import normal

import qdiff_engine as qe
from qdiff_engine.runtime import program

NAME = "unet2d"
SIZE = networks.CASES[NAME].shape


def test_parameters_that_change_afterwards_change_nothing() -> None:
    """Norms and float layers are the calibrated network's own numbers, not a view of a module that trains on."""
    net = copy.deepcopy(networks.network(NAME))
    calibration = qe.calibrate(net, networks.ddim(), shape=SIZE, steps=3, samples=2)
    model = qe.quantize(net, calibration, qe.Recipe.named("w8a8"))
    x = normal(2, *SIZE)
    before, pristine = model(x, 500).sample, copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    assert torch.equal(model(x, 500).sample, before)
    again = qe.quantize(pristine, calibration, qe.Recipe.named("w8a8"))
    assert torch.equal(again(x, 500).sample, before)
    with pytest.raises(ValueError, match="its parameters have another hash"):
        qe.quantize(net, calibration, qe.Recipe.named("w8a8"))


def test_autocast_changes_nothing_now_or_later() -> None:
    model, x = networks.rebuilt(networks.integer_model(NAME)), normal(2, *SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model(x, 500).sample
    expected = networks.rebuilt(model)(x, 500).sample
    assert inside.dtype == torch.float32
    assert torch.equal(inside, expected) and torch.equal(model(x, 500).sample, expected)


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty_threads")
def test_threads_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """More prompts and timesteps than are remembered, from four threads: every call returns what it returns alone."""
    monkeypatch.setattr(program, "_CACHED_TIMESTEPS", 2)
    model = networks.rebuilt(networks.integer_model("sd"))
    x = normal(1, *networks.CASES["sd"].shape)
    given = [((100, 400, 700)[i % 3], normal(1, 7, 24, seed=i)) for i in range(6)]
    expected = [networks.rebuilt(model)(x, *arguments).sample for arguments in given]
    wrong: list[object] = []

    def call(offset: int) -> None:
        try:
            for i in range(40):
                at = (i + offset) % len(given)
                if not torch.equal(model(x, *given[at]).sample, expected[at]):
                    wrong.append(at)
        except Exception as error:  # shown by the assertion, in the main thread
            wrong.append(error)

    callers = [threading.Thread(target=call, args=(offset,)) for offset in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_timesteps_are_numbers_of_any_kind() -> None:
    model, x = networks.integer_model(NAME), normal(1, *SIZE)
    for timestep in (numpy.int64(400), numpy.float32(400), torch.tensor(400)):
        assert torch.equal(model(x, timestep).sample, model(x, 400).sample)


def test_moving_a_model_is_refused_and_not_ignored() -> None:
    model = networks.integer_model(NAME)
    for move in (model.cuda, lambda: model.cuda(0), lambda: model.to("cuda", torch.float16)):
        with pytest.raises(ValueError, match="load the artifact with device='cuda"):
            move()
    assert model.cpu() is model and model.half() is model


def test_what_pipelines_of_sdxl_ask() -> None:
    """StableDiffusionXLPipeline compares its time ids' width with unet.add_embedding.linear_1.in_features."""
    pipelines = pytest.importorskip("diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl")
    model = networks.integer_model("sdxl")
    assert model.add_embedding.linear_1.in_features == 16 + 6 * 8
    holder = type("Pipeline", (), {"unet": model})()
    sizes = [(64, 64), (0, 0), (64, 64)]
    given = pipelines.StableDiffusionXLPipeline._get_add_time_ids(holder, *sizes, torch.float32, 16)
    assert given.tolist() == [[64, 64, 0, 0, 64, 64]]
    assert not hasattr(networks.integer_model(NAME), "add_embedding")


def test_a_model_may_be_told_not_to_look_for_nan() -> None:
    model, x = networks.rebuilt(networks.integer_model(NAME), check=False), normal(1, *SIZE)
    x[0, 0, 0, 0] = float("nan")
    assert model(x, 500).sample.shape == x.shape
    with pytest.raises(ValueError, match="sample holds NaN"):
        networks.integer_model(NAME)(x, 500)
