"""Small networks with random parameters, their conditioning and their calibrations, shared by the tests."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff_engine.calibration.calibration import Calibration, calibrate
from qdiff_engine.quantization import quantize
from qdiff_engine.recipe import Recipe
from qdiff_engine.runtime.model import IntegerUNet
from qdiff_engine.sampling import Guidance, Step, conditioning_for, denoise, initial_noise

STEPS, SAMPLES = 4, 4


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal values from a seed of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(unet: nn.Module, seed: int = 0) -> nn.Module:
    """``unet`` in eval mode, with no bias left at 0 and no norm left at the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
                module.weight += 0.2 * torch.randn(module.weight.shape, generator=generator)
                module.bias += 0.2 * torch.randn(module.bias.shape, generator=generator)
    return unet.eval()


def unet2d(**changes: Any) -> nn.Module:
    """A small diffusers UNet2DModel, 3 channels at 16x16."""
    from diffusers import UNet2DModel

    config = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return randomised(UNet2DModel(**{**config, **changes}))


def cifar_shape() -> nn.Module:
    """The CIFAR-10 DDPM network's blocks, an eighth as wide, on 16x16 pixels."""
    return unet2d(
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def condition_unet(**changes: Any) -> nn.Module:
    """A small diffusers UNet2DConditionModel in the shape of Stable Diffusion: cross-attention and GEGLU, 4x8x8."""
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return randomised(UNet2DConditionModel(**{**config, **changes}))


def sdxl_shape() -> nn.Module:
    """A small network in the shape of Stable Diffusion XL: deeper transformers, added text and size conditions."""
    return condition_unet(
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )


class PlainUNet(nn.Module):
    """A UNet in plain torch that does what diffusers does not.

    Activation before norm, norm after convolution, strided 4x4 and transposed convolutions, attention from 1x1
    convolutions with bmm and softmax, lopsided F.pad, in-place SiLU, depthwise convolution, a module called twice,
    and a timestep that must be [B]. ``around``: a residual around the whole network, too.
    """

    def __init__(self, channels: int = 3, width: int = 16, around: bool = False) -> None:
        super().__init__()
        self.around = around
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(inplace=True), nn.Linear(32, width))
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)
        self.mix = nn.Conv2d(width, width, 3)
        self.depthwise = nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=width)
        self.down = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.after = nn.GroupNorm(8, 2 * width)
        self.query_key_value = nn.Conv2d(2 * width, 6 * width, 1)
        self.project = nn.Conv2d(2 * width, 2 * width, 1)
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.merge = nn.Conv2d(2 * width, width, 1)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)
        self.act = nn.SiLU(inplace=True)
        self.register_buffer("frequencies", torch.exp(-torch.arange(8.0)), persistent=False)

    def attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.query_key_value(x).reshape(b, 3, c, h * w).unbind(1)
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) * c**-0.5, dim=-1)
        return x + self.project(torch.bmm(v, weights.transpose(1, 2)).reshape(b, c, h, w))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        assert timesteps.shape == (x.shape[0],)
        angles = timesteps[:, None].float() * self.frequencies
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype))
        h = self.enter(x) + embedding[:, :, None, None]
        h = self.norm(F.silu(h))  # activation, then norm
        h = self.mix(F.pad(h, (0, 2, 2, 0)))
        skip = self.depthwise(self.act(h))
        h = self.act(self.after(self.down(skip)))  # norm after convolution
        h = self.attend(self.attend(h))
        h = self.merge(torch.cat([self.up(h), skip], dim=1))
        h = self.leave(F.leaky_relu(h, 0.2))
        return x + h if self.around else h


def sinusoids(timesteps: Tensor) -> Tensor:
    """[B, 8] sines and cosines of the timesteps."""
    angles = timesteps[:, None].float() * torch.exp(-torch.arange(4.0))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Guided(nn.Module):
    """Hears an image (inpainting: beside the latents; ControlNet: through layers of its own) and a label ``y``."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.label = nn.Linear(8, 16), nn.Embedding(5, 16)
        self.enter, self.control = nn.Conv2d(6, 16, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)
        self.leave = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, image: Tensor, y: Tensor) -> tuple[Tensor]:
        h = self.enter(torch.cat([x, image], dim=1)) + self.time(sinusoids(t)).view(-1, 16, 1, 1)
        h = h + self.label(y)[:, :, None, None]
        h = F.silu(h + self.control(image))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(h.mean((2, 3))))))
        return (self.leave(h * gate[:, :, None, None]),)


class Patches(nn.Module):
    """A transformer of patches: adaptive LayerNorm, attention from one projection, a last layer behind an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.modulate = nn.Conv2d(3, 32, 4, stride=4), nn.Linear(8, 64)
        self.norm, self.attention, self.mix = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.leave = nn.Linear(32, 48)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.enter(x)
        b, _, height, width = h.shape
        h = h.flatten(2).transpose(1, 2)
        scale, shift = self.modulate(sinusoids(t)).chunk(2, dim=1)
        y = self.norm(h) * (1 + scale[:, None]) + shift[:, None]
        q, k, v = self.attention(y).reshape(b, height * width, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, height * width, 32)
        h = h + self.mix(F.gelu(h, approximate="tanh"))
        tiles = self.leave(h).reshape(b, height, width, 3, 4, 4)
        return torch.einsum("nhwcpq->nchpwq", tiles).reshape(b, 3, 4 * height, 4 * width)


