"""examples/cifar10: its network is diffusers', its data is read in every form, its training resumes and exports."""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from qdiff_engine.models import load_model
from qdiff_engine.sampling import predict

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "cifar10"
TINY = [
    "--channels",
    "32",
    "64",
    "--layers",
    "1",
    "--batch",
    "4",
    "--warmup",
    "1",
    "--log-every",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """The three modules of the example, imported as its script imports them."""
    sys.path.insert(0, str(FOLDER))
    import cifar_images
    import cifar_unet
    import train_cifar10

    yield SimpleNamespace(images=cifar_images, unet=cifar_unet, train=train_cifar10)
    sys.path.remove(str(FOLDER))
    for name in ("cifar_images", "cifar_unet", "train_cifar10"):
        del sys.modules[name]


@pytest.fixture
def pictures() -> numpy.ndarray:
    return numpy.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), dtype=numpy.uint8)


@pytest.fixture
def data(tmp_path: Path, pictures: numpy.ndarray) -> Path:
    numpy.savez(tmp_path / "images.npz", images=pictures.transpose(0, 2, 3, 1))
    return tmp_path / "images.npz"


@pytest.mark.parametrize("channels, layers", [((32, 64), 1), ((32, 64, 64, 96), 2)])
def test_the_network_is_diffusers_own(example: Any, channels: tuple[int, ...], layers: int) -> None:
    from diffusers import UNet2DModel

    unet = example.unet.CifarUNet(channels, layers).eval()
    other = UNet2DModel.from_config(unet.diffusers_config()).eval()
    other.load_state_dict(unet.state_dict(), strict=True)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 997])
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t), other(x, t, return_dict=False)[0], rtol=1e-4, atol=1e-5)


def test_the_default_network_has_twelve_million_parameters(example: Any) -> None:
    with torch.device("meta"):
        unet = example.unet.CifarUNet()
    count = sum(p.numel() for p in unet.parameters())
    assert 11.5e6 < count < 12.5e6
    halves = {name: value.half() for name, value in unet.state_dict().items()}
    parts = example.train.pieces(halves)
    sizes = [sum(2 * v.numel() for v in part.values()) for part in parts]
    assert len(parts) == 2 and max(sizes) < 16e6 and sum(sizes) == 2 * count < 32e6
    assert list(halves) == [name for part in parts for name in part]


def test_weights_that_are_too_large_are_refused(example: Any) -> None:
    with pytest.raises(ValueError, match="more than a file"):
        example.train.pieces({"a": torch.empty(8_000_000, dtype=torch.half, device="meta")})
    many = {str(i): torch.empty(7_000_000, dtype=torch.half, device="meta") for i in range(3)}
    with pytest.raises(ValueError, match="fewer --channels"):
        example.train.pieces(many)


