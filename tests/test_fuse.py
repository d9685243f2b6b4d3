"""Patterns become fused integer operators, and what must not fuse does not; the numbers stay those of the module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import normal, relative
from torch import Tensor, nn

from qdiff_engine.calibration.calibration import Calibration, calibrate
from qdiff_engine.graph.interpret import run_float, simulate
from qdiff_engine.graph.ir import Graph, Node
from qdiff_engine.quantization import quantize
from qdiff_engine.recipe import Recipe
from qdiff_engine.runtime.lowering import lower_for_cpu
from qdiff_engine.runtime.summary import layer_rows

CHANNELS, SIZE = 8, 6
MULTIPLIES = ("int_conv2d", "int_gemm", "conv2d", "linear", "conv1d")


class Net(nn.Module):
    """conv -> body(h, temb) -> conv, with whatever parts the body needs."""

    def __init__(self, body: Callable[[Any, Tensor, Tensor], Tensor], out: int = CHANNELS, **parts: Any) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(2, CHANNELS, 1), nn.Conv2d(out, 2, 1)
        self.time, self.body = nn.Linear(1, CHANNELS), body
        self.norm, self.layer_norm = nn.GroupNorm(2, CHANNELS), nn.LayerNorm(CHANNELS)
        self.conv, self.linear = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Linear(CHANNELS, CHANNELS)
        self.gain = nn.Parameter(torch.rand(CHANNELS) + 0.5)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        temb = self.time(timestep[:, None].float() / 1000)
        h = self.body(self, torch.tanh(self.enter(sample)), temb)
        return self.leave(h if h.shape[2:] == (SIZE, SIZE) else F.adaptive_avg_pool2d(h, SIZE))


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def image(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, SIZE, SIZE)


def permuted_tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], SIZE * SIZE, -1)


def permuted_image(x: Tensor) -> Tensor:
    """As Stable Diffusion XL's linear projections come back."""
    return x.reshape(x.shape[0], SIZE, SIZE, -1).permute(0, 3, 1, 2)


def fused(net: Net) -> tuple[Graph, Calibration]:
    """The net's fused graph, after proving that it and the integers on it compute what the net computes."""
    networks.randomised(net)
    calibration = calibrate(net, networks.ddim(), shape=(2, SIZE, SIZE), steps=1, samples=4)
    x, t = normal(3, 2, SIZE, SIZE), int(calibration.timesteps[0])
    inputs = {"sample": x, "timestep": torch.full((3,), t)}
    with torch.no_grad():
        expected = net(x, inputs["timestep"])
    assert relative(run_float(calibration.capture.graph, calibration.capture.constants, inputs), expected) < 1e-5
    model = quantize(net, calibration, Recipe.named("w8a8"))
    simulated = simulate(model.graph, model.constants, model.weights, model.table, inputs)
    assert relative(model(x, t).sample, simulated) < relative(simulated, expected) < 0.1
    assert relative(networks.rebuilt(model, "torch")(x, t).sample, simulated) < relative(simulated, expected)
    return calibration.capture.graph, calibration


def layer(graph: Graph, name: str) -> Node:
    (node,) = (n for n in graph.nodes if n.kwargs.get("layer") == name)
    return node


def source(graph: Graph, name: str, at: int = 0) -> Node:
    """The node that feeds a layer."""
    return graph.node(layer(graph, name).args[at].name)


def operators(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes if node.section == "main")


def test_groupnorm_silu_conv() -> None:
    graph, _ = fused(Net(lambda n, h, t: n.conv(F.silu(n.norm(h)))))
    norm = source(graph, "conv")
    assert norm.op == "groupnorm_silu_quantize" and norm.kwargs["silu"] and norm.kwargs["groups"] == 2
    assert not {"group_norm", "silu"} & operators(graph).keys()


def test_groupnorm_conv_without_activation() -> None:
    graph, _ = fused(Net(lambda n, h, t: n.conv(n.norm(h))))
    assert source(graph, "conv").op == "groupnorm_silu_quantize" and not source(graph, "conv").kwargs["silu"]


def test_scale_and_shift_of_a_norm() -> None:
    """norm * (1 + scale) + shift, per sample and channel."""

    def body(n: Net, h: Tensor, t: Tensor) -> Tensor:
        scale, shift = t[:, :, None, None], F.silu(t)[:, :, None, None]
        return n.conv(F.silu(n.norm(h) * (1 + scale) + shift))

    graph, _ = fused(Net(body))
    norm = source(graph, "conv")
    assert norm.op == "groupnorm_silu_quantize" and norm.kwargs["norm_scale"] and norm.kwargs["norm_shift"]
    assert not {"mul", "add", "group_norm"} & operators(graph).keys()


