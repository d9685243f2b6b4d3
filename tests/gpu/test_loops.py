"""The sampling loop, comparison and corrections with a model on an NVIDIA GPU and its float network there or not."""

from __future__ import annotations

import copy
from typing import Any

import networks
import pytest
import torch
from networks import CASES, SAMPLES, STEPS

import qdiff_engine as qe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and there is none here")
GUIDED: dict[str, Any] = {
    "conditioning": {"class_labels": torch.tensor([3, 7])},
    "unconditional": {"class_labels": torch.tensor([0])},
    "guidance_scale": 3.0,
}


def on_gpu(name: str, recipe: str) -> qe.IntegerUNet:
    return networks.rebuilt(networks.integer_model(name, recipe), device="cuda", dtype=torch.float32)


@pytest.mark.parametrize(("name", "given"), [("unet2d", {}), ("unet2d", {"eta": 1.0}), ("class", GUIDED)])
def test_a_gpu_draws_the_cpus_images(name: str, given: dict[str, Any]) -> None:
    """From the same seed, whatever the batch; in mode A16, where no flipped rounding magnifies a last bit."""
    shape, settings = (3, *CASES[name].shape), {"steps": STEPS, "seed": 5, **given}
    expected = qe.sample(networks.integer_model(name, "w8a16"), networks.ddim(), shape, **settings)
    for batch in (1, 3):
        drawn = qe.sample(on_gpu(name, "w8a16"), networks.ddim(), shape, batch=batch, **settings)
        assert drawn.device.type == "cpu" and networks.relative(drawn, expected) < 1e-3


@pytest.mark.parametrize("unet_device", ["cpu", "cuda"])
def test_comparing_and_correcting(unet_device: str) -> None:
    """The float network may be elsewhere than the model; what is measured is near what the CPU measures."""
    unet, shape = copy.deepcopy(networks.network("unet2d")).to(unet_device), CASES["unet2d"].shape
    found = []
    for model, reference in ((on_gpu("unet2d", "w4a8"), unet), (networks.integer_model("unet2d", "w4a8"), None)):
        network = networks.network("unet2d") if reference is None else reference
        noise = qe.measure_noise(model, network, networks.ddim(), shape, samples=SAMPLES)
        corrected = qe.correct(model, network, networks.ddim(), noise, "mmse+ibc+ivc", shape=shape)
        found.append(qe.compare(corrected, network, networks.ddim(), shape, STEPS, SAMPLES, seed=3))
        assert found[-1].finite and found[-1].images.device.type == "cpu"
    assert found[0].psnr_db == pytest.approx(found[1].psnr_db, abs=1.0)
