"""Sampling loops over diffusers schedulers: same seed, same images, whatever the batch size.

Every loop is one function, `denoise`: calibration records what the UNet received, `sample` keeps the final images.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Conditioning = Mapping[str, Any] | Callable[[int], Mapping[str, Any]] | None


@dataclass(frozen=True)
class Step:
    """One evaluation of the UNet inside a loop: ``sample`` and ``timestep`` are exactly what it received."""

    index: int
    count: int
    timestep: float
    sample: Tensor  # [n, C, H, W]
    prediction: Tensor  # [n, C, H, W], after guidance
    previous: Tensor  # [n, C, H, W], the latents after the scheduler's step


def check_count(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an int of at least ``least``, or an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_shape(shape: Any, rank: int, name: str = "shape") -> tuple[int, ...]:
    """``shape`` as a tuple of ``rank`` positive integers."""
    expected = "(n, C, H, W)" if rank == 4 else "(C, H, W)"
    if not isinstance(shape, tuple | list | torch.Size) or len(shape) != rank:
        raise ValueError(f"{name} must be {expected}, got {shape!r}")
    return tuple(check_count(f"{name}[{i}]", size) for i, size in enumerate(shape))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """diffusers announces unused configuration keys when a scheduler is copied; here that is expected."""
    logger = logging.getLogger("diffusers.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def prepared(scheduler: Any, steps: int) -> Any:
    """A copy of ``scheduler`` with ``steps`` timesteps set; the caller's own is left as it is."""
    check_count("steps", steps)
    for attribute in ("config", "set_timesteps", "step"):
        if not hasattr(scheduler, attribute):
            raise TypeError(
                f"scheduler must be a diffusers scheduler, got {type(scheduler).__name__} without {attribute!r}"
            )
    with _quiet():
        mine = type(scheduler).from_config(scheduler.config)
    limit = mine.config.get("num_train_timesteps", steps)
    if steps > limit:
        raise ValueError(f"steps must be at most the scheduler's {limit} training timesteps, got {steps}")
    if mine.config.get("thresholding", False):
        raise ValueError("scheduler uses dynamic thresholding, which the engine does not run; set thresholding=False")
    mine.set_timesteps(steps)
    return mine


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal latents [n, C, H, W]; sample j is the j-th draw of one CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(1, *shape[1:], generator=generator) for _ in range(shape[0])])


def conditioning_for(conditioning: Conditioning, samples: range) -> dict[str, Any]:
    """The keyword arguments of these samples: tensors are cycled along their first axis, a callable is asked."""
    if conditioning is None:
        return {}
    if callable(conditioning):
        return _stack([dict(conditioning(j)) for j in samples])
    if not isinstance(conditioning, Mapping):
        raise TypeError(f"conditioning must map names to tensors or be a callable, got {type(conditioning).__name__}")
    return {name: _cycled(value, samples, name) for name, value in conditioning.items()}


def _cycled(value: Any, samples: range, name: str) -> Any:
    if isinstance(value, Mapping):
        return {k: _cycled(v, samples, f"{name}.{k}") for k, v in value.items()}
    if not isinstance(value, Tensor) or value.dim() < 1 or value.shape[0] < 1:
        raise TypeError(f"conditioning[{name!r}] must be a tensor with at least one sample, got {type(value).__name__}")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"conditioning[{name!r}] holds NaN or infinity")
    return value[[j % value.shape[0] for j in samples]]


def _stack(items: list[dict[str, Any]]) -> dict[str, Any]:
    first = items[0]
    return {
        k: _stack([item[k] for item in items]) if isinstance(v, Mapping) else torch.cat([item[k] for item in items])
        for k, v in first.items()
    }


def _both(unconditional: Mapping[str, Any], conditional: Mapping[str, Any]) -> dict[str, Any]:
    """Unconditional and conditional arguments in one batch, in diffusers' order."""
    if set(unconditional) != set(conditional):
        raise ValueError(
            f"unconditional must have the keys of conditioning {sorted(conditional)}, got {sorted(unconditional)}"
        )
    return {
        k: _both(unconditional[k], v) if isinstance(v, Mapping) else torch.cat([unconditional[k], v])
        for k, v in conditional.items()
    }