def test_norm_over_a_concatenation() -> None:
    """Groups may straddle the two parts; the concatenation itself is never made."""
    graph, _ = fused(
        Net(
            lambda n, h, t: n.wide(F.silu(n.wide_norm(torch.cat([h, h * h], 1)))),
            wide=nn.Conv2d(2 * CHANNELS, CHANNELS, 3, padding=1),
            wide_norm=nn.GroupNorm(1, 2 * CHANNELS),
        )
    )
    assert len(source(graph, "wide").args) == 2 and "cat" not in operators(graph)


def test_layernorm_linear() -> None:
    graph, _ = fused(Net(lambda n, h, t: image(n.linear(n.layer_norm(tokens(h))))))
    assert source(graph, "linear").op == "layernorm_quantize" and "layer_norm" not in operators(graph)


def test_one_norm_feeds_three_linears_with_one_quantiser() -> None:
    def body(n: Net, h: Tensor, t: Tensor) -> Tensor:
        y = n.layer_norm(tokens(h))
        q, k, v = n.linear(y), n.key(y), n.value(y)
        return image(F.scaled_dot_product_attention(q, k, v))

    graph, _ = fused(Net(body, key=nn.Linear(CHANNELS, CHANNELS), value=nn.Linear(CHANNELS, CHANNELS)))
    assert operators(graph)["layernorm_quantize"] == 1
    assert len({layer(graph, name).args[0].name for name in ("linear", "key", "value")}) == 1


@pytest.mark.parametrize("gate_first", [False, True])
def test_geglu(gate_first: bool) -> None:
    """x[first half] * gelu(x[second half]) fuses; the other way round it stays three operators, and right."""

    def body(n: Net, h: Tensor, t: Tensor) -> Tensor:
        a, b = n.up(tokens(h)).chunk(2, dim=-1)
        return image(n.linear(F.gelu(a) * b if gate_first else a * F.gelu(b)))

    graph, _ = fused(Net(body, up=nn.Linear(CHANNELS, 2 * CHANNELS)))
    assert source(graph, "linear").kwargs["activation"] == ("none" if gate_first else "geglu")
    assert ("gelu" in operators(graph)) == gate_first


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    graph, _ = fused(Net(lambda n, h, t: image(n.linear(F.gelu(tokens(h) * 3, approximate=approximate)))))
    assert source(graph, "linear").kwargs["activation"] == ("gelu" if approximate == "none" else "gelu_tanh")


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k: F.scaled_dot_product_attention(q, k, k),  # [B, L, D], without heads
        lambda q, k: F.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None], scale=0.7)[:, 0],
        lambda q, k: F.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None], is_causal=True)[:, 0],
        lambda q, k: F.scaled_dot_product_attention(q, k, k, attn_mask=torch.ones(36, 36).tril().bool()),
        lambda q, k: F.scaled_dot_product_attention(q[:, None], k[:, None, ::2], k[:, None, ::2])[:, 0],
        lambda q, k: F.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None, :, :4])[:, 0].repeat(1, 1, 2),
        lambda q, k: torch.softmax(torch.einsum("bqd,bkd->bqk", q, k), -1) @ k,
        lambda q, k: torch.baddbmm(q, torch.softmax(q @ k.mT, -1), k, beta=0.5),
    ],
)
def test_attention_of_every_spelling(attend: Any) -> None:
    graph, _ = fused(Net(lambda n, h, t: image(attend(n.linear(tokens(h)), n.key(tokens(h)))), key=nn.Linear(8, 8)))
    assert operators(graph)["int_gemm"] == 2


def test_time_embedding_joins_the_convolution() -> None:
    """And on the CPU it moves on into the norm that reads the sum."""
    graph, _ = fused(
        Net(lambda n, h, t: n.second(F.silu(n.norm(n.conv(h) + t[:, :, None, None]))), second=nn.Conv2d(8, 8, 1))
    )
    assert layer(graph, "conv").kwargs["temb"] and "add" not in operators(graph)
    lowered = lower_for_cpu(graph)
    assert layer(lowered, "conv").kwargs["temb"] is None and source(lowered, "second").kwargs["pre_add"]
    assert layer(graph, "conv").kwargs["temb"]  # the graph itself stays as it was


def test_time_embedding_stays_where_others_read_the_sum() -> None:
    def body(n: Net, h: Tensor, t: Tensor) -> Tensor:
        y = n.conv(h) + t[:, :, None, None]
        return y + n.second(F.silu(n.norm(y)))

    graph, _ = fused(Net(body, second=nn.Conv2d(8, 8, 1)))
    assert layer(lower_for_cpu(graph), "conv").kwargs["temb"] and layer(graph, "second").kwargs["residual"]


