"""Whole UNets on an NVIDIA GPU: engine and float16 in turn, per model and batch size, in sections.

Everything of one section is timed in one run, on a synchronised clock, Python included: what a pipeline waits for.
"""

from __future__ import annotations

import gc
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qdiff_engine as qe
from benchmarks import bounds, ceilings, models, results_file, sections, synthetic
from benchmarks.ceilings import Ceilings
from benchmarks.sections import Rows, Section
from qdiff_engine.baselines import (
    Inputs,
    compiled_contestant,
    gpu_contestants,
    half_precision,
    moved,
    torchao_contestant,
    tried,
)
from qdiff_engine.benchmarking import check_outputs, weight_bytes
from qdiff_engine.measuring import Contestant, device_synchronize, interleaved, summary
from qdiff_engine.sampling import predict, timestep_tensor

BATCHES = (1, 2, 8, 16)
PRECISIONS = ("w8a8", "w4a8", "w4a4", "w8a16")
COLUMNS = (
    "model", "batch", "precision", "median_ms", "p05_ms", "p95_ms", "share_of_roofline", "speedup", "peak_memory_bytes",
    "weight_bytes", "gbops", "mode_switch_ms",
)  # fmt: skip
SECONDS = {"cifar10": 60.0, "sd15": 120.0, "sdxl": 240.0}  # expected of a section, building the network included
MIXED_PLAN = ("A8", "A4", "A8", "A4")  # rows of `synthetic.TIMESTEPS`
_MODE_BATCH = 2
_TIMED_SECONDS = 10.0  # of a section, spent in timed rounds


@dataclass
class Bench:
    """What the sections share: the device, its ceilings, and the one network that is loaded at a time."""

    device: torch.device
    limits: Ceilings
    repetitions: int = 50
    make: Callable[[str], nn.Module] = models.random_unet
    shape: Callable[[str], tuple[int, ...]] = models.shape_of
    conditioning: Callable[[str, int], dict[str, Any]] = models.conditioning_of
    graphs: Path | None = None
    name: str = ""
    unet: nn.Module | None = None  # float16 on the device
    network: synthetic.Ranged | None = None
    made: dict[str, float] = field(default_factory=dict)

    def load(self, name: str) -> None:
        """The network called ``name``, in place of another one."""
        if self.name == name:
            return
        start = time.monotonic()
        self.name, self.unet, self.network = "", None, None
        release()
        unet = self.make(name)
        store = None if self.graphs is None else self.graphs / f"{name}.json"
        self.network = synthetic.ranged(unet, self.shape(name), self.conditioning(name, 2), self.device, store)
        self.unet = half_precision(unet, self.inputs(name, 1)[0])
        self.name = name
        release()
        self.made[name] = round(time.monotonic() - start, 1)
        print(f"{name} made in {self.made[name]} s", file=sys.stderr)

    def inputs(self, name: str, batch: int) -> list[Inputs]:
        """One set per row of the table, in float16 on a GPU."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        given = moved(self.conditioning(name, batch), self.device, dtype)
        generator, result = torch.Generator().manual_seed(batch), []
        # parts of one tensor, as a sampler's timesteps are: the engine reads it once, and waits for no later one
        schedule = torch.cat([timestep_tensor(t, batch) for t in synthetic.TIMESTEPS]).to(self.device)
        for timestep in schedule.split(batch):
            sample = torch.randn(batch, *self.shape(name), generator=generator).to(self.device, dtype)
            result.append(Inputs(sample, timestep, given))
        return result


def release() -> None:
    """Give back what nobody refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_of(device: torch.device, make: Callable[[], Contestant], calls: int) -> tuple[Contestant, int | None]:
    """(what ``make`` made, the most memory that it and its first calls had on the device beside what was there)."""
    if device.type != "cuda":
        return make(), None
    release()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    contestant = make()
    for i in range(calls):
        contestant(i)
    torch.cuda.synchronize(device)
    return contestant, torch.cuda.max_memory_allocated(device) - before


def rounds_for(contestants: dict[str, Contestant], device: torch.device, most: int) -> int:
    """So many rounds that they take about `_TIMED_SECONDS`, five at least."""
    synchronize = device_synchronize(device)
    for run in contestants.values():
        run(0)
    synchronize()
    start = time.perf_counter()
    for run in contestants.values():
        run(0)
    synchronize()
    return max(5, min(most, int(_TIMED_SECONDS / max(time.perf_counter() - start, 1e-6))))


def timed(bench: Bench, contestants: dict[str, Contestant], sets: int) -> dict[str, dict[str, float]]:
    """{name: {median, p05, p95}} in milliseconds."""
    rounds = rounds_for(contestants, bench.device, bench.repetitions)
    times = interleaved(contestants, rounds, sets=sets, synchronize=device_synchronize(bench.device))
    return {name: summary(values) for name, values in times.items()}


