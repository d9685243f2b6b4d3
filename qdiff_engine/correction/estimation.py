"""Noise -> a corrected model: tables of a, b, g, B and sigma' by row, on rollouts where they depend on one another."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.calibration import sample_shape
from ..calibration.checkpoint import Checkpoint
from ..recipe import CorrectionRequest, check_correct
from ..runtime.model import IntegerUNet
from ..samplers import StepCoefficients, Stepper, coefficients, differences, prepared, sampler_key, signal_shares
from ..sampling import Conditioning, Guidance, check_count, evaluating, initial_noise
from ..tables import Correction, Noise
from .drift import input_affine, input_bias
from .measurement import (
    SEED,
    calibrated_rows,
    check_models,
    moments,
    noise_key,
    progress_key,
    ranges_fingerprints,
    weights_fingerprint,
)
from .moments import Moments
from .output import KeptSums, OutputCorrection, corrected_by, identity, mmse, ner, ptqd
from .variance import sigma_scale

_FEW = 32  # samples: the mean of each element is off by a sixth of its deviation
_NOTE = "the model's corrections:"  # how the command line knows what to show


@dataclass(frozen=True)
class NerWeights:
    """Settings of noise-estimation reconstruction, see `output.ner`; ``published`` is the sum form of its loss."""

    lambda1: float = 0.8
    lambda2: float = 0.1
    threshold: float = 1.0
    published: bool = False


@torch.no_grad()
def correct(
    model: IntegerUNet,
    unet: nn.Module,
    scheduler: Any,
    noise: Noise | None = None,
    method: str | None = None,
    *,
    shape: tuple[int, int, int] | None = None,
    samples: int | None = None,
    seed: int = SEED,
    guidance_scale: float | None = None,
    unconditional: Conditioning = None,
    conditioning: Conditioning = None,
    clamp: bool = True,
    ner_weights: NerWeights | None = None,
    batch: int = 16,
    cache_dir: str | Path | None = None,
    on_step: Callable[[int], None] | None = None,
) -> IntegerUNet:
    """``model`` with the quantisation noise corrected by ``method``: a new model over the same weights.

    "ptqd" and "mmse" come from ``noise`` alone. "ner", "+ibc" and "+ibc+ivc" are estimated from the noisiest step
    down, on a float and a quantised rollout from the same noise, the latter with the corrections of all earlier steps;
    the bias of the latents has one value per element, so it holds for their size. "+vsc" reduces the noise of DDPM and
    of DDIM with eta > 0; it is approximate where the sampler clips, and nothing with eta = 0.

    Args:
        model: the quantised model; ``unet``: its float original.
        scheduler: the sampler that ``noise`` was measured with.
        noise: from `measure_noise`; the one that the model carries by default.
        method: as `Recipe.correct`, which it is by default.
        samples, seed: of the rollouts; by default as many as the noise was measured on.
        guidance_scale, unconditional, conditioning: as for `measure_noise`.
        clamp: whether "ptqd" keeps k at 0 or above; a quantised prediction that falls short of e has k < 0.
        ner_weights: settings of "ner".
        cache_dir: folder for work in progress of the rollouts; an interrupted run resumes there.
        on_step: called with the index of every finished step of the rollouts.

    Raises:
        ValueError: another sampler or other weights than the measured ones, a mode that was not measured, "+ibc",
            "+ivc" or "+vsc" for a sampler other than DDIM and DDPM, an argument out of range, NaN in a prediction.
    """
    check_models(model, unet)
    noise, steps, eta = _measured(model, noise, scheduler, guidance_scale)
    method = model.recipe.correct if method is None else method
    asked = check_correct(method)
    check_sampler(method, scheduler, steps)
    step_rows = coefficients(prepared(scheduler, steps), eta)
    guidance = Guidance(guidance_scale, unconditional, conditioning)
    samples = int(noise.key["samples"]) if samples is None else check_count("samples", samples)
    tables = _Tables(model, noise, asked, ner_weights or NerWeights(), clamp)
    if asked.sampler_variance:
        assert step_rows is not None
        tables.take_sampler(step_rows)
    key = {name: value for name, value in noise.key.items() if name != "ranges"}
    if asked.rolled_out:
        key = noise_key(model, scheduler, steps, eta, guidance, samples, seed)
    if asked.input_bias and samples < _FEW:
        warnings.warn(
            f"{_NOTE} +ibc from {samples} samples has noise of its own, {_FEW} and more are better", stacklevel=2
        )
    if asked.rolled_out:
        progress = {
            **key,
            **progress_key(model, {"own": (model, frozenset())}),
            "method": method,
            "plan": list(model.table.modes),
        }
        progress |= {"ner": dataclasses.asdict(tables.weights), "clamp": clamp, "noise": noise.key, "batch": batch}
        checkpoint = None if cache_dir is None else Checkpoint.open(cache_dir, progress)
        start = initial_noise((samples, *sample_shape(unet, shape)), check_count("seed", seed, least=0))
        steppers = [Stepper(scheduler, steps, eta, seed, samples) for _ in range(2)]
        with evaluating(unet), model.correcting(False):
            _roll_out(tables, model, unet, steppers, start, guidance, batch, checkpoint, on_step)
    return tables.corrected(model, method, key | {"modes": list(model.table.modes)})


def check_sampler(method: str, scheduler: Any, steps: int) -> None:
    """Raise ValueError where a sampler cannot be corrected by ``method``; cheap, so that it can come first."""
    asked = check_correct(method)
    if method == "none":
        return
    ready = prepared(scheduler, steps)
    signal_shares(ready, [float(t) for t in ready.timesteps])
    if coefficients(ready) is None and (asked.input_bias or asked.sampler_variance):
        raise ValueError(
            f"+ibc, +ivc and +vsc are for DDIM and DDPM, got {type(scheduler).__name__}; use {asked.output!r}"
        )


def _measured(
    model: IntegerUNet, noise: Noise | None, scheduler: Any, guidance_scale: float | None
) -> tuple[Noise, int, float]:
    """(the noise, the steps and the eta it was measured with), checked against the model and the sampler."""
    noise = model.noise if noise is None else noise
    if noise is None:
        raise ValueError("noise must be given: measure_noise(model, unet, scheduler) makes it")
    steps, eta, samples = (noise.key.get(name) for name in ("steps", "eta", "samples"))
    if not isinstance(steps, int) or not isinstance(eta, int | float) or not isinstance(samples, int):
        raise ValueError(f"noise has no valid key: steps {steps!r:.50}, eta {eta!r:.50}, samples {samples!r:.50}")
    found = differences(noise.key, sampler_key(scheduler, steps, eta, guidance_scale))
    if noise.timesteps != model.table.timesteps or noise.key.get("model_hash") != model.key["model_hash"]:
        found.append("another model")
    elif noise.key.get("weight_bits") != model.recipe.weight_bits:
        found.append(f"weights of {noise.key.get('weight_bits')} bits, not {model.recipe.weight_bits}")
    elif noise.key.get("weights", own := weights_fingerprint(model)) != own:
        found.append("other integer weights or weight scales")
    elif not _same_ranges(noise, model):
        found.append("other activation scales")
    if found:
        raise ValueError(f"noise was measured in another setting: {'; '.join(found)}")
    return noise, steps, float(eta)


def _same_ranges(noise: Noise, model: IntegerUNet) -> bool:
    """Whether every row of the model runs with the activation scales that its mode was measured with."""
    measured = noise.key.get("ranges")
    if not isinstance(measured, dict):
        return measured is None
    rows = [(r, mode) for r, mode in enumerate(model.table.modes) if mode in noise.modes]  # of others `moments` tells
    own = ranges_fingerprints(model)
    found = {mode: measured.get(mode) for _, mode in rows}
    return all(isinstance(f := found[mode], list) and f[r : r + 1] == own[r : r + 1] for r, mode in rows)


def _affine(output: str, found: Moments, clamp: bool) -> OutputCorrection:
    """a and b of every row, as far as moments tell them: "ner" starts at the identity."""
    if output == "ptqd":
        return ptqd(found, clamp)
    return mmse(found) if output == "mmse" else identity(found)


class _Tables:
    """a, b, g, B and s' / s of every row, as far as they are known."""

    def __init__(
        self,
        model: IntegerUNet,
        noise: Noise,
        asked: CorrectionRequest,
        weights: NerWeights,
        clamp: bool,
    ) -> None:
        self.noise, self.asked, self.weights = noise, asked, weights
        self.timesteps, self.moments = model.table.timesteps, moments(noise, model.table.modes)
        affine = _affine(asked.output, self.moments, clamp)
        self.a, self.b, self.left = affine.a, affine.b, affine.noise_variance
        self.input_bias = list(torch.zeros_like(self.a))  # [C], or [C, *spatial] where it is corrected
        self.input_scale = torch.ones(len(self.a), dtype=torch.float64)
        self.sigma_scale = torch.ones(len(self.a), dtype=torch.float64)
        self.sampler: tuple[Tensor, Tensor] | None = None  # s and ce by row, where the variance is calibrated

    def take_sampler(self, steps: list[StepCoefficients]) -> None:
        """Calibrate the variance of this sampler; say where that is approximate, or nothing."""
        if any(step.clipped for step in steps):
            warnings.warn(f"{_NOTE} +vsc is approximate, the sampler clips the predicted sample", stacklevel=4)
        if not any(step.sigma > 0 for step in steps):
            warnings.warn(f"{_NOTE} +vsc does nothing, this sampler adds no noise", stacklevel=4)
        by_time = {step.timestep: step for step in steps}
        rows = [by_time[timestep] for timestep in self.timesteps]
        sigma, ce = ([getattr(row, name) for row in rows] for name in ("sigma", "output_coefficient"))
        self.sampler = torch.tensor(sigma, dtype=torch.float64), torch.tensor(ce, dtype=torch.float64)
        self.calibrate_variance()

    def calibrate_variance(self) -> None:
        """s' / s of every row from what the output's corrections leave."""
        if self.sampler is not None:
            self.sigma_scale = sigma_scale(*self.sampler, self.left)

    def reconstruct(self, row: int, e: Tensor, quantized: Tensor) -> None:
        """a = K of a row from its rollouts, and the variance that this leaves."""
        elements = e[0].numel() if self.weights.published else None
        kept = KeptSums.of(e, quantized, self.weights.threshold)
        self.a[row] = ner(kept, self.weights.lambda1, self.weights.lambda2, elements)
        self.left[row] = corrected_by(Moments(self.moments.sums[row]), self.a[row]).noise_variance
        self.calibrate_variance()

    def corrected_latents(self, row: int, x: Tensor, quantized: Tensor) -> Tensor:
        """g and B of a row from its rollouts' latents after the step, and the latter's with them."""
        if self.asked.input_variance:
            self.input_scale[row], self.input_bias[row] = input_affine(x, quantized)
        elif self.asked.input_bias:
            self.input_bias[row] = input_bias(x, quantized)
        else:
            return quantized
        return float(self.input_scale[row]) * quantized + self.input_bias[row].float()

    def corrected(self, model: IntegerUNet, method: str, key: dict[str, Any]) -> IntegerUNet:
        """The model with these tables."""
        table = dataclasses.replace(model.table, output_scale=self.a.float(), output_shift=self.b.float())
        recipe = dataclasses.replace(model.recipe, correct=method)
        correction = None
        if method != "none":
            scale = self.sigma_scale.float().clamp(0, 1)
            bias, gain = torch.stack(self.input_bias).float(), self.input_scale.float()
            correction = Correction(method, key, table.timesteps, bias, scale, gain)
        return model.with_table(table, recipe, correction, self.noise)


