"""The engine's kernels on an NVIDIA GPU, each checked against float64 before it is timed beside the vendor's.

A case makes several input sets with weights and all, so that rotating through them leaves the L2 cache cold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ceilings import Ceilings
from benchmarks.shapes import Conv, Gemm, Image
from benchmarks.timing import cache_bytes, set_count, times
from qdiff_engine import numerics, ops, reference

PRECISIONS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4), "w8a16": (8, 16)}  # bits of weights and activations
SCALE, ZERO_POINT = 0.02, 3
_OFTEN = 1e-3  # share of quantised elements that may be a step off


@dataclass
class Case:
    """A kernel at one shape: ``run(i)`` and baselines on input set i, and what one call computes and moves."""

    name: str
    shape: str
    precision: str
    operations: float  # multiplications and additions; 0 where memory is what counts
    bytes: float  # read and written once
    sets: int
    run: Callable[[int], Tensor]
    baselines: dict[str, Callable[[int], Tensor]]
    check: Callable[[], None]
    extra: dict[str, Any]


def quantization(device: torch.device) -> Tensor:
    """(s, 1 / s, z) as a step of a captured program reads it."""
    return torch.tensor([SCALE, numerics.inverse_scale(SCALE), ZERO_POINT], device=device)


def activations(shape: tuple[int, ...], bits: int, device: torch.device, sets: int) -> list[Tensor]:
    """Random integers of so many bits, or halves for 16; images in channels_last."""
    made = []
    for _ in range(sets):
        low, high = numerics.activation_range(min(bits, 8))
        x = torch.randint(low, high + 1, shape, dtype=torch.int8, device=device)
        x = torch.randn(shape, device=device).half() if bits == 16 else x
        made.append(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)
    return made


def row_bytes(features: int, bits: int) -> int:
    """Bytes of a row of activations as the engine stores it: 4-bit integers two to a byte, if that takes fewer."""
    if bits == 16:
        return 2 * features
    return min(features, ops.packed_width(features)) if bits == 4 else features


def as_stored(x: Tensor, bits: int) -> Tensor:
    """Activations [M, K] or [N, C, H, W] as the engine hands them to a product."""
    if row_bytes(x.shape[1], bits) >= x.shape[1]:
        return x
    from qdiff_kernels.packing import pack_rows

    return pack_rows(x.movedim(1, -1).contiguous()).movedim(-1, 1).view(ops.PACKED)


def integers(shape: tuple[int, ...], bits: int, device: torch.device) -> Tensor:
    """Random weights in the range of ``bits``."""
    low, high = numerics.weight_range(bits)
    return torch.randint(low, high + 1, shape, dtype=torch.int8, device=device)


def within_half_precision(y: Tensor, exact: Tensor, integer: bool, plain: Tensor | None = None) -> None:
    """One rounding to y's dtype where the sum is exact; else at most twice plain torch's error, both against float64.

    Raises:
        ValueError: it is further away, or not finite; nothing wrong is timed.
    """
    error = (y.double() - exact).abs()
    if integer:  # float32 terms as large as the largest result, then one rounding
        allowed = exact.abs() * torch.finfo(y.dtype).eps + 1e-6 * float(exact.abs().max())
        excess = float((error - allowed).max())
    else:
        assert plain is not None
        excess = float(error.max()) - 2 * float((plain.double() - exact).abs().max())
    if not excess <= 0:
        raise ValueError(f"the kernel is wrong: up to {float(error.max()):.3g} from float64, not timed")


def rarely_a_step(q: Tensor, expected: Tensor) -> None:
    """At most one step off, in fewer than 0.1 % of the elements."""
    difference = (q.int() - expected.int()).abs()
    if int(difference.max()) > 1 or float(difference.double().mean()) >= _OFTEN:
        raise ValueError(f"the kernel is wrong: {int(difference.max())} steps off, not timed")


def epilogue(acc: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What follows `torch._int_mm`: y[m, n] = acc s s_w[n] + (bias[n] - z wsum[n] s s_w[n]) in float16."""
    return (acc.float() * scale + shift).half()


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``function`` fused by torch.compile on a GPU; as it is on a CPU, where no C++ compiler is asked for."""
    if device.type != "cuda":
        return function
    torch._dynamo.reset()  # compiled for shape after shape, a function would fall back to eager execution
    return torch.compile(function, dynamic=False)


def gemm_case(shape: Gemm, precision: str, device: torch.device, backend: str | None = "triton") -> Case:
    """A linear layer with bias, float16 out; GEGLU alone among epilogues has a float baseline of two kernels."""
    weight_bits, bits = PRECISIONS[precision]
    m, n, k, geglu = shape.m, shape.n, shape.k, shape.geglu
    moved = m * row_bytes(k, bits) + n * k * weight_bits / 8 + 2.0 * m * (n // 2 if geglu else n)
    sets = set_count(moved, cache_bytes(device))
    x = activations((m, k), bits, device, sets)
    values = [integers((n, k), weight_bits, device) for _ in range(sets)]
    weight_scale, bias = torch.rand(n, device=device) * 1e-3 + 1e-4, torch.randn(n, device=device)
    packed = [ops.pack_gemm(v, weight_scale, weight_bits) for v in values]
    at = None if bits == 16 else quantization(device)
    zero_point = None if bits == 16 else ZERO_POINT
    kernel = ops.resolve("int_gemm", device, backend)
    stored = [as_stored(q, bits) for q in x]
    run = _geglu_run(packed, stored, at, bias) if geglu else (
        lambda i: kernel(stored[i], packed[i], at, zero_point, bias, out_dtype=torch.float16)
    )  # fmt: skip

    def exact() -> Tensor:
        q = x[0].double() if bits == 16 else (x[0].double() - ZERO_POINT) * SCALE
        y = q @ (values[0].double() * weight_scale.double()[:, None]).t() + bias.double()
        return y[:, : n // 2] * F.gelu(y[:, n // 2 :]) if geglu else y

    baselines = _float_gemms(x, values, weight_scale, bias, bits, geglu)
    if bits != 16 and not geglu and m > 16 and n % 8 == k % 8 == 0:
        scale = SCALE * weight_scale
        shift = [bias - ZERO_POINT * v.sum(1, dtype=torch.int32) * scale for v in values]
        finish = compiled(epilogue, device)
        baselines["int_mm"] = lambda i: finish(torch._int_mm(x[i], values[i].t()), scale, shift[i])
        baselines["int_mm-alone"] = lambda i: torch._int_mm(x[i], values[i].t())

    def check() -> None:
        plain = baselines["cublas-fp16"](0) if bits == 16 else None
        within_half_precision(run(0), exact(), bits != 16, plain)

    name = "int_gemm_geglu" if geglu else "int_gemm"
    extra = {"model": shape.model, "count": shape.count, "m": m, "n": n, "k": k}
    return Case(name, f"M{m} N{n} K{k}", precision, 2.0 * m * n * k, moved, sets, run, baselines, check, extra)


def _geglu_run(packed: list[Any], stored: list[Tensor], at: Tensor | None, bias: Tensor) -> Callable[[int], Tensor]:
    """The GEGLU epilogue is the kernel's own; `ops` has no name for it."""
    from qdiff_kernels.int_gemm import int_gemm
    from qdiff_kernels.packing import pack

    weights = [pack(p.values, p.scale, p.bits) for p in packed]
    x = [q.view(torch.uint8) if q.dtype == ops.PACKED else q for q in stored]
    return lambda i: int_gemm(x[i], weights[i], at, bias, geglu=True)


