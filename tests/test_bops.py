"""BOPs against a count by hand, against torch's flop counter, and against the published figures of the CIFAR-10 net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import qdiff_engine as qe
from qdiff_engine.bops import Bops, count_bops, count_recipe
from qdiff_engine.graph.capture import Capture, capture
from qdiff_engine.graph.fuse import fuse


def fused(net: nn.Module, shape: tuple[int, ...], conditioning: dict[str, Any] | None = None) -> Capture:
    captured = capture(net.eval(), shape, conditioning)
    fuse(captured.graph, captured.constants)
    return captured


def counted(captured: Capture, recipe: qe.Recipe | None) -> Bops:
    return count_recipe(captured.graph, captured.constants, recipe)


def flops(net: nn.Module, *arguments: torch.Tensor) -> int:
    """torch's own count; its CPU flash attention is not in the table, so the plain one runs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net(*arguments)
    return counter.get_total_flops()


class ThreeLayers(nn.Module):
    """2 -> 4 channels at 6x6, 4 -> 6 at stride 2, 6 -> 2: three convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.middle = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(self.first(sample)) + 0.001 * timestep[:, None, None, None]
        return self.last(F.silu(self.middle(hidden)))


FIRST, MIDDLE, LAST = 6 * 6 * 4 * 2 * 9, 3 * 3 * 6 * 4 * 9, 3 * 3 * 2 * 6


class Mixed(nn.Module):
    """Everything else that multiplies: groups, transposed convolution, linear of time, three products, a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(4, 8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 5, 4, stride=2, padding=1)
        self.joined = nn.Conv2d(16, 8, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.enter(sample) + self.time(timestep[:, None].float().expand(-1, 4))[:, :, None, None]
        x = self.joined(torch.cat([self.grouped(F.silu(x)), x], 1))
        tokens = x.flatten(2).transpose(1, 2)
        weights = torch.bmm(tokens, tokens.transpose(1, 2)).softmax(-1)
        tokens = torch.matmul(weights, tokens) + torch.einsum("bij,bjc->bic", weights, tokens)
        attended = F.scaled_dot_product_attention(tokens[:, None], tokens[:, None, :9], tokens[:, None, :9])
        return self.up((tokens + attended[:, 0]).transpose(1, 2).reshape(x.shape))


def test_three_layers_by_hand() -> None:
    captured = fused(ThreeLayers(), (2, 6, 6))
    result = counted(captured, qe.Recipe.named("w4a8"))
    rows = [(row.name, row.macs, row.weight_bits, row.activation_bits) for row in result.layers]
    assert rows == [("first", FIRST, 8, 16), ("middle", MIDDLE, 4, 8), ("last", LAST, 8, 8)]
    assert result.total == FIRST * 8 * 16 + MIDDLE * 4 * 8 + LAST * 8 * 8
    assert result.reference == (FIRST + MIDDLE + LAST) * 32 * 32
    assert result.ratio == result.reference / result.total
    assert counted(captured, None).total == result.reference


@pytest.mark.parametrize(
    ("recipe", "first", "middle", "last"),
    [
        (qe.Recipe.named("w8a8"), (8, 16), (8, 8), (8, 8)),
        (qe.Recipe.named("w4a4"), (8, 16), (4, 4), (8, 8)),
        (qe.Recipe.named("w4a4", edges="a8"), (8, 8), (4, 4), (8, 8)),
        (qe.Recipe.named("w4a16"), (8, 16), (4, 16), (8, 16)),
        (qe.Recipe.named("w4a8", plan=("A16", "A8", "A4", "A4")), (8, 16), (4, 8), (8, 10)),
        (qe.Recipe.named("w4a8-mixed"), (8, 16), (4, 0.8 * 8 + 0.2 * 4), (8, 8)),
        (qe.Recipe.named("w4a8", plan="budget:0.6"), (8, 16), (4, 0.2 * 8 + 0.8 * 4), (8, 8)),
        (qe.Recipe.named("w8a8", plan="budget:1.2"), (8, 16), (8, 0.2 * 16 + 0.8 * 8), (8, 0.2 * 16 + 0.8 * 8)),
        (qe.Recipe.named("w4a8", plan="preset:imagenet-20"), (8, 16), (4, (5 * 4 + 15 * 8) / 20), (8, 8)),
    ],
)
def test_bits_follow_the_recipe(
    recipe: qe.Recipe, first: tuple[int, int], middle: tuple[int, int], last: tuple[int, int]
) -> None:
    result = counted(fused(ThreeLayers(), (2, 6, 6)), recipe)
    bits = [(row.weight_bits, row.activation_bits) for row in result.layers]
    assert bits == [pytest.approx(pair) for pair in (first, middle, last)]
    by_hand = [macs * w * a for macs, (w, a) in zip((FIRST, MIDDLE, LAST), (first, middle, last), strict=True)]
    assert result.total == pytest.approx(sum(by_hand))
    assert result.switchable_fraction == pytest.approx(middle[1] / 8)


def test_quantised_model_counts_what_its_recipe_said(demo_unet: nn.Module, demo_scheduler: Any) -> None:
    recipe = qe.Recipe.named("w4a8", plan=("A16", "A8", "A4"), observer="minmax")
    calibration = qe.calibrate(demo_unet, demo_scheduler, steps=3, samples=1)
    model = qe.quantize(demo_unet, calibration, recipe)
    expected = count_recipe(calibration.capture.graph, calibration.capture.constants, recipe)
    assert qe.count_bops(model) == expected
    assert model.table.bits.unique().tolist() == [4, 8, 16]


def test_every_product_like_torchs_counter() -> None:
    net = Mixed()
    result = counted(fused(net, (3, 4, 4)), qe.Recipe.named("w8a8"))
    assert 2 * result.macs == flops(net, torch.randn(1, 3, 4, 4), torch.tensor([7]))
    rows = {row.name: row for row in result.layers}
    assert rows["grouped"].macs == 4 * 4 * 8 * 2 * 9
    assert (rows["joined"].macs, rows["joined"].weight_bits) == (4 * 4 * 8 * 16, 8)
    for name in ("up", "time", "bmm", "matmul", "scaled_dot_product_attention"):
        assert (rows[name].weight_bits, rows[name].activation_bits) == (32, 32)


@pytest.fixture(scope="module")
def cifar() -> tuple[nn.Module, Capture]:
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    return net, fused(net, (3, 32, 32))


def test_cifar10_ddpm_in_floating_point(cifar: tuple[nn.Module, Capture]) -> None:
    net, captured = cifar
    result = counted(captured, None)
    attention = sum(row.macs for row in result.layers if row.name.startswith("scaled_dot_product"))
    assert 2 * result.macs == flops(net, torch.randn(1, 3, 32, 32), torch.tensor([7]))
    assert round(result.macs / 1e9, 2) == 6.22
    assert round(result.total / 1e9) == 6371
    assert round(attention / 1e9, 3) == 0.168


@pytest.mark.parametrize(("recipe", "ratio"), [("w8a8", 11.3), ("w4a8", 17.3), ("w4a4", 23.4)])
def test_cifar10_ddpm_on_integers(cifar: tuple[nn.Module, Capture], recipe: str, ratio: float) -> None:
    result = counted(cifar[1], qe.Recipe.named(recipe))
    assert round(result.ratio, 1) == ratio
    assert result.total == sum(row.macs * row.weight_bits * row.activation_bits for row in result.layers)


def test_json_object(cifar: tuple[nn.Module, Capture]) -> None:
    data = counted(cifar[1], qe.Recipe.named("w4a8")).to_dict()
    assert set(data) == {"total_gbops", "float_gbops", "ratio", "switchable_fraction", "layers"}
    assert set(data["layers"][0]) == {"name", "macs", "weight_bits", "activation_bits", "gbops"}
    assert sum(row["gbops"] for row in data["layers"]) == pytest.approx(data["total_gbops"])


def test_only_quantised_models_are_counted() -> None:
    with pytest.raises(TypeError, match="IntegerUNet"):
        count_bops(ThreeLayers())  # type: ignore[arg-type]
