"""Memory of what learns: bytes that autograd keeps for a backward pass, and an error that says what to lower."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def memory_errors(doing: str, mend: str) -> Iterator[None]:
    """Running out of memory inside becomes an OSError that says what was done, and what to do about it."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        ours = isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        if not ours:
            raise
        raise OSError(errno.ENOMEM, f"not enough memory to {doing}; {mend}") from error


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
