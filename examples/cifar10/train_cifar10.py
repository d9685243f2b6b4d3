"""Train a DDPM UNet on CIFAR-10 (12M parameters with the defaults) and write it as a diffusers folder.

    python examples/cifar10/train_cifar10.py --data FOLDER --out cifar10-ddpm --device cuda --minutes 12

Needs torch, numpy and safetensors. A run that was stopped, or whose minutes were over, goes on with the same command;
the averaged weights are in ``--out`` after each of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cifar_images import read_images
from cifar_unet import CifarUNet
from torch import Tensor, nn

TIMESTEPS = 1000
PIECE_BYTES, MOST_BYTES = 15_000_000, 32_000_000  # of a weight file, of all of them
WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, stored with each checkpoint; a resumed run must have the same."""

    steps: int = 40_000
    batch: int = 256
    learning_rate: float = 4e-4
    warmup: int = 1000
    clip: float = 1.0
    ema: float = 0.9995
    schedule: str = "linear"
    channels: tuple[int, ...] = (128, 160, 160)
    layers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if len(self.channels) < 2 or any(c < 32 or c % 32 for c in self.channels):
            raise ValueError(f"--channels must be two or more multiples of 32, got {list(self.channels)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema must lie in [0, 1), got {self.ema}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"--schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")


def linear_betas() -> Tensor:
    """β[t] from 1e-4 to 0.02 (Ho et al. 2020)."""
    return torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)


