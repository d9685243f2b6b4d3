"""Float sampling runs that alignment starts from, and the sampler's step as a differentiable function."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..calibration.calibration import Calibration
from ..graph.interpret import flatten_conditioning, run_float
from ..samplers import StepCoefficients, Stepper
from ..sampling import Guidance, initial_noise


@dataclass(frozen=True)
class Moment:
    """Where a rollout stands: before step ``index``, at ``latents`` [n, C, H, W] of ``samples``.

    ``scheduler`` is the state of a sampler that steps by itself; None where a step needs nothing but its index.
    """

    index: int
    latents: Tensor
    samples: Sequence[int]
    scheduler: Any = None

    def on(self, device: torch.device, dtype: torch.dtype) -> Moment:
        """The moment with its latents, and those that its scheduler keeps, on ``device`` in ``dtype``."""
        scheduler = self.scheduler if self.scheduler is None else copy.copy(self.scheduler)
        if scheduler is not None:
            vars(scheduler).update({name: _latents_on(value, device, dtype) for name, value in vars(scheduler).items()})
        return Moment(self.index, self.latents.to(device, dtype), self.samples, scheduler)


def _latents_on(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """``value`` with whatever latents it holds moved; a scheduler's vectors of timesteps and sigmas stay."""
    if isinstance(value, list):
        return [_latents_on(item, device, dtype) for item in value]
    return value.to(device, dtype) if isinstance(value, Tensor) and value.dim() > 1 else value


class Steps(Protocol):
    """A sampler's steps: ``timesteps``, what the network receives, and how its prediction moves the latents.

    ``noise`` is what is drawn beforehand, for every step that adds some.
    """

    timesteps: list[float]
    noise: list[Tensor | None]

    def received(self, moment: Moment) -> Tensor:
        """What the network is given."""

    def advance(self, moment: Moment, prediction: Tensor) -> Moment:
        """The next moment; differentiable in ``prediction``, and always with the same noise."""


def fused_step(row: StepCoefficients, x: Tensor, e: Tensor, noise: Tensor | None) -> Tensor:
    """x' = cx x + c0 clamp(x0, +-clip) + cd eps + sigma z, in the dtype of ``x``; see `StepCoefficients`."""
    if row.prediction_type == "epsilon":
        sample, eps = (x - row.deviation * e) / row.signal, e
    elif row.prediction_type == "v_prediction":
        sample, eps = row.signal * x - row.deviation * e, row.signal * e + row.deviation * x
    else:
        sample, eps = e, (x - row.signal * e) / row.deviation
    y = row.cx * x + row.c0 * sample.clamp(-row.clip, row.clip) + row.cd * eps
    return y if noise is None else y + row.sigma * noise


class FusedSteps:
    """DDIM and DDPM, from their coefficients; the noise is the deployment sampler's own, drawn once."""

    def __init__(self, stepper: Stepper, shape: tuple[int, ...]) -> None:
        assert stepper.coefficients is not None
        self.timesteps, self.rows = stepper.timesteps, stepper.coefficients
        self.noise = [stepper.draw_noise(torch.empty(shape)) if row.sigma > 0 else None for row in self.rows]

    def received(self, moment: Moment) -> Tensor:
        """The latents themselves."""
        return moment.latents

    def advance(self, moment: Moment, prediction: Tensor) -> Moment:
        """One step; see `fused_step`."""
        noise = self.noise[moment.index]
        drawn = None if noise is None else noise[list(moment.samples)].to(moment.latents)
        latents = fused_step(self.rows[moment.index], moment.latents, prediction, drawn)
        return Moment(moment.index + 1, latents, moment.samples)


