"""A model on an NVIDIA GPU: graphs against plain launches, the CPU engine, determinism, modes, memory.

The operators themselves are tested by tests/test_kernels_*.py, which use the GPU where there is one.
"""

from __future__ import annotations

from pathlib import Path

import networks
import pytest
import torch
from torch import Tensor

import qdiff_engine as qe
from qdiff_engine.quantization import site_bits
from qdiff_engine.tables import Table

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and there is none here")
NAMES = ["unet2d", "sd", "plain"]


@pytest.fixture(scope="module", params=NAMES)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("gpu") / request.param
    networks.integer_model(request.param, "w8a8").save_pretrained(folder)
    return request.param, folder


def call(model: qe.IntegerUNet, name: str, batch: int, timestep: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, *model.graph.inputs["sample"][1:]), generator=generator).to(model.device)
    conditioning = {k: on(v, model.device) for k, v in networks.conditioning(name, batch).items()}
    return model(x, timestep, **conditioning).sample


def on(value: object, device: torch.device) -> object:
    if isinstance(value, dict):
        return {k: on(v, device) for k, v in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def test_graphs_equal_plain_launches(artifact: tuple[str, Path]) -> None:
    name, folder = artifact
    graphs, eager = qe.load(folder, "cuda"), qe.load(folder, "cuda", graphs=False)
    for timestep in graphs.table.timesteps:
        for batch in (1, 3, 2):
            assert torch.equal(call(graphs, name, batch, timestep), call(eager, name, batch, timestep))


def test_the_gpu_agrees_with_the_cpu(artifact: tuple[str, Path]) -> None:
    """In float32 only rounding ties may differ; in half precision two correct engines are up to 3 % apart."""
    name, folder = artifact
    cpu = qe.load(folder)
    for dtype, bound in ((torch.float32, 0.02), (torch.float16, 0.05), (torch.bfloat16, 0.1)):
        gpu = qe.load(folder, "cuda", dtype=dtype)
        for timestep in gpu.table.timesteps:
            expected, actual = call(cpu, name, 2, timestep), call(gpu, name, 2, timestep).float().cpu()
            assert float((actual - expected).norm() / expected.norm()) < bound, (dtype, timestep)


def test_a_hundred_runs_are_one(artifact: tuple[str, Path]) -> None:
    name, folder = artifact
    model = qe.load(folder, "cuda")
    first = call(model, name, 2, model.table.timesteps[0])
    for _ in range(99):
        assert torch.equal(call(model, name, 2, model.table.timesteps[0]), first)


MODES = ("A8", "A4", "A16", "A4")


def mixed(model: qe.IntegerUNet, **options: object) -> qe.IntegerUNet:
    """``model`` on the GPU with a mode of its own in every row; ranges of 8 bits, widened to 16 times for 4."""
    table = model.table
    assert len(table.timesteps) == len(MODES)
    bits = site_bits(model.graph, table.sites, MODES, "a16")
    four = bits == 4
    scale = torch.where(four, 17 * table.scale, table.scale)
    zero_point = torch.where(four, ((table.zero_point + 128) / 17).round().int() - 8, table.zero_point)
    rows = Table(
        table.timesteps, MODES, table.sites, scale, zero_point, bits, table.output_scale, table.output_shift
    )  # fmt: skip
    return networks.rebuilt(model, table=rows, device="cuda", **options)


@pytest.mark.parametrize("name", NAMES)
def test_modes_take_turns(name: str) -> None:
    """Any order of modes gives the bits that each row gives alone and launched kernel by kernel."""
    model = networks.integer_model(name, "w8a8")
    graphs, eager = mixed(model), mixed(model, graphs=False)
    timesteps = graphs.table.timesteps
    alone = {t: call(eager, name, 2, t) for t in timesteps}
    assert not torch.equal(alone[timesteps[0]], alone[timesteps[1]])
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 0, 1, 1, 3, 0)):
        for row in order:
            assert torch.equal(call(graphs, name, 2, timesteps[row]), alone[timesteps[row]]), (order, row)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    """Alone or among others, within what two correct engines differ by: libraries may sum in another order."""
    model = mixed(networks.integer_model(name, "w8a8"), dtype=torch.float32)
    x = torch.randn((8, *model.graph.inputs["sample"][1:]), generator=torch.Generator().manual_seed(3)).cuda()
    given = on(networks.conditioning(name, 8), model.device)
    for timestep in model.table.timesteps[:2]:
        whole = model(x, timestep, **given).sample
        for batch in (1, 3, 5):
            part = model(x[:batch], timestep, **on(networks.conditioning(name, batch), model.device)).sample
            distance = float((part - whole[:batch]).norm() / whole[:batch].norm())
            assert distance < 0.02, (timestep, batch, distance)


def test_memory_does_not_grow(artifact: tuple[str, Path]) -> None:
    name, folder = artifact
    model = qe.load(folder, "cuda")
    timesteps = model.table.timesteps

    def step(i: int) -> None:
        call(model, name, 1 + i % 2, timesteps[i % len(timesteps)], seed=i)

    for i in range(2 * len(timesteps)):
        step(i)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for i in range(1000):
        step(i)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_timesteps_of_a_schedule_on_the_gpu_are_read_once(artifact: tuple[str, Path]) -> None:
    name, folder = artifact
    model = qe.load(folder, "cuda")
    schedule = torch.tensor([int(t) for t in model.table.timesteps], device="cuda")
    expected = [call(model, name, 2, float(t)) for t in schedule.tolist()]
    x = torch.randn((2, *model.graph.inputs["sample"][1:]), generator=torch.Generator().manual_seed(0)).cuda()
    conditioning = {k: on(v, model.device) for k, v in networks.conditioning(name, 2).items()}
    model(x, schedule[0], **conditioning)
    torch.cuda.set_sync_debug_mode("error")  # from here on, waiting for the device raises
    try:
        actual = [model(x, t, **conditioning).sample for t in schedule]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
