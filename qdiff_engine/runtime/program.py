"""A compiled model: sections of instructions, and the memory of what the prompt and the timestep alone determine."""

from __future__ import annotations

import copy
import dataclasses
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..graph.ir import Dim, Graph
from ..ops import extension
from ..tables import Table
from ..weights import QuantizedWeight
from .compiler import Compiler, Row, Values, make_rows
from .lowering import lower_for_cpu

_CACHED_TIMESTEPS = 256
_CACHED_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}  # of what prompts and timesteps alone give, kept between calls


class Program:
    """A compiled model. ``run`` is the whole forward pass; on a GPU, one call at a time."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, tuple[QuantizedWeight, ...]],
        constants: Mapping[str, Tensor],
        table: Table,
        device: torch.device,
        backend: str | None = None,
        lower: Callable[[Graph], Graph] = lower_for_cpu,
        dtype: torch.dtype = torch.float32,
        floating: Collection[str] = (),
    ) -> None:
        if device.type == "cpu":
            extension.keep_freed_memory()
        lowered = lower(graph)
        self.corrects = True
        self.inputs = tuple(lowered.inputs)
        compiler = Compiler(lowered, weights, constants, table, device, backend, dtype, floating)
        self.folds_correction, self.output_bias = compiler.corrected_layer is not None, compiler.output_bias
        self._set_table(table)
        self.slots, lifetimes = compiler.slots, compiler.lifetimes
        self.sections = {name: compiler.section(name) for name in ("prompt", "time", "main")}
        self.output = compiler.slots[lowered.output]
        self._kept = {name: compiler.slots_of(lifetimes.kept_after(name)) for name in ("prompt", "time")}
        shapes = {node.name: node.shape for node in lowered.nodes}
        self._batched = {self.slots[name] for name, shape in shapes.items() if shape[:1] == ("B",)}
        self._time_repeats = all(_repeats(shapes[name]) for name in lifetimes.kept_after("time"))
        self._reads = {name: compiler.slots_of(lifetimes.conditioning_read(name)) for name in ("prompt", "time")}
        of_time = () if self._reads["time"] else compiler.section("prompt", lifetimes.needed_by("time"))
        self._time_alone = (*of_time, *self.sections["time"])
        self._by_identity = device.type != "cpu"
        self._kept_bytes = _CACHED_BYTES.get(device.type, _CACHED_BYTES["cpu"])
        self._forget()

    def _set_table(self, table: Table) -> None:
        self.rows = make_rows(table, self.output_bias)
        self._uncorrected = tuple(dataclasses.replace(row, output_scale=None, output_shift=None) for row in self.rows)

    def _forget(self) -> None:
        """Empty the caches of what the prompt and the timestep alone determine."""
        self._prompts = _Cache(4, self._kept_bytes, self._by_identity)
        self._times = _Cache(_CACHED_TIMESTEPS, self._kept_bytes, self._by_identity)

    def with_table(self, table: Table) -> Program:
        """This program with another table of the same sites, over the same packed weights."""
        other = copy.copy(self)
        other._set_table(table)
        other._forget()
        return other

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor], timestep: float, row: int, corrected: bool = True) -> Tensor:
        """Output for ``inputs`` (every graph input by name); ``timestep`` is the value in inputs["timestep"].

        ``corrected``: whether the row's correction is for this call, where the program corrects at all.
        """
        return self.main(*self.before_main(inputs, timestep, row, corrected))

    def before_main(
        self, inputs: Mapping[str, Tensor], timestep: float, row: int, corrected: bool = True
    ) -> tuple[Values, Row]:
        """Inputs, and what the prompt and the timestep alone determine: computed, or remembered from another step."""
        values: Values = [None] * len(self.slots)
        for name in self.inputs:
            values[self.slots[name]] = inputs[name]
        batch = inputs["sample"].shape[0]
        constants = (self.rows if self.corrects and corrected else self._uncorrected)[row]
        self._cached("prompt", self._prompts, (batch,), values, constants)
        self._cached("time", self._times, (batch, timestep), values, constants)
        return values, constants

    def main(self, values: Values, constants: Row) -> Tensor:
        """The part that depends on the latents; ``values`` are emptied on the way."""
        for instruction in self.sections["main"]:
            instruction(values, constants)
        output, a, b = values[self.output], constants.output_scale, constants.output_shift
        if a is None or b is None or self.folds_correction:
            return output
        shape = (1, -1, *[1] * (output.dim() - 2))
        return output * a.reshape(shape) + b.reshape(shape)

    def _cached(self, section: str, cache: _Cache, key: tuple, values: Values, row: Row) -> None:
        """Run a section, or restore what it left behind at an earlier call with equal inputs of those it reads."""
        conditioning = [values[slot] for slot in self._reads[section]]
        if cache.by_identity:  # the two prompts of guidance may take turns
            key = (*key, *map(id, conditioning))
        kept = cache.get(key, conditioning)
        if kept is None:
            if section == "time" and not conditioning and self._time_repeats:
                kept = self._single_time(values, row)
            else:
                for instruction in self.sections[section]:
                    instruction(values, row)
                kept = [(slot, values[slot]) for slot in self._kept[section]]
            cache.put(key, conditioning, kept)
        for slot, value in kept:
            values[slot] = value

    def _single_time(self, values: Values, row: Row) -> list[tuple[int, Any]]:
        """The time section for one sample, repeated: a batch size never changes what a timestep gives."""
        single: Values = [None] * len(values)
        for name in self.inputs:
            single[self.slots[name]] = values[self.slots[name]][:1]
        for instruction in self._time_alone:
            instruction(single, row)
        batch = len(values[self.slots["sample"]])
        kept = []
        for slot in self._kept["time"]:
            value = single[slot]
            if slot in self._batched:
                value = value.expand(batch, *value.shape[1:]).contiguous()
            kept.append((slot, value))
        return kept


def _repeats(shape: tuple[Dim, ...]) -> bool:
    """Whether a value of this shape is one sample's, repeated along the batch, or the same for every batch."""
    return not any(isinstance(size, str) for size in (shape[1:] if shape[:1] == ("B",) else shape))


