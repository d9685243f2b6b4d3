"""Where a model may run: GPUs that are missing or too old are refused in one sentence, before anything is read."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import networks
import pytest
import torch

import qdiff_engine as qe
from qdiff_engine import ops
from qdiff_engine.alignment.path import Moment
from qdiff_engine.graph.interpret import flatten_conditioning, run_float
from qdiff_engine.graph.ir import Node
from qdiff_engine.graph.operators import FLOAT_OPS
from qdiff_engine.ops import dispatch
from qdiff_engine.runtime.compiler import Compiler
from qdiff_engine.sampling import Guidance, initial_noise

OLD = r"Tesla T4 has compute capability 7\.5, the kernels need 8\.0 or newer"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A machine that reports GPUs of these compute capabilities; nothing runs on them."""

    def pretend(*capabilities: tuple[int, int]) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        for name, value in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "device_count": lambda: len(capabilities),
            "get_device_capability": lambda index=None: capabilities[index or 0],
            "get_device_name": lambda index=None: "Tesla T4" if capabilities[index or 0] < (8, 0) else "NVIDIA H200",
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        dispatch._status.cache_clear()
        dispatch.find.cache_clear()

    yield pretend
    monkeypatch.undo()
    dispatch._status.cache_clear()
    dispatch.find.cache_clear()


def test_a_gpu_that_is_too_old_is_refused(gpu: Callable[..., None], tmp_path: Any) -> None:
    model = networks.integer_model("plain")
    gpu((7, 5))
    with pytest.raises(ValueError, match=rf"device 'cuda' cannot be used: {OLD}"):
        qe.load(tmp_path / "not looked at", device="cuda")
    with pytest.raises(ValueError, match=OLD):
        networks.rebuilt(model, device="cuda")
    assert re.fullmatch(OLD, ops.backends()["triton"]["reason"]), "what doctor prints"


def test_the_gpu_that_is_named_is_the_one_judged(gpu: Callable[..., None]) -> None:
    gpu((9, 0), (7, 5))
    assert ops.refusal(torch.device("cuda")) is ops.refusal(torch.device("cuda", 0)) is None
    assert "7.5" in str(ops.refusal(torch.device("cuda", 1)))


def test_a_missing_c_compiler_is_told(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0))
    monkeypatch.setenv("CC", "cc")
    assert "compiler" not in ops.backends()["triton"]["reason"]
    gpu((9, 0))
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    status = ops.backends()["triton"]
    assert status["available"] and "no C compiler found" in status["reason"]


