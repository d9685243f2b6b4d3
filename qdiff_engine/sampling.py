"""Sampling loops over diffusers schedulers: same seed, same images, whatever the batch size.

Every loop is one function, `denoise`: calibration records what the UNet received, `sample` keeps the final images.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .memory import memory_errors
from .samplers import Stepper, mismatches, sampler_key
from .samplers import check_count as check_count
from .samplers import prepared as prepared
from .samplers import step_arguments as step_arguments
from .tables import Correction

Conditioning = Mapping[str, Any] | Callable[[int], Mapping[str, Any]] | None
Hearing = Callable[[Any], Mapping[str, Any]]  # indices of samples -> the keyword arguments of a call for them
# calls whose arguments a loop keeps, since integer models know them by the tensors themselves; with more batches than
# that in a loop, prompts are heard anew at every step
_PROMPTS = 4


@dataclass(frozen=True)
class Step:
    """One evaluation of the UNet inside a loop: ``sample`` and ``timestep`` are exactly what it received."""

    index: int
    count: int
    timestep: float
    sample: Tensor  # [n, C, H, W]
    prediction: Tensor  # [n, C, H, W], after guidance
    previous: Tensor  # [n, C, H, W], the latents after the scheduler's step


def check_shape(shape: Any, rank: int, name: str = "shape") -> tuple[int, ...]:
    """``shape`` as a tuple of ``rank`` positive integers."""
    expected = "(n, C, H, W)" if rank == 4 else "(C, H, W)"
    if not isinstance(shape, tuple | list | torch.Size) or len(shape) != rank:
        raise ValueError(f"{name} must be {expected}, got {shape!r}")
    return tuple(check_count(f"{name}[{i}]", size) for i, size in enumerate(shape))


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal latents [n, C, H, W]; sample j is the j-th draw of one CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(1, *shape[1:], generator=generator) for _ in range(shape[0])])


def conditioning_for(conditioning: Conditioning, samples: Sequence[int]) -> dict[str, Any]:
    """The keyword arguments of these samples: tensors are cycled along their first axis, a callable is asked."""
    if conditioning is None:
        return {}
    if callable(conditioning):
        return _stack([dict(conditioning(j)) for j in samples])
    if not isinstance(conditioning, Mapping):
        raise TypeError(f"conditioning must map names to tensors or be a callable, got {type(conditioning).__name__}")
    return {name: _cycled(value, samples, name) for name, value in conditioning.items()}


def _cycled(value: Any, samples: Sequence[int], name: str) -> Any:
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


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Nested tensors on ``device``, the floating ones in ``dtype`` where it is given."""
    if isinstance(value, Mapping):
        return {name: moved(item, device, dtype) for name, item in value.items()}
    return value.to(device, dtype) if dtype is not None and value.is_floating_point() else value.to(device)


def home(network: Any) -> torch.device:
    """Where a network computes: its own ``device``, its parameters', or the CPU."""
    device = getattr(network, "device", None)
    if isinstance(device, torch.device):
        return device
    parameter = _parameter(network)
    return torch.device("cpu") if parameter is None else parameter.device


def home_dtype(network: Any) -> torch.dtype | None:
    """The dtype that a network takes floating inputs in: its parameters'; None where any will do."""
    parameter = _parameter(network)
    return None if parameter is None or not parameter.is_floating_point() else parameter.dtype


def _parameter(network: Any) -> Tensor | None:
    return next(network.parameters(), None) if isinstance(network, nn.Module) else None


@contextlib.contextmanager
def evaluating(unet: nn.Module) -> Iterator[None]:
    """``unet`` in eval mode, and every module of it back as it was afterwards."""
    before, was_training = {module: module.training for module in unet.modules()}, unet.training
    unet.eval()
    try:
        yield
    finally:
        unet.train(was_training)  # which some modules do more at than note it
        for module, training in before.items():
            module.training = training