class OwnSteps:
    """A scheduler's own ``step``, on a copy of its state; the noise depends on seed, sample and step only."""

    def __init__(self, stepper: Stepper, seed: int) -> None:
        self.timesteps, self.seed, self.arguments = stepper.timesteps, seed, stepper.arguments
        self.noise: list[Tensor | None] = []

    def received(self, moment: Moment) -> Tensor:
        """The latents, scaled as the scheduler does."""
        return moment.scheduler.scale_model_input(moment.latents, moment.scheduler.timesteps[moment.index])

    def advance(self, moment: Moment, prediction: Tensor) -> Moment:
        """One step of a copy of the moment's scheduler."""
        scheduler, arguments = copy.deepcopy(moment.scheduler), dict(self.arguments)
        if "generator" in arguments:
            arguments["generator"] = [self._generator(j, moment.index) for j in moment.samples]
        timestep = scheduler.timesteps[moment.index]
        latents = scheduler.step(prediction, timestep, moment.latents, **arguments).prev_sample
        if prediction.requires_grad and not latents.requires_grad:
            raise ValueError(f"{type(scheduler).__name__}'s step is not differentiable, so nothing can be aligned")
        return Moment(moment.index + 1, latents, moment.samples, scheduler)

    def _generator(self, sample: int, index: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + sample * 10_007 + index) % 2**63)


class FloatNetwork:
    """The calibrated network in floating point, called like the module it came from."""

    def __init__(self, calibration: Calibration) -> None:
        self.graph, self.constants = calibration.capture.graph, calibration.capture.constants

    def forward(self, sample: Tensor, timestep: Tensor, **conditioning: Any) -> Tensor:
        """The float prediction."""
        inputs = {"sample": sample, "timestep": timestep, **flatten_conditioning(conditioning)}
        return run_float(self.graph, self.constants, inputs)

    __call__ = forward


@dataclass(frozen=True)
class Path:
    """Float sampling runs in batches: ``moments[batch][i]`` is before step i, the last one after all steps."""

    steps: Steps
    guidance: Guidance
    moments: tuple[tuple[Moment, ...], ...]

    @property
    def length(self) -> int:
        """How many steps."""
        return len(self.steps.timesteps)

    def gathered(self, index: int, samples: Sequence[int]) -> Moment:
        """The moment before step ``index`` of any samples, for samplers whose steps have no state (DDIM, DDPM)."""
        latents = torch.cat([moments[index].latents for moments in self.moments])
        return Moment(index, latents[list(samples)], samples)


@torch.no_grad()
def float_path(calibration: Calibration, batch: int) -> Path:
    """The calibration's trajectories as batches of moments, with the latents after the last step.

    Of DDIM and DDPM the calibration holds the latents; another sampler is run again, for the states of its scheduler.
    """
    key, samples = calibration.key, calibration.trajectory.samples
    count, seed = len(samples[0]), int(key["seed"])
    network, guidance = FloatNetwork(calibration), calibration.guidance
    stepper = Stepper(calibration.scheduler, key["steps"], key["eta"], seed, count)
    chunks = [range(j, min(j + batch, count)) for j in range(0, count, batch)]
    fused = stepper.coefficients is not None
    steps: Steps = FusedSteps(stepper, tuple(samples[0].shape)) if fused else OwnSteps(stepper, seed)
    noise = initial_noise((count, *calibration.shape), seed) * stepper.initial_scale
    moments = []
    for some in chunks:
        known = [s[some.start : some.stop] for s in samples]
        if fused:
            path = [Moment(i, latents, some) for i, latents in enumerate(known)]
        else:
            path = [Moment(0, noise[some.start : some.stop], some, copy.deepcopy(stepper.scheduler))]
        moments.append(_walked(path, steps, network, guidance))
    return Path(steps, guidance, tuple(moments))


def _walked(path: Sequence[Moment], steps: Steps, network: FloatNetwork, guidance: Guidance) -> tuple[Moment, ...]:
    """``path`` continued to the end with the float network's predictions."""
    moments = list(path)
    while len(moments) <= len(steps.timesteps):
        at = moments[-1]
        timestep = steps.timesteps[at.index]
        moments.append(steps.advance(at, guidance.prediction(network, steps.received(at), timestep, at.samples)))
    return tuple(moments)
