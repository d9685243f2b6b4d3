"""What a sampler's step computes: coefficients of DDIM and DDPM, one operator a step, and the key of a sampler."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .tables import Correction

FUSED = ("DDIMScheduler", "DDPMScheduler")  # samplers whose step is one `ops.denoise_step`
PREDICTIONS = ("epsilon", "v_prediction", "sample")
_UNCLIPPED = torch.finfo(torch.float32).max
_LARGEST = 2**62  # of counts and seeds, so that sums of a few of them are 64-bit integers


def check_count(name: str, value: Any, least: int = 1, most: int = _LARGEST) -> int:
    """``value`` as an int from ``least`` to ``most``, or an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return value


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
    for attribute in ("config", "set_timesteps", "step", "scale_model_input"):
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


@dataclass(frozen=True)
class StepCoefficients:
    """x' = cx x + c0 x0 + cd eps + sigma z, with x0 and eps the predicted sample and noise.

    DDIM has cx = 0, DDPM cd = 0. ``signal`` is sqrt(alpha_bar), ``deviation`` sqrt(1 - alpha_bar). ``clip`` bounds x0,
    and is the largest float32 where the sampler does not clip; eps is the one before the bound.
    """

    timestep: float
    cx: float
    c0: float
    cd: float
    sigma: float
    signal: float
    deviation: float
    clip: float
    prediction_type: str

    @property
    def clipped(self) -> bool:
        """Whether the sampler bounds the predicted sample."""
        return self.clip < _UNCLIPPED

    @property
    def output_coefficient(self) -> float:
        """ce, the factor of the model's output in x' where nothing is clipped.

        epsilon: cd - c0 sqrt(1 - alpha_bar) / sqrt(alpha_bar); v: cd sqrt(alpha_bar) - c0 sqrt(1 - alpha_bar);
        sample: c0 - cd sqrt(alpha_bar) / sqrt(1 - alpha_bar).
        """
        if self.prediction_type == "epsilon":
            return self.cd - self.c0 * self.deviation / self.signal
        if self.prediction_type == "v_prediction":
            return self.cd * self.signal - self.c0 * self.deviation
        return self.c0 - self.cd * self.signal / self.deviation


def coefficients(scheduler: Any, eta: float = 0.0) -> list[StepCoefficients] | None:
    """The coefficients of every step of a prepared scheduler; None for a sampler that the engine does not fuse.

    Computed in the scheduler's own float32 arithmetic, so that a fused step equals its step.

    Fused are diffusers' DDIM (any ``eta`` in [0, 1]) and DDPM with a fixed variance, for epsilon, v and sample
    predictions.

    Raises:
        ValueError: ``eta`` outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    name, config = type(scheduler).__name__, scheduler.config
    prediction_type = config.get("prediction_type", "epsilon")
    if name not in FUSED or prediction_type not in PREDICTIONS or config.get("thresholding", False):
        return None
    if name == "DDPMScheduler" and scheduler.variance_type not in ("fixed_small", "fixed_small_log", "fixed_large"):
        return None
    clip = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", False) else _UNCLIPPED
    rows = []
    for timestep in scheduler.timesteps.tolist():
        row = _ddim(scheduler, timestep, eta) if name == "DDIMScheduler" else _ddpm(scheduler, timestep)
        cx, c0, cd, sigma, signal, deviation = map(float, row)
        rows.append(StepCoefficients(float(timestep), cx, c0, cd, sigma, signal, deviation, clip, prediction_type))
    return rows


def signal_shares(scheduler: Any, timesteps: Sequence[float]) -> Tensor:
    """alpha_bar of every timestep, float64.

    Raises:
        ValueError: a scheduler without alphas_cumprod (flow matching, EDM), or a timestep outside it.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        raise ValueError(f"scheduler must have alphas_cumprod, which {type(scheduler).__name__} lacks")
    outside = [t for t in timesteps if not 0 <= round(t) < len(table)]
    if outside:
        raise ValueError(f"timesteps must lie in the schedule, 0 to {len(table) - 1}, got {outside[0]:g}")
    return table[[round(t) for t in timesteps]].double()


