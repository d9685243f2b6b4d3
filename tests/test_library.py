"""torch.ops.qdiff: PyTorch's own checks of the operators, and compiled functions that equal eager ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from comparing import present
from torch import Tensor

from qdiff_engine import ops, reference
from qdiff_engine.ops import library

library.register()
CHANNELS_LAST = torch.channels_last
AFFINE = torch.tensor([0.05, 1 / 0.05, 3.0])  # s, 1 / s, z
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(params=["triton", None], ids=["triton", "fastest"])
def backend(request: pytest.FixtureRequest) -> str | None:
    return None if request.param is None else present(request.param)


def integers(*shape: int, low: int = -128) -> Tensor:
    return torch.randint(low, 128, shape, dtype=torch.int8)


def image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=CHANNELS_LAST)


def integer_image(*shape: int) -> Tensor:
    return integers(*shape).contiguous(memory_format=CHANNELS_LAST)


def gemm(n: int, k: int) -> tuple[Tensor, ...]:
    packed = ops.pack_gemm(integers(n, k, low=-127), torch.rand(n) * 0.01)
    return packed.values, packed.scale, packed.sums


GEOMETRY = ([1, 1], [1, 1, 1, 1], [1, 1], 1, 1)  # stride, padding, dilation, groups, upsample
ENLARGED = ([2, 1], [0, 1, 2, 1], [1, 1], 1, 2)
TAIL = (None, None, None)


def conv(n: int, *channels: int) -> tuple[list[Tensor], ...]:
    weights = [ops.pack_conv2d(integers(n, c, 3, 3, low=-127), torch.rand(n) * 0.01) for c in channels]
    return [w.values for w in weights], [w.scale for w in weights], [w.sums for w in weights]


# operator and name of a case -> the raw operator's arguments but the backend
CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "quantize": lambda: (torch.randn(3, 7), AFFINE, 8, "none", torch.rand(7) + 0.5, 1, [0] * 4, torch.int8),
    "quantize geglu": lambda: (torch.randn(2, 3, 8), AFFINE, 4, "geglu", None, 1, [0] * 4, torch.uint8),
    "quantize image": lambda: (image(2, 5, 3, 4), AFFINE, 8, "silu", None, 2, [1, 0, 2, 1], torch.int8),
    "groupnorm_silu_quantize": lambda: (
        *(image(2, 8, 3, 4), 4, torch.rand(12), torch.rand(12), 1e-5, AFFINE, 8, True, image(2, 4, 3, 4)),
        *(torch.randn(2, 12), torch.randn(2, 12), torch.randn(2, 12), torch.rand(12), 2, [1, 0, 2, 1], torch.int8),
    ),
    "groupnorm_silu_quantize floating": lambda: (
        *(torch.randn(2, 8, 5), 4, None, None, 1e-5, None, 8, False),
        *(None, None, None, None, None, 1, [0] * 4, torch.int8),
    ),
    "layernorm_quantize": lambda: (torch.randn(2, 3, 9), torch.rand(9), torch.rand(9), 1e-5, AFFINE, 8, torch.uint8),
    "layernorm_quantize floating": lambda: (torch.randn(2, 9), None, None, 1e-5, None, 8, torch.int8),
    "int_gemm": lambda: (
        *(integers(2, 3, 33), *gemm(17, 33), 8, AFFINE, torch.randn(17), torch.randn(2, 3, 17), torch.rand(17)),
        *(False, None, 8, torch.float32),
    ),
    "int_gemm geglu": lambda: (integers(5, 33), *gemm(18, 33), 8, AFFINE, *TAIL, True, AFFINE, 4, torch.float32),
    "int_gemm floating": lambda: (torch.randn(5, 33), *gemm(9, 33), 8, None, *TAIL, False, None, 8, torch.float16),
    "int_conv2d": lambda: (
        *([integer_image(2, 5, 4, 6)], *conv(7, 5), [8], [AFFINE], [8], *GEOMETRY),
        *(torch.randn(7), torch.randn(2, 7), image(2, 7, 4, 6), torch.rand(7), None, 8, torch.float32),
    ),
    "int_conv2d segments": lambda: (
        *([integer_image(2, 5, 4, 6), integer_image(2, 3, 4, 6)], *conv(7, 5, 3), [8, 8], [AFFINE, AFFINE], [8, 8]),
        *(*ENLARGED, None, *TAIL, AFFINE, 8, torch.float32),
    ),
    "int_conv2d floating": lambda: (
        *([image(2, 5, 4, 6)], *conv(7, 5), [8], [None], [8], *GEOMETRY, None, *TAIL, None, 8, torch.float32),
    ),
    "denoise_step": lambda: (
        *(image(2, 3, 4, 5), *(torch.randn(2, 3, 4, 5) for _ in range(3)), torch.rand(8) + 0.5, 1.5, "v_prediction"),
        *(True, torch.rand(3), torch.rand(3), torch.rand(3)),
    ),
    "denoise_step plain": lambda: (
        *(torch.randn(2, 3, 7), torch.randn(2, 3, 7), None, None, torch.rand(8), None, "epsilon", False, *TAIL),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_operators_pass_pytorchs_checks(case: str, backend: str | None) -> None:
    """Schema, fake tensors (shape, dtype, strides), and that no result shares an argument's memory."""
    operator = getattr(torch.ops.qdiff, case.split()[0]).default
    result = torch.library.opcheck(operator, (*CASES[case](), backend), test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


def test_registering_twice_changes_nothing() -> None:
    before = torch.ops.qdiff.int_gemm.default
    library.register()
    assert torch.ops.qdiff.int_gemm.default is before


class Block:
    """A residual block and a feed-forward layer on every operator, in integers."""

    def __init__(self, api: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        self.api = api
        weight = torch.randint(-127, 128, (16, 16, 3, 3), dtype=torch.int8, generator=generator)
        self.conv = ops.pack_conv2d(weight, torch.full((16,), 1e-3), padding=(1, 1, 1, 1))
        self.up = ops.pack_gemm(weight.reshape(16, -1)[:, :16].repeat(4, 1), torch.full((64,), 2e-3))
        self.down = ops.pack_gemm(weight.reshape(16, -1)[:, :32].contiguous(), torch.full((16,), 2e-3))
        self.constants = torch.tensor([0.9, 0.4, -0.3, 0.2, 0.6, 0.8, 1.0, 7.5])

    def __call__(self, x: Tensor, temb: Tensor, noise: Tensor, affine: Tensor) -> Tensor:
        run = self.api
        q = run.groupnorm_silu_quantize(x, 4, None, None, 1e-5, affine, 0, 8)
        h = run.int_conv2d([ops.Segment(q, self.conv, affine, 0)], temb=temb, residual=x)
        b, c, height, width = h.shape
        rows = h.permute(0, 2, 3, 1).reshape(b, height * width, c)
        q = run.layernorm_quantize(rows, None, None, 1e-5, affine, 0, 8)
        q = run.int_gemm(q, self.up, affine, 0, geglu=True, output=(affine, 0, 8))
        rows = run.int_gemm(q, self.down, affine, 0, residual=rows)
        q = run.quantize(rows, 0.0625, 2, 8, activation="silu")
        e = (q.float() - 2).reshape(b, height, width, c).permute(0, 3, 1, 2) * 0.0625
        return run.denoise_step(x, e, None, noise, self.constants, clipped=True)


class Eager:
    """The functions of `ops`, their quantisations as numbers where the backend wants numbers."""

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        def numbers(value: Any) -> Any:
            if isinstance(value, Tensor) and value.shape == (3,):
                return float(value[0])
            if isinstance(value, ops.Segment):
                return value._replace(scale=float(value.scale[0]), zero_point=3)
            if isinstance(value, list):
                return [numbers(v) for v in value]
            return (float(value[0][0]), 3, value[2]) if isinstance(value, tuple) else value

        def run(*args: Any, **kwargs: Any) -> Tensor:
            given = [numbers(a) for a in args]
            for i, value in enumerate(args):
                if isinstance(value, Tensor) and value.shape == (3,):
                    given[i + 1] = 3
            return getattr(ops, name)(*given, **{k: numbers(v) if k == "output" else v for k, v in kwargs.items()})

        return run


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_functions_equal_eager_ones(compiler: str) -> None:
    """No graph break, no second compilation for another row of a table, and the same numbers to 1e-6."""
    if compiler == "inductor" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("inductor needs a C++ compiler, and there is none here")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled, eager, plain = (
        torch.compile(Block(library), fullgraph=True, backend=counter),
        Block(library),
        Block(Eager()),
    )
    x, temb, noise = image(2, 16, 4, 4), torch.randn(2, 16), torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        for scale in (0.03125, 0.0625):
            affine = torch.tensor([scale, 1 / scale, 3.0])
            expected = eager(x, temb, noise, affine)
            assert torch.equal(expected, plain(x, temb, noise, affine))
            torch.testing.assert_close(compiled(x, temb, noise, affine), expected, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


def test_weights_are_prepared_once() -> None:
    """A backend's own form of the weights is kept while they live, and made anew when they change."""
    packed = ops.pack_gemm(integers(17, 33, low=-127), torch.ones(17))
    q = integers(5, 33)
    before = len(library._PREPARED)
    first = library.int_gemm(q, packed, 1.0, 3)
    assert len(library._PREPARED) == before + 1
    kept = library._PREPARED[packed.values][2]
    assert (
        kept and torch.equal(library.int_gemm(q, packed, 1.0, 3), first) and library._PREPARED[packed.values][2] is kept
    )
    packed.values.neg_()
    packed.sums.neg_()
    assert torch.equal(library.int_gemm(q, packed, 1.0, 3), -first)
    expected = reference.int_gemm(q, packed.values, packed.scale, 1.0, 3)
    assert torch.equal(library.int_gemm(q, packed, 1.0, 3).double(), expected)
    del packed, kept
    assert len(library._PREPARED) == before


def test_segments_of_two_geometries_are_refused() -> None:
    weights = [ops.pack_conv2d(integers(4, 3, 3, 3), torch.ones(4), padding=(p,) * 4) for p in (0, 1)]
    segments = [ops.Segment(integer_image(1, 3, 5, 5), weight, 1.0, 0) for weight in weights]
    for given in (segments, []):
        with pytest.raises(ValueError, match="one geometry"):
            library.int_conv2d(given)
