"""Every kernel and tile compiled for every GPU: the right instruction, no spilled register, shared memory in bounds.

No GPU is needed. The README's test command leaves this folder out, for it takes minutes; ``pytest tests/compile``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from compiler import Facts, Variant, compilers, submitted
from qdiff_kernels.tiles import SHARED_MEMORY
from variants import others, products

VARIANTS = [*products(), *others()]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Facts]]]:
    """The selected variants, compiling on all cores while the first tests already look at results."""
    chosen = {item.callspec.params["variant"] for item in request.session.items if hasattr(item, "callspec")}
    with compilers(os.cpu_count() or 1) as pool:
        yield submitted(pool, [variant for variant in VARIANTS if str(variant) in chosen])


def test_names_are_unique() -> None:
    assert len({str(variant) for variant in VARIANTS}) == len(VARIANTS)


@pytest.mark.parametrize("variant", [str(variant) for variant in VARIANTS])
def test_compiles_well(variant: str, compiled: dict[str, Future[Facts]]) -> None:
    wanted: Variant = next(v for v in VARIANTS if str(v) == variant)
    facts = compiled[variant].result()
    found = ", ".join(facts.instructions) or "none"
    if wanted.expects:
        assert all(re.search(wanted.expects, name) for name in facts.instructions) and facts.instructions, found
    else:
        assert not facts.instructions, found
    assert facts.stack == 0, f"{facts.stack} bytes of registers spilled, of {facts.registers}"
    assert facts.shared <= SHARED_MEMORY[wanted.arch], f"{facts.shared} bytes of shared memory"
