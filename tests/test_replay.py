"""The device program's control flow, its kernels in Triton's interpreter and its recordings plain calls."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qdiff_engine as qe
from qdiff_engine import ops
from qdiff_engine.runtime.host_values import HostValues
from qdiff_engine.runtime.replay import ReplayedProgram, device_rows, quantization_rows, run_again
from qdiff_engine.tables import Table

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(interpreter: None) -> qe.IntegerUNet:
    """Rows in three modes, so that a rollout switches between recordings."""
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


def test_a_deep_copy_records_on_its_own(model: qe.IntegerUNet) -> None:
    """What the original recorded reads the original's addresses."""
    original = replayed(model)
    timestep, conditioning = model.table.timesteps[0], networks.conditioning("plain", 1)
    first, second = (torch.randn(1, *model.graph.inputs["sample"][1:]) for _ in range(2))
    original(first, timestep, **conditioning)
    other = deepcopy(original)
    expected = model(second, timestep, **conditioning).sample
    assert torch.equal(other(second, timestep, **conditioning).sample, expected)
    again = original(first, timestep, **conditioning).sample
    assert torch.equal(again, model(first, timestep, **conditioning).sample)


class Timed(nn.Module):
    """The latents' layers multiply what a timestep gave, of the timestep's own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.leave(F.silu(self.enter(x)) * (t + 1).reshape(-1, 1, 1, 1))


def test_fractional_timesteps_behind_whole_ones(interpreter: None) -> None:
    torch.manual_seed(0)
    net = Timed()
    calibration = qe.calibrate(net, networks.ddim(), shape=(3, 8, 8), steps=2, samples=2)
    plain = networks.rebuilt(qe.quantize(net, calibration, qe.Recipe()), "triton")
    copy, x = replayed(plain), networks.normal(1, 3, 8, 8)
    for timestep in (2, 1.5, 0.25, 3):
        assert torch.equal(copy(x, timestep).sample, plain(x, timestep).sample), timestep


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


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 0.03), (torch.bfloat16, 0.1)])
def test_half_precision_is_near(model: qe.IntegerUNet, dtype: torch.dtype, bound: float) -> None:
    """A few roundings fall the other way; the distance stays that of two correct engines.

    Every product here is of integers: Triton's interpreter multiplies bfloat16 values as if they were integers.
    """
    recipe = qe.Recipe(edges="a8")
    base = qe.quantize(networks.network("plain"), networks.calibration("plain"), recipe)
    copy = replayed(base, dtype=dtype)
    x = torch.randn(2, *base.graph.inputs["sample"][1:])
    conditioning, timestep = networks.conditioning("plain", 2), base.table.timesteps[0]
    inputs = {"sample": x.to(dtype), "timestep": torch.full((2,), timestep), **conditioning}
    actual = copy.program.run(inputs, timestep, 0)
    expected = base(x, timestep, **conditioning).sample
    assert actual.dtype == dtype
    assert networks.relative(actual, expected) < bound


def test_half_precision_is_near_in_every_mode(model: qe.IntegerUNet) -> None:
    copy = replayed(model, dtype=torch.float16)
    x = torch.randn(1, *model.graph.inputs["sample"][1:])
    conditioning = networks.conditioning("plain", 1)
    for row in (0, len(model.table.timesteps) - 1):
        timestep = model.table.timesteps[row]
        inputs = {"sample": x.half(), "timestep": torch.full((1,), timestep), **conditioning}
        actual = copy.program.run(inputs, timestep, row)
        assert networks.relative(actual, model(x, timestep, **conditioning).sample) < 0.03


class CrossAttention(nn.Module):
    """An image that attends to a text twice, between a GroupNorm and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.enter, self.norm = nn.Linear(8, 16), nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.query, self.leave = nn.Linear(16, 16), nn.Conv2d(16, 3, 3, padding=1)
        self.keys, self.values = (nn.ModuleList(nn.Linear(24, 16) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        h = self.norm(self.enter(x) + self.time(networks.sinusoids(t))[:, :, None, None])
        for key, value in zip(self.keys, self.values, strict=True):
            rows = self.query(h.flatten(2).transpose(1, 2))
            parts = (part[:, None] for part in (rows, key(encoder_hidden_states), value(encoder_hidden_states)))
            h = h + F.scaled_dot_product_attention(*parts)[:, 0].transpose(1, 2).reshape(h.shape)
        return self.leave(F.silu(h))


@functools.cache
def cross_attention() -> qe.IntegerUNet:
    torch.manual_seed(0)
    net, text = CrossAttention().eval(), networks.normal(2, 7, 24)
    given = {"steps": 2, "samples": 2, "conditioning": {"encoder_hidden_states": text}}
    return qe.quantize(net, qe.calibrate(net, networks.ddim(), shape=(3, 8, 8), **given), qe.Recipe())


class Text:
    """The replayed program of a network with cross-attention, its operators counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[tuple[str, int]] = Counter()  # (operator, features of its input)
        resolve = ops.resolve

        def counting(operator: str, *where: Any) -> Callable[..., Any]:
            run = resolve(operator, *where)

            def counted(x: Any, *args: Any, **kwargs: Any) -> Any:
                features = x.shape[-1] if isinstance(x, Tensor) else x[0].q.shape[1]
                self.calls[operator, features] += 1
                return run(x, *args, **kwargs)

            return counted

        monkeypatch.setattr(ops, "resolve", counting)
        self.model = cross_attention()
        parts = (self.model.graph, self.model.weights, self.model.constants, self.model.table)
        self.program = ReplayedProgram(*parts, CPU, "triton")
        for cache in (self.program._prompts, self.program._times):
            cache.by_identity = True  # as on a device

    def step(self, row: int, text: Tensor) -> Tensor:
        timestep = self.model.table.timesteps[row]
        sample = networks.normal(1, 3, 8, 8, seed=row).contiguous(memory_format=torch.channels_last)
        given = {"encoder_hidden_states": text}
        return self.program.run(networks.flat_inputs(self.model, sample, timestep, given), timestep, row).clone()

    @property
    def of_text(self) -> int:
        """How often the 24 features of every token were multiplied."""
        return self.calls["int_gemm", 24]


@pytest.fixture
def text_program(monkeypatch: pytest.MonkeyPatch, interpreter: None) -> Text:
    cross_attention()
    return Text(monkeypatch)


def test_text_keys_and_values_are_made_once_per_prompt(text_program: Text) -> None:
    """One product per prompt gives both cross-attentions their text; other operators run in every step."""
    run, first = text_program, networks.normal(1, 7, 24)
    outputs = [run.step(0, first)]
    counts = Counter(run.calls)
    assert run.of_text == 1
    outputs += [run.step(row, first) for row in (1, 0)]
    assert run.of_text == 1 and torch.equal(outputs[0], outputs[2])
    others = {key: count for key, count in counts.items() if key[1] != 24}
    assert others and all(run.calls[key] == 3 * count for key, count in others.items())
    second = run.step(0, networks.normal(1, 7, 24, seed=9))
    assert run.of_text == 2 and not torch.equal(second, outputs[0]), "another prompt"
    assert torch.equal(run.step(0, first), outputs[0]) and run.of_text == 2, "the first one is still known"


def test_a_timestep_is_embedded_once_whatever_the_prompt(text_program: Text) -> None:
    """The text does not reach the time embedding here, so that another prompt costs only its keys and values."""
    run = text_program
    run.step(0, networks.normal(1, 7, 24))
    embedded = run.program._times.entries.copy()
    run.step(0, networks.normal(1, 7, 24, seed=9))
    assert list(run.program._times.entries) == list(embedded) and len(embedded) == 1
    assert all(a is b for a, b in zip(run.program._times.entries.values(), embedded.values(), strict=True))


def test_what_is_in_place_already_is_not_copied_again(text_program: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step moves the latents, the row, and what its timestep gave; the prompt's values stay where they are."""
    run, text = text_program, networks.normal(1, 7, 24)
    copied: list[Tensor] = []
    copy, copy_all = Tensor.copy_, torch._foreach_copy_
    run.step(0, text)
    monkeypatch.setattr(Tensor, "copy_", lambda self, other: copied.append(self) or copy(self, other))
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, source: copied.extend(to) or copy_all(to, source))
    run.step(0, text)
    (batch,) = run.program._batches.values()
    places = {id(place) for slot, place in batch.values.items() if slot in run.program._remembered}
    assert copied and not [place for place in copied if id(place) in places]
    run.step(1, text)
    renewed = [place for place in copied if id(place) in places]
    assert 0 < len(renewed) < len(places), "what the other timestep gave, and nothing of the prompt"


_WAITING = ("item", "cpu", "tolist", "nonzero", "numpy", "__bool__", "__float__", "__int__", "__index__")


def test_no_layer_makes_the_host_wait(text_program: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that reads a tensor's values, or sends some to the device, outside the (interpreted) kernels."""
    from triton.runtime.interpreter import GridExecutor

    inside: list[int] = []
    launch = GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.append(1)
        try:
            return launch(self, *args, **kwargs)
        finally:
            inside.pop()

    of_host: list[Tensor] = []  # made on the host from numbers, which it may read

    def banned(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wait(*args: Any, **kwargs: Any) -> Any:
            of_the_host = name == "tensor" and "device" not in kwargs or any(args[0] is x for x in of_host)
            assert inside or of_the_host, f"{name} makes the host wait for the device"
            result = original(*args, **kwargs)
            of_host.extend([result] if name == "tensor" else [])
            return result

        monkeypatch.setattr(owner, name, wait)

    run, text = text_program, networks.normal(1, 7, 24)
    first = run.step(0, text)
    monkeypatch.setattr(GridExecutor, "__call__", launched)
    for name in _WAITING:
        banned(Tensor, name)
    for name in ("tensor", "equal", "allclose"):
        banned(torch, name)
    again = run.step(0, text)
    monkeypatch.undo()
    assert torch.equal(again, first)


def test_quantization_rows_hold_what_kernels_read(model: qe.IntegerUNet) -> None:
    rows = quantization_rows(model.table, CPU)
    assert rows.shape == (*model.table.scale.shape, 4) and rows.dtype == torch.float32
    assert torch.equal(rows[..., 0], model.table.scale)
    assert torch.equal(rows[..., 1], (1 / model.table.scale.double()).float())
    assert torch.equal(rows[..., 2].int(), model.table.zero_point)
    first = rows.data_ptr()
    assert all((q.data_ptr() - first) % 16 == 0 for q, _, _ in device_rows(model.table, CPU)[1].sites)


def test_snapshots_are_renewed_when_the_tensor_changes() -> None:
    host, x = HostValues(), torch.randn(3, 4)
    first = host.snapshot("x", x)
    assert host.snapshot("x", x) is first and first is not x
    x.add_(1)
    second = host.snapshot("x", x)
    assert second is not first and torch.equal(second, x)
    assert host.snapshot("x", x.clone()) is not second
    y = torch.randn(3, 4)
    other = host.snapshot("x", y)
    assert host.snapshot("x", x) is second and host.snapshot("x", y) is other, "two prompts take turns"
    labels = torch.tensor([1, 2])
    assert host.snapshot("labels", labels).dtype == torch.int64
    with torch.inference_mode():
        untracked = torch.randn(2)
    assert host.snapshot("x", untracked) is not host.snapshot("x", untracked), "changes of it cannot be seen"


def test_half_precision_is_refused_on_a_cpu(tmp_path: Any) -> None:
    networks.integer_model("plain", "w8a8").save_pretrained(tmp_path / "artifact")
    with pytest.raises(ValueError, match="float32 on a CPU"):
        qe.load(tmp_path / "artifact", dtype=torch.float16)