def _ddim(scheduler: Any, timestep: int, eta: float) -> tuple[Tensor | float, ...]:
    """(cx, c0, cd, sigma, signal, deviation) of a DDIM step, sigma = eta sqrt((1-ab')/(1-ab) (1 - ab/ab'))."""
    before = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_bar = scheduler.alphas_cumprod[timestep]
    alpha_bar_before = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    beta_bar, beta_bar_before = 1 - alpha_bar, 1 - alpha_bar_before
    sigma = eta * ((beta_bar_before / beta_bar) * (1 - alpha_bar / alpha_bar_before)) ** 0.5
    direction = (1 - alpha_bar_before - sigma**2) ** 0.5
    return 0.0, alpha_bar_before**0.5, direction, sigma, alpha_bar**0.5, beta_bar**0.5


def _ddpm(scheduler: Any, timestep: int) -> tuple[Tensor | float, ...]:
    """(cx, c0, cd, sigma, signal, deviation) of a DDPM step over the strided schedule, beta = 1 - ab/ab'."""
    before = int(scheduler.previous_timestep(timestep))
    alpha_bar = scheduler.alphas_cumprod[timestep]
    alpha_bar_before = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.one
    beta_bar, beta_bar_before = 1 - alpha_bar, 1 - alpha_bar_before
    alpha = alpha_bar / alpha_bar_before
    beta = 1 - alpha
    c0, cx = (alpha_bar_before**0.5 * beta) / beta_bar, alpha**0.5 * beta_bar_before / beta_bar
    sigma: Tensor | float = 0.0
    if timestep > 0:
        variance = scheduler._get_variance(timestep)
        sigma = variance if scheduler.variance_type == "fixed_small_log" else variance**0.5
    return cx, c0, 0.0, sigma, alpha_bar**0.5, beta_bar**0.5


class Stepper:
    """x_t -> x_{t-1}, step by step: one operator for DDIM and DDPM, the scheduler's own step for other samplers.

    Args:
        scheduler: a diffusers scheduler; copied. ``steps`` and ``eta`` are the sampler's.
        seed, count: one noise stream per sample; ``count`` samples.
        guidance_scale: of the two branches that `step` is given.
        correction: input bias and noise scale by row; refused for samplers that are not fused.
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        eta: float,
        seed: int,
        count: int,
        guidance_scale: float | None = None,
        correction: Correction | None = None,
    ) -> None:
        self.scheduler = prepared(scheduler, steps)
        self.arguments = step_arguments(self.scheduler, eta, seed, count)
        self.timesteps = [float(t) for t in self.scheduler.timesteps]
        self.initial_scale = getattr(self.scheduler, "init_noise_sigma", 1.0)
        self.guidance_scale = guidance_scale
        self.coefficients = coefficients(self.scheduler, eta)
        self.correction = correction
        self.input_bias = correction.input_bias if correction is not None and correction.has_input_bias else None
        if correction is not None and self.coefficients is None and not correction.only_output:
            raise ValueError(f"{type(scheduler).__name__} takes no input bias or calibrated noise; DDIM and DDPM do")

    def received(self, index: int, latents: Tensor) -> Tensor:
        """What the UNet is given at this step."""
        return self.scheduler.scale_model_input(latents, self.scheduler.timesteps[index])

    def step(
        self,
        index: int,
        latents: Tensor,
        cond: Tensor,
        uncond: Tensor | None = None,
        a: Tensor | None = None,
        b: Tensor | None = None,
        sigma_scale: float | None = None,
    ) -> Tensor:
        """The latents after step ``index``.

        ``a`` and ``b`` float32 [C] correct the guided prediction first; ``sigma_scale`` replaces the correction's.
        The correction's g takes no operation of its own: it multiplies the step's coefficients.
        """
        if self.coefficients is None:
            return self._own_step(index, latents, cond, uncond, a, b)
        row = self.coefficients[index]
        sigma, gain, bias = row.sigma, 1.0, None
        if self.correction is not None:
            r = self.correction.row(row.timestep)
            sigma *= float(self.correction.sigma_scale[r])
            gain = float(self.correction.input_scale[r])
            if self.input_bias is not None:
                self.input_bias = self.input_bias.to(latents.device)  # copied once, not at every step
                bias = self.input_bias[r]
        if sigma_scale is not None:
            sigma = row.sigma * sigma_scale
        noise = self.draw_noise(latents) if row.sigma > 0 else None  # drawn though sigma be 0: the streams stay in step
        guidance = 1.0 if self.guidance_scale is None else float(self.guidance_scale)
        terms = [gain * term for term in (row.cx, row.c0, row.cd, sigma)]
        constants = [*terms, row.signal, row.deviation, row.clip, guidance]
        return ops.denoise_step(
            latents,
            cond,
            uncond,
            noise,
            torch.tensor(constants, dtype=torch.float32, device=latents.device),
            prediction_type=row.prediction_type,
            clipped=True,  # `clip` is beyond any value where the sampler does not
            a=a,
            b=b,
            input_bias=bias,
        )

    def draw_noise(self, latents: Tensor) -> Tensor:
        """The next step's standard normal noise, one stream per sample."""
        shape = (1, *latents.shape[1:])
        drawn = [torch.randn(shape, generator=generator) for generator in self.arguments["generator"]]
        return torch.cat(drawn).to(latents)

    def _own_step(
        self, index: int, latents: Tensor, cond: Tensor, uncond: Tensor | None, a: Tensor | None, b: Tensor | None
    ) -> Tensor:
        if uncond is not None:
            assert self.guidance_scale is not None
            cond = uncond + self.guidance_scale * (cond - uncond)
        for term, combine in ((a, torch.mul), (b, torch.add)):
            cond = cond if term is None else combine(cond, term.reshape(-1, *[1] * (cond.dim() - 2)))
        return self.scheduler.step(cond, self.scheduler.timesteps[index], latents, **self.arguments).prev_sample


