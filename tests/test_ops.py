"""Which backend runs an operator, what is refused, and what concerns all operators."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from comparing import assert_close, integers, present

from qdiff_engine import ops, reference
from qdiff_engine.numerics import MAX_K
from qdiff_engine.ops import operands, triton_kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_packed_activations_give_the_same_bits() -> None:
    """4-bit integers two to a byte, from every operator that writes them into both that read them."""
    present("triton")
    given: dict[str, Any] = {"backend": "triton"}
    x, rows, bias, site = torch.randn(2, 128, 5, 6), torch.randn(3, 7, 130), torch.randn(130), (0.3, -3, 4)
    padding = (1, 1, 1, 1)
    whole = ops.pack_conv2d(integers(9, 128, 3, 3), torch.rand(9), padding=padding)
    grouped = ops.pack_conv2d(integers(8, 64, 3, 3), torch.rand(8), groups=2)
    linear = ops.pack_gemm(integers(9, 130, low=-8, high=7), torch.rand(9), 4)
    results = []
    for storage in (torch.int8, triton_kernels.PACKED):
        images = (
            ops.quantize(x, *site, storage=storage, **given),
            ops.groupnorm_silu_quantize(x, 8, None, None, 1e-5, *site, padding=padding, storage=storage, **given),
        )
        q = ops.layernorm_quantize(rows, None, bias, 1e-5, *site, storage=storage, **given)
        assert {q.dtype, *(image.dtype for image in images)} == {storage}
        segments = [ops.Segment(image, weight, *site[:2]) for image in images for weight in (whole, grouped)]
        results.append([ops.int_conv2d([segment], **given) for segment in segments])
        results[-1].append(ops.int_gemm(q, linear, *site[:2], **given))
    for plain, packed in zip(*results, strict=True):
        assert torch.equal(plain, packed)
    with pytest.raises(ValueError, match="q must hold 130 features in 96 bytes, got"):
        ops.int_gemm(q[..., :64], linear, *site[:2], **given)
    with pytest.raises(ValueError, match="storage torch.int4 needs 4-bit integers, got 8 bits"):
        ops.quantize(x, 0.3, -3, 8, storage=triton_kernels.PACKED, **given)


def test_the_first_available_backend_is_chosen() -> None:
    states = ops.backends()
    assert list(states) == ["onednn", "native", "torch", "triton", "cuda"]
    first = next(name for name in states if states[name]["available"])
    assert ops.chosen("int_gemm") == ops.chosen("int_conv2d") == first
    assert ops.storage() == (torch.uint8 if first == "onednn" else torch.int8)
    assert ops.resolve("int_gemm", torch.device("cpu"), first) is ops.resolve("int_gemm")


@pytest.mark.parametrize(
    "triton_version, numpy_version, runs",
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.7.0", "2.5.1", True)],
)
def test_an_interpreter_that_cannot_loop_is_not_available(
    triton_version: str, numpy_version: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.6 makes a loop's bound of an array of one element, which numpy refuses from 2.4 on."""
    triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(numpy, "__version__", numpy_version)
    found, reason = triton_kernels.available()
    assert found is runs and ("numpy < 2.4, got 2.4.0" in reason) is not runs


@pytest.mark.parametrize(
    "operator, backend, message",
    [
        ("int_gemm", "cuda", "not part of this version"),
        ("quantize", "onednn", "onednn"),
        ("int_gemm", "vulkan", "backend must be one of onednn, native, torch"),
        ("softmax", None, "operator must be one of quantize"),
    ],
)
def test_a_missing_backend_raises_with_the_reason(operator: str, backend: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.resolve(operator, "cpu", backend)


WITHOUT_VNNI = """
import torch
from qdiff_engine import ops, reference
state = ops.backends()["onednn"]
assert not state["available"] and "saturate" in state["reason"], state
assert ops.chosen("int_gemm") in ("native", "torch") and ops.chosen("int_conv2d") in ("native", "torch")
try:
    ops.resolve("int_gemm", backend="onednn")
    raise AssertionError("oneDNN was taken")
except ops.BackendError as error:
    assert "saturate" in str(error)
q, weight = torch.full((2, 16, 5, 5), 127, dtype=torch.int8), torch.full((8, 16, 3, 3), 127, dtype=torch.int8)
q[1], unit = torch.randint(-128, 128, (16, 5, 5)).to(torch.int8), torch.ones(8)
packed = ops.pack_conv2d(weight, unit, padding=(1, 1, 1, 1))
expected = reference.int_conv2d([(q, weight, unit, 1.0, -128)], padding=(1, 1, 1, 1))
for backend in (None, "torch"):
    y = ops.int_conv2d([ops.Segment(q, packed, 1.0, -128)], backend=backend)
    assert torch.equal(y.double(), expected)
    y = ops.int_gemm(q[:, :, 0, 0], ops.pack_gemm(weight[:, :, 0, 0], unit), 1.0, -128, backend=backend)
    assert torch.equal(y.double(), reference.int_gemm(q[:, :, 0, 0], weight[:, :, 0, 0], unit, 1.0, -128))
"""


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's u8 x s8 saturation is an x86 matter"
)
@pytest.mark.parametrize("isa", ["AVX512_CORE", "AVX2"])
def test_without_vnni_onednn_is_refused_and_results_stay_exact(isa: str) -> None:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_VNNI], env=environment, cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_two_most_recent_entries_stay() -> None:
    cache: dict[Any, int] = {}
    made = []

    def get(key: int) -> int:
        return operands.recent(cache, key, lambda: made.append(key) or key * 10)

    assert [get(key) for key in (1, 2, 1, 3, 1, 2)] == [10, 20, 10, 30, 10, 20]
    assert made == [1, 2, 3, 2] and list(cache) == [1, 2]