def cosine_betas() -> Tensor:
    """β[t] = min(0.999, 1 - f(t + 1) / f(t)), f(t) = cos²((t / T + 0.008) / 1.008 · π / 2) (Nichol 2021)."""
    f = torch.cos((torch.arange(TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


@dataclass
class Training:
    """What changes from step to step."""

    unet: CifarUNet
    average: CifarUNet
    optimizer: torch.optim.Optimizer
    step: int = 0

    def state(self) -> dict[str, Any]:
        """Tensors and plain values only, so that a checkpoint loads without running code."""
        parts = {name: getattr(self, name).state_dict() for name in ("unet", "average", "optimizer")}
        return {**parts, "step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state that `state` returned."""
        for name in ("unet", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]


def start(settings: Settings, device: torch.device) -> Training:
    """The state before the first step."""
    torch.manual_seed(settings.seed)
    made = [CifarUNet(settings.channels, settings.layers).to(device, memory_format=torch.channels_last) for _ in "ab"]
    unet, average = made
    average.load_state_dict(unet.state_dict())
    average.requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=0.0, fused=device.type == "cuda")
    return Training(unet, average, optimizer)


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up to the peak, then a cosine that ends near zero."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@functools.lru_cache(maxsize=1)
def permutation(count: int, seed: int) -> Tensor:
    """The order of an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def drawn(settings: Settings, images: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x0 in [-1, 1], half of them flipped; a timestep from each of B equal parts; noise), a function of the step."""
    device, batch = images.device, settings.batch
    epoch, position = divmod(step, max(1, len(images) // batch))
    order = permutation(len(images), settings.seed * 1_000_003 + epoch)
    x = images[order[position * batch :][:batch].to(device)].float().div_(127.5).sub_(1)
    generator = torch.Generator(device).manual_seed((settings.seed + 1) * 1_000_000_007 + step)
    flipped = torch.rand(len(x), 1, 1, 1, generator=generator, device=device) < 0.5
    x = torch.where(flipped, x.flip(3), x).contiguous(memory_format=torch.channels_last)
    spread = (torch.arange(len(x), device=device) + torch.rand(len(x), generator=generator, device=device)) / len(x)
    timesteps = (spread * TIMESTEPS).long().clamp_(max=TIMESTEPS - 1)
    return x, timesteps, torch.randn(x.shape, generator=generator, device=device).to(memory_format=torch.channels_last)


def train_step(training: Training, network: nn.Module, settings: Settings, images: Tensor, alpha_bar: Tensor) -> Tensor:
    """One step of ‖noise - unet(noisy, t)‖² with its EMA; the loss stays on the device."""
    x, timesteps, noise = drawn(settings, images, training.step)
    at = alpha_bar[timesteps][:, None, None, None]
    noisy = at.sqrt() * x + (1 - at).sqrt() * noise
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate(settings, training.step)
    with torch.autocast(images.device.type, torch.bfloat16):
        predicted = network(noisy, timesteps)
    loss = nn.functional.mse_loss(predicted.float(), noise)
    training.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(training.unet.parameters(), settings.clip)
    training.optimizer.step()
    training.step += 1
    with torch.no_grad():  # the random start is soon forgotten: the decay rises to its value
        decay = min(settings.ema, (1 + training.step) / (10 + training.step))
        weights = [parameter.detach() for parameter in training.unet.parameters()]
        torch._foreach_lerp_(list(training.average.parameters()), weights, 1 - decay)
    return loss.detach()


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
    state = torch.load(path, map_location="cpu", weights_only=True)
    saved, wanted = state.pop("settings"), dataclasses.asdict(settings)
    changed = [f"{name} {saved.get(name)} -> {value}" for name, value in wanted.items() if saved.get(name) != value]
    if changed:
        raise ValueError(
            f"{path}: made with other settings ({', '.join(changed)}); give the same ones, or delete {path.parent}"
        )
    training.restore(state)


def load_weights(folder: Path, training: Training) -> None:
    """Begin with what `export` wrote to ``folder``, in the network and in its average; the optimiser starts anew."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted((folder / "unet").glob(f"{WEIGHTS}*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder / 'unet'}: holds no weights; --init takes an --out of this script")
    try:
        tensors = {name: value.float() for file in files for name, value in load_file(file).items()}
        for network in (training.unet, training.average):
            network.load_state_dict(tensors)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: its weights do not fit this network: {str(error).splitlines()[0]}") from error


def pieces(tensors: dict[str, Tensor], most: int = PIECE_BYTES) -> list[dict[str, Tensor]]:
    """The tensors in their order, in as few parts of at most ``most`` bytes as that order allows.

    Raises:
        ValueError: one tensor, or all of them together, are too large.
    """
    parts: list[dict[str, Tensor]] = [{}]
    total = filled = 0
    for name, value in tensors.items():
        size = value.numel() * value.element_size()
        total += size
        if size > most:
            raise ValueError(f"weight {name} has {size} bytes, more than a file of {most}")
        if filled + size > most:
            parts.append({})
            filled = 0
        parts[-1][name] = value
        filled += size
    if total > MOST_BYTES:
        raise ValueError(f"the weights have {total} bytes, more than {MOST_BYTES}; take fewer --channels")
    return parts


def export(out: Path, unet: CifarUNet, schedule: str) -> None:
    """``unet`` in half precision and its noise schedule as a diffusers folder, swapped in as a whole."""
    from safetensors.torch import save_file

    folder = out.with_name(f"{out.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    tensors = {name: value.detach().cpu().half().contiguous() for name, value in unet.state_dict().items()}
    parts, where = pieces(tensors), {}
    for i, part in enumerate(parts):
        name = f"{WEIGHTS}-{i + 1:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else f"{WEIGHTS}.safetensors"
        save_file(part, folder / "unet" / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(2 * v.numel() for v in tensors.values())}, "weight_map": where}
        _write_json(folder / "unet" / f"{WEIGHTS}.safetensors.index.json", index)
    _write_json(folder / "unet" / "config.json", unet.diffusers_config())
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": TIMESTEPS,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        "prediction_type": "epsilon",
        "clip_sample": True,
    }
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    old = out.with_name(f"{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(folder, out)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def train(settings: Settings, options: argparse.Namespace, device: torch.device) -> bool:
    """Train until the steps or the minutes are over; whether the steps are."""
    begin = time.monotonic()
    images = read_images(options.data).to(device)
    if len(images) < settings.batch:
        raise ValueError(f"{options.data}: {len(images)} images are fewer than one batch of {settings.batch}")
    alpha_bar = (1 - SCHEDULES[settings.schedule]()).cumprod(0).float().to(device)
    training = start(settings, device)
    checkpoint = options.out.with_name(f"{options.out.name}.partial") / "checkpoint.pt"
    if checkpoint.exists():
        load_checkpoint(checkpoint, training, settings)
    elif options.init is not None:
        load_weights(options.init, training)
    count = sum(p.numel() for p in training.unet.parameters())
    print(f"{count / 1e6:.1f}M parameters, {len(images)} images, from step {training.step}", file=sys.stderr)
    network = torch.compile(training.unet) if options.compile else training.unet
    losses: list[Tensor] = []
    while training.step < settings.steps and time.monotonic() - begin < 60 * options.minutes:
        losses.append(train_step(training, network, settings, images, alpha_bar))
        if training.step % options.log_every == 0:
            loss = float(torch.stack(losses).mean())
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {training.step}; lower --learning-rate")
            seconds = time.monotonic() - begin
            print(f"step {training.step} of {settings.steps}, loss {loss:.4f}, {seconds:.0f} s", file=sys.stderr)
            losses.clear()
        if training.step % options.checkpoint_every == 0:
            save_checkpoint(checkpoint, training, settings)
    save_checkpoint(checkpoint, training, settings)
    export(options.out, training.average, settings.schedule)
    return training.step >= settings.steps


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description="Train a DDPM UNet on CIFAR-10 and save it as a diffusers folder.")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10: its folder, or an .npz")
    parser.add_argument(
        "--out", type=Path, required=True, help="the diffusers folder; --out.partial has the checkpoint"
    )
    parser.add_argument("--init", type=Path, default=None, help="begin with the weights of an earlier --out")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; the same command goes on")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network; takes a minute, then faster")
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--checkpoint-every", type=int, default=2000)
    for item in dataclasses.fields(Settings):
        default = getattr(defaults, item.name)
        kind: Any = {"type": int, "nargs": "+"} if item.name == "channels" else {"type": type(default)}
        parser.add_argument(f"--{item.name.replace('_', '-')}", default=default, help="default: %(default)s", **kind)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 when it trained, 1 with one line on what is wrong."""
    options = parse_arguments(arguments)
    try:
        values = {item.name: getattr(options, item.name) for item in dataclasses.fields(Settings)}
        settings = Settings(**{**values, "channels": tuple(options.channels)})
        device = torch.device(options.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {options.device}: torch sees no GPU; use --device cpu")
        torch.backends.cudnn.benchmark = True
        done = train(settings, options, device)
    except (OSError, ValueError) as error:
        print(f"train_cifar10: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train_cifar10: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    print(f"{options.out}: {'done' if done else 'the same command goes on'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
