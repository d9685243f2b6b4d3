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


SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
NAMES = ("cifar10", "sd15", "sdxl")
_POOL = 1 << 22  # distinct random values; larger parameters repeat them


def random_unet(name: str, fill: bool = True) -> nn.Module:
    """A UNet of `NAMES` with random weights, in seconds where drawing 2.6 billion normal values takes a minute.

    ``fill`` False leaves its memory as it comes, which is enough for capturing it.

    Raises:
        OSError: diffusers, whose classes these are, cannot be imported.
        ValueError: the name is none of `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"model must be one of {', '.join(NAMES)}, got {name!r}")
    try:
        from diffusers.models.unets.unet_2d import UNet2DModel
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    except ImportError as error:
        raise OSError(f"the UNets are classes of diffusers ({error}); pip install diffusers") from None
    with torch.device("meta"):
        if name == "cifar10":
            made = UNet2DModel(**CIFAR10)
        else:
            made = UNet2DConditionModel(**(SD15 if name == "sd15" else SDXL))
    empty = made.to_empty(device="cpu").eval()
    return filled(empty) if fill else empty


@torch.no_grad()
def filled(unet: nn.Module) -> nn.Module:
    """``unet`` with weights of deviation 1 / sqrt(3 fan_in), as torch starts them, norms near 1 and biases near 0."""
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))
    norms = {id(m.weight) for m in unet.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
    for i, parameter in enumerate(unet.parameters()):
        flat, start = parameter.view(-1), (7919 * i) % (_POOL // 2)
        for at in range(0, len(flat), _POOL // 2):
            part = flat[at : at + _POOL // 2]
            part.copy_(pool[start : start + len(part)])
        if id(parameter) in norms:
            parameter.mul_(0.1).add_(1)
        elif parameter.dim() > 1:
            parameter.mul_((3 * parameter[0].numel()) ** -0.5)
        else:
            parameter.mul_(0.02)
    for buffer_name, buffer in unet.named_buffers():
        raise ValueError(f"buffer {buffer_name} {list(buffer.shape)} would be left without values")
    return unet


def shape_of(name: str) -> tuple[int, int, int]:
    """(C, H, W) of one sample."""
    return {"cifar10": (3, 32, 32), "sd15": (4, 64, 64), "sdxl": (4, 128, 128)}[name]


def conditioning_of(name: str, batch: int) -> dict[str, Any]:
    """Random keyword arguments for ``batch`` samples."""
    if name == "cifar10":
        return {}
    generator = torch.Generator().manual_seed(1)
    width = 768 if name == "sd15" else 2048
    given: dict[str, Any] = {"encoder_hidden_states": torch.randn(batch, 77, width, generator=generator)}
    if name == "sdxl":
        sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]).repeat(batch, 1)
        embeds = torch.randn(batch, 1280, generator=generator)
        given["added_cond_kwargs"] = {"text_embeds": embeds, "time_ids": sizes}
    return given


def scheduler() -> Any:
    """DDIM with diffusers' default schedule."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler()


def quantized(unet: nn.Module, precisions: list[str], steps: int = 4) -> dict[str, qe.IntegerUNet]:
    """Integer models of ``unet`` by precision, calibrated on a few short trajectories (enough for its speed)."""
    calibration = qe.calibrate(unet, scheduler(), steps=steps, samples=2, batch=2)
    return {name: qe.quantize(unet, calibration, qe.Recipe.named(name)) for name in precisions}
