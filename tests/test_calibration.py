"""Calibration: the same bytes for a seed, resumed after kill -9, every sampler and conditioning, clear errors."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from networks import CASES, normal
from torch import Tensor, nn

import qdiff_engine as qe
from qdiff_engine.calibration import calibration as calibration_module
from qdiff_engine.calibration import checkpoint
from qdiff_engine.calibration.calibration import Calibration, calibrate, calibration_key
from qdiff_engine.quantization import quantize
from qdiff_engine.recipe import Recipe
from qdiff_engine.runtime import files
from qdiff_engine.sampling import Guidance

TESTS = Path(__file__).resolve().parent
SETTINGS: dict[str, Any] = {"shape": (3, 16, 16), "steps": 5, "samples": 3, "seed": 11}

_CALIBRATE = """
import sys, time, torch, networks
from qdiff_engine.calibration.calibration import calibrate
torch.set_num_threads(int(sys.argv[1]))
stop = int(sys.argv[3])

def on_step(step):
    print(step.index, flush=True)
    if step.index == stop:
        time.sleep(600)

calibrate(networks.network("plain"), networks.ddim(), shape=(3, 16, 16), steps=5, samples=3, seed=11,
          cache_dir=sys.argv[2], on_step=on_step)
"""


def tiny(**changes: Any) -> Calibration:
    """The plain network's calibration with a few settings changed."""
    scheduler = changes.pop("scheduler", None) or networks.ddim()
    return calibrate(networks.network("plain"), scheduler, **{**SETTINGS, **changes})


def assert_equal(a: Calibration, b: Calibration) -> None:
    assert (a.timesteps, a.sites, a.key, a.shape) == (b.timesteps, b.sites, b.key, b.shape)
    assert torch.equal(a.counts, b.counts) and torch.equal(a.ranges, b.ranges)
    assert a.inputs.keys() == b.inputs.keys()
    assert all(torch.equal(value, b.inputs[name]) for name, value in a.inputs.items())
    assert a.trajectory.timesteps == b.trajectory.timesteps
    assert all(map(torch.equal, a.trajectory.samples, b.trajectory.samples))


def artifact_bytes(calibration: Calibration, folder: Path, name: str = "plain") -> dict[str, bytes]:
    quantize(networks.network(name), calibration, Recipe.named("w4a8")).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (artifact_bytes(tiny(), tmp_path / name) for name in ("a", "b"))
    assert first == second and len(first) == 3
    assert artifact_bytes(tiny(cache_dir=tmp_path / "cache"), tmp_path / "c") == first
    assert artifact_bytes(tiny(seed=12), tmp_path / "d") != first


def test_the_trajectory_is_what_the_unet_received() -> None:
    seen: list[tuple[float, Tensor]] = []
    calibration = tiny(on_step=lambda step: seen.append((step.timestep, step.sample.clone())))
    assert calibration.trajectory.timesteps == tuple(timestep for timestep, _ in seen)
    assert all(map(torch.equal, calibration.trajectory.samples, (sample for _, sample in seen)))
    assert {tuple(sample.shape) for sample in calibration.trajectory.samples} == {(3, 3, 16, 16)}


def test_the_random_state_of_the_caller_does_not_matter() -> None:
    a = tiny()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert_equal(a, tiny())
    assert torch.equal(torch.get_rng_state(), before)


def killed(cache: Path, stop: int, at: int) -> None:
    """A calibration in another process, killed with SIGKILL once it has told of step ``at``; it waits at ``stop``."""
    command = [sys.executable, "-c", _CALIBRATE, str(torch.get_num_threads()), str(cache), str(stop)]
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) == at:
                break
        child.send_signal(signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL


def test_kill_9_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the first step, then in the middle of work, then before the last step; resumed; the same bytes."""
    cache = tmp_path / "cache"
    expected = artifact_bytes(tiny(), tmp_path / "whole")
    killed(cache, stop=0, at=0)
    assert [path.name for path in sorted(cache.glob("step-*"))] == ["step-00000.safetensors"]
    killed(cache, stop=4, at=1)
    assert len(list(cache.glob("step-*.safetensors"))) >= 2
    killed(cache, stop=3, at=3)
    assert len(list(cache.glob("step-*.safetensors"))) >= 4
    seen: list[int] = []
    calls = counted_predictions(monkeypatch)
    resumed = tiny(cache_dir=cache, on_step=lambda step: seen.append(step.index))
    assert seen == [0, 1, 2, 3, 4] and len(calls) <= 1, "four of the five steps were on disk"
    assert artifact_bytes(resumed, tmp_path / "resumed") == expected


def counted_predictions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call of the network that calibration makes from here on."""
    calls: list[int] = []
    predict = calibration_module._Recorder.predict
    monkeypatch.setattr(
        calibration_module._Recorder, "predict", lambda self, *a, **k: calls.append(1) or predict(self, *a, **k)
    )
    return calls


def test_an_interruption_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    expected = tiny()
    for at in (0, 2, 4):

        def on_step(step: Any, at: int = at) -> None:
            if step.index == at:
                raise Stop

        with pytest.raises(Stop):
            tiny(cache_dir=tmp_path / "cache", on_step=on_step)
        assert len(list((tmp_path / "cache").glob("step-*.safetensors"))) == at + 1
    calls = counted_predictions(monkeypatch)
    assert_equal(tiny(cache_dir=tmp_path / "cache"), expected)
    assert not calls, "all of it was on disk"


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "missing"])
def test_a_damaged_step_is_computed_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiny(cache_dir=tmp_path)
    path = tmp_path / "step-00002.safetensors"
    whole = path.read_bytes()
    calls = counted_predictions(monkeypatch)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": whole[:-100], "empty": b"", "garbage": os.urandom(999)}[damage])
    assert_equal(tiny(cache_dir=tmp_path), expected)
    assert path.read_bytes() == whole
    assert len(calls) == 3, "this step and those behind it"