def engines(bench: Bench, batch: int, precisions: tuple[str, ...]) -> Iterator[tuple[str, qe.IntegerUNet, Any, Any]]:
    """(precision, model, contestant, peak memory), made one after the other."""
    assert bench.network is not None
    inputs = bench.inputs(bench.name, batch)
    for precision in precisions:
        bench.network.weights(qe.Recipe.named(precision), bench.device)  # rounding takes memory that no model needs
        model: list[qe.IntegerUNet] = []

        def make(precision: str = precision, model: list[qe.IntegerUNet] = model) -> Contestant:
            model.append(synthetic.integer_model(bench.network, precision, bench.device))  # type: ignore[arg-type]
            return lambda i: predict(model[0], *inputs[i])

        contestant, peak = peak_of(bench.device, make, len(inputs))
        yield precision, model[0], contestant, peak


def network_rows(bench: Bench, name: str, batch: int, precisions: tuple[str, ...] = PRECISIONS) -> Rows:
    """One row per precision; float16 eager and as a CUDA graph beside all of them, in the same rounds."""
    bench.load(name)
    assert bench.unet is not None
    inputs, unet = bench.inputs(name, batch), bench.unet
    floats, absent = gpu_contestants(unet, inputs, False)
    if "torch-fp16" not in floats:
        raise RuntimeError(f"float16 does not run: {absent['torch-fp16']}")
    _, activations = peak_of(bench.device, lambda: floats["torch-fp16"], 1)
    float_bytes = sum(p.numel() * p.element_size() for p in unet.parameters())
    made = list(engines(bench, batch, precisions))
    errors = {}
    for precision, _, run, _ in list(made):
        try:
            errors[precision] = check_outputs(run, floats["torch-fp16"], len(inputs))
        except ValueError as error:  # of a random network at the fewest bits, say: the others have their rows
            print(f"{name}, batch {batch}, {precision} is left out: {error}", file=sys.stderr, flush=True)
    made = [entry for entry in made if entry[0] in errors]
    if not made:
        raise ValueError(f"{name}, batch {batch}: no precision has a sane output")
    times = timed(bench, {p: run for p, _, run, _ in made} | floats, len(inputs))
    rows = []
    for precision, model, _, peak in made:
        bound = bounds.forward_bound_ms(model, batch, bench.limits)
        rows.append(
            {
                **_row(name, batch, precision, times[precision], {n: times[n] for n in floats}, absent),
                "backend": "triton" if bench.device.type == "cuda" else "cpu",
                "peak_memory_bytes": peak,
                "weight_bytes": weight_bytes(model),
                "gbops": round(qe.count_bops(model).total / 1e9, 3),
                "relative_error": errors[precision],
                "bound_ms": float(f"{bound:.5g}"),
                "share_of_roofline": float(f"{bound / times[precision]['median']:.4g}"),
                "float_weight_bytes": float_bytes,
                "baseline_peak_memory_bytes": {
                    "torch-fp16": None if activations is None else float_bytes + activations
                },
            }
        )
    return rows


def _row(
    name: str, batch: int, precision: str, engine: dict[str, float], floats: dict[str, dict], absent: dict[str, str]
) -> dict[str, Any]:
    return {
        "model": name,
        "parameters": "random",
        "batch": batch,
        "precision": precision,
        "median_ms": engine["median"],
        "p05_ms": engine["p05"],
        "p95_ms": engine["p95"],
        "baselines": floats,
        "baselines_absent": absent,
        "speedup": {n: round(t["median"] / engine["median"], 3) for n, t in floats.items()},
    }


def compiled_rows(bench: Bench, name: str, batch: int, baseline: str, precisions: tuple[str, ...] = PRECISIONS) -> Rows:
    """A baseline that compiles for minutes, beside the engine timed again: joins the rows of `network_rows`."""
    bench.load(name)
    unet, inputs = bench.unet, bench.inputs(name, batch)
    assert unet is not None
    halves = [Inputs(*(moved(part, bench.device, torch.float16) for part in item)) for item in inputs]
    torch._dynamo.reset()
    maker = torchao_contestant if baseline == "torchao-int8" else compiled_contestant
    floats, absent = tried({baseline: lambda: maker(unet, halves)})
    made = list(engines(bench, batch, precisions)) if floats else []
    times = timed(bench, {p: run for p, _, run, _ in made} | floats, len(inputs)) if floats else {}
    rows = []
    for precision in precisions:
        row: dict[str, Any] = {"model": name, "batch": batch, "precision": precision}
        engine = times.get(precision)
        found = {n: times[n] for n in floats}
        row |= {"baselines": found, "baselines_absent": absent}
        row["speedup"] = {n: round(t["median"] / engine["median"], 3) for n, t in found.items()} if engine else {}
        rows.append(row)
    return rows


