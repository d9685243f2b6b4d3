"""Train the bundled model (a 4.0M-parameter DDPM UNet of MNIST digits) from MNIST's own files.

    python examples/train_mnist.py --data FOLDER --out mnist32-ddpm

FOLDER holds train-images-idx3-ubyte or train-images-idx3-ubyte.gz; the file itself or an .npz with `images` (or Keras's
`x_train`) works as well. Labels are not used. The defaults are the settings of the bundled weights. A killed run
goes on where it stopped: give the same command again.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import math
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

IMAGES = "train-images-idx3-ubyte"
IDX_IMAGES_MAGIC = 2051
TRAINING_IMAGES = 60_000
TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, stored with each checkpoint; a resumed run must have the same."""

    steps: int = 3460
    batch: int = 64
    learning_rate: float = 6e-4
    warmup: int = 200
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.999
    channels: tuple[int, ...] = (32, 64, 128)
    images: int = TRAINING_IMAGES
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if len(self.channels) != 3 or any(c < 16 or c % 16 for c in self.channels):
            raise ValueError(f"--channels must be three multiples of 16, got {list(self.channels)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema must lie in [0, 1), got {self.ema}")


@dataclass
class Training:
    """The state that changes from step to step; `state` and `restore` carry all of it."""

    unet: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0

    def state(self) -> dict[str, Any]:
        """Tensors and plain values only, so that a checkpoint loads without running code."""
        return {
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state that `state` returned."""
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.step = state["step"]


def read_images(path: Path, count: int) -> Tensor:
    """The first ``count`` training images, uint8 [N, 28, 28], from an .npz, an IDX file or a folder that holds one."""
    if path.is_dir():
        candidates = [path / IMAGES, path / f"{IMAGES}.gz", path / "train-images.idx3-ubyte"]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: holds neither {IMAGES} nor {IMAGES}.gz; download MNIST there")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --data takes MNIST's folder, its image file or an .npz")
    images = _read_npz(path) if path.suffix == ".npz" else _read_idx(path)
    if images.dtype != numpy.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28) or not len(images):
        raise ValueError(f"{path}: images must be uint8 [N, 28, 28], got {images.dtype} {list(images.shape)}")
    return torch.from_numpy(images[:count].copy())


def _read_npz(path: Path) -> numpy.ndarray:
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            name = next((name for name in ("images", "x_train") if name in archive), None)
            if name is None:
                raise ValueError(f"must hold 'images' or 'x_train', got {sorted(archive)}")
            return archive[name]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_idx(path: Path) -> numpy.ndarray:
    """IDX: big-endian magic, count, rows and columns as uint32, then the pixels."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); download it again") from error
    header = numpy.frombuffer(data[:16], dtype=">u4") if len(data) >= 16 else numpy.zeros(4, dtype=numpy.uint32)
    magic, *shape = (int(value) for value in header)
    if magic != IDX_IMAGES_MAGIC:
        raise ValueError(f"{path}: not an IDX file of images (magic {magic}, not {IDX_IMAGES_MAGIC})")
    if len(data) != 16 + math.prod(shape):
        raise ValueError(f"{path}: {len(data)} bytes, but the header says {16 + math.prod(shape)}; download it again")
    return numpy.frombuffer(data, dtype=numpy.uint8, offset=16).reshape(shape)


def prepare(images: Tensor) -> Tensor:
    """x = 2 image / 255 - 1, padded with background to 32x32: uint8 [N, 28, 28] -> float32 [N, 1, 32, 32]."""
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    return padded[:, None].float().mul_(2 / 255).sub_(1)


def make_unet(channels: tuple[int, ...]) -> nn.Module:
    """The bundled network's shape, with ``channels`` at 32x32, 16x16 and 8x8."""
    from diffusers import UNet2DModel

    unet: Any = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=math.gcd(32, *channels),
        norm_num_groups=16,
    )
    return unet


