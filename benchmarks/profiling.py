"""Where the milliseconds of a forward pass go: one timer around every instruction of the compiled program."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qdiff_engine.graph.ir import Node
from qdiff_engine.measuring import summary
from qdiff_engine.runtime.compiler import Instruction, Row, Values
from qdiff_engine.runtime.lowering import lower_for_cpu
from qdiff_engine.runtime.model import IntegerUNet
from qdiff_engine.runtime.program import Program
from qdiff_engine.sampling import predict

OUTSIDE = "outside the instructions"  # checks of the arguments, caches, copies in and out


def kind_of(node: Node) -> str:
    """The row of the profile that an instruction counts in."""
    if node.op == "int_conv2d":
        taps = "segments" if len(node.args) > 1 else "x".join(str(s) for s in node.kwargs.get("stride", ()))
        fused = [name for name in ("temb", "residual") if node.kwargs[name] is not None]
        return " + ".join([f"int_conv2d stride {taps}" if taps != "segments" else "int_conv2d two segments", *fused])
    if node.op == "groupnorm_silu_quantize":
        parts = ["two inputs"] * (len(node.args) > 1) + ["silu"] * node.kwargs["silu"]
        parts += ["upsample"] * (node.kwargs["upsample"] > 1)
        return " + ".join([node.op, *parts])
    if node.op == "quantize":
        placed = ["upsample"] * (node.kwargs["upsample"] > 1) + ["pad"] * any(node.kwargs["padding"])
        return " + ".join([node.op, *placed])
    return node.op


class _Timed:
    """An instruction that adds its seconds to ``spent``."""

    def __init__(self, instruction: Instruction, spent: list[float], clock: Callable[[], float]) -> None:
        self.instruction, self.spent, self.clock = instruction, spent, clock

    def __call__(self, values: Values, row: Row) -> None:
        start = self.clock()
        self.instruction(values, row)
        self.spent[0] += self.clock() - start


def _labels(model: IntegerUNet, program: Program) -> list[tuple[str, str]]:
    """(kind, name of the layer or value) of every instruction of the main section, in order."""
    lowered = lower_for_cpu(model.graph).nodes
    nodes = iter([node for node in lowered if node.section == "main" and node.op != "quantized_copy"])
    labels = []
    for instruction in program.sections["main"]:
        if instruction.__qualname__.startswith("_emptying"):
            labels.append(("emptying slots", ""))
        else:
            node = next(nodes)
            labels.append((kind_of(node), str(node.kwargs.get("layer") or node.kwargs.get("site") or node.name)))
    assert next(nodes, None) is None, "every node of the main section makes one instruction"
    return labels


@torch.inference_mode()
def profile(
    model: IntegerUNet,
    inputs: tuple[Any, Any, Mapping[str, Any]],
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Rows {kind, calls, ms, share} of a forward pass, slowest first; medians over ``repetitions``.

    What is left of the whole call is the row `OUTSIDE`. With one thread, ``time.thread_time`` as the clock counts
    this thread's own work only, which other processes on the machine hardly disturb.
    """
    main, labels = model.program.sections["main"], _labels(model, model.program)
    spent = [[0.0] for _ in main]
    timed: list[Instruction] = [_Timed(i, s, clock) for i, s in zip(main, spent, strict=True)]
    per_kind: dict[str, list[float]] = defaultdict(list)
    per_call: list[list[float]] = []
    model.program.sections["main"] = timed
    try:
        for repetition in range(repetitions + 2):
            for s in spent:
                s[0] = 0.0
            start = clock()
            predict(model, *inputs)
            whole = clock() - start
            if repetition < 2:
                continue
            sums: dict[str, float] = defaultdict(float)
            for (kind, _), s in zip(labels, spent, strict=True):
                sums[kind] += s[0]
            sums[OUTSIDE] = whole - sum(sums.values())
            per_call.append([s[0] for s in spent])
            for kind, seconds in sums.items():
                per_kind[kind].append(1e3 * seconds)
    finally:
        model.program.sections["main"] = main
    return _rows(labels, per_kind) + _slowest(labels, per_call)


def _rows(labels: list[tuple[str, str]], per_kind: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    medians = {kind: summary(values)["median"] for kind, values in per_kind.items()}
    total = sum(medians.values())
    calls = {kind: sum(k == kind for k, _ in labels) or 1 for kind in medians}
    rows = [{"kind": k, "calls": calls[k], "ms": ms, "share": round(ms / total, 4)} for k, ms in medians.items()]
    return sorted(rows, key=lambda row: -row["ms"])


def _slowest(labels: list[tuple[str, str]], per_call: list[list[float]], count: int = 8) -> list[dict[str, Any]]:
    """The single instructions that take longest, as further rows."""
    medians = torch.tensor(per_call, dtype=torch.float64).median(0).values * 1e3
    order = medians.argsort(descending=True)[:count].tolist()
    return [
        {"kind": f"  {labels[i][0]}: {labels[i][1]}", "calls": 1, "ms": round(float(medians[i]), 4), "share": None}
        for i in order
    ]
