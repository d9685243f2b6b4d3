"""``pytest benchmarks --benchmark-only``: the kernels under pytest-benchmark, engine and baselines in one table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.kernels import Case, cases, check

_CASES = list(cases(quick=True))


@pytest.mark.parametrize(("precision", "case"), _CASES, ids=[f"{case.name}-{p}" for p, case in _CASES])
@pytest.mark.parametrize("contestant", ["engine", "torch-fp32", "torch-bf16"])
def test_kernel(benchmark: Any, precision: str, case: Case, contestant: str) -> None:
    """One kernel at one shape."""
    run = case.run if contestant == "engine" else case.baselines.get(contestant)
    if run is None:
        pytest.skip(f"{case.name} has no baseline {contestant}")
    benchmark.group = f"{case.name} {precision} {case.shape}"
    with torch.inference_mode():
        check(case)
        benchmark(run, 0)
