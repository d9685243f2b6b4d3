"""``pytest benchmarks --benchmark-only``: one forward pass of the CIFAR-10 UNet under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qdiff_engine as qe
from benchmarks import models
from qdiff_engine.benchmarking import check_outputs, input_sets
from qdiff_engine.measuring import channels_last
from qdiff_engine.sampling import predict


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, qe.IntegerUNet]:
    """The float network, channels last, and its W8A8 model, whose outputs resemble the float ones."""
    unet = channels_last(models.cifar10_unet())
    model = models.quantized(unet, ["w8a8"], steps=2)["w8a8"]
    inputs = input_sets(model, 1, None, None)
    with torch.inference_mode():
        check_outputs(lambda i: predict(model, *inputs[i]), lambda i: predict(unet, *inputs[i]), len(inputs))
    return unet, model


@pytest.mark.parametrize("contestant", ["engine-w8a8", "torch-fp32", "torch-bf16"])
def test_unet(benchmark: Any, pair: tuple[nn.Module, qe.IntegerUNet], contestant: str) -> None:
    """Batch 8."""
    unet, model = pair
    inputs = input_sets(model, 8, None, None)[0]
    network = model if contestant.startswith("engine") else unet
    benchmark.group = "cifar10 batch 8 (random weights)"
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=contestant == "torch-bf16"):
        benchmark.pedantic(predict, (network, *inputs), warmup_rounds=2, rounds=10)
