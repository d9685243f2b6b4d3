"""Corrections inside diffusers pipelines: a scheduler that corrects its latents and scales the noise it draws."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from typing import Any

from ..runtime.model import IntegerUNet
from ..samplers import FUSED, mismatches, sampler_key


def corrected_scheduler(
    scheduler: Any, model: IntegerUNet, *, guidance_scale: float | None = None, strict: bool = False
) -> Any:
    """A copy of ``scheduler`` for ``pipe.scheduler`` that completes the corrections of ``pipe.unet = model``.

    The model itself returns the corrected prediction. For DDIM and DDPM this scheduler makes g[r] x' + B[r] of every
    step's x' and scales the step's noise by s'[r] / s[r]; any other sampler steps as it is. When the pipeline sets its
    steps, and at a step with another eta than the step before, the corrections' key is compared: where it does not fit,
    all of them are off, the model's too, until it does. A pipeline hands eta to the step alone, so the first prediction
    of a run is corrected as if the corrections' own eta held; what was refused (``strict``) changes nothing.

    A pipeline that rescales its guidance changes the guided prediction after the model: then correct the output only.

    Args:
        scheduler: a diffusers scheduler, of the class and configuration that the corrections were estimated for.
        model: with corrections, from `correct` or from an artifact that holds some.
        guidance_scale: the pipeline's, or None without guidance.
        strict: raise instead of warning.

    Raises:
        TypeError: ``scheduler`` is not a diffusers scheduler.
        ValueError: the model has no corrections; with ``strict``, corrections for another setting.
    """
    if getattr(model, "correction", None) is None:
        raise ValueError("model has no corrections; qdiff_engine.correct(model, unet, scheduler, noise) makes them")
    for attribute in ("config", "set_timesteps", "step", "num_inference_steps"):
        if not hasattr(scheduler, attribute):
            raise TypeError(f"scheduler must be a diffusers scheduler, got {type(scheduler).__name__}")
    mine, kind = copy.copy(scheduler), _kind(scheduler)
    mine.__class__ = _corrected_class(kind)
    mine._corrections = _State(kind, model, guidance_scale, strict)
    if mine.num_inference_steps is not None:
        mine._corrections.check(mine)
    return mine


def _kind(scheduler: Any) -> Any:
    """The scheduler's class, below the one that this module may have made of it."""
    kind: Any = type(scheduler)
    return kind.__mro__[1] if hasattr(kind, "_corrections") else kind


class _State:
    """What a corrected scheduler knows beside its own fields."""

    def __init__(self, kind: type, model: IntegerUNet, guidance_scale: float | None, strict: bool) -> None:
        self.kind, self.model, self.guidance_scale, self.strict = kind, model, guidance_scale, strict
        self.on = True
        assert model.correction is not None
        self.own_eta = float(model.correction.key.get("eta", 0.0))
        self.heard = (self.own_eta, False)  # eta, and whether the clipped sample gives the direction, of the last step
        self.input_bias = model.correction.input_bias  # on the device of the last step
        self.scale: float | None = None  # of the noise that a DDPM step in progress draws
        self.warned: set[str] = set()

    def check(self, scheduler: Any, eta: float | None = None, clipped_output: bool = False) -> None:
        """Switch everything on or off for the steps that are set, and for what a step was told; None where nothing."""
        correction, eta = self.model.correction, self.own_eta if eta is None else eta
        assert correction is not None
        key = sampler_key(scheduler, scheduler.num_inference_steps, eta, self.guidance_scale)
        reasons = mismatches(self.model, key)
        if {float(t) for t in scheduler.timesteps} != set(correction.timesteps) and not reasons:
            reasons.append("timesteps other than the corrected ones")
        if clipped_output:
            reasons.append("use_clipped_model_output True, not False")
        message = f"the model's corrections ({correction.method}) are for another setting: {'; '.join(reasons)}"
        if reasons and self.strict:
            raise ValueError(message)
        self.heard, self.on, self.model.corrects = (eta, clipped_output), not reasons, not reasons
        if reasons and message not in self.warned:
            self.warned.add(message)
            warnings.warn(f"{message}; they are off", UserWarning, stacklevel=4)


@functools.cache
def _corrected_class(kind: Any) -> Any:
    """A subclass of a scheduler class whose instances may carry a `_State`; without one they behave as before."""

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.set_timesteps(self, *args, **kwargs)
        state = self._corrections
        if state is not None:
            state.check(self)
        return result

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self._corrections
        if state is None or kind.__name__ not in FUSED:
            return kind.step(self, *args, **kwargs)
        given = inspect.signature(kind.step).bind(self, *args, **kwargs)
        given.apply_defaults()
        arguments = {name: value for name, value in given.arguments.items() if name != "self"}
        _check_step(self, state, arguments)
        if not state.on:
            return kind.step(self, **arguments)
        return _corrected_step(self, kind, state, arguments)

    def variance(self: Any, *args: Any, **kwargs: Any) -> Any:
        value, state = kind._get_variance(self, *args, **kwargs), self._corrections
        if state is None or state.scale is None:
            return value
        return value * (state.scale if self.variance_type == "fixed_small_log" else state.scale**2)

    members: dict[str, Any] = {"set_timesteps": set_timesteps, "step": step, "_corrections": None}
    if kind.__name__ == "DDPMScheduler":
        members["_get_variance"] = variance
    # by the name of its class a pipeline saves a scheduler, and finds it again
    return type(kind.__name__, (kind,), {**members, "__module__": kind.__module__})


def _check_step(scheduler: Any, state: _State, arguments: dict[str, Any]) -> None:
    """Compare the key again at a step whose eta, or direction from the clipped sample, is not the last step's."""
    eta, clipped_output = float(arguments.get("eta", state.own_eta)), bool(arguments.get("use_clipped_model_output"))
    if (eta, clipped_output) != state.heard:
        state.check(scheduler, eta, clipped_output)


def _corrected_step(scheduler: Any, kind: type[Any], state: _State, arguments: dict[str, Any]) -> Any:
    """The scheduler's own step with its noise scaled, and its result corrected."""
    correction = state.model.correction
    assert correction is not None
    row = correction.row(float(arguments["timestep"]))
    sample, scale = arguments["sample"], float(correction.sigma_scale[row])
    if scale != 1 and "variance_noise" in arguments:
        noise = arguments["variance_noise"]
        if noise is None:
            from diffusers.utils.torch_utils import randn_tensor

            output = arguments["model_output"]
            noise = randn_tensor(
                output.shape, generator=arguments["generator"], device=output.device, dtype=output.dtype
            )
        arguments = {**arguments, "variance_noise": noise * scale, "generator": None}
    state.scale = scale
    try:
        result = kind.step(scheduler, **arguments)
    finally:
        state.scale = None
    state.input_bias = state.input_bias.to(sample.device)  # copied once, not at every step
    bias, gain = state.input_bias[row].to(sample.dtype), float(correction.input_scale[row])
    bias = bias.reshape(*bias.shape, *[1] * (sample.dim() - 1 - bias.dim()))
    if isinstance(result, tuple):
        return (gain * result[0] + bias, *result[1:])
    result.prev_sample = gain * result.prev_sample + bias
    return result
