"""unet + scheduler -> Calibration: statistics of every quantiser's input in every row of the deployment sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.capture import Capture, capture
from ..graph.fuse import fuse
from ..graph.interpret import flatten_conditioning, run_float
from ..graph.ir import to_json
from ..recipe import Recipe
from ..samplers import sampler_key
from ..sampling import (
    Conditioning,
    Guidance,
    Step,
    check_count,
    check_shape,
    conditioning_for,
    denoise,
    evaluating,
    home,
    initial_noise,
    predict_at_home,
    prepared,
    step_arguments,
)
from .checkpoint import Checkpoint, fingerprint
from .inputs import InputSampler
from .observers import BINS, Histogram, merged

# relative L2 between the module and its captured graph, which computes in float32 on the CPU
_CAPTURE_TOLERANCE, _TF32_TOLERANCE, _HALF_TOLERANCE = 1e-3, 1e-2, 5e-2


@dataclass(frozen=True)
class Trajectory:
    """Float sampling runs as the UNet saw them: step i received ``samples[i]`` [n, C, H, W] and ``timesteps[i]``.

    Sample j of every step belongs to run j, and to the conditioning of index j.
    """

    timesteps: tuple[float, ...]
    samples: tuple[Tensor, ...]


@dataclass(frozen=True)
class Calibration:
    """What quantisation needs to know of a model: its graph, and histograms per row and site.

    Args:
        capture: the fused graph with its float parameters.
        timesteps: distinct timesteps of the rows, noisiest first.
        sites: quantiser names, the second axis of the statistics.
        counts: float64 [R, S, BINS]; ranges: float64 [R, S, 2], the span of each histogram.
        inputs: {"layer:segment": bfloat16 [P, K]}, samples of what each layer multiplies, over all rows.
        trajectory: what the UNet received at every step, noisiest first, and with which timestep.
        key: what the statistics belong to: checkpoint hash, sampler, step count, eta, guidance, prediction type.
        shape: (C, H, W) of one sample.
        scheduler, guidance: the deployment sampler, for what is measured later on trajectories.
    """

    capture: Capture
    timesteps: tuple[float, ...]
    sites: tuple[str, ...]
    counts: Tensor
    ranges: Tensor
    inputs: dict[str, Tensor]
    trajectory: Trajectory
    key: dict[str, Any]
    shape: tuple[int, ...]
    scheduler: Any = None
    guidance: Guidance = Guidance()


def sample_shape(unet: nn.Module, shape: Any) -> tuple[int, ...]:
    """(C, H, W): ``shape`` where it is given, else from the module's diffusers configuration."""
    if shape is not None:
        return check_shape(shape, 3)
    config = getattr(unet, "config", None)
    channels, size = (getattr(config, name, None) for name in ("in_channels", "sample_size"))
    if channels is None or size is None:
        raise ValueError("shape must be given as (C, H, W): the unet has no config.in_channels and config.sample_size")
    height, width = (size, size) if isinstance(size, int) else size
    return (int(channels), int(height), int(width))


def calibration_key(
    model_hash: str, scheduler: Any, steps: int, samples: int, seed: int, eta: float, guidance: Guidance
) -> dict[str, Any]:
    """The JSON key that statistics and corrections carry."""
    first = conditioning_for(guidance.conditioning, range(samples))
    without = conditioning_for(guidance.unconditional, range(samples)) if guidance.scale is not None else {}
    return {
        "model_hash": model_hash,
        **sampler_key(scheduler, steps, eta, guidance.scale),
        "samples": samples,
        "seed": seed,
        "conditioning": fingerprint([first, without]) if first else None,
    }


def captured(unet: nn.Module, shape: tuple[int, ...], guidance: Guidance) -> Capture:
    """The fused integer graph of ``unet``, with float parameters."""
    result = capture(unet, shape, conditioning_for(guidance.conditioning, range(2)))
    fuse(result.graph, result.constants)
    return result