@pytest.mark.parametrize("change", [{"seed": 12}, {"steps": 4}, {"eta": 0.3}, {"batch": 1}])
def test_another_key_starts_afresh(change: dict[str, Any], tmp_path: Path) -> None:
    tiny(cache_dir=tmp_path)
    assert_equal(tiny(cache_dir=tmp_path, **change), tiny(**change))
    assert len(list(tmp_path.glob("step-*"))) == change.get("steps", 5)


class Steps(nn.Module):
    """The same parameters, whatever ``gain`` the code multiplies by."""

    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.leave(torch.relu(self.enter(x) * self.gain))


def test_other_code_with_equal_parameters_starts_afresh(tmp_path: Path) -> None:
    unet, settings = Steps().eval(), {"shape": (3, 8, 8), "steps": 2, "samples": 2}
    calibrate(unet, networks.ddim(), **settings, cache_dir=tmp_path)
    unet.gain = 2.0
    expected = calibrate(unet, networks.ddim(), **settings)
    assert_equal(calibrate(unet, networks.ddim(), **settings, cache_dir=tmp_path), expected)


def test_a_cache_folder_survives_every_moment_of_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the key is written, and while a folder of another key is deleted; through a link, too."""
    expected = tiny()
    cache = tmp_path / "cache"
    (tmp_path / "disk").mkdir()
    cache.symlink_to(tmp_path / "disk")
    (cache / ".key.json.saving-0123abcd").write_text("{")
    assert_equal(tiny(cache_dir=cache), expected)

    class Killed(Exception):
        pass

    def killed(folder: Path) -> None:
        (folder / "key.json").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            tiny(cache_dir=cache, seed=12)
    assert_equal(tiny(cache_dir=cache), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "disk"], "the leftover is gone"


def test_an_older_engines_work_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(checkpoint, "__version__", "0.0.1")
    tiny(cache_dir=tmp_path)
    monkeypatch.undo()
    (tmp_path / "step-00000.safetensors").write_bytes(b"from an older engine")
    tiny(cache_dir=tmp_path, on_step=told.append)
    assert len(told) == 5 and "0.0.1" not in (tmp_path / "key.json").read_text()


def test_a_cache_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files"):
        tiny(cache_dir=tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        tiny(cache_dir=tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_samplers_and_prediction_types(kind: Any, prediction_type: str) -> None:
    scheduler = kind(clip_sample=True, prediction_type=prediction_type)
    calibration = tiny(scheduler=scheduler)
    assert calibration.timesteps == (800.0, 600.0, 400.0, 200.0, 0.0)
    assert calibration.key["prediction_type"] == prediction_type
    assert calibration.key["scheduler"]["class"] == kind.__name__
    model = quantize(networks.network("plain"), calibration, Recipe.named("w8a8"))
    image = qe.sample(model, scheduler, (1, 3, 16, 16), steps=5)
    assert bool(torch.isfinite(image).all()) and float(image.abs().max()) <= 4


def test_statistics_follow_the_trajectory() -> None:
    """eta, the sampler and what it predicts change the latents of every step but the first."""
    base = tiny()
    for changes in ({"eta": 1.0}, {"scheduler": DDPMScheduler()}, {"scheduler": networks.ddim(clip_sample=True)}):
        other = tiny(**changes)
        assert torch.equal(other.ranges[0], base.ranges[0]) and not torch.equal(other.ranges[1:], base.ranges[1:])
        assert other.key != base.key
    assert bool((base.ranges[..., 0] <= 0).all()) and bool((base.ranges[..., 1] >= 0).all())
    assert bool((base.counts.sum(-1) > 0).all()) and base.counts.shape[:2] == (5, len(base.sites))


@pytest.mark.parametrize("name", ["class", "sdxl"])
def test_conditioning_by_tensor_and_by_callable(name: str) -> None:
    """Both ways of naming a sample's conditioning give the same statistics; other conditioning gives others."""
    case, unet = CASES[name], networks.network(name)
    settings = {"shape": case.shape, "steps": 2, "samples": 3}

    def ask(j: int) -> dict[str, Any]:
        one = networks.conditioning(name, j + 1)
        return {k: {n: t[j:] for n, t in v.items()} if isinstance(v, dict) else v[j:] for k, v in one.items()}

    by_tensor = calibrate(unet, networks.ddim(), conditioning=case.conditioning, **settings)
    by_call = calibrate(unet, networks.ddim(), conditioning=ask, **settings)
    assert_equal(by_tensor, by_call)
    if name == "sdxl":
        return
    other = calibrate(unet, networks.ddim(), conditioning=ask(1), **settings)
    assert other.key["conditioning"] != by_tensor.key["conditioning"]
    assert not torch.equal(other.ranges, by_tensor.ranges)


