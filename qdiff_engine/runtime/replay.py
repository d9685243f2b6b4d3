"""The program on a device that replays recorded work: fixed addresses, one recording per batch size and mode.

A step copies the row of the table, the latents and what the timestep gave to the addresses the recording reads, and
replays it: nothing is dispatched, allocated or waited for layer by layer. On a GPU a recording is a CUDA graph; any
other way to repeat a function will do, and ``record=run_again`` simply calls it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..graph.ir import Graph
from ..tables import Table
from ..weights import QuantizedWeight
from .compiler import Row, Values, folded
from .lowering import lower_for_gpu
from .program import Program

Recorded = Callable[[], Tensor]
Recorder = Callable[[Callable[[], Tensor]], Recorded]
_BATCH_SIZES = 4  # recordings are kept for so many
_WARM_UP = 2


def run_again(function: Callable[[], Tensor]) -> Recorded:
    """No recording: every replay calls the function."""
    return function


class CudaGraphs:
    """Records functions as CUDA graphs that share one memory pool; their results are read before the next replay."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaGraphs:
        """With a pool of its own: what records into one takes turns."""
        return CudaGraphs(self.device)

    def __call__(self, function: Callable[[], Tensor]) -> Recorded:
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # kernels compile, libraries allocate their workspaces
            for _ in range(_WARM_UP):
                function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, stream=stream):
            output = function()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


@dataclass
class _Batch:
    """Fixed addresses of one batch size and kind of timestep, and what was recorded on them by mode."""

    values: dict[int, Tensor]  # slot -> where recordings read it
    constants: list[tuple[int, Any]]  # sizes, which a batch size determines
    sources: dict[int, Tensor]  # slot -> what the prompt or a timestep gave, and is there already
    recorded: dict[tuple[int, ...], Recorded]


class ReplayedProgram(Program):
    """A `Program` whose main section is recorded once per batch size and mode, and replayed for every row of the mode.

    Args:
        record: how to repeat a function: `CudaGraphs(device)`, or `run_again`.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, tuple[QuantizedWeight, ...]],
        constants: Mapping[str, Tensor],
        table: Table,
        device: torch.device,
        backend: str | None = None,
        record: Recorder = run_again,
        dtype: torch.dtype = torch.float32,
        floating: Collection[str] = (),
    ) -> None:
        self.device, self.record = device, record
        super().__init__(graph, weights, constants, table, device, backend, lower_for_gpu, dtype, floating)
        self._remembered = {slot for kept in self._kept.values() for slot in kept}

    def _set_table(self, table: Table) -> None:
        super()._set_table(table)
        self.quantizations = quantization_rows(table, self.device)
        a, b = table.output_scale, table.output_shift
        bias = self.output_bias if table.corrects() else None
        self.corrections = torch.stack([a, folded(a, b, bias)], 1).to(self.device)
        ones, zeros = torch.ones_like(a[0]), torch.zeros_like(b[0])
        self._identity = torch.stack([ones, folded(ones, zeros, bias)]).to(self.device)
        self.modes = [tuple(bits) for bits in table.bits.tolist()]
        self._table_corrects = table.corrects()
        self._start()

    def _start(self) -> None:
        """Fixed addresses for the terms of a row, and nothing recorded on them yet."""
        self.current = self.quantizations[0].clone()
        self.corrected = self.corrections[0].clone()
        terms = tuple(self.corrected) if self._table_corrects else (None, None)
        self._mode_rows = {
            mode: Row(tuple((self.current[i, :3], 0, bits) for i, bits in enumerate(mode)), *terms)
            for mode in set(self.modes)
        }
        self._batches: OrderedDict[tuple[int, torch.dtype], _Batch] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayedProgram:
        """Over the same packed weights, which never change, with addresses and recordings of its own."""
        other = copy.copy(self)
        other.record = copy.deepcopy(self.record, memo)
        other._start()
        other._forget()
        return other

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor], timestep: float, row: int, corrected: bool = True) -> Tensor:
        """As `Program.run`; the result is overwritten by the next call."""
        values, _ = self.before_main(inputs, timestep, row)
        self.current.copy_(self.quantizations[row])
        self.corrected.copy_(self.corrections[row] if self.corrects and corrected else self._identity)
        batch = self._batch((len(inputs["sample"]), inputs["timestep"].dtype), values)
        self._renew(batch, values)
        mode = self.modes[row]
        if mode not in batch.recorded:
            batch.recorded[mode] = self.record(lambda: self._main(batch, self._mode_rows[mode]))
        return batch.recorded[mode]()

    def _renew(self, batch: _Batch, values: Values) -> None:
        """Copy to the fixed addresses what is not there from the call before: a few launches, however many values."""
        stale = [slot for slot in batch.values if batch.sources.get(slot) is not values[slot]]
        kept = [slot for slot in stale if slot in self._remembered]
        for slot in stale:
            if slot not in self._remembered:
                batch.values[slot].copy_(values[slot])
        if kept:
            torch._foreach_copy_([batch.values[slot] for slot in kept], [values[slot] for slot in kept])
            batch.sources.update((slot, values[slot]) for slot in kept)

    def _main(self, batch: _Batch, row: Row) -> Tensor:
        values: Values = [None] * len(self.slots)
        for slot, value in (*batch.values.items(), *batch.constants):
            values[slot] = value
        return self.main(values, row)

    def _batch(self, key: tuple[int, torch.dtype], values: Values) -> _Batch:
        """The fixed addresses of a batch size, made at its first call; timesteps are whole numbers or fractions."""
        found = self._batches.get(key)
        if found is None:
            read = {self.slots[name] for name in self.inputs} | self._remembered
            present = [(slot, values[slot]) for slot in sorted(read) if values[slot] is not None]
            found = _Batch(
                {slot: value.clone() for slot, value in present if isinstance(value, Tensor)},
                [(slot, value) for slot, value in present if not isinstance(value, Tensor)],
                {},
                {},
            )
            self._batches[key] = found
            if len(self._batches) > _BATCH_SIZES:
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        return found


def device_rows(table: Table, device: torch.device) -> list[Row]:
    """Every row of the table as kernels on ``device`` read it, without corrections."""
    quantizations = quantization_rows(table, device)
    return [
        Row(tuple((q[:3], 0, width) for q, width in zip(row, bits, strict=True)), None, None)
        for row, bits in zip(quantizations, table.bits.tolist(), strict=True)
    ]


def quantization_rows(table: Table, device: torch.device) -> Tensor:
    """float32 [rows, sites, 4]: (s, float32(1 / s), z), what kernels read, and 0.

    16 bytes a site: Triton compiles a kernel anew for addresses that are no multiples of that.
    """
    inverse = torch.tensor([[numerics.inverse_scale(s) for s in row] for row in table.scale.tolist()])
    terms = [table.scale, inverse.reshape(table.scale.shape), table.zero_point.float(), torch.zeros_like(table.scale)]
    return torch.stack(terms, dim=-1).to(device)
