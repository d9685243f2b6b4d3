"""Timing contestants side by side, and the peak memory of a model in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .sampling import predict

Contestant = Callable[[int], Any]  # runs once on the input set of that number

WARM_UP = 2  # untimed rounds

_CHILD = "from qdiff_engine.measuring import run_child; run_child()"
_CHILD_RUNS = 3
_CHILD_TIMEOUT = 600.0  # seconds


def interleaved(
    contestants: Mapping[str, Contestant],
    rounds: int,
    *,
    sets: int = 1,
    warm_up: int = WARM_UP,
    pause: float = 0.0,
    synchronize: Callable[[], None] = lambda: None,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every call, A B C A B C ..., so that a noisy moment of the machine hits all alike.

    Args:
        contestants: by name. In round i each runs once on input set ``i % sets``.
        rounds: timed rounds; ``warm_up`` untimed ones, at least one per input set, go before.
        pause: seconds before each call, lest one library's idle threads, which spin for a while, take a core from the
            next one's; it also lets a library's own threads fall asleep, which only long calls can ignore.
        synchronize: waits for the device before a clock is read.
        on_round: called with (rounds done, rounds in all), for progress.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    warm_up = max(warm_up, sets)
    for i in range(warm_up + rounds):
        for name, run in contestants.items():
            if pause:
                time.sleep(pause)
            synchronize()
            start = time.perf_counter()
            run(i % sets)
            synchronize()
            if i >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
        if on_round is not None:
            on_round(i + 1, warm_up + rounds)
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, 5th and 95th percentile."""
    values = torch.tensor(times, dtype=torch.float64)
    points = torch.quantile(values, torch.tensor([0.5, 0.05, 0.95], dtype=torch.float64))
    return dict(zip(("median", "p05", "p95"), (round(float(p), 4) for p in points), strict=True))


@contextlib.contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """torch's intra-operation threads set to ``threads`` inside (None leaves them), as before outside."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def device_synchronize(device: torch.device) -> Callable[[], None]:
    """What waits for the work queued on ``device``."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def cuda_graph(function: Callable[[], Any], warm_up: int = 3) -> Callable[[], Any]:
    """``function`` captured as a CUDA graph: calls replay it, and return the same memory, overwritten."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries choose algorithms and allocate their workspaces
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """torch.autocast to ``dtype``, or nothing where it is None."""
    with torch.autocast(device.type, dtype=dtype) if dtype is not None else contextlib.nullcontext():
        yield


def channels_last(module: nn.Module) -> nn.Module:
    """``module`` with its image weights in channels_last memory, changed in place."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def peak_memory(
    artifact: Path | None,
    unet: nn.Module | None,
    inputs: Sequence[tuple[Tensor, Tensor, Mapping[str, Any]]],
    threads: int,
    dtype: torch.dtype | None = None,
) -> int | None:
    """Most memory, in bytes, of a fresh process that loads one model and runs it; None where unknown.

    The process holds what a deployment holds: the interpreter, torch, the artifact (``artifact``) or the float
    module (``unet``, channels_last), and a forward pass on each of ``inputs``, on their device. On a CPU it is the
    largest resident set (Linux only, where the kernel keeps VmHWM) and ``dtype`` that of autocast; on a GPU what torch
    has allocated there at most, CUDA graphs included, and ``dtype`` that of the model itself.
    """
    device = inputs[0][0].device
    if device.type == "cpu" and not Path("/proc/self/status").exists():
        return None
    with tempfile.TemporaryDirectory(prefix="qdiff-bench-") as folder:
        job = Path(folder) / "job.pt"
        module = str(Path(folder) / "module.pt") if unet is not None else None
        if unet is not None:
            torch.save(unet, Path(folder) / "module.pt")  # read back by our own child only
        torch.save([(sample, timestep, dict(conditioning)) for sample, timestep, conditioning in inputs], job)
        order = {"artifact": str(artifact) if artifact else None, "module": module, "inputs": str(job)}
        order |= {"threads": str(threads), "dtype": str(dtype).removeprefix("torch.") if dtype else None}
        order["device"] = str(device)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps(order)],
            capture_output=True, text=True, env=environment, timeout=_CHILD_TIMEOUT, check=False,
        )  # fmt: skip
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"the process that measures peak memory failed with status {done.returncode}: {line}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"])


def run_child() -> None:
    """The child of `peak_memory`: load, run, print the high-water mark."""
    order = json.loads(sys.argv[1])
    torch.set_num_threads(int(order["threads"]))
    dtype = getattr(torch, order["dtype"]) if order["dtype"] else None
    device = torch.device(order["device"])
    inputs = torch.load(order["inputs"], weights_only=True, map_location=device)
    model: Any
    if order["artifact"] is not None:
        from .runtime.model import load

        model = load(order["artifact"], device=device, dtype=dtype)
    else:
        model = channels_last(torch.load(order["module"], weights_only=False).to(device))
    cast = dtype if device.type == "cpu" and order["artifact"] is None else None
    with torch.inference_mode(), autocast(device, cast):
        for i in range(_CHILD_RUNS):
            predict(model, *inputs[i % len(inputs)])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else high_water_mark()
    print(json.dumps({"peak_memory_bytes": peak}))


def high_water_mark() -> int:
    """VmHWM of this process in bytes: unlike ru_maxrss it does not start from the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM line")
