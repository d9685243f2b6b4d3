"""model + unet + scheduler -> Noise: what quantisation adds to the guided prediction, per mode and row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.calibration import Calibration, sample_shape
from ..calibration.checkpoint import Checkpoint, fingerprint
from ..graph.capture import hash_parameters
from ..quantization import equalised, make_table
from ..runtime.model import IntegerUNet
from ..samplers import prepared, sampler_key, signal_shares, step_arguments
from ..sampling import (
    Conditioning,
    Guidance,
    Step,
    check_count,
    conditioning_for,
    denoise,
    evaluating,
    initial_noise,
)
from ..tables import MODES, NOISE_SUMS, Noise, with_learnt
from .moments import Moments

SEED = 10_000  # far from the seeds of calibration and of images, so that no correction is judged on its own samples
OnStep = Callable[[Step], None]
_SHORT = 16  # hexadecimal digits that tell one row's scales from another's


@torch.no_grad()
def measure_noise(
    model: IntegerUNet,
    unet: nn.Module,
    scheduler: Any,
    shape: tuple[int, int, int] | None = None,
    steps: int | None = None,
    samples: int = 256,
    seed: int = SEED,
    *,
    calibration: Calibration | None = None,
    modes: Sequence[str] | None = None,
    eta: float | None = None,
    guidance_scale: float | None = None,
    unconditional: Conditioning = None,
    conditioning: Conditioning = None,
    batch: int = 16,
    cache_dir: str | Path | None = None,
    on_step: OnStep | None = None,
) -> Noise:
    """Sums over e and d = e_hat - e, both fed the float trajectory, for every candidate mode in every row.

    Memory does not grow with samples but for their latents. The model's own output correction is off meanwhile.

    Args:
        model: the quantised model; ``unet``: its float original.
        scheduler: the deployment sampler, of the calibrated timesteps.
        steps, eta: of the sampler; those of the model's calibration by default.
        samples: trajectories, each one guided sample per row.
        calibration: of the model; gives the ranges of modes that the model's own plan does not run.
        modes: "A4", "A8", "A16"; by default all three with ``calibration``, else those of the plan, each in its rows.
        guidance_scale, unconditional, conditioning: of the deployment; noise is measured on the guided prediction.
        cache_dir: folder for work in progress; an interrupted run with the same arguments resumes there.
        batch: samples per call. ``on_step`` is called after every step, for progress.

    Returns:
        A `Noise`; the same arguments give the same one bit for bit, resumed or not. `moments` reads it.

    Raises:
        ValueError: an argument out of range, another network than the calibrated one, a sampler that visits other
            timesteps, NaN in a prediction.
        TypeError: ``model`` or ``unet`` of the wrong kind.
    """
    check_models(model, unet)
    shape_ = sample_shape(unet, shape)
    steps = int(model.key["steps"]) if steps is None else steps
    eta = float(model.key["eta"]) if eta is None else eta
    check_count("samples", samples), check_count("seed", seed, least=0), check_count("batch", batch)
    guidance = Guidance(guidance_scale, unconditional, conditioning)
    ready = prepared(scheduler, steps)
    step_arguments(ready, eta, seed, samples)
    rows = calibrated_rows(model, ready)
    contenders = _contenders(model, calibration, modes)
    key = noise_key(model, scheduler, steps, eta, guidance, samples, seed)
    key["ranges"] = {mode: ranges_fingerprints(contender) for mode, (contender, _) in contenders.items()}
    alpha_bar = signal_shares(ready, model.table.timesteps)
    checkpoint = None
    if cache_dir is not None:
        progress = {**key, **progress_key(model, contenders), "shape": list(shape_), "batch": batch}
        checkpoint = Checkpoint.open(cache_dir, progress)
    meter = _Meter(contenders, rows, model.table.output_scale.shape[1], guidance, batch, checkpoint, on_step)
    with evaluating(unet), model.correcting(False):
        denoise(
            unet,
            scheduler,
            initial_noise((samples, *shape_), seed),
            steps=steps,
            seed=seed,
            eta=eta,
            guidance=guidance,
            batch=batch,
            recorded=meter.resume(len(ready.timesteps)),
            on_step=meter.finish_step,
        )
    return Noise(key, model.table.timesteps, tuple(contenders), meter.total, alpha_bar)


def moments(noise: Noise, modes: str | Sequence[str]) -> Moments:
    """The moments [R, C] of every row in its mode; one name stands for all rows.

    Raises:
        ValueError: a mode that was not measured, or not in its row.
    """
    wanted = (modes,) * len(noise.timesteps) if isinstance(modes, str) else tuple(modes)
    if len(wanted) != len(noise.timesteps):
        raise ValueError(f"modes must name one mode for each of {len(noise.timesteps)} rows, got {len(wanted)}")
    missing = sorted(set(wanted) - set(noise.modes))
    if missing:
        raise ValueError(f"the noise of {', '.join(missing)} was not measured, only that of {', '.join(noise.modes)}")
    found = Moments(torch.stack([noise.sums[noise.modes.index(mode), r] for r, mode in enumerate(wanted)]))
    found.check_measured()
    return found


def signal_to_noise(noise: Noise) -> Tensor:
    """SNR of the float latents, alpha_bar / (1 - alpha_bar), float64 [R]."""
    return noise.alpha_bar / (1 - noise.alpha_bar)


def noise_key(
    model: IntegerUNet, scheduler: Any, steps: int, eta: float, guidance: Guidance, samples: int, seed: int
) -> dict[str, Any]:
    """The JSON key of measurements and corrections: network, sampler, bits, and what they were estimated on."""
    first = conditioning_for(guidance.conditioning, range(samples))
    without = conditioning_for(guidance.unconditional, range(samples)) if guidance.scale is not None else {}
    return {
        "model_hash": model.key["model_hash"],
        **sampler_key(scheduler, steps, eta, guidance.scale),
        "weight_bits": model.recipe.weight_bits,
        "weights": weights_fingerprint(model),
        "samples": samples,
        "seed": seed,
        "conditioning": fingerprint([first, without]) if first else None,
    }


def calibrated_rows(model: IntegerUNet, scheduler: Any) -> dict[float, int]:
    """Timestep -> row, for a prepared scheduler that visits exactly the calibrated timesteps."""
    visited, table = {float(t) for t in scheduler.timesteps}, model.table
    if visited != set(table.timesteps):
        raise ValueError(
            f"the sampler visits {len(visited)} timesteps, the model is calibrated on {len(table.timesteps)}: noise "
            f"is measured, and corrected, on the calibrated ones; use the sampler and the steps of the calibration"
        )
    return {timestep: r for r, timestep in enumerate(table.timesteps)}


def check_models(model: Any, unet: Any) -> None:
    """Raise unless ``model`` is an integer model, and made from ``unet``."""
    if not isinstance(model, IntegerUNet):
        raise TypeError(f"model must be an IntegerUNet, got {type(model).__name__}")
    if not isinstance(unet, nn.Module):
        raise TypeError(f"unet must be a torch module, got {type(unet).__name__}")
    if hash_parameters(unet) != model.key.get("model_hash"):
        raise ValueError("unet is not the one that the model was made from: its parameters have another hash")


def _contenders(
    model: IntegerUNet, calibration: Calibration | None, modes: Sequence[str] | None
) -> dict[str, tuple[IntegerUNet, frozenset[int]]]:
    """Mode -> (a model that runs it, the rows in which it does)."""
    own = model.table.modes
    default = [m for m in MODES if calibration is not None or m in own]
    wanted = default if modes is None else list(dict.fromkeys(modes))
    unknown = sorted(set(map(str, wanted)) - set(MODES))
    if unknown or not wanted:
        raise ValueError(f"modes must be some of {', '.join(MODES)}, got {', '.join(unknown) or 'none'}")
    if calibration is None:
        absent = sorted(set(wanted) - set(own))
        if absent:
            raise ValueError(f"modes {', '.join(absent)} are not in the model's plan; their ranges need calibration=")
        return {mode: (model, frozenset(r for r, m in enumerate(own) if m == mode)) for mode in wanted}
    if calibration.key["model_hash"] != model.key["model_hash"] or calibration.sites != model.table.sites:
        raise ValueError("calibration is not the one that the model was made from")
    if calibration.timesteps != model.table.timesteps:
        raise ValueError("calibration has other timesteps than the model")
    calibration = equalised(calibration, model.recipe)
    every, found = frozenset(range(len(own))), {}
    for mode in wanted:
        recipe = dataclasses.replace(model.recipe, plan=(mode,) * len(own), correct="none")
        table = with_learnt(make_table(calibration, recipe), model.table)  # its own scales where the bits agree
        found[mode] = (model.with_table(table, recipe), every)
    return found


def progress_key(model: IntegerUNet, contenders: dict[str, tuple[IntegerUNet, frozenset[int]]]) -> dict[str, Any]:
    """What tells one quantised model's measurement from another's."""
    tables = {mode: [m.table.scale, m.table.zero_point, m.table.bits] for mode, (m, _) in contenders.items()}
    flat = {f"table.{mode}.{i}": value for mode, values in tables.items() for i, value in enumerate(values)}
    return {"quantized": fingerprint(flat), "modes": list(contenders)}


def weights_fingerprint(model: IntegerUNet) -> str:
    """What tells one rounding of a network's weights, with its scales, from another."""
    parts = [w for layer in sorted(model.weights) for w in model.weights[layer]]
    return fingerprint({f"{i}.{name}": v for i, w in enumerate(parts) for name, v in (("q", w.values), ("s", w.scale))})