def test_a_norm_quantises_what_a_shortcut_reads_beside_it() -> None:
    graph, _ = fused(Net(lambda n, h, t: n.conv(F.silu(n.norm(h))) + n.second(h), second=nn.Conv2d(8, 8, 1)))
    lowered = lower_for_cpu(graph)
    norm, copy = source(lowered, "conv"), source(lowered, "second")
    assert copy.op == "quantized_copy" and norm.kwargs["copies"] == {0: copy.name}
    assert source(graph, "second").op == "quantize", "the graph itself stays as it was"


def test_a_shortcut_that_comes_before_the_norm_quantises_for_itself() -> None:
    net = Net(lambda n, h, t: n.conv(F.silu(n.norm(h * n.second(h).mean()))) + n.second(h), second=nn.Conv2d(8, 8, 1))
    early = Net(lambda n, h, t: n.conv(F.silu(n.norm(n.second(h)))) + h, second=nn.Conv2d(8, 8, 1))
    for module in (net, early):
        lowered = lower_for_cpu(fused(module)[0])
        assert source(lowered, "second").op == "quantize"
        assert source(lowered, "conv").kwargs["copies"] == {}


@pytest.mark.parametrize("swapped", [False, True])
def test_residual_joins_the_convolution(swapped: bool) -> None:
    graph, _ = fused(Net(lambda n, h, t: h + n.conv(h) if swapped else n.conv(h) + h))
    assert layer(graph, "conv").kwargs["residual"] and "add" not in operators(graph)


@pytest.mark.parametrize("there, back", [(tokens, image), (tokens, permuted_image), (permuted_tokens, image)])
def test_residual_crosses_layout_changes(there: Callable[..., Tensor], back: Callable[..., Tensor]) -> None:
    """x + image(linear(tokens(x))): the residual takes the inverse way."""
    graph, _ = fused(Net(lambda n, h, t: h + back(n.linear(there(h)))))
    assert layer(graph, "linear").kwargs["residual"] and "add" not in operators(graph)


def test_a_value_read_twice_keeps_its_addition() -> None:
    def body(n: Net, h: Tensor, t: Tensor) -> Tensor:
        y = n.conv(h)
        return (y + h) * y

    graph, _ = fused(Net(body))
    assert layer(graph, "conv").kwargs["residual"] is None and operators(graph)["add"] == 1


def test_broadcast_addition_is_no_residual() -> None:
    graph, _ = fused(Net(lambda n, h, t: n.conv(h) + h.mean((2, 3), keepdim=True)))
    assert layer(graph, "conv").kwargs["residual"] is None and layer(graph, "conv").kwargs["temb"] is None


@pytest.mark.parametrize("kernel", [1, 3])
def test_skip_concatenation_becomes_two_segments(kernel: int) -> None:
    """Each with a scale, a zero point and a weight scale of its own."""
    graph, calibration = fused(
        Net(
            lambda n, h, t: n.short(torch.cat([h, 5 * h[:, :3]], 1)),
            short=nn.Conv2d(CHANNELS + 3, CHANNELS, kernel, padding=kernel // 2),
        )
    )
    node = layer(graph, "short")
    assert node.kwargs["segments"] == (CHANNELS, 3) and len(node.args) == 2 and "cat" not in operators(graph)
    sites = [graph.node(ref.name).kwargs["site"] for ref in node.args]
    low, high = (calibration.ranges[0, calibration.sites.index(s)].abs().max() for s in sites)
    assert high > 2 * low


@pytest.mark.parametrize("stride", [1, 2])
def test_nearest_upsampling_joins_the_convolution(stride: int) -> None:
    def body(n: Net, h: Tensor, t: Tensor) -> Tensor:
        return n.strided(F.interpolate(h, scale_factor=2, mode="nearest"))

    graph, _ = fused(Net(body, strided=nn.Conv2d(CHANNELS, CHANNELS, 3, stride=stride, padding=1)))
    assert layer(graph, "strided").kwargs["upsample"] == 2
    assert not any("upsample" in op for op in operators(graph))


def test_upsampling_by_a_fraction_stays() -> None:
    net = Net(lambda n, h, t: n.conv(F.interpolate(h, size=(9, 9), mode="nearest")))
    graph, _ = fused(net)
    assert layer(graph, "conv").kwargs["upsample"] == 1 and operators(graph)["upsample_nearest2d"] == 1


@pytest.mark.parametrize(
    ("pad", "expected"),
    [
        (lambda h: F.pad(h, (0, 1, 0, 1)), (1, 2, 1, 2)),
        (lambda h: F.pad(h, (2, 0, 1, 3)), (2, 4, 3, 1)),
        (lambda h: F.pad(h, (1, 1, 1, 1), value=0.7), (1, 1, 1, 1)),
        (lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"), (1, 1, 1, 1)),
        (lambda h: F.pad(h, (-1, 0, 0, -1)), (1, 1, 1, 1)),
    ],
)
def test_zero_padding_joins_the_convolution(pad: Any, expected: tuple[int, ...]) -> None:
    """(top, bottom, left, right); padding by anything but zeros, and cropping, stays outside."""
    graph, _ = fused(Net(lambda n, h, t: n.conv(pad(h))))
    assert layer(graph, "conv").kwargs["padding"] == expected
    stays = expected == (1, 1, 1, 1)
    assert any("pad" in op for op in operators(graph)) == stays


@pytest.mark.parametrize(
    ("kernel", "dilation", "expected"), [(3, 1, (1, 1, 1, 1)), (4, 1, (1, 2, 1, 2)), (3, 2, (2,) * 4)]
)
def test_same_padding(kernel: int, dilation: int, expected: tuple[int, ...]) -> None:
    conv = nn.Conv2d(CHANNELS, CHANNELS, kernel, padding="same", dilation=dilation)
    graph, _ = fused(Net(lambda n, h, t: n.same(h), same=conv))
    assert layer(graph, "same").kwargs["padding"] == expected


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(CHANNELS, CHANNELS, (1, 5), padding=(0, 2), bias=False),
        nn.Conv2d(CHANNELS, CHANNELS, (3, 2), stride=(2, 1), padding=(2, 0)),
    ],
)
def test_convolutions_of_every_geometry(conv: nn.Conv2d) -> None:
    graph, _ = fused(Net(lambda n, h, t: n.other(h), other=conv))
    assert layer(graph, "other").op == "int_conv2d"