def test_every_form_of_the_data_is_read(example: Any, data: Path, pictures: numpy.ndarray, tmp_path: Path) -> None:
    from PIL import Image

    assert torch.equal(example.images.read_images(data), torch.from_numpy(pictures))
    binary, python = tmp_path / "bin" / "cifar-10-batches-bin", tmp_path / "py"
    binary.mkdir(parents=True), python.mkdir()
    for i, part in enumerate(numpy.split(pictures, 5)):
        labels = numpy.full((len(part), 1), i, dtype=numpy.uint8)
        (binary / f"data_batch_{i + 1}.bin").write_bytes(numpy.hstack([labels, part.reshape(len(part), -1)]).tobytes())
        content = {b"data": part.reshape(len(part), -1), b"labels": [i] * len(part)}
        (python / f"data_batch_{i + 1}").write_bytes(pickle.dumps(content, protocol=2))
    for folder in (binary.parent, python):
        assert torch.equal(example.images.read_images(folder), torch.from_numpy(pictures))
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(numpy.full((32, 32, 3), picture[0, 0, 0], dtype=numpy.uint8)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    offsets = numpy.cumsum([0, *map(len, files)])
    numpy.savez(tmp_path / "jpeg.npz", jpeg=numpy.frombuffer(b"".join(files), dtype=numpy.uint8), offsets=offsets)
    decoded = example.images.read_images(tmp_path / "jpeg.npz")
    assert decoded.shape == (10, 3, 32, 32) and decoded.dtype == torch.uint8
    assert int((decoded[:, 0, 0, 0].int() - torch.from_numpy(pictures[:, 0, 0, 0]).int()).abs().max()) <= 2


def test_wrong_data_is_named(example: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data_batch_1"):
        example.images.read_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        example.images.read_images(tmp_path / "nothing")
    (tmp_path / "data_batch_1.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="no records"):
        example.images.read_images(tmp_path)
    (tmp_path / "data_batch_1.bin").unlink()
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(ValueError, match="pathlib"):
        example.images.read_images(tmp_path)
    numpy.savez(tmp_path / "other.npz", labels=numpy.zeros(3))
    with pytest.raises(ValueError, match="'jpeg' and 'offsets'"):
        example.images.read_images(tmp_path / "other.npz")


@pytest.mark.parametrize("name, kind", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_noise_schedules_are_diffusers_own(example: Any, name: str, kind: str) -> None:
    from diffusers import DDPMScheduler

    betas = example.train.SCHEDULES[name]()
    torch.testing.assert_close(betas.float(), DDPMScheduler(beta_schedule=kind).betas, rtol=1e-5, atol=1e-7)


def test_a_stopped_run_ends_like_one_that_was_not(example: Any, data: Path, tmp_path: Path) -> None:
    """Bit for bit; and the loader takes what is written, whether the steps are over or only the minutes."""
    arguments = ["--data", str(data), *TINY, "--steps", "4", "--checkpoint-every", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert example.train.main([*arguments, "--out", str(whole)]) == 0
    assert example.train.main([*arguments, "--out", str(parts), "--minutes", "0"]) == 0
    assert load_model(parts).unet.config.block_out_channels == [32, 64]
    real = example.train.train_step
    calls = []

    def interrupted(*given: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*given)

    example.train.train_step = interrupted
    try:
        assert example.train.main([*arguments, "--out", str(parts)]) == 130
    finally:
        example.train.train_step = real
    assert example.train.main([*arguments, "--out", str(parts)]) == 0
    a, b = load_model(whole), load_model(parts)
    assert a.scheduler.config.num_train_timesteps == 1000
    for (name, x), y in zip(a.unet.state_dict().items(), b.unet.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    start = example.train.start(example.train.Settings(channels=(32, 64), layers=1), torch.device("cpu")).unet
    moved = [not torch.equal(x, y.half().float()) for x, y in zip(a.unet.parameters(), start.parameters(), strict=True)]
    assert all(moved), "every parameter was trained"
    refused = [*arguments, "--out", str(parts), "--learning-rate", "0.5"]
    assert example.train.main(refused) == 1


def test_weights_in_pieces_are_loaded(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = example.unet.CifarUNet((32, 64), 1).eval()
    size = sum(2 * p.numel() for p in unet.parameters())
    small = example.train.pieces
    monkeypatch.setattr(example.train, "pieces", lambda tensors: small(tensors, size // 2))
    example.train.export(tmp_path / "model", unet, "cosine")
    files = sorted(path.name for path in (tmp_path / "model" / "unet").glob("*.safetensors"))
    assert len(files) >= 2 and files[0].endswith(f"-00001-of-{len(files):05}.safetensors")
    loaded = load_model(tmp_path / "model")
    assert loaded.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([500])
    with torch.no_grad():
        expected = unet.half().float()(x, t)
        torch.testing.assert_close(predict(loaded.unet, x, t, {}), expected, rtol=1e-4, atol=1e-5)
    index = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    assert set(json.loads(index.read_text())["weight_map"].values()) == set(files)


def test_a_run_can_begin_with_earlier_weights(example: Any, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    unet = example.unet.CifarUNet((32, 64), 1)
    example.train.export(tmp_path / "earlier", unet, "linear")
    arguments = ["--data", str(data), *TINY, "--steps", "4", "--minutes", "0"]
    assert example.train.main([*arguments, "--out", str(tmp_path / "x"), "--init", str(tmp_path / "earlier")]) == 0
    loaded = load_model(tmp_path / "x").unet.state_dict()
    assert all(torch.equal(value.half().float(), loaded[name]) for name, value in unet.state_dict().items())
    assert example.train.main([*arguments, "--out", str(tmp_path / "y"), "--init", str(tmp_path)]) == 1


def test_training_lowers_the_loss(example: Any) -> None:
    """Images of one colour are soon told from noise."""
    settings = example.train.Settings(steps=20, batch=4, channels=(32, 64), layers=1, warmup=3, learning_rate=2e-3)
    images = torch.full((16, 3, 32, 32), 90, dtype=torch.uint8)
    training = example.train.start(settings, torch.device("cpu"))
    alpha_bar = (1 - example.train.linear_betas()).cumprod(0).float()
    losses = [float(example.train.train_step(training, training.unet, settings, images, alpha_bar)) for _ in range(20)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_batches_are_a_function_of_the_step(example: Any, pictures: numpy.ndarray) -> None:
    settings = example.train.Settings(batch=5, channels=(32, 64))
    images = torch.from_numpy(pictures)
    first, again, other = (example.train.drawn(settings, images, step) for step in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and not torch.equal(first[0], other[0])
    x, timesteps, noise = first
    assert x.shape == noise.shape == (5, 3, 32, 32) and float(x.min()) >= -1 and float(x.max()) <= 1
    assert timesteps.tolist() == sorted(timesteps.tolist()) and int(timesteps[0]) < 200 <= int(timesteps[1])