def _roll_out(
    tables: _Tables,
    model: IntegerUNet,
    unet: nn.Module,
    steppers: list[Stepper],
    start: Tensor,
    guidance: Guidance,
    batch: int,
    checkpoint: Checkpoint | None,
    on_step: Callable[[int], None] | None,
) -> None:
    """Both rollouts in step: each row's statistics come from latents that carry the earlier rows' corrections."""
    rows, timesteps = calibrated_rows(model, steppers[0].scheduler), steppers[0].timesteps
    if len(timesteps) != len(rows):
        raise ValueError("rollouts need a sampler that visits every timestep once")
    done = {} if checkpoint is None else checkpoint.finished(len(timesteps))
    x = quantized = start * steppers[0].initial_scale
    for i, timestep in enumerate(timesteps):
        row, known = rows[timestep], done.pop(i, None)
        if known is None:
            pairs = ((unet, steppers[0].received(i, x)), (model, steppers[1].received(i, quantized)))
            e, e_hat = (guidance.combined(*guidance.in_batches(run, given, timestep, batch)) for run, given in pairs)
            if checkpoint is not None:
                checkpoint.save(i, {"float": e, "quantized": e_hat})
        else:
            e, e_hat = known["float"], known["quantized"]
        if tables.asked.output == "ner":
            tables.reconstruct(row, e, e_hat)
        a, b, scale = tables.a[row].float(), tables.b[row].float(), float(tables.sigma_scale[row])
        x = steppers[0].step(i, x, e)
        quantized = steppers[1].step(i, quantized, e_hat, a=a, b=b, sigma_scale=scale)
        quantized = tables.corrected_latents(row, x, quantized)
        if on_step is not None:
            on_step(i)
