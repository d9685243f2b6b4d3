"""MODEL: the bundled network, diffusers folders good and bad, and the script that trains the bundled one."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from qdiff_engine import models

ROOT = Path(models.__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train_mnist.py"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tiny_unet() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet: Any = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, **blocks
    )
    return unet.eval()


@pytest.fixture
def layout(tmp_path: Path, tiny_unet: Any) -> Path:
    """A folder with `unet/` and `scheduler/`."""
    folder = tmp_path / "tiny"
    tiny_unet.save_pretrained(folder / "unet")
    scheduler: Any = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same_weights(left: torch.nn.Module, right: torch.nn.Module) -> None:
    expected = right.state_dict()
    assert left.state_dict().keys() == expected.keys()
    for name, value in left.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name


def test_demo_is_the_bundled_float32_model() -> None:
    before = torch.random.get_rng_state()
    loaded = models.load_model("demo")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loaded.name == "demo"
    assert sum(parameter.numel() for parameter in loaded.unet.parameters()) == 4_023_233
    assert {value.dtype for value in loaded.unet.state_dict().values()} == {torch.float32}
    assert not any(module.training for module in loaded.unet.modules())
    assert isinstance(loaded.scheduler, DDPMScheduler)
    stored = load_file(models.DEMO_FOLDER / "unet" / WEIGHTS)
    for name, value in loaded.unet.state_dict().items():
        assert torch.equal(value, stored[name].float()), name


def test_demo_predicts_the_noise_of_a_noisy_image(demo_unet: torch.nn.Module, demo_scheduler: Any) -> None:
    image = -torch.ones(2, 1, 32, 32)
    image[:, :, 6:26, 15:18] = 1
    noise = torch.randn(image.shape)
    timesteps = torch.tensor([400, 800])
    with torch.no_grad():
        predicted = demo_unet(demo_scheduler.add_noise(image, noise, timesteps), timesteps, return_dict=False)[0]
    assert predicted.shape == image.shape
    assert bool(torch.isfinite(predicted).all())
    # an untrained network scores about 1; this one has seen strokes like these
    assert float((predicted - noise).square().mean()) < 0.1


def test_demo_file_is_half_precision_below_nine_megabytes() -> None:
    path = models.DEMO_FOLDER / "unet" / WEIGHTS
    assert path.stat().st_size < 9_000_000
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}


def test_package_data_is_found_from_another_folder(tmp_path: Path) -> None:
    code = (
        "import sys, qdiff_engine.models as m\n"
        "assert 'diffusers' not in sys.modules\n"
        "print(all((m.DEMO_FOLDER / name).is_file() for name in sys.argv[1:]))\n"
    )
    names = ["unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_folder_with_unet_and_scheduler(layout: Path, tiny_unet: Any) -> None:
    loaded = models.load_model(layout)
    assert loaded.name == "tiny"
    assert loaded.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert_same_weights(loaded.unet, tiny_unet)


def test_pipeline_folder(layout: Path, tiny_unet: Any) -> None:
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "X"]}
    (layout / "model_index.json").write_text(json.dumps(index))
    assert_same_weights(models.load_model(str(layout)).unet, tiny_unet)
    shutil.rmtree(layout / "scheduler")
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json: no such file"):
        models.load_model(layout)


def test_flat_folder_has_a_scheduler_only_beside_it(layout: Path, tiny_unet: Any) -> None:
    loaded = models.load_model(layout / "unet")
    assert loaded.scheduler is None
    assert loaded.name == "unet"
    assert_same_weights(loaded.unet, tiny_unet)
    shutil.copy(layout / "scheduler" / "scheduler_config.json", layout / "unet")
    (layout / "unet" / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    assert isinstance(models.load_model(layout / "unet").scheduler, DDPMScheduler)


def test_sharded_and_half_precision_weights(tmp_path: Path, tiny_unet: Any) -> None:
    tiny_unet.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert_same_weights(models.load_model(tmp_path / "sharded").unet, tiny_unet)
    tiny_unet.save_pretrained(tmp_path / "sharded-half", max_shard_size="20KB", variant="fp16")
    assert_same_weights(models.load_model(tmp_path / "sharded-half").unet, tiny_unet)
    tiny_unet.save_pretrained(tmp_path / "half", variant="fp16")
    assert_same_weights(models.load_model(tmp_path / "half").unet, tiny_unet)


def test_shard_index_cannot_leave_its_folder(tmp_path: Path, tiny_unet: Any) -> None:
    tiny_unet.save_pretrained(tmp_path, max_shard_size="20KB")
    edit_json(tmp_path / f"{WEIGHTS}.index.json", weight_map={"conv_in.weight": "../other.safetensors"})
    with pytest.raises(ValueError, match=r"names '\.\./other\.safetensors'"):
        models.load_model(tmp_path)


def remove_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickle_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def truncate_weights(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def git_lfs_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["conv_in.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def add_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "extra.weight": torch.ones(1)}, folder / WEIGHTS, metadata={"format": "pt"})


def reshape_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "conv_in.bias": torch.ones(3)}, folder / WEIGHTS, metadata={"format": "pt"})


def poison_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["conv_in.bias"][0] = float("nan")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def json_with(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def config_text(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config.json").write_text(text)


BAD_UNETS = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config\.json: no such file"),
    "broken JSON": (config_text('{"_class_name": '), ValueError, r"config\.json: not valid JSON"),
    "JSON list": (config_text("[1, 2]"), ValueError, r"config\.json: must hold a JSON object, got list"),
    "deep JSON": (config_text("[" * 100_000), ValueError, r"config\.json: not valid JSON"),
    "no class name": (json_with(_class_name=None), ValueError, r"config\.json: no '_class_name'"),
    "unknown class": (json_with(_class_name="UNet9DModel"), ValueError, r"'UNet9DModel', which is none of the UNets"),
    "a class of diffusers": (json_with(_class_name="AutoencoderKL"), ValueError, "none of the UNets"),
    "a module": (json_with(_class_name="unet_2d"), ValueError, "none of the UNets"),
    "a scheduler": (json_with(_class_name="DDPMScheduler"), ValueError, "none of the UNets"),
    "a name from os": (json_with(_class_name="os.system"), ValueError, "none of the UNets"),
    "wrong value": (json_with(block_out_channels="wide"), ValueError, "do not make a UNet"),
    "another width": (json_with(block_out_channels=[16, 16]), ValueError, "do not make a UNet|wrong shape"),
    "quantised": (json_with(quantization_config={"load_in_8bit": True}), ValueError, "already quantised"),
    "no weights": (remove_weights, FileNotFoundError, rf"{WEIGHTS}: no such file"),
    "pickle": (pickle_weights, FileNotFoundError, "pickled weights are not read"),
    "truncated": (truncate_weights, ValueError, rf"{WEIGHTS}: truncated or not safetensors"),
    "lfs pointer": (git_lfs_pointer, ValueError, "git lfs pull"),
    "missing weight": (drop_a_weight, ValueError, r"lack 'conv_in\.weight'"),
    "unknown weight": (add_a_weight, ValueError, r"unknown 'extra\.weight'"),
    "wrong shape": (reshape_a_weight, ValueError, r"conv_in\.bias"),
    "NaN": (poison_a_weight, ValueError, r"'conv_in\.bias' holds NaN"),
}


@pytest.mark.parametrize("case", BAD_UNETS)
def test_bad_unet_folder(case: str, layout: Path) -> None:
    spoil, kind, message = BAD_UNETS[case]
    spoil(layout / "unet")
    with pytest.raises(kind, match=message) as caught:
        models.load_model(layout)
    assert "\n" not in str(caught.value)
    assert str(layout) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "none of the schedulers"),
        ({"_class_name": "SchedulerMixin"}, "none of the schedulers|does not configure"),
        ({"_class_name": "NoSuchScheduler"}, "'NoSuchScheduler', which is none of the schedulers"),
        ({"beta_schedule": "steep"}, "does not configure a DDPMScheduler"),
        ({"num_train_timesteps": "many"}, "does not configure a DDPMScheduler"),
    ],
)
def test_bad_scheduler(changes: dict[str, Any], message: str, layout: Path) -> None:
    edit_json(layout / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        models.load_model(layout)
    assert "scheduler_config.json" in str(caught.value)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder; MODEL is 'demo'"):
        models.load_model(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="not a diffusers model"):
        models.load_model(tmp_path)
    with pytest.raises(NotADirectoryError, match="not a folder"):
        models.load_model(__file__)
    with pytest.raises(ValueError, match="device must be"):
        models.load_model("demo", device="gpu")
    with pytest.raises(ValueError, match="torch sees"):
        models.load_model("demo", device=f"cuda:{torch.cuda.device_count()}")


def test_pipeline_without_a_unet(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": ["diffusers", "X"]}')
    with pytest.raises(ValueError, match=r"no 'unet' \(it has transformer\)"):
        models.load_model(tmp_path)
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    with pytest.raises(FileNotFoundError, match=r"unet: missing, though model_index\.json names it"):
        models.load_model(tmp_path)


def test_ddim_keeps_the_configuration(capfd: pytest.CaptureFixture[str]) -> None:
    source: Any = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample_range=2.0)
    scheduler = models.ddim(source)
    assert issubclass(type(scheduler), DDIMScheduler)
    for name in ("beta_schedule", "beta_start", "prediction_type", "clip_sample", "clip_sample_range"):
        assert scheduler.config[name] == source.config[name], name
    assert torch.equal(scheduler.alphas_cumprod, source.alphas_cumprod)
    assert capfd.readouterr() == ("", "")


def test_ddim_does_not_start_to_clip() -> None:
    from diffusers import DPMSolverMultistepScheduler

    assert models.ddim(DPMSolverMultistepScheduler()).config.clip_sample is False


def test_ddim_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no beta schedule"):
        models.ddim(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="no DDIM scheduler from the configuration"):
        models.ddim(DDPMScheduler(beta_schedule="sigmoid"))
    with pytest.raises(TypeError, match="diffusers scheduler, got NoneType"):
        models.ddim(None)


@pytest.fixture
def script() -> Iterator[ModuleType]:
    """The training script as a module; it may change the thread count, which is put back."""
    spec = importlib.util.spec_from_file_location("train_mnist", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_mnist"] = module
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    del sys.modules["train_mnist"]


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder with 20 random images as MNIST's own gzipped IDX file."""
    pixels = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8)
    data = struct.pack(">4I", 2051, 20, 28, 28) + pixels.numpy().tobytes()
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(data))
    return folder