@torch.no_grad()
def calibrate(
    unet: nn.Module,
    scheduler: Any,
    recipe: Recipe | None = None,
    shape: tuple[int, int, int] | None = None,
    steps: int = 50,
    samples: int = 64,
    seed: int = 0,
    conditioning: Conditioning = None,
    cache_dir: str | Path | None = None,
    *,
    eta: float = 0.0,
    guidance_scale: float | None = None,
    unconditional: Conditioning = None,
    batch: int = 16,
    on_step: Callable[[Step], None] | None = None,
) -> Calibration:
    """Sample float trajectories with the deployment sampler and record every quantiser's input, row by row.

    Args:
        unet: the float UNet, ``forward(sample, timestep, **conditioning)``.
        scheduler: the deployment sampler (a diffusers scheduler).
        recipe: checked early; the statistics serve every recipe.
        shape: (C, H, W); taken from ``unet.config`` when it is there.
        steps, eta, guidance_scale: of the deployment sampler. ``samples`` trajectories are drawn from ``seed``.
        conditioning, unconditional: keyword arguments of the UNet, cycled over the samples.
        cache_dir: folder for work in progress; an interrupted run with the same arguments resumes there.
        batch: samples per UNet call.
        on_step: called after every step, for progress.

    Returns:
        A `Calibration`; the same arguments give the same one bit for bit, resumed or not.

    Raises:
        ValueError: an argument out of range, a module that cannot be captured, NaN in the data.
    """
    if not isinstance(unet, nn.Module):
        raise TypeError(f"unet must be a torch module, got {type(unet).__name__}")
    if recipe is not None and not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, got {type(recipe).__name__}; Recipe.named('w8a8') makes one")
    check_count("steps", steps), check_count("samples", samples), check_count("seed", seed, least=0)
    check_count("batch", batch)
    shape_ = sample_shape(unet, shape)
    guidance = Guidance(guidance_scale, unconditional, conditioning)
    ready = prepared(scheduler, steps)
    step_arguments(ready, eta, seed, samples)  # a wrong eta is known before the work
    model = captured(unet, shape_, guidance)
    model.constants = _owned(model.constants, unet)
    key = calibration_key(model.model_hash, scheduler, steps, samples, seed, eta, guidance)
    # equal parameters may belong to other code: the graph tells it apart
    progress = {**key, "shape": list(shape_), "batch": batch, "graph": fingerprint(to_json(model.graph))}
    checkpoint = None if cache_dir is None else Checkpoint.open(cache_dir, progress)
    sampler = InputSampler(model.graph, model.constants, len(ready.timesteps), seed)
    recorder = _Recorder(model, sampler, checkpoint, on_step)
    noise = initial_noise((samples, *shape_), seed)
    _check_capture(unet, model, noise[:2] * getattr(ready, "init_noise_sigma", 1.0), ready, guidance)
    denoise(
        recorder.predict,
        scheduler,
        noise,
        steps=steps,
        seed=seed,
        eta=eta,
        guidance=guidance,
        batch=batch,
        recorded=recorder.resume(len(ready.timesteps)),
        on_step=recorder.finish_step,
    )
    return dataclasses.replace(recorder.result(key, shape_), scheduler=scheduler, guidance=guidance)


def _owned(constants: dict[str, Tensor], unet: nn.Module) -> dict[str, Tensor]:
    """Copies of what lies in the module's own memory: its parameters may train on, the calibration's stay."""
    lent = {value.untyped_storage().data_ptr() for value in (*unet.parameters(), *unet.buffers())}
    return {k: v.clone() if v.untyped_storage().data_ptr() in lent else v for k, v in constants.items()}


def _check_capture(unet: nn.Module, model: Capture, noise: Tensor, scheduler: Any, guidance: Guidance) -> None:
    """The captured graph must reproduce the module; a capture that does not would calibrate something else."""
    received = scheduler.scale_model_input(noise, scheduler.timesteps[0])
    timestep = torch.full((len(noise),), int(scheduler.timesteps[0]))
    extra = conditioning_for(guidance.conditioning, range(len(noise)))
    dtype = next(unet.parameters(), noise).dtype
    with evaluating(unet):
        expected = predict_at_home(unet, received, float(timestep[0]), extra)
    if not bool(torch.isfinite(expected).all()):
        raise ValueError("the unet predicts NaN or infinity: its parameters or its conditioning hold them")
    inputs = {"sample": received, "timestep": timestep, **flatten_conditioning(extra)}
    actual = run_float(model.graph, model.constants, inputs)
    tolerance = _HALF_TOLERANCE
    if dtype == torch.float32:
        tolerance = _CAPTURE_TOLERANCE if home(unet).type == "cpu" else _TF32_TOLERANCE
    error = float((actual - expected).norm() / expected.norm().clamp(min=1e-12))
    if not error < tolerance:
        raise ValueError(f"the captured graph differs from the unet by {error:.2g} (relative L2); it cannot be used")


