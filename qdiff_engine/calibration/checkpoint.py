"""Calibration's work in progress on disk: one file a step, each written whole, so that a killed run resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..runtime.files import remove_folder, remove_leftovers, write_file
from ..version import __version__


def fingerprint(value: Any) -> str:
    """Hash of nested mappings and lists of tensors and JSON values, for keys that must name their conditioning."""
    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Mapping):
            for name in sorted(item):
                digest.update(f"{name}:".encode())
                add(item[name])
        elif isinstance(item, list | tuple):
            digest.update(f"[{len(item)}]".encode())
            for part in item:
                add(part)
        elif isinstance(item, Tensor):
            digest.update(f"{item.dtype}{list(item.shape)}".encode())
            digest.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(json.dumps(item, sort_keys=True, default=str).encode())

    add(value)
    return digest.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A folder of finished steps that belongs to one key; another key's folder is emptied first."""

    folder: Path

    @classmethod
    def open(cls, folder: str | Path, key: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint in ``folder``, with whatever steps an earlier run of the same ``key`` and engine finished."""
        folder = Path(os.path.realpath(folder))
        text = json.dumps({**key, "engine": __version__}, sort_keys=True, indent=1)
        key_file = folder / "key.json"
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"cache_dir {str(folder)!r} is a file; name a folder")
        if folder.is_dir():
            remove_leftovers(key_file)
            if any(folder.iterdir()) and not key_file.is_file():
                raise FileExistsError(f"cache_dir {str(folder)!r} holds other files; name an empty folder")
            if key_file.is_file() and key_file.read_text() != text:
                remove_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        write_file(key_file, text.encode())
        return cls(folder)

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write one step's tensors, whole or not at all."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_file(self._file(step), safetensors.torch.save(contiguous))

    def load(self, step: int) -> dict[str, Tensor] | None:
        """One step's tensors; None where it is not there or cannot be read, so that it is computed again."""
        path = self._file(step)
        try:
            return safetensors.torch.load(path.read_bytes())
        except FileNotFoundError:
            return None
        except (safetensors.SafetensorError, ValueError):
            path.unlink()
            return None

    def finished(self, count: int) -> dict[int, dict[str, Tensor]]:
        """The tensors of the steps that an earlier run finished, of ``count``, from the first on without a gap."""
        found: dict[int, dict[str, Tensor]] = {}
        for step in range(count):
            tensors = self.load(step)
            if tensors is None:
                break
            found[step] = tensors
        return found

    def newest(self) -> tuple[int, dict[str, Tensor]] | None:
        """(step, tensors) of the last step that can be read, of work whose every state replaces the one before."""
        for step in sorted(self._steps(), reverse=True):
            tensors = self.load(step)
            if tensors is not None:
                return step, tensors
        return None

    def discard_before(self, step: int) -> None:
        """Delete the states before ``step``."""
        for older in self._steps():
            if older < step:
                self._file(older).unlink()

    def _steps(self) -> list[int]:
        return [int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.safetensors")]

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:05d}.safetensors"

    def remove(self) -> None:
        """Delete the folder: the work is done and lives elsewhere."""
        remove_folder(self.folder)