def train_arguments(mnist: Path, out: Path) -> list[str]:
    small = "--steps 6 --batch 4 --warmup 2 --channels 16 16 16 --threads 1 --checkpoint-every 2"
    return ["--data", str(mnist), "--out", str(out), *small.split()]


KILLED_WHILE_WRITING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import train_mnist
replace = os.replace
def kill_second(source, target):
    if train_mnist.Path(target).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill_second
train_mnist.main(sys.argv[2:])
"""


def test_killed_training_resumes_bit_for_bit(script: ModuleType, mnist: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(SCRIPT.parent), *train_arguments(mnist, killed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not killed.exists()
    assert torch.load(tmp_path / "killed.partial" / "checkpoint.pt", weights_only=True)["step"] == 2

    assert script.main(train_arguments(mnist, killed)) == 0
    assert script.main(train_arguments(mnist, whole)) == 0
    assert not (tmp_path / "killed.partial").exists()
    weights = Path("unet") / WEIGHTS
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    loaded = models.load_model(killed)
    assert isinstance(loaded.scheduler, DDPMScheduler)
    torch.manual_seed(0)
    start = script.make_unet((16, 16, 16)).get_parameter("conv_in.weight")
    moved = (loaded.unet.get_parameter("conv_in.weight") - start).detach().abs().max()
    assert float(moved) > 1e-4


def test_training_refuses_what_it_cannot_continue(
    script: ModuleType, mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    training = script.start(script.Settings(channels=(16, 16, 16)), torch.device("cpu"))
    script.save_checkpoint(tmp_path / "out.partial" / "checkpoint.pt", training, script.Settings(steps=9))
    assert script.main(train_arguments(mnist, out)) == 1
    assert "made with other settings (steps 9 -> 6" in capsys.readouterr().err
    (tmp_path / "out.partial" / "checkpoint.pt").write_bytes(b"half a checkp")
    assert script.main(train_arguments(mnist, out)) == 1
    assert "not a checkpoint of this script" in capsys.readouterr().err
    out.mkdir()
    (out / "mine").write_text("")
    assert script.main(train_arguments(mnist, out)) == 1
    assert "exists already" in capsys.readouterr().err
    assert (out / "mine").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack(">4I", 2051, 3, 28, 28) + bytes(2 * 28 * 28), "but the header says"),
        (struct.pack(">2I", 2049, 3) + bytes(30), r"not an IDX file of images \(magic 2049"),
        (b"", "not an IDX file of images"),
        (gzip.compress(bytes(1000), mtime=0)[:-12], "damaged gzip file"),
        (struct.pack(">4I", 2051, 1, 32, 32) + bytes(32 * 32), r"images must be uint8 \[N, 28, 28\]"),
    ],
    ids=["short", "labels", "empty", "damaged", "wrong-size"],
)
def test_bad_idx_file(data: bytes, message: str, script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        script.read_images(tmp_path, 10)


def test_training_data_and_schedule(script: ModuleType, mnist: Path) -> None:
    data = script.prepare(script.read_images(mnist, 10))
    assert data.shape == (10, 1, 32, 32)
    assert float(data.min()) == -1 and float(data.max()) == 1
    settings = script.Settings(batch=5)
    seen = torch.cat([script.batch_indices(settings, 10, step) for step in (2, 3)])
    assert sorted(seen.tolist()) == list(range(10))
    timesteps = script.stratified_timesteps(50, torch.Generator().manual_seed(0))
    assert torch.equal(timesteps // 20, torch.arange(50))
    rates = [script.learning_rate(script.Settings(), step) for step in range(3460)]
    assert max(rates) == 6e-4 == rates[199]
    assert rates[0] == pytest.approx(3e-6) and 0 < rates[-1] < 1e-8