def make_scheduler() -> Any:
    """DDPM with 1000 steps and linear betas from 1e-4 to 0.02."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS, beta_schedule="linear", prediction_type="epsilon", clip_sample=True
    )


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up to the peak, then a cosine that ends near zero."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.5 * (1 + math.cos(math.pi * progress)))


def batch_indices(settings: Settings, count: int, step: int) -> Tensor:
    """The images of ``step``: a new permutation each epoch, a function of seed and step, so nothing needs saving."""
    epoch, position = divmod(step, count // settings.batch)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)[position * settings.batch :][: settings.batch]


def stratified_timesteps(batch: int, generator: torch.Generator) -> Tensor:
    """t[j] = floor(1000 (j + u[j]) / batch), u uniform: one timestep from each of ``batch`` equal parts."""
    position = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return (position * TRAIN_TIMESTEPS).long().clamp_(max=TRAIN_TIMESTEPS - 1)


def start(settings: Settings, device: torch.device) -> Training:
    """The state before the first step."""
    torch.manual_seed(settings.seed)
    unet = make_unet(settings.channels).to(device)
    average = make_unet(settings.channels).to(device).requires_grad_(False)
    average.load_state_dict(unet.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=settings.weight_decay)
    return Training(unet, average, optimizer, torch.Generator().manual_seed(settings.seed))


def train_step(training: Training, settings: Settings, data: Tensor, scheduler: Any) -> float:
    """One step of ‖noise - unet(noisy, t)‖² with its EMA; returns the loss."""
    images = data[batch_indices(settings, len(data), training.step).to(data.device)]
    timesteps = stratified_timesteps(settings.batch, training.generator).to(data.device)
    noise = torch.randn(images.shape, generator=training.generator).to(data.device)
    noisy = scheduler.add_noise(images, noise, timesteps)
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate(settings, training.step)
    with torch.autocast(data.device.type, torch.bfloat16):
        predicted = training.unet(noisy, timesteps, return_dict=False)[0]
    loss = nn.functional.mse_loss(predicted.float(), noise)
    training.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(training.unet.parameters(), settings.clip)
    training.optimizer.step()
    training.step += 1
    update_average(training, settings.ema)
    return loss.item()


@torch.no_grad()
def update_average(training: Training, decay: float) -> None:
    """average = d average + (1 - d) weights, d rising to ``decay`` so that the random start is soon forgotten."""
    decay = min(decay, (1 + training.step) / (10 + training.step))
    for average, weight in zip(training.average.parameters(), training.unet.parameters(), strict=True):
        average.lerp_(weight, 1 - decay)


def save_checkpoint(path: Path, training: Training, settings: Settings) -> None:
    """Write beside ``path``, then swap: a kill at any moment leaves the old checkpoint or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save({"settings": dataclasses.asdict(settings), **training.state()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, training: Training, settings: Settings) -> None:
    """Restore ``training``, if the checkpoint was made with the same settings."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state.pop("settings")
    except (RuntimeError, LookupError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a checkpoint of this script; delete {path.parent} to start afresh") from error
    wanted = dataclasses.asdict(settings)
    changed = [f"{name} {saved.get(name)} -> {value}" for name, value in wanted.items() if saved.get(name) != value]
    if changed:
        raise ValueError(
            f"{path}: made with other settings ({', '.join(changed)}); give the same ones, or delete {path.parent}"
        )
    training.restore(state)


def save_model(out: Path, work: Path, training: Training, scheduler: Any) -> None:
    """The averaged weights in half precision and the scheduler, as a diffusers folder that appears whole."""
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    average: Any = training.average
    average.half().save_pretrained(folder / "unet", safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    if out.is_dir():
        out.rmdir()
    os.replace(folder, out)


def progress_steps(first: int, last: int) -> Iterator[tuple[int, Any]]:
    """Each step's number with a function that shows its loss, under a progress bar with the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("loss {task.fields[loss]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=last, completed=first, loss="-")
        for step in range(first, last):
            yield step, lambda loss: progress.update(task, advance=1, loss=f"{loss:.4f}")


def train(settings: Settings, data_path: Path, out: Path, device: torch.device, checkpoint_every: int) -> None:
    """Train, or go on with, the run whose work in progress lies in ``out``.partial."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists already; delete it or choose another --out")
    images = read_images(data_path, settings.images)
    if len(images) < settings.batch:
        raise ValueError(f"{data_path}: {len(images)} images are fewer than one batch of {settings.batch}")
    data = prepare(images).to(device)
    scheduler = make_scheduler()
    training = start(settings, device)
    work = out.with_name(f"{out.name}.partial")
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        load_checkpoint(checkpoint, training, settings)
        print(f"going on from step {training.step} of {checkpoint}", file=sys.stderr)
    average_loss: float | None = None
    for step, show in progress_steps(training.step, settings.steps):
        loss = train_step(training, settings, data, scheduler)
        if not math.isfinite(loss):
            raise ValueError(f"the loss of step {step} is {loss}; delete {work} and lower --learning-rate")
        average_loss = loss if average_loss is None else 0.98 * average_loss + 0.02 * loss
        show(average_loss)
        if training.step % checkpoint_every == 0 or training.step == settings.steps:
            save_checkpoint(checkpoint, training, settings)
    save_model(out, work, training, scheduler)
    shutil.rmtree(work)
    print(f"saved {out}", file=sys.stderr)


def usable_device(name: str) -> torch.device:
    """The device called ``name``, if this machine has it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA GPUs; use cpu")
    return device


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; every default is the bundled model's setting."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description="Train a small DDPM UNet on MNIST and save it as a diffusers folder.")
    parser.add_argument("--data", type=Path, required=True, help="MNIST: its folder, its IDX image file, or an .npz")
    parser.add_argument("--out", type=Path, required=True, help="the new diffusers folder")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS", help="default: %(default)s")
    for field in dataclasses.fields(Settings):
        name, value = "--" + field.name.replace("_", "-"), getattr(defaults, field.name)
        if isinstance(value, tuple):
            parser.add_argument(name, type=int, nargs=len(value), default=value, help=f"default: {value}")
        else:
            parser.add_argument(name, type=type(value), default=value, help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 on success, 1 with one line on standard error otherwise."""
    options = parse_arguments(arguments)
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    try:
        if options.checkpoint_every < 1:
            raise ValueError(f"--checkpoint-every must be at least 1, got {options.checkpoint_every}")
        if options.threads > 0:
            torch.set_num_threads(options.threads)
        settings = Settings(**{**fields, "channels": tuple(fields["channels"])})
        train(settings, options.data, options.out, usable_device(options.device), options.checkpoint_every)
    except (OSError, ValueError) as error:
        print(f"train_mnist: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train_mnist: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