def _float_gemms(
    x: list[Tensor], values: list[Tensor], weight_scale: Tensor, bias: Tensor, bits: int, geglu: bool
) -> dict[str, Callable[[int], Tensor]]:
    baselines: dict[str, Callable[[int], Tensor]] = {}
    for name, dtype in (("cublas-fp16", torch.float16), ("cublas-bf16", torch.bfloat16)):
        floats = [v.to(dtype) if bits == 16 else ((v.float() - ZERO_POINT) * SCALE).to(dtype) for v in x]
        weights, b = [(v.float() * weight_scale[:, None]).to(dtype) for v in values], bias.to(dtype)

        def linear(i: int, floats: Any = floats, weights: Any = weights, b: Tensor = b) -> Tensor:
            y = F.linear(floats[i], weights[i], b)
            if not geglu:
                return y
            value, gate = y.chunk(2, dim=-1)
            return value * F.gelu(gate)

        baselines[name] = linear
    return baselines


def conv_case(shape: Conv, precision: str, device: torch.device, backend: str | None = "triton") -> Case:
    """3x3, stride 1, padding 1, with bias, float16 out, channels_last throughout."""
    weight_bits, bits = PRECISIONS[precision]
    batch, cin, cout, size = shape.batch, shape.cin, shape.cout, shape.size
    pixels = batch * size * size
    moved = pixels * row_bytes(cin, bits) + 9.0 * cin * cout * weight_bits / 8 + 2.0 * pixels * cout
    sets = set_count(moved, cache_bytes(device))
    x = activations((batch, cin, size, size), bits, device, sets)
    values = [integers((cout, cin, 3, 3), weight_bits, device) for _ in range(sets)]
    weight_scale, bias = torch.rand(cout, device=device) * 1e-3 + 1e-4, torch.randn(cout, device=device)
    packed = [ops.pack_conv2d(v, weight_scale, padding=(1, 1, 1, 1), bits=weight_bits) for v in values]
    at, zero_point = (None, None) if bits == 16 else (quantization(device), ZERO_POINT)
    kernel = ops.resolve("int_conv2d", device, backend)
    stored = [as_stored(q, bits) for q in x]
    segments = [ops.Segment(q, w, at, zero_point, min(bits, 8)) for q, w in zip(stored, packed, strict=True)]

    def run(i: int) -> Tensor:
        return kernel([segments[i]], bias, out_dtype=torch.float16)

    baselines: dict[str, Callable[[int], Tensor]] = {}
    for name, dtype in (("cudnn-fp16", torch.float16), ("cudnn-bf16", torch.bfloat16)):
        floats = [v.to(dtype) if bits == 16 else ((v.float() - ZERO_POINT) * SCALE).to(dtype) for v in x]
        weights = [(v.float() * weight_scale[:, None, None, None]).to(dtype) for v in values]
        weights = [w.contiguous(memory_format=torch.channels_last) for w in weights]
        b = bias.to(dtype)
        baselines[name] = lambda i, f=floats, w=weights, b=b: F.conv2d(f[i], w[i], b, padding=1)

    def check() -> None:
        q = x[0].double() if bits == 16 else (x[0].double() - ZERO_POINT) * SCALE
        weight = values[0].double() * weight_scale.double()[:, None, None, None]
        plain = baselines["cudnn-fp16"](0) if bits == 16 else None
        within_half_precision(run(0), F.conv2d(q, weight, bias.double(), padding=1), bits != 16, plain)

    extra = {"model": shape.model, "count": shape.count, "m": shape.m, "n": cout, "k": shape.k}
    text = f"N{batch} C{cin} K{cout} {size}x{size}"
    operations = 2.0 * pixels * cout * shape.k
    return Case("int_conv2d_3x3", text, precision, operations, moved, sets, run, baselines, check, extra)


