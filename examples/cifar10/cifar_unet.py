"""The DDPM UNet of CIFAR-10 in plain torch; its parameters have the names and shapes of diffusers' `UNet2DModel`.

ε(x, t): x [B, C, H, W], t [B]; one level per entry of ``channels``, attention at the second one and in the middle.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
EPS = 1e-5


class Residual(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))), the shortcut a 1x1 convolution where widths differ."""

    def __init__(self, cin: int, cout: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, cin, EPS), nn.Conv2d(cin, cout, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, cout)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, cout, EPS), nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """x + out(softmax(q k^T / sqrt(d)) v) over all pixels, per head of ``head`` channels."""

    def __init__(self, channels: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.group_norm = nn.GroupNorm(GROUPS, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            layer(tokens).reshape(b, h * w, -1, self.head).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.to_out[0](y).transpose(1, 2).reshape(b, c, h, w)


class Resample(nn.Module):
    """A convolution of stride 2, or one behind nearest-neighbour upsampling."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class Level(nn.Module):
    """Residual blocks of one resolution, and the way to the next."""

    def __init__(self, widths: list[tuple[int, int]], time: int, head: int | None, resample: str | None) -> None:
        super().__init__()
        cout = widths[-1][1]
        self.resnets = nn.ModuleList([Residual(cin, cout, time) for cin, cout in widths])
        if head is not None:
            self.attentions = nn.ModuleList([Attention(cout, head) for _ in range(max(1, len(widths)))])
        if resample is not None:
            setattr(self, f"{resample}samplers", nn.ModuleList([Resample(cout, resample == "up")]))

    def block(self, i: int, x: Tensor, time: Tensor) -> Tensor:
        """Residual block i, and its attention where the level has any."""
        x = self.resnets[i](x, time)
        return self.attentions[i](x) if hasattr(self, "attentions") else x


class Middle(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, channels: int, time: int, head: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, head)])
        self.resnets = nn.ModuleList([Residual(channels, channels, time) for _ in range(2)])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time)), time)


class TimeEmbedding(nn.Module):
    """silu(W1 [cos, sin](t f)) W2, f from 1 down to 1 / 10000."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1, self.linear_2 = nn.Linear(channels, width), nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.channels // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timestep.device) / half)
        angles = timestep[:, None].float() * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.linear_2(F.silu(self.linear_1(waves.to(self.linear_1.weight.dtype))))


class CifarUNet(nn.Module):
    """ε(x, t) of the module's docstring.

    Args:
        channels: width of every level, multiples of 32. layers: residual blocks per level on the way down.
        head: channels of an attention head.
    """

    def __init__(self, channels: tuple[int, ...] = (128, 160, 160), layers: int = 2, head: int = 32) -> None:
        super().__init__()
        self.channels, self.layers, self.head = channels, layers, head
        time, last = 4 * channels[0], len(channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], time)
        self.down_blocks, skips, width = nn.ModuleList(), [channels[0]], channels[0]
        for i, cout in enumerate(channels):
            widths = [(width if j == 0 else cout, cout) for j in range(layers)]
            self.down_blocks.append(Level(widths, time, head if i == 1 else None, "down" if i < last else None))
            skips += [cout] * (layers + (i < last))
            width = cout
        self.mid_block = Middle(width, time, head)
        self.up_blocks = nn.ModuleList()
        for i, cout in reversed(list(enumerate(channels))):
            widths = []
            for _ in range(layers + 1):
                widths.append((width + skips.pop(), cout))
                width = cout
            self.up_blocks.append(Level(widths, time, head if i == 1 else None, "up" if i > 0 else None))
        self.conv_norm_out, self.conv_out = nn.GroupNorm(GROUPS, width, EPS), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = self.time_embedding(timestep)
        h = self.conv_in(x)
        skips = [h]
        for level in self.down_blocks:
            for i in range(self.layers):
                h = level.block(i, h, time)
                skips.append(h)
            if hasattr(level, "downsamplers"):
                h = level.downsamplers[0](h)
                skips.append(h)
        h = self.mid_block(h, time)
        for level in self.up_blocks:
            for i in range(self.layers + 1):
                h = level.block(i, torch.cat([h, skips.pop()], dim=1), time)
            if hasattr(level, "upsamplers"):
                h = level.upsamplers[0](h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def diffusers_config(self) -> dict[str, Any]:
        """config.json of the `UNet2DModel` that has these parameters."""
        count = len(self.channels)
        kinds = ["AttnDownBlock2D" if i == 1 else "DownBlock2D" for i in range(count)]
        return {
            "_class_name": "UNet2DModel",
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": self.layers,
            "block_out_channels": list(self.channels),
            "down_block_types": kinds,
            "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
            "attention_head_dim": self.head,
            "norm_num_groups": GROUPS,
        }
