"""CIFAR-10's training images as uint8 [N, 3, 32, 32], from any of the forms it comes in.

- a folder with data_batch_1.bin ... data_batch_5.bin ("binary version"), or data_batch_1 ... ("python version")
- an .npz with ``images`` [N, 32, 32, 3], or with ``jpeg``: all files end to end, and ``offsets`` [N + 1] into them
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")
_PIXELS = 3 * 32 * 32
# what the pickles of the python version name, in old spelling and new
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
    ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip


def read_images(path: Path) -> Tensor:
    """The images in ``path``, a folder or an .npz.

    Raises:
        OSError: nothing of the kind is there.
        ValueError: a file is damaged or of another format.
    """
    if path.is_file():
        images = _read_npz(path)
    elif path.is_dir():
        images = _read_folder(path)
    else:
        raise FileNotFoundError(f"{path}: no such file or folder; --data takes CIFAR-10's folder or an .npz")
    if images.dtype != numpy.uint8 or images.ndim != 4 or images.shape[1:] != (3, 32, 32) or not len(images):
        raise ValueError(f"{path}: images must be uint8 [N, 3, 32, 32], got {images.dtype} {list(images.shape)}")
    return torch.from_numpy(numpy.ascontiguousarray(images))


def _read_folder(path: Path) -> numpy.ndarray:
    for folder in (path / name for name in FOLDERS):
        for suffix, read in ((".bin", _read_binary), ("", _read_pickle)):
            files = [folder / f"{name}{suffix}" for name in BATCHES]
            if files[0].is_file():
                return numpy.concatenate([read(file) for file in files])
    raise FileNotFoundError(f"{path}: holds neither {BATCHES[0]}.bin nor {BATCHES[0]}; unpack CIFAR-10 there")


def _read_binary(path: Path) -> numpy.ndarray:
    """Records of a label and 3072 pixels, colour by colour."""
    data = numpy.frombuffer(path.read_bytes(), dtype=numpy.uint8)
    if not len(data) or len(data) % (1 + _PIXELS):
        raise ValueError(f"{path}: {len(data)} bytes are no records of {1 + _PIXELS}; download it again")
    return data.reshape(-1, 1 + _PIXELS)[:, 1:].reshape(-1, 3, 32, 32)


class _Arrays(pickle.Unpickler):
    """Reads arrays and plain values; a pickle that names anything else is refused, since it could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"names {module}.{name}, which CIFAR-10 does not")
        return super().find_class(module, name)


def _read_pickle(path: Path) -> numpy.ndarray:
    try:
        content = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        return numpy.asarray(content[b"data"]).reshape(-1, 3, 32, 32)
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a batch of CIFAR-10's python version ({error})") from error


def _read_npz(path: Path) -> numpy.ndarray:
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            if "images" in archive:
                return archive["images"].transpose(0, 3, 1, 2)
            if not {"jpeg", "offsets"} <= set(archive):
                raise ValueError(f"must hold 'images', or 'jpeg' and 'offsets', got {sorted(archive)}")
            return _decoded(archive["jpeg"].tobytes(), archive["offsets"].tolist())
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from error


def _decoded(data: bytes, offsets: list[int]) -> numpy.ndarray:
    from PIL import Image

    files = (data[start:end] for start, end in zip(offsets, offsets[1:], strict=False))
    images = [numpy.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    return numpy.stack(images).transpose(0, 3, 1, 2)
