"""How much memory learning takes: what one call of the simulation keeps for its backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        path: the float path's latents.
    """

    parameters: int
    network: int
    saved: int
    path: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.parameters + self.network + self.saved + self.path


class SavedBytes:
    """Counts distinct storages saved for backward; ``now`` those alive, ``peak`` the most of them, in bytes.

    ``held``: tensors that are there anyway, such as weights, and are not counted.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        self.now = self.peak = 0
        self._held = {tensor.untyped_storage().data_ptr() for tensor in held}
        self._alive: dict[int, tuple[int, int]] = {}  # pointer -> (uses, bytes)

    @contextlib.contextmanager
    def counting(self) -> Iterator[SavedBytes]:
        """Count what is saved inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor):
            yield self

    def add(self, pointer: int, size: int) -> None:
        """One more saved tensor in a storage."""
        uses, _ = self._alive.get(pointer, (0, size))
        self._alive[pointer] = (uses + 1, size)
        self.now += size if uses == 0 and pointer not in self._held else 0
        self.peak = max(self.peak, self.now)

    def drop(self, pointer: int) -> None:
        """One saved tensor less."""
        uses, size = self._alive.pop(pointer)
        if uses > 1:
            self._alive[pointer] = (uses - 1, size)
        elif pointer not in self._held:
            self.now -= size


class _Kept:
    """A saved tensor for as long as autograd holds on to it."""

    def __init__(self, counter: SavedBytes, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.counter, self.tensor, self.pointer = counter, tensor, storage.data_ptr()
        counter.add(self.pointer, storage.nbytes())

    def __del__(self) -> None:
        self.counter.drop(self.pointer)


def estimated(simulation: Simulation, path: Path, batch: int) -> Memory:
    """The memory of learning with ``batch`` samples a call, from calls with one sample and with two."""
    held = list(held_by(simulation))
    one, two = (_saved_by(simulation, path, count, held) for count in (1, 2))
    rows = batch * (1 if path.guidance.scale is None else 2)
    latents = [moment.latents for moments in path.moments for moment in moments]
    return Memory(
        parameters=_ADAM * _bytes([parameter for _, parameter in simulation.learnt.named()]),
        network=_bytes(held),
        saved=one + max(two - one, 0) * (rows - 1),
        path=_bytes(latents),
    )


def held_by(simulation: Simulation) -> Iterator[Tensor]:
    """The dequantised weights and the constants, which every call reads."""
    yield from simulation.constants.values()
    for parts in simulation.learnt.fixed.values():
        yield from parts


def _saved_by(simulation: Simulation, path: Path, count: int, held: list[Tensor]) -> int:
    """Bytes that one call with ``count`` samples saves for backward."""
    moment = path.moments[0][0]
    sample = path.steps.received(moment)[:1].repeat(count, 1, 1, 1).to(simulation.learnt.device)
    timestep = timestep_tensor(path.steps.timesteps[0], count)
    conditioning: dict[str, Any] = conditioning_for(path.guidance.conditioning, range(count))
    with torch.enable_grad(), SavedBytes(held).counting() as saved:
        output = predict(simulation, sample, timestep, conditioning)
    del output
    return saved.peak


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
