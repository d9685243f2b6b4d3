"""The input sampler takes true patches: their product with the weights is a value of the layer's output."""

import pytest
import torch

from qdiff_engine.calibration.inputs import InputSampler
from qdiff_engine.graph.interpret import convolve
from qdiff_engine.graph.ir import Const, Graph, Node, Ref


def _sampler(node: Node, weight: torch.Tensor, steps: int = 4) -> InputSampler:
    node.kwargs |= {"layer": "layer", "weight": Const("w")}
    return InputSampler(Graph({"x": ("B",)}, [node], node.name), {"w": weight}, steps, seed=3)


def _is_among(rows: torch.Tensor, candidates: torch.Tensor) -> bool:
    """Whether every row of ``rows`` is close to some row of ``candidates``."""
    return bool((torch.cdist(rows.double(), candidates.double()).amin(1) < 1e-3).all())


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "upsample"),
    [((1, 1), (1, 1, 1, 1), (1, 1), 1), ((2, 2), (0, 1, 0, 1), (1, 1), 1), ((1, 2), (2, 2, 1, 3), (2, 1), 1),
     ((1, 1), (1, 1, 1, 1), (1, 1), 2)],
)  # fmt: skip
def test_convolution_patches(stride, padding, dilation, upsample) -> None:
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": 1, "upsample": upsample}
    weight = torch.randn(40, 3, 3, 3)
    x = torch.randn(2, 3, 9, 8).to(torch.bfloat16).float()  # exact in the sampler's storage
    y = convolve(x, weight, None, geometry)
    node = Node("n", "int_conv2d", (Ref("x"),), dict(geometry), ("B", *y.shape[1:]))
    sampler = _sampler(node, weight)
    sampler(node, 0, x)
    patches = sampler.taken["layer:0"].float()
    assert patches.shape == (sampler.per_step, 27)
    assert _is_among(patches @ weight.flatten(1).T, y.permute(0, 2, 3, 1).reshape(-1, 40))


def test_linear_rows() -> None:
    weight, x = torch.randn(5, 12), torch.randn(2, 7, 12).to(torch.bfloat16).float()
    node = Node("n", "int_gemm", (Ref("x"),), {}, ("B", 7, 5))
    sampler = _sampler(node, weight)
    sampler(node, 0, x)
    assert _is_among(sampler.taken["layer:0"].float(), x.reshape(-1, 12))


def test_one_take_per_step_the_same_for_the_same_step() -> None:
    weight, x = torch.randn(5, 12), torch.randn(2, 700, 12)
    node = Node("n", "int_gemm", (Ref("x"),), {}, ("B", 700, 5))
    sampler = _sampler(node, weight)
    sampler(node, 0, x)
    first = sampler.taken["layer:0"]
    sampler(node, 0, torch.zeros_like(x))
    assert sampler.taken["layer:0"] is first, "later batches of a step add nothing"
    sampler.start(1)
    sampler(node, 0, x)
    assert not torch.equal(sampler.taken["layer:0"], first), "another step draws other places"
    sampler.start(0)
    sampler(node, 0, x)
    assert torch.equal(sampler.taken["layer:0"], first), "a resumed run draws what the interrupted one did"