def _gemm() -> ops.GemmWeight:
    return ops.pack_gemm(integers(5, 7), torch.ones(5))


def _segment(**geometry: Any) -> ops.Segment:
    return ops.Segment(integers(1, 3, 4, 4), ops.pack_conv2d(integers(5, 3, 3, 3), torch.ones(5), **geometry), 1.0, 0)


WRONG: list[tuple[Callable[[str], Any], str]] = [
    (lambda b: ops.int_gemm(integers(2, 8), _gemm(), 1.0, 0, backend=b), r"q must be \[..., 7\].*got \[2, 8\]"),
    (lambda b: ops.int_gemm(integers(2, 7).int(), _gemm(), 1.0, 0, backend=b), "q must be int8, uint8 or floating"),
    (lambda b: ops.int_gemm(integers(2, 7), integers(5, 7), 1.0, 0, backend=b), "weight must come from pack_gemm"),
    (lambda b: ops.int_gemm(integers(2, 7), _gemm(), None, None, backend=b), "scale and zero_point are needed"),
    (
        lambda b: ops.int_gemm(integers(2, 7), _gemm(), 1.0, 0, torch.ones(4), backend=b),
        r"bias must be float(32|ing) \[5\]",
    ),
    (lambda b: ops.int_gemm(integers(2, 7), _gemm(), 1.0, 0, residual=torch.ones(5), backend=b), "residual must be"),
    (lambda b: ops.int_conv2d([], backend=b), "at least one Segment"),
    (lambda b: ops.int_conv2d([_segment(dilation=(3, 3))], backend=b), "smaller than the kernel"),
    (lambda b: ops.int_conv2d([_segment(), _segment(stride=(2, 2))], backend=b), "one output shape"),
    (lambda b: ops.int_conv2d([_segment()], temb=torch.ones(2, 5), backend=b), r"temb must be float(32|ing) \[1, 5\]"),
    (lambda b: ops.int_conv2d([_segment()], output_scale=torch.ones(1), backend=b), "output_scale must be float32"),
    (lambda b: ops.pack_gemm(torch.ones(5, 7), torch.ones(5)), r"weight must be int8 \[N, K\]"),
    (lambda b: ops.pack_gemm(integers(5, 7), torch.ones(4)), r"weight_scale must be float32 \[5\]"),
    (lambda b: ops.pack_gemm(integers(1, MAX_K + 1), torch.ones(1)), "an int32 accumulator holds 66311"),
    (lambda b: _segment(padding=(1, 1)), "padding must be a tuple of 4"),
    (lambda b: _segment(groups=2), "groups must divide Cout = 5"),
]


@pytest.mark.parametrize("call, message", WRONG)
def test_wrong_operands_are_named(backend: str, call: Callable[[str], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(backend)


@pytest.mark.parametrize(
    "error, options",
    [
        (ValueError, {"scale": 0.0}),
        (ValueError, {"zero_point": 128}),
        (ValueError, {"bits": 5}),
        (ValueError, {"upsample": 0}),
        (ValueError, {"padding": (1, 1)}),
        (ValueError, {"activation": "relu6"}),
        (TypeError, {"storage": torch.int32}),
        (TypeError, {"x": integers(1, 2, 3, 4)}),
        (ValueError, {"x": torch.ones(3, 3), "upsample": 2}),
        (ValueError, {"x": torch.ones(3, 3), "activation": "geglu"}),
    ],
)
def test_wrong_quantizers_are_named(quantizer: str, error: type[Exception], options: dict[str, Any]) -> None:
    arguments = {"x": torch.ones(1, 2, 3, 4), "scale": 0.1, "zero_point": 0, "bits": 8} | options
    with pytest.raises(error, match="got"):
        ops.quantize(**arguments, backend=quantizer)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_denoise_step(name: str, prediction_type: str, clipped: bool) -> None:
    """The sampler's update on every backend; the kernel's own tests cover layouts and precisions."""
    x, cond, uncond, noise = (torch.randn(2, 4, 5, 7) for _ in range(4))
    constants = torch.tensor([0.9, 0.4, -0.3, 0.2, 0.6, 0.8, 1.0, 7.5])
    terms = {key: torch.randn(4) for key in ("a", "b", "input_bias")}
    options: dict[str, Any] = {"prediction_type": prediction_type, "clipped": clipped}
    for more in ({}, {"guidance": 1.5, **terms}):
        expected = reference.denoise_step(x, cond, uncond, noise, constants, **options, **more)
        assert_close(
            ops.denoise_step(x, cond, uncond, noise, constants, **options, **more, backend=present(name)), expected
        )
    y = ops.denoise_step(x.half(), cond.half(), None, None, constants, **options, backend=present(name))
    assert y.dtype == torch.float16
    for wrong, words in (({"prediction_type": "noise"}, "prediction_type"), ({"a": torch.ones(3)}, "a must be")):
        with pytest.raises(ValueError, match=words):
            ops.denoise_step(x, cond, None, None, constants, **wrong, backend=present(name))
    with pytest.raises(ValueError, match="uncond must be"):
        ops.denoise_step(x, cond, uncond[:1], None, constants, backend=present(name))
