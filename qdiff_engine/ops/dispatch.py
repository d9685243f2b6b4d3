"""Which backend runs an operator: one table, fastest first."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# operator -> (backend, module of this package that implements it), fastest first
_TABLE: dict[str, tuple[tuple[str, str], ...]] = {
    "quantize": (("triton", "triton_kernels"), ("native", "native"), ("torch", "plain")),
    "groupnorm_silu_quantize": (("triton", "triton_kernels"), ("native", "native"), ("torch", "plain")),
    "layernorm_quantize": (("triton", "triton_kernels"), ("native", "native"), ("torch", "plain")),
    "attention": (("native", "native"), ("torch", "plain")),
    "int_gemm": (
        ("triton", "triton_kernels"),
        ("onednn", "onednn"),
        ("native", "native_matmul"),
        ("torch", "plain"),
    ),
    "int_conv2d": (
        ("triton", "triton_kernels"),
        ("onednn", "onednn"),
        ("native", "native_matmul"),
        ("torch", "plain"),
    ),
    "denoise_step": (("triton", "triton_kernels"), ("native", "native_sampler"), ("torch", "plain")),
}
EPILOGUES = frozenset({"triton"})  # backends whose products finish their own result: GEGLU, output, out_dtype


class BackendError(ValueError):
    """A backend that was asked for by name cannot run here; the message says why."""


class Backend(NamedTuple):
    """What runs operators: where, and how to find out whether it can."""

    devices: tuple[str, ...]
    storage: torch.dtype  # how it likes quantised activations: int8 (q) or uint8 (q + 128)
    available: Callable[[], tuple[bool, str]]  # (whether, reason)


def _imported(module: str) -> Callable[[], tuple[bool, str]]:
    return lambda: importlib.import_module(f"{__package__}.{module}").available()


def _planned(name: str) -> Callable[[], tuple[bool, str]]:
    def status() -> tuple[bool, str]:
        gpu = "" if torch.cuda.is_available() else ", and there is no NVIDIA GPU here"
        return False, f"the {name} kernels are not part of this version yet{gpu}"

    return status


_BACKENDS = {
    "onednn": Backend(("cpu",), torch.uint8, _imported("onednn")),
    "native": Backend(("cpu",), torch.int8, _imported("extension")),
    "torch": Backend(("cpu", "cuda"), torch.int8, _imported("plain")),
    "triton": Backend(("cuda",), torch.int8, _imported("triton_kernels")),
    "cuda": Backend(("cuda",), torch.int8, _planned("CUDA")),
}


@functools.cache
def _status(name: str) -> tuple[bool, str]:
    return _BACKENDS[name].available()


def backends() -> dict[str, dict[str, Any]]:
    """Backend name -> {"available": bool, "reason": str}."""
    return {name: dict(zip(("available", "reason"), _status(name), strict=True)) for name in _BACKENDS}


@functools.cache
def find(operator: str, device: str, backend: str | None) -> tuple[str, Callable[..., Any]]:
    """(backend, function) for an operator on a kind of device; see `resolve`."""
    if operator not in _TABLE:
        raise ValueError(f"operator must be one of {', '.join(_TABLE)}, got {operator!r}")
    if backend is not None and backend not in _BACKENDS:
        raise BackendError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    refusals = [] if backend is None or backend in dict(_TABLE[operator]) else [_refusal(backend, operator)]
    for name, module in _TABLE[operator]:
        if backend not in (None, name):
            continue
        if device not in _BACKENDS[name].devices and not (backend == name and _interpreted(name)):
            refusals.append(f"{name} runs on {' and '.join(_BACKENDS[name].devices)}, not on {device}")
        elif not _status(name)[0]:
            refusals.append(f"{name}: {_status(name)[1]}")
        else:
            return name, getattr(importlib.import_module(f"{__package__}.{module}"), operator)
    raise BackendError(f"no backend for {operator}: {'; '.join(refusals)}")


def _interpreted(backend: str) -> bool:
    """Whether a backend that is asked for by name runs on any device: Triton, where it interprets its kernels."""
    return backend == "triton" and importlib.import_module(f"{__package__}.triton_kernels").interpreted()


def _refusal(backend: str, operator: str) -> str:
    """Why a backend that is not in an operator's row of the table cannot run it."""
    is_available, reason = _status(backend)
    return f"{backend}: {reason}" if not is_available else f"{backend} has no {operator}"


def resolve(operator: str, device: torch.device | str = "cpu", backend: str | None = None) -> Callable[..., Any]:
    """The function that runs ``operator`` on ``device``: that of ``backend``, or of the fastest one available.

    Raises:
        BackendError: the backend is missing here, with the reason.
    """
    target = torch.device(device)
    function = find(operator, target.type, backend)[1]
    if target.type != "cuda" or torch.cuda.device_count() < 2:
        return function
    return _launched_on(torch.cuda.current_device() if target.index is None else target.index, function)


@functools.cache
def _launched_on(gpu: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` while that GPU is the current one: kernels are launched there, wherever their tensors are."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device(gpu):
            return function(*args, **kwargs)

    return run


def chosen(operator: str, device: torch.device | str = "cpu", backend: str | None = None) -> str:
    """Name of the backend that `resolve` takes."""
    return find(operator, torch.device(device).type, backend)[0]


def refusal(device: torch.device, backend: str | None = None) -> str | None:
    """Why no model can run on ``device``, with ``backend`` if one is named; None where one can.

    A GPU runs recorded steps, whose kernels read scales from its memory: Triton's do.
    """
    if device.type == "cpu":
        return None
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU here"
    if not _status("triton")[0]:
        return _status("triton")[1]
    if backend is not None and chosen("int_gemm", device, backend) not in EPILOGUES:
        return f"backend {backend!r} is for a CPU; leave it out, or name one of {', '.join(sorted(EPILOGUES))}"
    return importlib.import_module(f"{__package__}.triton_kernels").unsupported(device)


def supports(backend: str | None, operator: str) -> bool:
    """Whether a backend is, or is not known to be missing from, an operator's row of the table.

    False only for a known backend that has no such operator (oneDNN has no norms): others then run it.
    """
    return backend not in _BACKENDS or backend in dict(_TABLE[operator]) or not _status(backend)[0]


def storage(device: torch.device | str = "cpu", backend: str | None = None) -> torch.dtype:
    """Storage of quantised activations that the chosen `int_conv2d` reads without a conversion."""
    return _BACKENDS[chosen("int_conv2d", device, backend)].storage