_LOCK = threading.RLock()  # of all caches: one of its own would keep a model from being copied


class _Cache:
    """Least recently used values by key, for any number of threads.

    Conditioning is compared by content; by identity where a comparison would make the host wait for a device: there the
    caller hands over the same tensor only while its content stays the same.
    """

    def __init__(self, limit: int, most_bytes: int, by_identity: bool = False) -> None:
        self.limit, self.most_bytes, self.by_identity = limit, most_bytes, by_identity
        self.bytes = 0
        self.entries: OrderedDict[tuple, tuple[list[Tensor], list[tuple[int, Any]], int]] = OrderedDict()

    def get(self, key: tuple, conditioning: list[Tensor]) -> list[tuple[int, Any]] | None:
        entry = self.entries.get(key)
        if entry is None or len(entry[0]) != len(conditioning):
            return None
        equal = operator.is_ if self.by_identity else torch.equal
        if not all(equal(a, b) for a, b in zip(entry[0], conditioning, strict=True)):
            return None
        with _LOCK:
            if key in self.entries:
                self.entries.move_to_end(key)
        return entry[1]

    def put(self, key: tuple, conditioning: list[Tensor], kept: list[tuple[int, Any]]) -> None:
        size = sum(v.numel() * v.element_size() for _, v in kept if isinstance(v, Tensor))
        entry = ([c if self.by_identity else c.clone() for c in conditioning], kept, size)
        with _LOCK:
            self._drop(key)
            self.entries[key] = entry
            self.bytes += size
            while len(self.entries) > 1 and (len(self.entries) > self.limit or self.bytes > self.most_bytes):
                self._drop(next(iter(self.entries)))

    def _drop(self, key: tuple) -> None:
        entry = self.entries.pop(key, None)
        self.bytes -= entry[2] if entry is not None else 0