class _Recorder:
    """Runs the captured graph in place of the module, and keeps each step's histograms and layer inputs."""

    def __init__(
        self,
        model: Capture,
        sampler: InputSampler,
        checkpoint: Checkpoint | None,
        on_step: Callable[[Step], None] | None,
    ) -> None:
        self.model, self.sampler, self.checkpoint, self.on_step = model, sampler, checkpoint, on_step
        self.sites = tuple(node.kwargs["site"] for node in model.graph.nodes if "site" in node.kwargs)
        self.rows: dict[float, list[tuple[Tensor, Tensor]]] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        self.path: list[tuple[float, Tensor]] = []
        self.done: dict[int, dict[str, Tensor]] = {}
        self._start(0)

    def _start(self, step: int) -> None:
        self.histograms = {site: Histogram() for site in self.sites}
        self.sampler.start(step)

    def predict(self, sample: Tensor, timestep: Tensor, **conditioning: Any) -> tuple[Tensor]:
        """The float prediction, its activations observed on the way."""

        def observe(site: str, x: Tensor) -> Tensor:
            self.histograms[site].update(x)
            return x

        inputs = {"sample": sample, "timestep": timestep, **flatten_conditioning(conditioning)}
        graph, constants = self.model.graph, self.model.constants
        return (run_float(graph, constants, inputs, activation=observe, layer_input=self.sampler),)

    def resume(self, count: int) -> dict[int, Tensor]:
        """Predictions of the steps that an earlier run finished, from the first on without a gap."""
        self.done = {} if self.checkpoint is None else self.checkpoint.finished(count)
        self._start(len(self.done))
        return {step: tensors["prediction"] for step, tensors in self.done.items()}

    def finish_step(self, step: Step) -> None:
        """File a step's statistics under its timestep, on disk first."""
        tensors = self.done.pop(step.index, None)
        if tensors is None:
            tensors = {"sample": step.sample, "prediction": step.prediction, **self._statistics()}
            if self.checkpoint is not None:
                self.checkpoint.save(step.index, tensors)
            self._start(step.index + 1)
        self.path.append((step.timestep, tensors["sample"]))
        self.rows.setdefault(step.timestep, []).append((tensors["counts"].double(), tensors["ranges"]))
        for name, value in tensors.items():
            if name.startswith("input."):
                self.inputs.setdefault(name.removeprefix("input."), []).append(value)
        if self.on_step is not None:
            self.on_step(step)

    def _statistics(self) -> dict[str, Tensor]:
        histograms = list(self.histograms.values())
        counts = torch.stack([torch.zeros(BINS) if h.counts is None else h.counts for h in histograms])
        ranges = torch.tensor([[h.low, h.high] for h in histograms], dtype=torch.float64)
        inputs = {f"input.{name}": value for name, value in self.sampler.taken.items()}
        return {"counts": counts, "ranges": ranges, **inputs}

    def result(self, key: dict[str, Any], shape: tuple[int, ...]) -> Calibration:
        """Everything recorded, rows noisiest first."""
        timesteps = tuple(sorted(self.rows, reverse=True))
        merged_rows = [_merge_visits(self.rows[t]) for t in timesteps]
        counts = torch.stack([counts for counts, _ in merged_rows])
        ranges = torch.stack([ranges for _, ranges in merged_rows])
        inputs = {name: torch.cat(parts) for name, parts in self.inputs.items()}
        visited, samples = zip(*self.path, strict=True)
        trajectory = Trajectory(visited, samples)
        return Calibration(self.model, timesteps, self.sites, counts, ranges, inputs, trajectory, key, shape)


def _merge_visits(visits: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Statistics of a timestep that the sampler visits more than once."""
    if len(visits) == 1:
        return visits[0]
    counts, ranges = merged(torch.stack([c for c, _ in visits]), torch.stack([r for _, r in visits]), 0)
    return counts[0], ranges[0]