def test_width_one_conv1d_is_a_linear() -> None:
    graph, _ = fused(Net(lambda n, h, t: n.pointwise(h.flatten(2)).reshape(h.shape), pointwise=nn.Conv1d(8, 8, 1)))
    assert layer(graph, "pointwise").op == "int_gemm" and "conv1d" not in operators(graph)


def test_a_module_called_twice_is_quantised_twice() -> None:
    graph, calibration = fused(Net(lambda n, h, t: n.conv(3 * torch.tanh(n.conv(h)))))
    assert layer(graph, "conv") is not layer(graph, "conv.again")
    assert {"conv", "conv.again"} <= set(calibration.sites)


@pytest.mark.parametrize(
    ("body", "parts", "reason"),
    [
        (lambda n, h, t: F.conv2d(h, n.conv.weight * n.gain[:, None, None, None]), {}, "weight is computed"),
        (lambda n, h, t: F.conv2d(h, n.conv.weight, n.gain * 2), {}, "bias is computed"),
        (lambda n, h, t: n.up(h), {"up": nn.ConvTranspose2d(8, 8, 2, stride=2)}, "transposed convolution"),
        (
            lambda n, h, t: n.wide(h.flatten(2)).reshape(h.shape),
            {"wide": nn.Conv1d(8, 8, 3, padding=1)},
            "wider than 1",
        ),
        (lambda n, h, t: image(torch.bmm(tokens(h), h.mean(2) @ h.mean(3).transpose(1, 2))), {}, "activations stay"),
    ],
)
def test_what_stays_floating_says_why(body: Any, parts: dict[str, nn.Module], reason: str) -> None:
    net = Net(body, **parts)
    _, calibration = fused(net)
    rows = layer_rows(quantize(net, calibration, Recipe.named("w8a8")))
    assert any(reason in (row["reason"] or "") for row in rows)
    assert {row["name"] for row in rows if row["quantized"]} >= {"enter", "leave"}


def test_the_time_embedding_stays_floating() -> None:
    net = Net(lambda n, h, t: n.conv(h) + t[:, :, None, None])
    _, calibration = fused(net)
    (row,) = (r for r in layer_rows(quantize(net, calibration, Recipe.named("w8a8"))) if r["name"] == "time")
    assert not row["quantized"] and "exact, and cached" in row["reason"]


def test_a_norm_with_computed_parameters_stays_floating() -> None:
    graph, _ = fused(Net(lambda n, h, t: n.conv(F.silu(F.group_norm(h, 2, n.gain * 2, n.gain)))))
    assert source(graph, "conv").op == "quantize" and operators(graph)["group_norm"] == 1


def test_first_and_last_layer_are_marked() -> None:
    graph, _ = fused(Net(lambda n, h, t: n.conv(h)))
    edges = {n.kwargs["layer"]: n.kwargs.get("edge") for n in graph.nodes if n.op in MULTIPLIES[:2]}
    assert edges == {"enter": "first", "conv": None, "leave": "last"}