def groupnorm_case(shape: Image, device: torch.device, backend: str | None = "triton") -> Case:
    """GroupNorm of 32 groups, SiLU and quantisation of a float16 image; the eager baseline does not quantise."""
    batch, channels, size = shape.batch, shape.channels, shape.size
    moved = 3.0 * batch * channels * size * size
    sets = set_count(moved, cache_bytes(device))
    x = activations((batch, channels, size, size), 16, device, sets)
    weight, bias = (torch.randn(channels, device=device).half() for _ in range(2))
    at = quantization(device)
    kernel = ops.resolve("groupnorm_silu_quantize", device, backend)

    def run(i: int) -> Tensor:
        return kernel(x[i], 32, weight, bias, 1e-5, at, ZERO_POINT, 8)

    def plain(x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 32, weight, bias, 1e-5))

    def quantised(x: Tensor) -> Tensor:
        return (plain(x).float() * (1 / SCALE)).round().add(ZERO_POINT).clamp(-128, 127).to(torch.int8)

    fused = compiled(quantised, device)

    def check() -> None:
        expected = reference.groupnorm_silu_quantize(x[0], 32, weight, bias, 1e-5, SCALE, ZERO_POINT, 8)
        rarely_a_step(run(0), expected)

    baselines: dict[str, Callable[[int], Tensor]] = {
        "torch-fp16": lambda i: plain(x[i]),
        "torch-fp16-compile": lambda i: fused(x[i]),
    }
    text, extra = f"N{batch} C{channels} {size}x{size}", {"model": shape.model}
    return Case("groupnorm_silu_quantize", text, "a8", 0.0, moved, sets, run, baselines, check, extra)