def predict_at_home(network: Any, sample: Tensor, timestep: float, conditioning: Mapping[str, Any]) -> Tensor:
    """`predict` of a network on any device and in any dtype, for a ``sample`` on any; the output is like the sample."""
    device, dtype, times = home(network), home_dtype(network), timestep_tensor(timestep, len(sample))
    if _parameter(network) is not None:  # an integer model has none, and reads the timestep on the host
        times = times.to(device)
    return predict(network, moved(sample, device, dtype), times, moved(conditioning, device, dtype)).to(sample)


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

    def prediction(self, unet: Any, sample: Tensor, timestep: float, samples: Sequence[int]) -> Tensor:
        """The guided prediction for these samples."""
        return self.combined(*self.branches(unet, sample, timestep, samples))

    def heard(self, samples: Sequence[int]) -> Mapping[str, Any]:
        """Keyword arguments of a call for these samples: the conditional ones, with guidance behind the others."""
        conditional = conditioning_for(self.conditioning, samples)
        return conditional if self.scale is None else _both(conditioning_for(self.unconditional, samples), conditional)

    def branches(
        self, unet: Any, sample: Tensor, timestep: float, samples: Sequence[int], hear: Hearing | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(conditional, unconditional) predictions, from one call; without guidance the latter is None.

        hear: in place of `heard`, where its results are kept.
        """
        heard = (hear or self.heard)(samples)
        if self.scale is None:
            return predict_at_home(unet, sample, timestep, heard), None
        without, with_ = predict_at_home(unet, torch.cat([sample, sample]), timestep, heard).chunk(2)
        return with_, without

    def in_batches(
        self, unet: Any, sample: Tensor, timestep: float, batch: int, hear: Hearing | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`branches` of all samples [n, C, H, W], ``batch`` a call; float32, where the samples are."""
        chunks = [range(j, min(j + batch, len(sample))) for j in range(0, len(sample), batch)]
        mend = "lower batch (--batch)" if batch > 1 else "batch is 1 already: use a device with more memory"
        with memory_errors(f"run {batch} samples at a time", mend):
            parts = [self.branches(unet, sample[c.start : c.stop], timestep, c, hear) for c in chunks]
        with_, without = (
            None if side[0] is None else torch.cat([part.float() for part in side]) for side in zip(*parts, strict=True)
        )
        assert with_ is not None
        return with_, without

    def combined(self, conditional: Tensor, unconditional: Tensor | None) -> Tensor:
        """e = e_u + scale (e_c - e_u)."""
        if self.scale is None or unconditional is None:
            return conditional
        return unconditional + self.scale * (conditional - unconditional)


def timestep_tensor(value: float, batch: int) -> Tensor:
    """[batch] copies of a timestep: int64 where it is whole, float32 where a sampler asks between two steps."""
    whole = float(value).is_integer()
    return torch.full((batch,), int(value) if whole else value, dtype=torch.int64 if whole else torch.float32)


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
    correction: Correction | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """x_T -> x_0: run the scheduler's loop over ``latents`` [n, C, H, W] and return the final latents.

    Args:
        unet: anything called as ``unet(sample, timestep, **conditioning)``.
        scheduler: a diffusers scheduler; copied, so several loops never disturb one another.
        steps, eta: of the sampler. ``seed`` drives the noise of stochastic steps, one stream per sample.
        batch: samples per UNet call (twice as many rows with guidance).
        recorded: predictions known from an earlier, interrupted run, by step index; not computed again.
        correction: input bias and calibrated noise of every row, for DDIM and DDPM.
        on_step: called after every step.

    DDIM and DDPM steps are one operator, `ops.denoise_step`: guidance, update, noise, input bias. Other samplers step
    by themselves. The loop runs where ``unet`` does; what ``on_step`` sees and the result lie where ``latents`` do.

    Raises:
        ValueError: an argument out of range, or NaN in the latents or in a prediction.
    """
    guidance, recorded = guidance or Guidance(), recorded or {}
    stepper = Stepper(scheduler, steps, eta, seed, len(latents), guidance.scale, correction)
    check_count("batch", batch)
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents hold NaN or infinity")
    given, latents = latents.device, latents.to(home(unet)) * stepper.initial_scale

    @functools.lru_cache(maxsize=_PROMPTS)
    def hear(samples: range) -> Mapping[str, Any]:
        return moved(guidance.heard(samples), home(unet), home_dtype(unet))

    for i, value in enumerate(stepper.timesteps):
        received = stepper.received(i, latents)
        known = recorded.get(i)
        if known is None:
            branches = guidance.in_batches(unet, received, value, batch, hear)
        else:
            branches = known.to(latents), None
        if not all(bool(torch.isfinite(e).all()) for e in branches if e is not None):
            raise ValueError(f"the UNet predicted NaN or infinity at step {i} (timestep {value:g})")
        latents = stepper.step(i, latents, *branches)
        if on_step is not None:
            seen = (part.to(given) for part in (received, guidance.combined(*branches), latents))
            on_step(Step(i, len(stepper.timesteps), value, *seen))
    return latents.to(given)


@contextlib.contextmanager
def corrections(
    model: Any,
    scheduler: Any,
    steps: int,
    eta: float,
    guidance_scale: float | None,
    on: bool = True,
    strict: bool = False,
) -> Iterator[Correction | None]:
    """The corrections of ``model`` that fit a sampler, and its output corrected or not for the length of the block.

    Raises:
        ValueError: with ``strict``, corrections that do not fit; otherwise one warning, and they are off.
    """
    found = getattr(model, "correction", None)
    if found is None:
        yield None
        return
    reasons = mismatches(model, sampler_key(scheduler, steps, eta, guidance_scale)) if on else []
    if reasons:
        message = f"the model's corrections ({found.method}) are for another setting: {'; '.join(reasons)}"
        if strict:
            raise ValueError(message)
        warnings.warn(f"{message}; they are off", UserWarning, stacklevel=4)
    applied = on and not reasons
    with model.correcting(applied):
        yield found if applied else None


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
    correction: bool = True,
    strict: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Images (or latents) [n, C, H, W] drawn with ``model``, on the CPU; the same seed gives the same in any batch.

    Args:
        model: an `IntegerUNet` or any UNet called as ``model(sample, timestep, **conditioning)``.
        scheduler: a diffusers scheduler (copied, never changed).
        shape: (n, C, H, W).
        conditioning: the UNet's keyword arguments, tensors cycled over the samples or a callable from sample index.
        guidance_scale, unconditional: classifier-free guidance and its unconditional keyword arguments.
        correction: apply the model's corrections where their key fits this sampler; False leaves them off.
        strict: raise where they do not fit, instead of warning and leaving them off.

    Raises:
        ValueError: an argument out of range, NaN, or with ``strict`` corrections for another sampler.
    """
    n, *image = check_shape(shape, 4)
    noise = initial_noise((n, *image), check_count("seed", seed, least=0, most=2**64 - 1))
    guidance = Guidance(guidance_scale, unconditional, conditioning)
    with corrections(model, scheduler, steps, eta, guidance_scale, correction, strict) as found:
        return denoise(
            model,
            scheduler,
            noise,
            steps=steps,
            seed=seed,
            eta=eta,
            guidance=guidance,
            batch=batch,
            correction=found,
            on_step=on_step,
        )
