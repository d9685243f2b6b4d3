"""How much memory learning takes: what one call of the simulation keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph.interpret import Evaluation
from ..memory import SavedBytes
from ..sampling import conditioning_for, predict, timestep_tensor
from .learnt import Simulation
from .path import Path

_ADAM = 4  # a parameter, its gradient and Adam's two moments


@dataclass(frozen=True)
class Memory:
    """Bytes that alignment is expected to hold at its peak; none of it grows with the number of steps in a group.

    Args:
        parameters: what is learnt, with gradients and Adam's moments.
        network: dequantised weights and constants.
        saved: the activations of a batch that one call keeps for its backward pass.
        path: the float path's latents, and the sampler's noise.
    """

    parameters: int
    network: int
    saved: int
    path: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.parameters + self.network + self.saved + self.path


def estimated(simulation: Simulation, path: Path, batch: int) -> Memory:
    """The memory of learning with ``batch`` samples a call, from calls with one sample and with two in every mode."""
    held, table = list(held_by(simulation)), simulation.learnt.table0
    of_mode = {table.modes[table.row(t)]: t for t in path.steps.timesteps}  # with A16, quantisers keep nothing
    calls = [[_saved_by(simulation, path, t, count, held) for count in (1, 2)] for t in of_mode.values()]
    samples = sum(len(moments[0].samples) for moments in path.moments)
    rows = min(batch, samples) * (1 if path.guidance.scale is None else 2)
    latents = [moment.latents for moments in path.moments for moment in moments]
    latents += [noise for noise in path.steps.noise if noise is not None]
    return Memory(
        parameters=_ADAM * _bytes([parameter for _, parameter in simulation.learnt.named()]),
        network=_bytes(held),
        saved=max(one + max(two - one, 0) * (rows - 1) for one, two in calls),
        path=_bytes(latents),
    )


def held_by(simulation: Simulation) -> Iterator[Tensor]:
    """The weights that are not learnt and the constants, which every call reads."""
    yield from simulation.constants.values()
    yield from simulation.learnt.held()


def _saved_by(simulation: Simulation, path: Path, at: float, count: int, held: list[Tensor]) -> int:
    """Bytes that one call with ``count`` samples at a timestep saves for backward."""
    moment = path.moments[0][0]
    sample = path.steps.received(moment)[:1].repeat(count, 1, 1, 1).to(simulation.learnt.device)
    timestep = timestep_tensor(at, count)
    conditioning: dict[str, Any] = conditioning_for(path.guidance.conditioning, range(count))
    if simulation.parts is not None:
        return _saved_in_parts(simulation, held, lambda: predict(simulation, sample, timestep, conditioning))
    with torch.enable_grad(), SavedBytes(held).counting() as saved:
        output = predict(simulation, sample, timestep, conditioning)
    del output
    return saved.peak


def _saved_in_parts(simulation: Simulation, held: list[Tensor], call: Callable[[], Tensor]) -> int:
    """What a call keeps that computes its parts again: what they hand on, and all that the largest of them saves."""
    handed_on: dict[int, int] = {}
    largest = 0

    def counted(part: Evaluation, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal largest
        with SavedBytes(
            [*held, *(value for value in values.values() if isinstance(value, Tensor))]
        ).counting() as saved:
            values = part(values)
        largest = max(largest, saved.peak)
        storages = [value.untyped_storage() for value in values.values() if isinstance(value, Tensor)]
        kept.extend(storages)
        handed_on.update({storage.data_ptr(): storage.nbytes() for storage in storages})
        return values

    kept: list[torch.UntypedStorage] = []  # so that no address is used twice
    run_part, simulation.run_part = simulation.run_part, counted
    try:
        with torch.enable_grad():
            call()
    finally:
        simulation.run_part = run_part
    return sum(handed_on.values()) + largest


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
