"""The networks that are timed. They have random weights: a forward pass takes the same time, its images are noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import qdiff_engine as qe

CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}


def cifar10_unet() -> nn.Module:
    """The DDPM UNet of CIFAR-10 (35.7M parameters), with random weights."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(**CIFAR10).eval()


def scheduler() -> Any:
    """DDIM with diffusers' default schedule."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler()


def quantized(unet: nn.Module, precisions: list[str], steps: int = 4) -> dict[str, qe.IntegerUNet]:
    """Integer models of ``unet`` by precision, calibrated on a few short trajectories (enough for its speed)."""
    calibration = qe.calibrate(unet, scheduler(), steps=steps, samples=2, batch=2)
    return {name: qe.quantize(unet, calibration, qe.Recipe.named(name)) for name in precisions}