def test_operators_run_on_their_own_gpu(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU: the one of the tensors is made current, where there are several."""
    entered: list[int] = []

    @contextlib.contextmanager
    def current(index: int) -> Iterator[None]:
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", current)
    gpu((9, 0))
    alone = ops.resolve("quantize", "cuda:0", "torch")
    gpu((9, 0), (9, 0))
    x = torch.randn(1, 3, 4, 4)
    for device, index in (("cuda:1", 1), ("cuda", 0), ("cpu", None)):
        entered.clear()
        q = ops.resolve("quantize", device, "torch")(x, 0.1, 0, 8)
        assert torch.equal(q, alone(x, 0.1, 0, 8)) and entered == ([] if index is None else [index])
    assert ops.refusal(torch.device("cuda", 2)) == "there is no GPU number 2: torch sees 2"


def test_a_backend_for_cpus_is_refused_on_a_gpu(gpu: Callable[..., None], tmp_path: Any) -> None:
    gpu((9, 0))
    with pytest.raises(ValueError, match="backend 'torch' is for a CPU; leave it out, or name one of triton"):
        qe.load(tmp_path / "not looked at", device="cuda", backend="torch")
    with pytest.raises(ValueError, match="onednn runs on cpu, not on cuda"):
        qe.load(tmp_path / "not looked at", device="cuda", backend="onednn")
    assert ops.refusal(torch.device("cuda"), "triton") is None


@pytest.mark.parametrize(
    "options, words",
    [
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda'"),
        ({"dtype": torch.float16}, "float32 on a CPU"),
        ({"tune_batch": 0}, "tune_batch must be at least 1"),
    ],
)
def test_arguments_are_checked_before_the_artifact(tmp_path: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        qe.load(tmp_path / "not looked at", **options)


@pytest.mark.parametrize(
    ("op", "args"), [("arange", (0, 4)), ("full", ((2, 3), 1.5)), ("ones", ((2,),)), ("scalar_tensor", (2.0,))]
)
def test_a_tensor_made_of_numbers_lies_on_the_models_device(op: str, args: tuple[Any, ...]) -> None:
    """The timestep embedding of diffusers begins with an arange."""
    compiler = SimpleNamespace(device=torch.device("meta"), slots={"made": 0}, constants={}, dtype=torch.float16)
    node = Node("made", op, args, {"dtype": torch.float32}, section="time")
    values: list[Any] = [None]
    Compiler.floating(cast(Compiler, compiler), node, FLOAT_OPS[op])(values, cast(Any, None))
    assert values[0].is_meta and values[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["unet2d", "class", "sd", "sdxl", "guided", "plain"])
def test_the_float_network_runs_where_its_input_is(name: str) -> None:
    """Learning evaluates it on the device that learns: tensors made of numbers have to be there, too."""
    found, step = networks.calibration(name).capture, networks.trajectory(name)[0]
    given = flatten_conditioning(networks.conditioning(name, networks.SAMPLES))
    timestep = torch.full((networks.SAMPLES,), int(step.timestep))
    inputs = {"sample": step.sample, "timestep": timestep, **given}
    constants, elsewhere = ({key: x.to("meta") for key, x in held.items()} for held in (found.constants, inputs))
    output = run_float(found.graph, constants, elsewhere)
    assert output.is_meta and output.shape == step.sample.shape


def test_a_schedulers_latents_follow_the_moments() -> None:
    """Those it keeps between steps; its own vectors stay, and so does the path's scheduler."""
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(4)
    latents = torch.zeros(1, 3, 4, 4)
    scheduler.model_outputs = [None, latents]
    moved = Moment(1, latents, range(1), scheduler).on(torch.device("meta"), torch.float64)
    assert moved.latents.is_meta and moved.scheduler.model_outputs[0] is None
    assert moved.scheduler.model_outputs[1].is_meta and moved.scheduler.model_outputs[1].dtype == torch.float64
    assert not scheduler.model_outputs[1].is_meta and not moved.scheduler.sigmas.is_meta
    assert moved.scheduler.sigmas.dtype == torch.float32


class Received(Exception):
    """What a network was called with."""


class Elsewhere(torch.nn.Module):
    """A half-precision network on a device without data, which raises what it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, device="meta", dtype=torch.float16))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: dict[str, torch.Tensor]) -> torch.Tensor:
        raise Received(sample, timestep, *text.values())


def test_a_sampling_loop_runs_where_the_network_is() -> None:
    """Latents, timesteps and nested conditioning from the CPU arrive on the network's device, in its dtype."""
    text = {"text": {"embeds": torch.zeros(2, 5), "ids": torch.tensor([3, 4])}}
    given = {"guidance_scale": 2.0, "conditioning": text, "unconditional": text}
    with pytest.raises(Received) as found:
        qe.sample(Elsewhere(), networks.ddim(), (2, 3, 8, 8), steps=2, **given)
    sample, timestep, embeds, ids = found.value.args
    assert all(value.is_meta and len(value) == 4 for value in (sample, timestep, embeds, ids))
    assert sample.dtype == embeds.dtype == torch.float16 and ids.dtype == timestep.dtype == torch.int64


def test_an_integer_model_elsewhere_converts_by_itself() -> None:
    """It has no parameters: its ``device`` says where it is; it reads the timestep on the host."""

    def called(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        assert sample.is_meta and sample.dtype == torch.float32 and timestep.device.type == "cpu"
        raise Received

    called.device = torch.device("meta")  # type: ignore[attr-defined]
    with pytest.raises(Received):
        Guidance().prediction(called, initial_noise((1, 3, 8, 8), 0), 500.0, range(1))