def test_the_key_knows_all_conditioning() -> None:
    """Every sample's, of both branches: a cache of other conditioning must not be resumed."""
    base = normal(16, 7, 24, seed=4)
    other = torch.cat(
        [base[:8], normal(1, 7, 24, seed=6), base[9:]]
    )  # differs in a sample that print() would leave out
    keys = set()
    for conditional, unconditional in ((base, base), (other, base), (base, other)):
        words = [{"encoder_hidden_states": words} for words in (unconditional, conditional)]
        key = calibration_key("hash", networks.ddim(), 2, 16, 0, 0.0, Guidance(2.0, *words))
        keys.add(key["conditioning"])
    assert len(keys) == 3


def test_the_network_is_left_as_it_was() -> None:
    unet = copy.deepcopy(networks.network("plain")).train()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    calibrate(unet, networks.ddim(), **{**SETTINGS, "steps": 2})
    assert unet.training and all(torch.equal(before[name], value) for name, value in unet.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in unet.parameters())


def test_every_module_of_the_network_keeps_its_mode() -> None:
    """A frozen batch norm in a network that trains stays frozen."""
    unet = copy.deepcopy(networks.network("plain")).train()
    unet.norm.eval()
    calibrate(unet, networks.ddim(), **{**SETTINGS, "steps": 2})
    assert unet.training and unet.mix.training and not unet.norm.training


def test_half_precision_networks() -> None:
    unet = copy.deepcopy(networks.network("plain")).half()
    calibration = calibrate(unet, networks.ddim(), **{**SETTINGS, "steps": 2})
    model = quantize(unet, calibration, Recipe.named("w8a8"))
    x = networks.trajectory("plain")[0].sample
    with torch.no_grad():
        expected = networks.network("plain")(x, torch.full((len(x),), 750))
    assert networks.relative(model(x, 750).sample, expected) < 0.07


class Branching(nn.Module):
    """Chooses its path by the values of the latents, which no graph can record."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(x) if float(x.mean()) > 0 else x


class Unknown(nn.Module):
    """Uses an operator that the engine does not know."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.fft.fft2(x).real


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1001}, ValueError, "at most the scheduler's 1000"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"batch": 0}, ValueError, "batch must be at least 1"),
        ({"eta": -0.1}, ValueError, r"eta must lie in \[0, 1\]"),
        ({"shape": None}, ValueError, r"shape must be given as \(C, H, W\)"),
        ({"shape": (3, 16)}, ValueError, r"shape must be \(C, H, W\)"),
        ({"shape": (4, 16, 16)}, ValueError, r"PlainUNet cannot be captured .* shape \[4, 16, 16\]"),
        ({"shape": (3, 17, 17)}, ValueError, r"PlainUNet cannot be captured .* shape \[3, 17, 17\]"),
        ({"scheduler": object()}, TypeError, "scheduler must be a diffusers scheduler"),
        ({"recipe": "w8a8"}, TypeError, "recipe must be a Recipe, got str"),
        ({"conditioning": {"words": torch.ones(1, 2)}}, ValueError, "cannot be captured"),
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale needs unconditional"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny(**changes)


def test_modules_that_cannot_be_captured() -> None:
    with pytest.raises(ValueError, match="Branching cannot be captured by torch.export"):
        calibrate(Branching(), networks.ddim(), **SETTINGS)
    with pytest.raises(ValueError, match="is not one the engine knows"):
        calibrate(Unknown(), networks.ddim(), **SETTINGS)
    with pytest.raises(TypeError, match="unet must be a torch module, got function"):
        calibrate(lambda x, t: x, networks.ddim(), **SETTINGS)  # type: ignore[arg-type]


def test_nan_in_the_network_or_the_conditioning() -> None:
    unet = copy.deepcopy(networks.network("plain"))
    with torch.no_grad():
        unet.mix.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        calibrate(unet, networks.ddim(), **SETTINGS)
    case = CASES["sd"]
    words = {"encoder_hidden_states": torch.full((1, 7, 24), torch.inf)}
    with pytest.raises(ValueError, match="encoder_hidden_states.*NaN or infinity"):
        calibrate(networks.network("sd"), networks.ddim(), shape=case.shape, steps=2, samples=1, conditioning=words)