def predict(unet: Any, sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
    """The UNet's output tensor, for modules that return a tensor, a tuple or an object with ``sample``."""
    forward = getattr(unet, "forward", unet)
    keywords = {"return_dict": False} if "return_dict" in inspect.signature(forward).parameters else {}
    output = unet(sample, timestep, **conditioning, **keywords)
    return output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: e = e_u + scale (e_c - e_u); no guidance when ``scale`` is None."""

    scale: float | None = None
    unconditional: Conditioning = None
    conditioning: Conditioning = None

    def __post_init__(self) -> None:
        if self.scale is not None and self.unconditional is None:
            raise ValueError("guidance_scale needs unconditional: the keyword arguments of the unconditional branch")
        if self.scale is not None and not isinstance(self.scale, int | float):
            raise TypeError(f"guidance_scale must be a number, got {type(self.scale).__name__}")

    def prediction(self, unet: Any, sample: Tensor, timestep: float, samples: range) -> Tensor:
        """The guided prediction for these samples."""
        conditional = conditioning_for(self.conditioning, samples)
        if self.scale is None:
            return predict(unet, sample, timestep_tensor(timestep, len(sample)), conditional)
        both = _both(conditioning_for(self.unconditional, samples), conditional)
        output = predict(unet, torch.cat([sample, sample]), timestep_tensor(timestep, 2 * len(sample)), both)
        without, with_ = output.chunk(2)
        return without + self.scale * (with_ - without)


def timestep_tensor(value: float, batch: int) -> Tensor:
    """[batch] copies of a timestep: int64 where it is whole, float32 where a sampler asks between two steps."""
    whole = float(value).is_integer()
    return torch.full((batch,), int(value) if whole else value, dtype=torch.int64 if whole else torch.float32)


def step_arguments(scheduler: Any, eta: float, seed: int, n: int) -> dict[str, Any]:
    """What the scheduler's step takes beside the latents: eta, and one generator per sample; eta is checked."""
    parameters = inspect.signature(scheduler.step).parameters
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if eta > 0 and "eta" not in parameters:
        raise ValueError(f"eta = {eta} needs a scheduler whose step takes it, as DDIM; got {type(scheduler).__name__}")
    arguments: dict[str, Any] = {"eta": eta} if "eta" in parameters else {}
    if "generator" in parameters:  # one per sample: a batch size never changes an image
        arguments["generator"] = [torch.Generator().manual_seed((seed * 1_000_003 + j + 1) % 2**63) for j in range(n)]
    return arguments


def denoise(
    unet: Any,
    scheduler: Any,
    latents: Tensor,
    *,
    steps: int,
    seed: int = 0,
    eta: float = 0.0,
    guidance: Guidance | None = None,
    batch: int = 16,
    recorded: Mapping[int, Tensor] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """x_T -> x_0: run the scheduler's loop over ``latents`` [n, C, H, W] and return the final latents.

    Args:
        unet: anything called as ``unet(sample, timestep, **conditioning)``.
        scheduler: a diffusers scheduler; copied, so several loops never disturb one another.
        steps, eta: of the sampler. ``seed`` drives the noise of stochastic steps, one stream per sample.
        batch: samples per UNet call (twice as many rows with guidance).
        recorded: predictions known from an earlier, interrupted run, by step index; not computed again.
        on_step: called after every step.

    Raises:
        ValueError: an argument out of range, or NaN in the latents or in a prediction.
    """
    scheduler = prepared(scheduler, steps)
    check_count("batch", batch)
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents hold NaN or infinity")
    guidance, recorded = guidance or Guidance(), recorded or {}
    arguments = step_arguments(scheduler, eta, seed, len(latents))
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    timesteps = list(scheduler.timesteps)
    for i, timestep in enumerate(timesteps):
        value = float(timestep)
        received = scheduler.scale_model_input(latents, timestep)
        prediction = recorded.get(i)
        if prediction is None:
            chunks = [range(j, min(j + batch, len(latents))) for j in range(0, len(latents), batch)]
            prediction = torch.cat(
                [guidance.prediction(unet, received[c.start : c.stop], value, c).float().cpu() for c in chunks]
            )
            if not bool(torch.isfinite(prediction).all()):
                raise ValueError(f"the UNet predicted NaN or infinity at step {i} (timestep {value:g})")
        latents = scheduler.step(prediction, timestep, latents, **arguments).prev_sample
        if on_step is not None:
            on_step(Step(i, len(timesteps), value, received, prediction, latents))
    return latents


@torch.no_grad()
def sample(
    model: Any,
    scheduler: Any,
    shape: tuple[int, int, int, int],
    steps: int = 50,
    seed: int = 0,
    *,
    eta: float = 0.0,
    guidance_scale: float | None = None,
    unconditional: Conditioning = None,
    conditioning: Conditioning = None,
    batch: int = 16,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Images (or latents) [n, C, H, W] drawn with ``model``; the same seed gives the same images for any ``batch``.

    Args:
        model: an `IntegerUNet` or any UNet called as ``model(sample, timestep, **conditioning)``.
        scheduler: a diffusers scheduler (copied, never changed).
        shape: (n, C, H, W).
        conditioning: the UNet's keyword arguments, tensors cycled over the samples or a callable from sample index.
        guidance_scale, unconditional: classifier-free guidance and its unconditional keyword arguments.
    """
    n, *image = check_shape(shape, 4)
    noise = initial_noise((n, *image), check_count("seed", seed, least=0))
    guidance = Guidance(guidance_scale, unconditional, conditioning)
    return denoise(
        model, scheduler, noise, steps=steps, seed=seed, eta=eta, guidance=guidance, batch=batch, on_step=on_step
    )
