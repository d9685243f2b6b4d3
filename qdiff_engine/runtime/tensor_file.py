"""Reading and writing the safetensors format: the same tensors give the same bytes, and a stranger's file is safe.

A file is an 8-byte little-endian header length, a JSON header ``{name: {"dtype", "shape", "data_offsets"}}`` and the
tensors' bytes without gaps. A reader says beforehand which tensors it expects, so nothing else is ever allocated.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from . import canonical_json

MAX_HEADER = 32 * 2**20
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _CODES}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of a file must be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(file: BinaryIO, tensors: dict[str, Tensor]) -> str:
    """Write ``tensors``, widest element type first and then by name, so that all are aligned; returns the SHA-256."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, offset = {}, 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise ValueError(f"tensor {name!r}: {tensor.dtype} cannot be stored")
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = canonical_json.dump_line(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for chunk in (len(text).to_bytes(8, "little"), text):
        digest.update(chunk)
        file.write(chunk)
    for name in order:
        content = _bytes(tensors[name].detach().cpu().contiguous())
        digest.update(content)
        file.write(content)
    return digest.hexdigest()


def read_tensors(file: BinaryIO, expected: dict[str, TensorSpec]) -> tuple[dict[str, Tensor], str]:
    """The tensors, in memory of their own, and the SHA-256 of the file.

    Raises:
        ValueError: the file is truncated or malformed, or does not hold exactly the ``expected`` tensors.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise ValueError(f"the file is truncated: it has {size} bytes and a header of {length}")
    if length > MAX_HEADER:
        raise ValueError(f"the header is {length} bytes long, which is over the limit of {MAX_HEADER}")
    text = file.read(length)
    order = _check_header(canonical_json.parse(text), expected)
    total = 8 + length + sum(spec.size() for spec in expected.values())
    if size != total:
        raise ValueError(f"the file is {'truncated' if size < total else 'too long'}: {size} bytes instead of {total}")
    digest = hashlib.sha256(prefix + text)
    tensors = {}
    for name in order:
        tensors[name] = _read_tensor(file, name, expected[name])
        digest.update(_bytes(tensors[name]))
    return tensors, digest.hexdigest()


def _check_header(header: Any, expected: dict[str, TensorSpec]) -> list[str]:
    """Names in the order of their data; raises ValueError unless the header describes exactly ``expected``."""
    if not isinstance(header, dict):
        raise ValueError("the header must be an object")
    header.pop("__metadata__", None)
    for name in sorted(expected.keys() ^ header.keys()):
        raise ValueError(f"tensor {name!a} is {'missing' if name in expected else 'not expected'}")
    found = []
    for name, entry in header.items():
        spec = expected[name]
        wanted = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape)}
        offsets = entry.pop("data_offsets", None) if isinstance(entry, dict) else None
        # repr tells True from 1 and 1.0 from 1
        if repr(sorted(wanted.items())) != repr(sorted(entry.items()) if isinstance(entry, dict) else entry):
            raise ValueError(f"tensor {name!a} must be {wanted}, got {str(entry)[:200]!a}")
        if not isinstance(offsets, list) or len(offsets) != 2 or any(type(o) is not int for o in offsets):
            raise ValueError(f"tensor {name!a}: data_offsets must be two integers")
        found.append((offsets[0], offsets[1], name))
    end = 0
    for first, last, name in sorted(found):
        if first != end or last != first + expected[name].size():
            raise ValueError(
                f"tensor {name!a}: data_offsets {[first, last]} leave a gap, overlap or do not fit its shape"
            )
        end = last
    return [name for _, _, name in sorted(found)]


def _read_tensor(file: BinaryIO, name: str, spec: TensorSpec) -> Tensor:
    try:
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
    except (RuntimeError, MemoryError) as error:
        raise OSError(errno.ENOMEM, f"tensor {name!a} needs {spec.size()} bytes of memory") from error
    content = _bytes(tensor)
    done = 0
    while done < len(content):
        count = file.readinto(content[done:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"the file is truncated in tensor {name!a}")
        done += count
    if spec.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise ValueError(f"tensor {name!a} holds bytes that are neither 0 nor 1")
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # a single element may have any stride
    return flat.view(torch.uint8).numpy().data