def mode_rows(bench: Bench, name: str, batch: int = _MODE_BATCH) -> Rows:
    """What a step pays for another mode than the last one's: alternating rows against staying in either mode."""
    bench.load(name)
    assert bench.network is not None
    inputs = bench.inputs(name, batch)
    model = synthetic.integer_model(bench.network, "w4a8", bench.device, MIXED_PLAN)

    def visiting(*order: int) -> Contestant:
        return lambda i: predict(model, *inputs[order[i % len(order)]])

    stays = ("A8", "A4")
    contestants = {"A8": visiting(0, 2), "A4": visiting(1, 3), "switching": visiting(0, 1, 2, 3)}
    check_outputs(contestants["switching"], None, len(inputs))
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    rounds = rounds_for(contestants, bench.device, bench.repetitions)
    synchronize = device_synchronize(bench.device)
    for repetition in range(rounds + 2):
        for contestant, run in contestants.items():
            for i in range(-4, 4):  # four calls of a contestant's own go before the timed ones
                synchronize()
                start = time.perf_counter()
                run(i)
                synchronize()
                mode = contestant if contestant in stays else ("A8", "A4")[i % 2]
                if repetition >= 2 and i >= 0:
                    times[contestant, mode].append(1e3 * (time.perf_counter() - start))
    stay = {mode: summary(times[mode, mode])["median"] for mode in stays}
    switched = {mode: summary(times["switching", mode])["median"] for mode in stays}
    both = summary([value for mode in stays for value in times["switching", mode]])
    return [
        {
            **_row(name, batch, "w4a8/w4a4 in turn", both, {}, {}),
            "backend": "triton" if bench.device.type == "cuda" else "cpu",
            "peak_memory_bytes": None,
            "weight_bytes": weight_bytes(model),
            "gbops": round(qe.count_bops(model).total / 1e9, 3),
            "stay_ms": stay,
            "switched_ms": switched,
            "mode_switch_ms": round(sum(switched[mode] - stay[mode] for mode in stays) / 2, 5),
        }
    ]


def merged(rows: Rows, new: Rows) -> Rows:
    """Rows of the same model, batch and precision become one: their baselines join."""
    key = ("model", "batch", "precision")
    result = {tuple(row[k] for k in key): dict(row) for row in rows}
    for row in new:
        old = result.get(tuple(row[k] for k in key))
        if old is None and "median_ms" not in row:
            raise LookupError(f"{row['model']} batch {row['batch']} has no row of the engine yet; measure that first")
        if old is None:
            result[tuple(row[k] for k in key)] = row
            continue
        absent = {**old["baselines_absent"], **row["baselines_absent"]}
        for name in ("baselines", "speedup"):
            old[name] = {**old[name], **row[name]}
        old["baselines_absent"] = {n: reason for n, reason in absent.items() if n not in old["baselines"]}
    return list(result.values())


def unet_sections(
    bench: Bench, names: tuple[str, ...] = models.NAMES, batches: tuple[int, ...] = BATCHES
) -> list[Section]:
    """Engine and float16 of every network first, then mode switches, then what compiles for minutes."""
    made = [
        Section(f"{n} batch {b}", lambda n=n, b=b: network_rows(bench, n, b), SECONDS[n])
        for n in names
        for b in batches
    ]
    made += [Section(f"{n} modes", lambda n=n: mode_rows(bench, n), SECONDS[n]) for n in names]
    for baseline in ("torch-fp16-compile", "torchao-int8"):
        for n in names:
            for b in batches:
                measure = lambda n=n, b=b, baseline=baseline: compiled_rows(bench, n, b, baseline)  # noqa: E731
                made.append(Section(f"{n} batch {b} {baseline}", measure, 2 * SECONDS[n]))
    return made


def main(options: Namespace) -> int:
    """The GPU part of ``python -m benchmarks.unet``; 1 where a section went wrong."""
    start = time.monotonic()
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no NVIDIA GPU here")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cudnn.benchmark = True
    machine = results_file.machine("cuda", options.commit)
    limits = ceilings.measure(device)
    machine["ceilings"] = limits._asdict()
    print(f"{machine['gpu']}: {limits}")
    bench = Bench(device, limits, 5 if options.quick else options.repetitions, graphs=options.graphs)
    todo = unet_sections(bench, ("cifar10",), (2,))[:2] if options.quick else unet_sections(bench)
    path = options.out or (None if options.quick else results_file.default_path("unet", "cuda"))
    with torch.no_grad():  # torch.compile knows tensors made without gradients, not those of inference mode
        rows, wrong = sections.run(todo, options, "unet", machine, path, merge=merged, start=start)
    results_file.show(f"UNets with random weights, {machine['gpu']}", rows, COLUMNS)
    for line in wrong:
        print(f"went wrong: {line}")
    return 1 if wrong else 0