def ranges_fingerprints(model: IntegerUNet) -> list[str]:
    """What tells the activation scales of every row from others."""
    table = model.table
    rows = zip(table.scale, table.zero_point, table.bits, strict=True)
    return [fingerprint({"scale": s, "zero_point": z, "bits": b})[:_SHORT] for s, z, b in rows]


class _Meter:
    """Runs the contenders on each step's input, and keeps sums and the float prediction on disk."""

    def __init__(
        self,
        contenders: dict[str, tuple[IntegerUNet, frozenset[int]]],
        rows: dict[float, int],
        channels: int,
        guidance: Guidance,
        batch: int,
        checkpoint: Checkpoint | None,
        on_step: OnStep | None,
    ) -> None:
        self.contenders, self.rows, self.guidance, self.batch = contenders, rows, guidance, batch
        self.checkpoint, self.on_step = checkpoint, on_step
        self.total = torch.zeros(len(contenders), len(rows), channels, NOISE_SUMS, dtype=torch.float64)
        self.done: dict[int, dict[str, Tensor]] = {}

    def resume(self, count: int) -> dict[int, Tensor]:
        """Predictions of the steps that an earlier run finished."""
        self.done = {} if self.checkpoint is None else self.checkpoint.finished(count)
        return {step: tensors["prediction"] for step, tensors in self.done.items()}

    def finish_step(self, step: Step) -> None:
        """Add a step's sums to its row."""
        row, tensors = self.rows[step.timestep], self.done.pop(step.index, None)
        if tensors is None:
            tensors = {"prediction": step.prediction, "sums": self._sums(step, row)}
            if self.checkpoint is not None:
                self.checkpoint.save(step.index, tensors)
        self.total[:, row] += tensors["sums"]
        if self.on_step is not None:
            self.on_step(step)

    def _sums(self, step: Step, row: int) -> Tensor:
        sums = torch.zeros(len(self.contenders), *self.total.shape[2:], dtype=torch.float64)
        for m, (model, measured) in enumerate(self.contenders.values()):
            for start in range(0, len(step.sample) if row in measured else 0, self.batch):
                some = range(start, min(start + self.batch, len(step.sample)))
                part = slice(some.start, some.stop)
                quantized = self.guidance.prediction(model, step.sample[part], step.timestep, some)
                sums[m] += Moments.of(step.prediction[part], quantized).sums
        return sums
