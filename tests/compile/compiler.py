"""Compiles kernel variants for GPUs that are not here, in processes whose Triton does not interpret."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WARP = 32


@dataclass(frozen=True)
class Variant:
    """A kernel with the argument types, constants and schedule that one launch would give it."""

    name: str
    kernel: str  # "module:function"
    arch: int  # 80 .. 120
    types: dict[str, str]  # argument -> Triton type; arguments without one are constexpr, absent pointers None
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()  # integers known to be multiples of 16; pointers always are
    warps: int = 4
    stages: int = 3
    expects: str = ""  # the matrix instruction, a regular expression; none for kernels that multiply nothing

    def __str__(self) -> str:
        return f"{self.name}-sm{self.arch}"


@dataclass(frozen=True)
class Facts:
    """What the machine code shows."""

    instructions: tuple[str, ...]  # matrix instructions in the PTX
    registers: int
    stack: int  # bytes of every thread's frame that are read back: spilled registers
    shared: int  # bytes per block
    triton: str = field(compare=False)


def compile_variant(variant: Variant) -> Facts:
    """Compiles with the Triton of this process; its own cache remembers the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = variant.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for i, argument in enumerate(kernel.arg_names):
        kind = variant.types.get(argument)
        signature[argument] = kind or "constexpr"
        if kind is None:
            constants[(i,)] = variant.constants.get(argument)
        elif kind.startswith("*") or argument in variant.divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Triton 3.9 announces a change of its defaults
        compiled = triton.compile(source, target=GPUTarget("cuda", variant.arch, _WARP), options=options)
    found = re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*", compiled.asm["ptx"])
    registers, stack = _usage(compiled.asm["cubin"])
    return Facts(tuple(sorted(set(found))), registers, stack, compiled.metadata.shared, triton.__version__)


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a cubin's only kernel.

    Eight bytes that nothing is loaded from count as none: Triton 3.6's ptxas gives them to kernels that use descriptors
    on sm_120, and only ever writes zeros there. A spilled register is read back.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = re.search(r"REG:(\d+) STACK:(\d+)", _dumped(file.name, "-res-usage"))
        assert found, "cuobjdump named no registers"
        registers, stack = int(found[1]), int(found[2])
        if stack == 8 and not re.search(r"\bLDL\b", _dumped(file.name, "-sass")):
            stack = 0
    return registers, stack


def _dumped(path: str, what: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, what, path], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def compilers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile, started without TRITON_INTERPRET, which Triton reads once."""
    interpreting = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(os.getpid).result()
            yield pool
    finally:
        if interpreting is not None:
            os.environ["TRITON_INTERPRET"] = interpreting


def submitted(pool: ProcessPoolExecutor, variants: list[Variant]) -> dict[str, Future[Facts]]:
    """Every variant under way, by its name."""
    return {str(variant): pool.submit(compile_variant, variant) for variant in variants}
