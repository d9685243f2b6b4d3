"""Layers measured on integers and in floating point, by a clock that says what a test wants: what is kept and shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networks
import pytest
import torch
from torch import Tensor

import qdiff_engine as qe
from qdiff_engine.runtime import compiler
from qdiff_engine.runtime.float_layers import float_layer
from qdiff_engine.runtime.replay import ReplayedProgram
from qdiff_engine.runtime.summary import inspect
from qdiff_engine.runtime.tuning import _copies, floating_sites, host_clock, retabled
from qdiff_engine.tables import Table

PLAN = ("A4", "A8", "A16", "A8")


class Clock:
    """Reports scripted milliseconds for work that it does run, and keeps what it was asked."""

    def __init__(self, integer: Callable[[Any], float], floating: Callable[[Any], float]) -> None:
        self.answers = {"integer": integer, "float": floating}
        self.results: list[tuple[str, Any]] = []

    def __call__(self, kind: str, works: Sequence[Callable[[], Any]]) -> float:
        (result,) = (work() for work in works)  # a CPU needs no copies of the weights
        self.results.append((kind, result))
        return self.answers[kind](result)


def model(name: str = "plain", bits: int = 8) -> qe.IntegerUNet:
    recipe = qe.Recipe(weight_bits=bits, plan=PLAN)
    return qe.quantize(networks.network(name), networks.calibration(name), recipe)


def outputs(unet: qe.IntegerUNet, name: str = "plain") -> list[Tensor]:
    x = networks.normal(2, *unet.graph.inputs["sample"][1:])
    return [unet(x, t, **networks.conditioning(name, 2)).sample for t in unet.table.timesteps]


def main_layers(unet: qe.IntegerUNet) -> set[str]:
    nodes = [node for node in unet.graph.nodes if node.op in ("int_gemm", "int_conv2d")]
    return {node.kwargs["layer"] for node in nodes if node.section == "main"}


def test_layers_stay_integer_where_that_is_faster() -> None:
    """Nothing changes but that both times are known, each shape being measured once."""
    base, clock = model(), Clock(lambda y: 0.5, lambda y: 0.75)
    tuned = networks.rebuilt(base, tune=True, clock=clock)
    assert set(tuned.timings) == main_layers(base)
    assert all((t.integer_ms, t.float_ms, t.floating) == (0.5, 0.75, False) for t in tuned.timings.values())
    assert [kind for kind, _ in clock.results] == ["integer", "float"] * (len(clock.results) // 2)
    assert len(clock.results) // 2 < len(tuned.timings), "the two calls of attend have one shape"
    for integer, floating in zip(clock.results[::2], clock.results[1::2], strict=True):
        assert integer[1].shape == floating[1].shape and integer[1].dtype == floating[1].dtype
        assert len(integer[1]) == 2, "tune_batch"
    assert all(map(torch.equal, outputs(tuned), outputs(base)))


@pytest.mark.parametrize("name", ["plain", "sd"])
def test_layers_run_on_dequantised_weights_where_that_is_faster(name: str) -> None:
    """All of them: then the model is the one whose table leaves every site of the latents' layers floating."""
    base = model(name, bits=4)
    tuned = networks.rebuilt(base, tune=True, clock=Clock(lambda y: 2.0, lambda y: 1.0))
    assert all(timing.floating for timing in tuned.timings.values()) and set(tuned.timings) == main_layers(base)
    floating = networks.rebuilt(base, table=retabled(base.table, floating_sites(base.graph, tuned.timings)))
    for actual, expected in zip(outputs(tuned, name), outputs(floating, name), strict=True):
        assert networks.relative(actual, expected) < 1e-5
    assert tuned.table is base.table, "what is saved stays what was calibrated"


def test_some_layers_stay_floating() -> None:
    """Layers of one quantiser decide together, by the sum of their times; the others keep their integers."""
    base = model()
    clock = Clock(lambda y: 1.0, lambda y: 0.5 if y.shape[1] == 32 else 2.0)
    tuned = networks.rebuilt(base, tune=True, clock=clock)
    chosen = {name for name, timing in tuned.timings.items() if timing.floating}
    assert chosen and chosen < main_layers(base)
    sites = floating_sites(base.graph, tuned.timings)
    table = retabled(base.table, sites)
    kept = [i for i, site in enumerate(table.sites) if site not in sites]
    assert torch.equal(table.bits[:, kept], base.table.bits[:, kept])
    expected = outputs(networks.rebuilt(base, table=table))
    for actual, same in zip(outputs(tuned), expected, strict=True):
        assert networks.relative(actual, same) < 0.03  # a rounding behind a floating layer may fall the other way


