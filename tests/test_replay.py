"""The device program's control flow, its kernels in Triton's interpreter and its recordings plain calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networks
import pytest
import torch
from torch import Tensor

import qdiff_engine as qe
from qdiff_engine import ops
from qdiff_engine.runtime.host_values import HostValues
from qdiff_engine.runtime.replay import ReplayedProgram, quantization_rows, run_again
from qdiff_engine.tables import Table

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> qe.IntegerUNet:
    """Rows in three modes, so that a rollout switches between recordings."""
    if not ops.backends()["triton"]["available"] or torch.cuda.is_available():
        pytest.skip("these tests run the kernels on a CPU, in Triton's interpreter")
    base = networks.integer_model("plain", "w8a8")
    table = base.table
    bits = table.bits.clone()
    half = len(table.timesteps) // 2
    bits[half:][bits[half:] == 8] = 16
    modes = tuple("A8" if row < half else "A16" for row in range(len(table.timesteps)))
    changed = Table(
        table.timesteps, modes, table.sites, table.scale, table.zero_point, bits, table.output_scale, table.output_shift
    )
    return networks.rebuilt(base, "triton", table=changed)


class Recorder:
    """Counts what is recorded, and repeats it by calling it."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1

        def replay() -> Tensor:
            self.replayed += 1
            return function()

        return replay


def replayed(model: qe.IntegerUNet, record: Any = run_again, **options: Any) -> qe.IntegerUNet:
    copy = networks.rebuilt(model, "triton")
    parts = (model.graph, model.weights, model.constants, copy.table)
    copy.program = ReplayedProgram(*parts, CPU, "triton", record=record, **options)
    return copy


def rollout(model: qe.IntegerUNet, batch: int = 2) -> list[Tensor]:
    """The model's answer at every calibrated timestep, on latents that differ from step to step."""
    generator = torch.Generator().manual_seed(5)
    shape = (batch, *model.graph.inputs["sample"][1:])
    latents = [torch.randn(shape, generator=generator) for _ in model.table.timesteps]
    conditioning = networks.conditioning("plain", batch)
    return [model(x, t, **conditioning).sample for x, t in zip(latents, model.table.timesteps, strict=True)]


def test_replaying_equals_running(model: qe.IntegerUNet) -> None:
    """One recording per mode serves every row of the mode, bit for bit."""
    recorder = Recorder()
    copy = replayed(model, recorder)
    rows = len(model.table.timesteps)
    for expected, actual in zip(rollout(model), rollout(copy), strict=True):
        assert torch.equal(actual, expected)
    assert recorder.recorded == len(set(model.table.modes)) == 2 and recorder.replayed == rows
    copy(torch.randn(2, *model.graph.inputs["sample"][1:]), 0, **networks.conditioning("plain", 2))
    assert recorder.recorded == 2 and recorder.replayed == rows + 1, "nothing is recorded again"


def test_every_batch_size_has_its_own_recordings(model: qe.IntegerUNet) -> None:
    recorder = Recorder()
    copy = replayed(model, recorder)
    timestep = model.table.timesteps[0]
    for batch in (1, 3, 1):
        x = torch.randn(batch, *model.graph.inputs["sample"][1:])
        conditioning = networks.conditioning("plain", batch)
        assert torch.equal(copy(x, timestep, **conditioning).sample, model(x, timestep, **conditioning).sample)
    assert recorder.recorded == 2


def test_only_so_many_batch_sizes_are_kept(model: qe.IntegerUNet) -> None:
    recorder = Recorder()
    copy = replayed(model, recorder)
    for batch in (1, 2, 3, 4, 5, 1):
        x = torch.randn(batch, *model.graph.inputs["sample"][1:])
        copy(x, model.table.timesteps[0], **networks.conditioning("plain", batch))
    assert len(copy.program._batches) == 4 and recorder.recorded == 6, "the first one was dropped and made again"


def test_a_result_survives_the_next_call(model: qe.IntegerUNet) -> None:
    """Recordings overwrite their output; what the caller got must not change."""
    copy = replayed(model)
    x = torch.randn(1, *model.graph.inputs["sample"][1:])
    conditioning = networks.conditioning("plain", 1)
    first = copy(x, model.table.timesteps[0], **conditioning).sample
    kept = first.clone()
    copy(-x, model.table.timesteps[-1], **conditioning)
    assert torch.equal(first, kept)


def test_corrections_follow_the_row(model: qe.IntegerUNet) -> None:
    """a and b of the row are read at replay, and equal e' = a e + b of the uncorrected output."""
    table = model.table
    a, b = 0.5 + torch.rand_like(table.output_scale), torch.randn_like(table.output_shift)
    corrected = Table(table.timesteps, table.modes, table.sites, table.scale, table.zero_point, table.bits, a, b)
    copy = networks.rebuilt(model, "triton", table=corrected)
    copy.program = ReplayedProgram(model.graph, model.weights, model.constants, corrected, CPU, "triton")
    for row, (plain, actual) in enumerate(zip(rollout(model), rollout(copy), strict=True)):
        expected = plain * a[row, :, None, None] + b[row, :, None, None]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_near(model: qe.IntegerUNet) -> None:
    """A few roundings fall the other way; the distance stays that of two correct engines."""
    copy = replayed(model, dtype=torch.float16)
    x = torch.randn(2, *model.graph.inputs["sample"][1:])
    conditioning = networks.conditioning("plain", 2)
    timestep = model.table.timesteps[0]
    inputs = {"sample": x.half(), "timestep": torch.full((2,), timestep), **conditioning}
    actual = copy.program.run(inputs, timestep, 0)
    expected = model(x, timestep, **conditioning).sample
    assert actual.dtype == torch.float16
    assert float((actual.float() - expected).norm() / expected.norm()) < 0.03


def test_quantization_rows_hold_what_kernels_read(model: qe.IntegerUNet) -> None:
    rows = quantization_rows(model.table)
    assert rows.shape == (*model.table.scale.shape, 3) and rows.dtype == torch.float32
    assert torch.equal(rows[..., 0], model.table.scale)
    assert torch.equal(rows[..., 1], (1 / model.table.scale.double()).float())
    assert torch.equal(rows[..., 2].int(), model.table.zero_point)


def test_snapshots_are_renewed_when_the_tensor_changes() -> None:
    host, x = HostValues(), torch.randn(3, 4)
    first = host.snapshot("x", x)
    assert host.snapshot("x", x) is first and first is not x
    x.add_(1)
    second = host.snapshot("x", x)
    assert second is not first and torch.equal(second, x)
    assert host.snapshot("x", x.clone()) is not second
    labels = torch.tensor([1, 2])
    assert host.snapshot("labels", labels).dtype == torch.int64
    with torch.inference_mode():
        untracked = torch.randn(2)
    assert host.snapshot("x", untracked) is not host.snapshot("x", untracked), "changes of it cannot be seen"


def test_half_precision_is_refused_on_a_cpu(tmp_path: Any) -> None:
    networks.integer_model("plain", "w8a8").save_pretrained(tmp_path / "artifact")
    with pytest.raises(ValueError, match="float32 on a CPU"):
        qe.load(tmp_path / "artifact", dtype=torch.float16)
