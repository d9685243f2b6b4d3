"""Shared fixtures. Triton reads TRITON_INTERPRET once, at import, so it is set here, before any test module loads."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(min(2, torch.get_num_threads()))  # in every test process alike: last bits hang on it
_MOST_PROCESSES = 8  # each needs a gigabyte


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Test processes: one per core; none beside the first where a GPU or the compile tests' own pool is at work."""
    if torch.cuda.is_available() or any("compile" in argument for argument in config.args):
        return 0
    return min(os.cpu_count() or 1, _MOST_PROCESSES)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test draws the same random numbers, alone or after others."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty comes filled with NaN or the largest integer, so that an output never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def kernels() -> None:
    """Triton's kernels run here: on a GPU, or in the interpreter."""
    from comparing import available

    available("triton")


@pytest.fixture(scope="session")
def interpreter(kernels: None) -> None:
    """Triton's kernels run on the CPU, in its interpreter."""
    if torch.cuda.is_available():
        pytest.skip("this test runs the kernels on a CPU, in Triton's interpreter")


@pytest.fixture(params=["triton", "onednn", "native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that multiplies integers."""
    from comparing import present

    return present(request.param)


@pytest.fixture(params=["triton", "native", "torch"])
def quantizer(request: pytest.FixtureRequest) -> str:
    """A backend that quantises."""
    from comparing import present

    return present(request.param)


@pytest.fixture(scope="session")
def demo_unet() -> torch.nn.Module:
    """The bundled float32 UNet; shared, so a test that changes it copies it first."""
    from qdiff_engine.models import demo_model

    return demo_model().unet


@pytest.fixture(scope="session")
def demo_scheduler() -> Any:
    """The demo's deployment sampler, DDIM; shared, so a test calls set_timesteps before it relies on them."""
    from qdiff_engine.models import ddim, demo_model

    return ddim(demo_model().scheduler)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """(exit status, standard output, standard error) of one `qdiff` command, run in this process."""
    from qdiff_engine.cli import main

    def call(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder, JSON object) of a demo on tiny settings, run from another folder than the source tree."""
    from commands import DEMO, loaded, start

    folder = tmp_path_factory.mktemp("cli")
    process = start(*DEMO, "--out", "shown", "--json", folder=folder)
    out, error = process.communicate(timeout=300)
    return folder / "shown", loaded((process.returncode, out, error))


@pytest.fixture(scope="session")
def artifact(demo: tuple[Path, dict[str, Any]]) -> Path:
    """A W4A8 artifact of the bundled model, calibrated for three steps."""
    return demo[0] / "artifact-w4a8"
