"""How fast and how large the integer model is, beside the float one, measured in the same run."""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import numerics, ops
from .baselines import Inputs, float_contestants, half_precision
from .bops import count_bops
from .graph.interpret import flatten_conditioning
from .graph.ir import Node, sizes
from .measuring import (
    WARM_UP,
    Contestant,
    cuda_graph,
    device_synchronize,
    interleaved,
    peak_memory,
    summary,
    thread_count,
)
from .plan_requests import switchable_fraction
from .runtime.model import IntegerUNet
from .sampling import Conditioning, check_count, conditioning_for, moved, predict, timestep_tensor
from .tables import Table

INPUT_SETS = 4
ENGINE, FLOOR = "engine", "integer floor"
_PAUSE = 0.05  # seconds between contestants, in which the threads of the last one's library fall asleep
_SANE_DISTANCE = 1.0  # relative L2 to the float output; unrelated outputs of equal size differ by 1.4


def bench(
    model: IntegerUNet,
    unet: nn.Module | None = None,
    *,
    batch: int = 8,
    repetitions: int = 20,
    threads: int | None = None,
    conditioning: Conditioning = None,
    timestep: float | None = None,
    memory: bool = True,
    compile_: bool = False,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time one forward pass of ``model``, of its integer calls alone, and of float baselines, round by round.

    Args:
        model: the integer model.
        unet: its float original; without it no baseline runs.
        batch: samples per forward pass. ``repetitions``: timed rounds; in each, every contestant runs once.
        threads: torch's threads while measuring; None leaves them as they are.
        conditioning: the UNet's keyword arguments, cycled over the batch; needed where the model takes any.
        timestep: measured timestep; by default several rows from the noisiest to the last take turns, of every
            mode that the plan has.
        memory: measure peak memory too, in one fresh process per model.
        compile_: on a GPU, time torch.compile too, which compiles for minutes.
        on_round: called with (rounds done, rounds in all).

    Returns:
        device, threads, batch, repetitions; ``engine_ms`` and ``baselines``: {median, p05, p95} in milliseconds;
        ``modes_ms``: the engine's median per mode; ``plan_ms``: their mean over the plan's rows, as ``gbops`` and
        ``switchable_fraction`` are means; ``baselines_absent``: {name: reason}; ``speedup``: median baseline / plan_ms;
        ``integer_floor_ms``, the integer convolutions and linears alone at the noisiest row, and ``floor_share`` of
        the engine's time in that mode (None where no layer is integer); ``relative_error`` to float at the first
        input set; ``weight_bytes`` as stored; ``peak_memory_bytes`` and ``baseline_peak_memory_bytes`` (None where
        unknown).

    Raises:
        ValueError: an argument out of range, missing conditioning, or an output that is not finite or far from float.
    """
    check_count("batch", batch), check_count("repetitions", repetitions)
    if threads is not None:
        check_count("threads", threads)
    on_gpu = model.device.type == "cuda"
    # torch.compile knows tensors made without gradients, not those of inference mode
    with thread_count(threads) as used, torch.no_grad() if on_gpu else torch.inference_mode(), _cudnn_tuned():
        inputs = input_sets(model, batch, timestep, conditioning)
        floats, absent = float_contestants(unet, inputs, model.device, used, compile_)
        contestants: dict[str, Contestant] = {ENGINE: lambda i: predict(model, *inputs[i])}
        reference = floats.get("torch-fp16" if on_gpu else "torch-fp32")
        if unet is not None and reference is None:
            raise ValueError(f"the float network does not run: {absent.get('torch-fp16')}")
        error = check_outputs(contestants[ENGINE], reference, len(inputs))
        calls = integer_calls(model, inputs[0])
        if calls:
            contestants[FLOOR] = _in_sequence(calls, on_gpu)
        times = interleaved(
            {**contestants, **floats},
            repetitions,
            sets=len(inputs),
            pause=0.0 if on_gpu else _PAUSE,
            synchronize=device_synchronize(model.device),
            on_round=on_round,
        )
        del contestants, floats, calls, reference  # the children below need the memory
        peaks = peak_memories(model, unet, inputs, used) if memory else {}
    modes_ms, plan_ms = plan_average(model, inputs, times[ENGINE])
    medians = {name: summary(values) for name, values in times.items()}
    engine, floor = medians.pop(ENGINE), medians.pop(FLOOR, None)
    beside_floor = modes_ms[model.table.modes[model.table.row(float(inputs[0].timestep[0]))]] if floor else plan_ms
    return {
        "device": str(model.device),
        "threads": used,
        "batch": batch,
        "repetitions": repetitions,
        "engine_ms": engine,
        "modes_ms": modes_ms,
        "plan_ms": plan_ms,
        "gbops": count_bops(model).total / 1e9,
        "switchable_fraction": switchable_fraction(model.table.modes),
        "integer_floor_ms": floor["median"] if floor else None,
        "floor_share": round(floor["median"] / beside_floor, 4) if floor else None,
        "baselines": medians,
        "baselines_absent": absent,
        "speedup": {name: round(times_["median"] / plan_ms, 3) for name, times_ in medians.items()},
        "relative_error": error,
        "weight_bytes": weight_bytes(model),
        "peak_memory_bytes": peaks.pop(ENGINE, None),
        "baseline_peak_memory_bytes": peaks,
    }


@contextlib.contextmanager
def _cudnn_tuned() -> Iterator[None]:
    """cuDNN tries its algorithms for every shape inside, as whoever cares for speed lets it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def input_sets(model: IntegerUNet, batch: int, timestep: float | None, conditioning: Conditioning) -> list[Inputs]:
    """`INPUT_SETS` draws of latents or a few more, at timesteps spread over each mode's rows; one conditioning."""
    given = conditioning_for(conditioning, range(batch))
    missing = sorted(set(model.graph.inputs) - {"sample", "timestep"} - set(flatten_conditioning(given)))
    if missing:
        raise ValueError(f"conditioning must give {', '.join(missing)}: the model takes it")
    given = moved(given, model.device, None if model.device.type == "cpu" else model.dtype)
    generator, result = torch.Generator().manual_seed(0), []
    values = [timestep] * INPUT_SETS if timestep is not None else measured_timesteps(model.table)
    # parts of one tensor, as a sampler's timesteps are: a model on a GPU reads it once, and waits for no later one
    schedule = torch.cat([timestep_tensor(value, batch) for value in values]).to(model.device)
    for step in schedule.split(batch):
        sample = torch.randn(sizes(model.graph.inputs["sample"], batch), generator=generator)
        result.append(Inputs(sample.to(model.device, model.dtype), step, given))
    return result


def measured_timesteps(table: Table) -> list[float]:
    """Timesteps of `INPUT_SETS` rows, or as many of each mode where there are several, noisiest first."""
    present = list(dict.fromkeys(table.modes))
    each = math.ceil(INPUT_SETS / len(present))
    timesteps = []
    for mode in present:
        rows = [t for t, m in zip(table.timesteps, table.modes, strict=True) if m == mode]
        timesteps += [rows[round(i * (len(rows) - 1) / max(each - 1, 1))] for i in range(each)]
    return timesteps


def plan_average(model: IntegerUNet, inputs: list[Inputs], times: Sequence[float]) -> tuple[dict[str, float], float]:
    """(median milliseconds per mode, their mean over the plan's rows; the median alone where a mode was not timed).

    Args:
        times: of rounds that took the input sets in turn, beginning where `measuring.interleaved` begins.
    """
    by_mode: dict[str, list[float]] = {}
    first = max(WARM_UP, len(inputs))
    for i, value in enumerate(times):
        row = model.table.row(float(inputs[(first + i) % len(inputs)].timestep[0]))
        by_mode.setdefault(model.table.modes[row], []).append(value)
    medians = {mode: summary(values)["median"] for mode, values in by_mode.items()}
    if set(medians) < set(model.table.modes):
        return medians, summary(times)["median"]
    return medians, round(math.fsum(medians[mode] for mode in model.table.modes) / len(model.table.modes), 4)


def check_outputs(engine: Contestant, reference: Contestant | None, sets: int) -> float | None:
    """Relative L2 distance of the engine to float on input set 0; nothing is timed before the outputs are sane."""
    outputs = [engine(i).float() for i in range(sets)]
    for i, output in enumerate(outputs):
        if not bool(torch.isfinite(output).all()):
            raise ValueError(f"the engine's output on input set {i} is not finite; nothing was timed")
    if reference is None:
        return None
    expected = reference(0).float()
    if outputs[0].shape != expected.shape:
        raise ValueError(f"the engine's output is {list(outputs[0].shape)}, the float one {list(expected.shape)}")
    error = float((outputs[0] - expected).norm() / expected.norm().clamp(min=1e-12))
    if not error < _SANE_DISTANCE:
        raise ValueError(f"the engine's output is {error:.2g} (relative L2) from float; nothing was timed")
    return round(error, 6)


def integer_calls(model: IntegerUNet, inputs: Inputs) -> list[Callable[[], Tensor]]:
    """Every integer convolution and linear that a step runs, on random integers of its shape and with nothing fused.

    A convolution gets its image upsampled already, and on a CPU padded, as the kernel before it can write it.
    """
    row = model.table.row(float(inputs.timestep[0]))
    return [call for node in model.graph.nodes for call in _integer_call(model, node, row, len(inputs.sample))]


def _integer_call(model: IntegerUNet, node: Node, row: int, batch: int) -> Iterator[Callable[[], Tensor]]:
    if node.op not in ("int_conv2d", "int_gemm") or node.section != "main":
        return
    run = ops.resolve(node.op, model.device)
    sources = model.graph.quantizer_of()
    for ref, weight in zip(node.args, model.weights[node.kwargs["layer"]], strict=True):
        column = model.table.sites.index(sources[ref.name].kwargs["site"])
        if int(model.table.bits[row, column]) == 16:
            continue
        scale, zero_point = float(model.table.scale[row, column]), int(model.table.zero_point[row, column])
        shape = _operand_shape(node, weight.values, sizes(model.graph.node(ref.name).shape, batch), model.device)
        q = torch.randint(0, 8, shape, dtype=torch.uint8).to(ops.storage(model.device))
        q, values, scales = (t.to(model.device) for t in (q, weight.values, weight.scale))
        at: Any = scale
        if model.device.type != "cpu":  # as a step of the replayed program reads it
            at = torch.tensor([scale, numerics.inverse_scale(scale), zero_point], device=model.device)
        out = {} if model.device.type == "cpu" else {"out_dtype": model.dtype}
        if node.op == "int_gemm":
            yield _bound(run, q, ops.pack_gemm(values, scales, weight.bits), at, zero_point, **out)
        else:
            geometry = {name: node.kwargs[name] for name in ("stride", "dilation", "groups")}
            geometry |= {} if model.device.type == "cpu" else {"padding": node.kwargs["padding"]}
            q, packed = q.contiguous(memory_format=torch.channels_last), ops.pack_conv2d(
                values, scales, **geometry, bits=weight.bits
            )  # fmt: skip
            yield _bound(run, [ops.Segment(q, packed, at, zero_point)], **out)


def _in_sequence(calls: list[Callable[[], Tensor]], on_gpu: bool) -> Contestant:
    def once() -> None:
        for call in calls:
            call()

    run = cuda_graph(once) if on_gpu else once
    return lambda i: run()


def _bound(run: Callable[..., Tensor], *arguments: Any, **options: Any) -> Callable[[], Tensor]:
    return lambda: run(*arguments, **options)


def _operand_shape(node: Node, weight: Tensor, shape: tuple[int, ...], device: torch.device) -> tuple[int, ...]:
    """Shape of the integers that a layer multiplies, its image upsampled, and on a CPU padded."""
    if node.op == "int_gemm":
        return (*shape[:-1], weight.shape[1])
    top, bottom, left, right = node.kwargs["padding"] if device.type == "cpu" else (0, 0, 0, 0)
    height, width = (size * node.kwargs["upsample"] for size in shape[2:])
    return (shape[0], weight.shape[1] * node.kwargs["groups"], height + top + bottom, width + left + right)


def weight_bytes(model: IntegerUNet) -> int:
    """Bytes of the model's parameters as the artifact stores them: packed integers, scales, float constants."""
    total = sum(value.numel() * value.element_size() for value in model.constants.values())
    for weight in (part for parts in model.weights.values() for part in parts):
        columns = math.prod(weight.values.shape[1:])
        total += len(weight.values) * ((columns + 1) // 2 if weight.bits == 4 else columns)
        total += weight.scale.numel() * weight.scale.element_size()
    return total


def peak_memories(
    model: IntegerUNet, unet: nn.Module | None, inputs: list[Inputs], threads: int
) -> dict[str, int | None]:
    """Peak memory of the engine and of the torch baselines, each in a process that loads nothing else.

    On a CPU it is the process's; on a GPU what torch has allocated there.
    """
    with tempfile.TemporaryDirectory(prefix="qdiff-bench-") as folder:
        artifact = Path(folder) / "artifact"
        model.save_pretrained(artifact)
        peaks = {ENGINE: peak_memory(artifact, None, inputs, threads, model.dtype)}
    if unet is not None and model.device.type == "cuda":
        module = half_precision(unet, inputs[0]).cpu()
        peaks["torch-fp16"] = peak_memory(None, module, inputs, threads, torch.float16)
    elif unet is not None:
        module = copy.deepcopy(unet).float().eval()
        peaks["torch-fp32"] = peak_memory(None, module, inputs, threads)
        peaks["torch-bf16"] = peak_memory(None, module, inputs, threads, torch.bfloat16)
    return peaks