def test_a_correction_reaches_a_floating_last_layer() -> None:
    base = model()
    table = base.table
    a, b = 0.5 + torch.rand_like(table.output_scale), torch.randn_like(table.output_shift)
    changed = Table(table.timesteps, table.modes, table.sites, table.scale, table.zero_point, table.bits, a, b)
    clock = Clock(lambda y: 2.0, lambda y: 1.0)
    plain, corrected = (networks.rebuilt(base, table=t, tune=True, clock=clock) for t in (table, changed))
    for row, (x, y) in enumerate(zip(outputs(plain), outputs(corrected), strict=True)):
        expected = x * a[row, :, None, None] + b[row, :, None, None]
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreter")
def test_replaying_floating_layers_equals_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged products, GEGLU and a result quantised for the next layer, as a GPU runs them."""
    base = model("sd")
    proj, value = "ff.net.0.proj", "attn1.to_q"
    floating = {name for name in main_layers(base) if proj in name or value in name}
    table = retabled(base.table, floating)
    parts = (base.graph, base.weights, base.constants, table, torch.device("cpu"), "triton")
    merged = {name.replace("to_q", other) for name in floating if value in name for other in ("to_k", "to_v")}
    made: list[str] = []
    monkeypatch.setattr(compiler, "float_layer", lambda node, *more: made.append(node.name) or float_layer(node, *more))
    programs = [ReplayedProgram(*parts, floating=names) for names in (floating | merged, ())]
    assert len(made) == len(floating) == 8, "a GEGLU and a merged product in four transformers"
    x, row = networks.normal(1, 4, 8, 8).contiguous(memory_format=torch.channels_last), 1
    inputs = networks.flat_inputs(base, x, table.timesteps[row], networks.conditioning("sd", 1))
    actual, expected = (program.run(inputs, table.timesteps[row], row) for program in programs)
    assert networks.relative(actual, expected) < 0.03


def test_inspect_shows_both_times(tmp_path: Path) -> None:
    base = model("sd")
    clock = Clock(lambda y: 1.0, lambda y: 0.5 if y.dim() == 3 else 2.0)
    tuned = networks.rebuilt(base, tune=True, clock=clock)
    rows = {row["name"]: row for row in inspect(tuned)["layers"]}
    for name, timing in tuned.timings.items():
        row = rows[name]
        assert (row["integer_ms"], row["float_ms"]) == (timing.integer_ms, timing.float_ms)
        assert row["quantized"] is not timing.floating and ("faster" in (row["reason"] or "")) is timing.floating
    assert any(t.floating for t in tuned.timings.values()) and not all(t.floating for t in tuned.timings.values())
    assert not [row for name, row in rows.items() if name not in tuned.timings and "integer_ms" in row]
    tuned.save_pretrained(tmp_path / "artifact")
    untuned = inspect(tmp_path / "artifact")["layers"]
    assert not [row for row in untuned if "integer_ms" in row], "times belong to a machine, not to an artifact"
    shown = {row["name"]: row for row in inspect(tmp_path / "artifact", tuned.timings)["layers"]}
    assert shown == rows


def test_the_host_clock_reads_milliseconds() -> None:
    calls: list[int] = []
    assert 0 <= host_clock("integer", [lambda: calls.append(1)]) < 1000 and len(calls) > 1


def test_a_gpu_reads_weights_that_its_cache_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies for three times the cache, of half a byte and of two bytes a weight; 64 of them at most."""
    cache = SimpleNamespace(L2_cache_size=10**6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cache)
    parts = {
        name: (SimpleNamespace(values=torch.empty(n, 1000), bits=4),) for name, n in (("large", 1000), ("thin", 1))
    }
    made: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, weights=parts)
    layers: list[Any] = [SimpleNamespace(kwargs={"layer": name}) for name in parts]
    copies = [_copies(made, layer, kind) for layer in layers for kind in ("integer", "float")]
    assert copies == [6, 2, 64, 64]


@pytest.mark.parametrize("value, error", [(0, ValueError), (1.5, TypeError)])
def test_a_wrong_batch_is_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="tune_batch"):
        networks.rebuilt(networks.integer_model("plain"), tune=True, tune_batch=value)