def sampler_key(scheduler: Any, steps: int, eta: float, guidance_scale: float | None) -> dict[str, Any]:
    """The JSON key of a sampler: class and configuration, prediction type, step count, eta, guidance."""
    config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_") or k == "_class_name"}
    return {
        "scheduler": {"class": type(scheduler).__name__, **{k: _json(v) for k, v in sorted(config.items())}},
        "prediction_type": str(config.get("prediction_type", "epsilon")),
        "steps": steps,
        "eta": float(eta),
        "guidance_scale": None if guidance_scale is None else float(guidance_scale),
    }


def _json(value: Any) -> Any:
    """A setting as JSON has it; infinity, which it has not, by name."""
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    plain = value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else str(value)


def mismatches(model: Any, sampler: Mapping[str, Any]) -> list[str]:
    """Why the corrections of ``model`` are not valid for a sampler, one phrase each; none where they are.

    Args:
        model: with ``correction``, ``key``, ``table`` and ``recipe``, as an `IntegerUNet`.
        sampler: from `sampler_key`.
    """
    key = model.correction.key
    found = differences(key, sampler)
    if key.get("model_hash") != model.key.get("model_hash"):
        found.append("another network")
    if key.get("weight_bits") != model.recipe.weight_bits or key.get("modes") != list(model.table.modes):
        found.append("other precisions")
    return found


def differences(key: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """How the sampler of ``other`` differs from that of ``key``, one phrase each; settings of only one are passed over.

    Both are mappings with the entries of `sampler_key`.
    """
    found = []
    for name in ("prediction_type", "steps", "eta", "guidance_scale"):
        if key.get(name) != other.get(name):
            found.append(f"{name} {other.get(name)}, not {key.get(name)}")
    mine, theirs = (entry.get("scheduler") for entry in (key, other))
    if not isinstance(mine, Mapping) or not isinstance(theirs, Mapping):
        return [*found, "scheduler unknown"]
    for name in ["class", *sorted(mine.keys() & theirs.keys() - {"class", "_class_name", "prediction_type"})]:
        if mine.get(name) != theirs.get(name):
            found.append(f"scheduler {name} {theirs.get(name)}, not {mine.get(name)}")
    return found
