"""What the host knows of tensors without waiting for the device: timesteps read once, conditioning copied once."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


def version(tensor: Tensor) -> int | None:
    """How often ``tensor`` was changed in place; None where torch does not count (inference tensors)."""
    return None if tensor.is_inference() else tensor._version


_SNAPSHOTS = 4  # per name: prompts may take turns


class HostValues:
    """Remembers, for as long as a tensor lives unchanged, its values on the host and a copy of it."""

    def __init__(self) -> None:
        self._schedule: tuple[weakref.ref[Tensor], int, list[float]] | None = None
        self._snapshots: dict[str, list[tuple[weakref.ref[Tensor], int, Tensor]]] = {}

    def first(self, tensor: Tensor) -> float:
        """The first value of ``tensor``.

        A step of a schedule on a device is a view of all its timesteps: those are read once, and no later step waits.
        """
        if tensor.device.type == "cpu":
            return float(tensor.reshape(-1)[0])
        base = tensor._base if tensor._base is not None else tensor
        count, whole = version(base), base.dim() == 1 and base.is_contiguous()
        if count is None or not whole:
            return float(tensor.reshape(-1)[0])
        known = self._schedule
        if known is None or known[0]() is not base or known[1] != count:
            known = self._schedule = (weakref.ref(base), count, [float(value) for value in base.tolist()])
        return known[2][tensor.storage_offset() - base.storage_offset()]

    def snapshot(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, in float32 if it is floating: the same object again while the tensor is unchanged."""
        count = version(tensor)
        known = [entry for entry in self._snapshots.get(name, ()) if entry[0]() is not None]
        for entry in known:
            if entry[0]() is tensor and entry[1] == count:
                return entry[2]
        copied = tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        if count is not None:
            kept = [entry for entry in known if entry[0]() is not tensor][-_SNAPSHOTS + 1 :]
            self._snapshots[name] = [*kept, (weakref.ref(tensor), count, copied)]
        return copied