def layernorm_case(rows: int, features: int, device: torch.device, backend: str | None = "triton") -> Case:
    """LayerNorm and quantisation of float16 rows."""
    moved = 3.0 * rows * features
    sets = set_count(moved, cache_bytes(device))
    x = activations((rows, features), 16, device, sets)
    weight, bias = (torch.randn(features, device=device).half() for _ in range(2))
    at = quantization(device)
    kernel = ops.resolve("layernorm_quantize", device, backend)

    def run(i: int) -> Tensor:
        return kernel(x[i], weight, bias, 1e-5, at, ZERO_POINT, 8)

    def check() -> None:
        rarely_a_step(run(0), reference.layernorm_quantize(x[0], weight, bias, 1e-5, SCALE, ZERO_POINT, 8))

    baselines: dict[str, Callable[[int], Tensor]] = {
        "torch-fp16": lambda i: F.layer_norm(x[i], (features,), weight, bias, 1e-5)
    }
    text = f"M{rows} K{features}"
    return Case("layernorm_quantize", text, "a8", 0.0, moved, sets, run, baselines, check, {"model": "sdxl"})


def measure(case: Case, ceilings: Ceilings, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row per baseline, after the check."""
    case.check()
    found, absent = times({"engine": case.run, **case.baselines}, case.sets, rounds, device)
    if "engine" in absent:
        raise RuntimeError(absent["engine"])
    median = found["engine"]["median"]
    bound = ceilings.bound_ms(case.operations, case.bytes, case.precision)
    common = {
        "name": case.name,
        "shape": case.shape,
        "precision": case.precision,
        "median_ms": median,
        "p05_ms": found["engine"]["p05"],
        "p95_ms": found["engine"]["p95"],
        "tops": float(f"{case.operations / median / 1e9:.5g}") if case.operations else None,
        "gbps": float(f"{case.bytes / median / 1e6:.5g}"),
        "bound_ms": float(f"{bound:.5g}"),
        "share_of_peak": float(f"{bound / median:.4g}"),
        "input_sets": case.sets,
        "checked": True,
        **case.extra,
    }
    rows = []
    for name in case.baselines:
        if name in absent:
            rows.append(common | {"baseline": name, "baseline_ms": None, "speedup": None, "absent": absent[name]})
        else:
            baseline = found[name]["median"]
            rows.append(common | {"baseline": name, "baseline_ms": baseline, "speedup": round(baseline / median, 3)})
    return rows
