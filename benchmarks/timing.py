"""Milliseconds of single calls on a device, contestants in turn, on inputs that no cache still holds.

On a GPU each contestant's calls, one per input set, are captured in a CUDA graph whose replays are timed with events:
neither Python nor launches are in the figure, as they are not in a deployment that replays graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qdiff_engine.baselines import first_line
from qdiff_engine.measuring import summary

Contestant = Callable[[int], Any]  # one call on the input set of that number
_WARM_UP = 3
_LEAST_CALLS = 16  # per replay, so that a replay is long against the clock's ticks
_MOST_SETS = 64
_HEAD_START = 400_000  # clock cycles, some 200 us


def set_count(bytes_per_set: float, cache_bytes: float) -> int:
    """Input sets whose bytes together are three times the cache, 2 to 64 of them."""
    return max(2, min(_MOST_SETS, -(-int(3 * cache_bytes) // max(1, int(bytes_per_set)))))


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory: L2 on a GPU; on a CPU a guess."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 20


def times(
    contestants: Mapping[str, Contestant], sets: int, rounds: int, device: torch.device
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """({name: {median, p05, p95} in ms per call}, {name: why it could not be timed}).

    A figure is the mean over one pass through all input sets; percentiles are over ``rounds`` passes.
    """
    make = _graph if device.type == "cuda" else _loop
    passes, absent = {}, {}
    for name, run in contestants.items():
        try:
            passes[name] = make(run, sets)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            absent[name] = first_line(error)
    found: dict[str, list[float]] = {name: [] for name in passes}
    for i in range(_WARM_UP + rounds):
        for name, timed in passes.items():
            milliseconds = timed()
            if i >= _WARM_UP:
                found[name].append(milliseconds)
    return {name: summary(values) for name, values in found.items()}, absent


def _loop(run: Contestant, sets: int) -> Callable[[], float]:
    for i in range(sets):
        run(i)

    def timed() -> float:
        start = time.perf_counter()
        for i in range(sets):
            run(i)
        return 1e3 * (time.perf_counter() - start) / sets

    return timed


def _graph(run: Contestant, sets: int) -> Callable[[], float]:
    calls = sets * max(1, -(-_LEAST_CALLS // sets))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels compile, libraries choose algorithms and allocate workspaces
        for i in range(sets):
            run(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for i in range(calls):
            outputs.append(run(i % sets))  # kept, so that every call writes memory of its own
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(outputs: list[Tensor] = outputs) -> float:
        torch.cuda._sleep(_HEAD_START)  # the device is still busy when the replay is launched: no gap is timed
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    return timed