@dataclass(frozen=True)
class Case:
    """A network, the shape of a sample and the keyword arguments of two samples."""

    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    conditioning: dict[str, Any] = field(default_factory=dict)


CASES = {
    "unet2d": Case(unet2d, (3, 16, 16)),
    "cifar": Case(cifar_shape, (3, 16, 16)),
    "class": Case(lambda: unet2d(num_class_embeds=10), (3, 16, 16), {"class_labels": torch.tensor([3, 7])}),
    "scale-shift": Case(lambda: unet2d(resnet_time_scale_shift="scale_shift"), (3, 16, 16)),
    "sd": Case(condition_unet, (4, 8, 8), {"encoder_hidden_states": normal(2, 7, 24)}),
    "sdxl": Case(
        sdxl_shape,
        (4, 8, 8),
        {
            "encoder_hidden_states": normal(2, 7, 24),
            "added_cond_kwargs": {
                "text_embeds": normal(2, 16, seed=2),
                "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64], [32.0, 48, 4, 8, 64, 32]]),
            },
        },
    ),
    "plain": Case(lambda: randomised(PlainUNet()), (3, 16, 16)),
    "around": Case(lambda: randomised(PlainUNet(around=True)), (3, 16, 16)),
    "guided": Case(
        lambda: randomised(Guided()), (3, 16, 16), {"image": normal(2, 3, 16, 16, seed=3), "y": torch.tensor([4, 1])}
    ),
    "patches": Case(lambda: randomised(Patches()), (3, 16, 16)),
}


def ddim(**changes: Any) -> Any:
    """A DDIM scheduler that does not clip, so that errors are not hidden."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**{"num_train_timesteps": 1000, "clip_sample": False, **changes})


@functools.cache
def network(name: str) -> nn.Module:
    """The network of a case, always with the same parameters; shared, so a test that changes it copies it first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[name].make()


@functools.cache
def calibration(name: str) -> Calibration:
    """The case calibrated on a short DDIM trajectory."""
    case = CASES[name]
    return calibrate(
        network(name), ddim(), shape=case.shape, steps=STEPS, samples=SAMPLES, conditioning=case.conditioning
    )


@functools.cache
def bundled_unet() -> nn.Module:
    """The bundled network; shared, so a test that changes it copies it first."""
    from qdiff_engine.models import demo_model

    return demo_model().unet


@functools.cache
def bundled_calibration() -> Calibration:
    """The bundled network, calibrated on ten DDIM steps of the scheduler that it was trained with."""
    from qdiff_engine.models import ddim as ddim_like
    from qdiff_engine.models import demo_model

    return calibrate(bundled_unet(), ddim_like(demo_model().scheduler), steps=10, samples=4)


@functools.cache
def integer_model(name: str, recipe: str = "w8a8") -> IntegerUNet:
    """The case quantised by a named recipe; shared, so it is only called."""
    return quantize(network(name), calibration(name), Recipe.named(recipe))


def conditioning(name: str, batch: int) -> dict[str, Any]:
    """A case's keyword arguments for ``batch`` samples."""
    return conditioning_for(CASES[name].conditioning, range(batch))


@functools.cache
def trajectory(name: str) -> tuple[Step, ...]:
    """What the calibration saw: the steps of the float network's sampling run from seed 0."""
    case, steps = CASES[name], []
    with torch.no_grad():
        denoise(
            network(name),
            ddim(),
            initial_noise((SAMPLES, *case.shape), 0),
            steps=STEPS,
            guidance=Guidance(conditioning=case.conditioning),
            on_step=steps.append,
        )
    return tuple(steps)


def rebuilt(model: IntegerUNet, backend: str | None = None, **changes: Any) -> IntegerUNet:
    """``model`` compiled anew, on another backend or with some of its parts replaced."""
    parts = ("graph", "weights", "constants", "table", "recipe", "key", "model_config")
    return IntegerUNet(**{**{name: getattr(model, name) for name in parts}, **changes}, backend=backend)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with ``count`` threads, and back as it was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def relative(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in float64."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def flat_inputs(model: IntegerUNet, sample: Tensor, timestep: float, given: dict[str, Any]) -> dict[str, Tensor]:
    """The graph's inputs by name, as `IntegerUNet.forward` makes them."""
    from qdiff_engine.graph.interpret import flatten_conditioning

    inputs = {"sample": sample, "timestep": torch.full((len(sample),), int(timestep)), **flatten_conditioning(given)}
    assert set(inputs) == set(model.graph.inputs)
    return inputs


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
