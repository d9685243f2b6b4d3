"""How far a quantised model is from its float original: same noise, same sampler, step by step and at the end."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calibration.calibration import sample_shape
from .calibration.checkpoint import Checkpoint, fingerprint
from .graph.capture import hash_parameters
from .models import DEMO_HASH, DEMO_PARAMETERS
from .quality import PIXEL_PEAK, Extractor, Perception, perceive, structural_similarity
from .samplers import prepared, sampler_key
from .sampling import (
    Conditioning,
    Guidance,
    Step,
    check_count,
    conditioning_for,
    corrections,
    denoise,
    evaluating,
    initial_noise,
)

LIMIT_DB = 200.0  # stands for equality, which has no finite value in decibels
_PIXEL_CHANNELS = (1, 3)
_UNSEEN = Perception(None, "no feature extractor is known for this network; name one")
AUTO = "auto"

OnStep = Callable[[str, Step], None]  # (model's name, "float" for the original; the step that it finished)


@dataclass(frozen=True)
class Comparison:
    """Fidelity of a model to its float original, from the same initial noise.

    Args:
        psnr: of every final image, in dB; pixels clamped to [-1, 1] with peak 2, latents with the float range.
        step_sqnr_db: per step, 10 log10(|e|^2 / |e - e_hat|^2) over all samples, both fed the float trajectory.
        latent_error: per step, |x - x_hat| / |x| between the two trajectories, each fed its own latents.
        finite: whether every value of the model's final images is finite.
        timesteps: what the UNet received at each step.
        float_images, images: final images [n, C, H, W] of the original and of the model.
        ssim: structural similarity of every final image.
        perception: what the feature extractor sees in both sets of final images.
    """

    psnr: tuple[float, ...]
    step_sqnr_db: list[float]
    latent_error: list[float]
    finite: bool
    timesteps: list[float]
    float_images: Tensor
    images: Tensor
    ssim: tuple[float, ...] = ()
    perception: Perception = _UNSEEN

    @property
    def psnr_db(self) -> float:
        """Mean over images of the peak signal-to-noise ratio, in dB."""
        return math.fsum(self.psnr) / len(self.psnr)

    @property
    def psnr_db_min(self) -> float:
        """The worst image's, in dB."""
        return min(self.psnr)

    @property
    def samples(self) -> int:
        """How many images were compared."""
        return len(self.psnr)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``qdiff compare``."""
        return {
            "psnr_db": self.psnr_db,
            "psnr_db_min": self.psnr_db_min,
            "step_sqnr_db": self.step_sqnr_db,
            "latent_error": self.latent_error,
            "finite": self.finite,
            "samples": self.samples,
            "ssim": math.fsum(self.ssim) / len(self.ssim) if self.ssim else None,
            **self.perception.to_dict(),
        }


def compare(
    model: Any,
    unet: nn.Module,
    scheduler: Any,
    shape: tuple[int, int, int] | None = None,
    steps: int = 50,
    samples: int = 16,
    seed: int = 0,
    *,
    eta: float = 0.0,
    guidance_scale: float | None = None,
    unconditional: Conditioning = None,
    conditioning: Conditioning = None,
    batch: int = 16,
    pixels: bool | None = None,
    correction: bool = True,
    strict: bool = False,
    features: Extractor | str | None = AUTO,
    on_step: OnStep | None = None,
) -> Comparison:
    """Sample the float ``unet`` and the ``model`` from the same noise, and measure their distance.

    Three passes of ``steps`` evaluations: the float trajectory, the model on that trajectory's inputs, and the
    model's own trajectory.

    Args:
        model: an `IntegerUNet`, or anything called like ``unet``.
        shape: (C, H, W); taken from ``unet.config`` when it is there.
        pixels: whether the final samples are images in [-1, 1] rather than latents; by default, 1 or 3 channels are.
        correction, strict: whether the model's corrections are applied, as for `sampling.sample`.
        features: the extractor of the Fréchet distance and of the class figures: a module that maps images to
            features [n, F] or to (features, logits), "digits" for the bundled digit classifier, None for none;
            "auto" takes that classifier for the bundled network and none for another.
        on_step: called as ``on_step(name, step)`` after every step, with the name "float" or "model".
        steps, samples, seed, eta, guidance_scale, unconditional, conditioning, batch: as for `sampling.sample`.

    Raises:
        ValueError: an argument out of range, or a prediction that is not finite.
    """
    results = compare_all(
        {"model": model},
        unet,
        scheduler,
        shape,
        steps,
        samples,
        seed,
        eta=eta,
        guidance_scale=guidance_scale,
        unconditional=unconditional,
        conditioning=conditioning,
        batch=batch,
        pixels=pixels,
        correction=correction,
        strict=strict,
        features=features,
        on_step=on_step,
    )
    return results["model"]


@torch.no_grad()
def compare_all(
    models: Mapping[str, Any],
    unet: nn.Module,
    scheduler: Any,
    shape: tuple[int, int, int] | None = None,
    steps: int = 50,
    samples: int = 16,
    seed: int = 0,
    *,
    eta: float = 0.0,
    guidance_scale: float | None = None,
    unconditional: Conditioning = None,
    conditioning: Conditioning = None,
    batch: int = 16,
    pixels: bool | None = None,
    correction: bool = True,
    strict: bool = False,
    features: Extractor | str | None = AUTO,
    step_sqnr: bool = True,
    cache_dir: str | Path | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Comparison]:
    """`compare` for several models, which share one float trajectory.

    Args:
        step_sqnr: False leaves `Comparison.step_sqnr_db` empty and saves one of each model's two passes.
        cache_dir: folder for the float predictions: an interrupted comparison, or another one with the same network,
            sampler, images and conditioning, reads them there; a comparison of anything else empties the folder first.
    """
    size = sample_shape(unet, shape)
    extractor = extractor_named(features, unet)
    check_count("samples", samples), check_count("seed", seed, least=0)
    guidance = Guidance(guidance_scale, unconditional, conditioning)
    noise = initial_noise((samples, *size), seed)
    keywords: dict[str, Any] = {"steps": steps, "seed": seed, "eta": eta, "guidance": guidance, "batch": batch}
    sqnr: dict[str, list[float]] = {name: [] for name in models}
    path: list[Tensor] = []  # the float latents after every step
    timesteps: list[float] = []
    kept, recorded = None, {}
    if cache_dir is not None:
        sampler = sampler_key(scheduler, steps, eta, guidance_scale)
        kept = Checkpoint.open(cache_dir, _float_key(unet, sampler, guidance, noise, seed))
        done = kept.finished(len(prepared(scheduler, steps).timesteps))
        recorded = {step: tensors["prediction"] for step, tensors in done.items()}

    def follow(step: Step) -> None:
        if kept is not None and step.index not in recorded:
            kept.save(step.index, {"prediction": step.prediction})
        for name, model in models.items() if step_sqnr else ():
            prediction = guided_prediction(model, guidance, step, batch)
            noise_energy = float((prediction - step.prediction).double().square().sum())
            sqnr[name].append(decibels(float(step.prediction.double().square().sum()), noise_energy))
        path.append(step.previous)
        timesteps.append(step.timestep)
        if on_step is not None:
            on_step("float", step)

    pixels = size[0] in _PIXEL_CHANNELS if pixels is None else pixels
    results = {}
    with contextlib.ExitStack() as stack:
        setting = (scheduler, steps, eta, guidance_scale, correction, strict)
        applied = {name: stack.enter_context(corrections(model, *setting)) for name, model in models.items()}
        with evaluating(unet):
            reference = denoise(unet, scheduler, noise, recorded=recorded, on_step=follow, **keywords)
        trajectories = {
            name: _own_trajectory(
                name, model, scheduler, noise, path, {**keywords, "correction": applied[name]}, on_step
            )
            for name, model in models.items()
        }
    for name, (errors, images) in trajectories.items():
        finite = bool(torch.isfinite(images).all())
        psnr = tuple(image_psnr(images, reference, pixels))
        ssim = tuple(structural_similarity(images, reference, pixels))
        seen = _UNSEEN if extractor is None else perceive(extractor, images, reference, pixels)
        results[name] = Comparison(psnr, sqnr[name], errors, finite, timesteps, reference, images, ssim, seen)
    return results


def _float_key(
    unet: nn.Module, sampler: dict[str, Any], guidance: Guidance, noise: Tensor, seed: int
) -> dict[str, Any]:
    """What the float predictions of a comparison depend on."""
    every = range(len(noise))
    first = conditioning_for(guidance.conditioning, every)
    without = conditioning_for(guidance.unconditional, every) if guidance.scale is not None else {}
    return {
        "model_hash": hash_parameters(unet),
        **sampler,
        "latents": list(noise.shape),
        "seed": seed,
        "conditioning": fingerprint([first, without]),
    }


def extractor_named(features: Extractor | str | None, unet: Any) -> Extractor | None:
    """The extractor that ``features`` stands for when samples of ``unet`` are compared; see `compare`."""
    if features is None or (callable(features) and not isinstance(features, str)):
        return features
    if features not in (AUTO, "digits"):
        raise ValueError(f"features must be a module, 'auto', 'digits' or None, got {features!r}")
    if features == AUTO and not _is_bundled(unet):
        return None
    from .digits import digit_classifier

    return digit_classifier()


def _is_bundled(unet: Any) -> bool:
    """Whether ``unet`` is the bundled network; a large one is told by its size, without hashing it."""
    if not isinstance(unet, nn.Module) or sum(p.numel() for p in unet.parameters()) != DEMO_PARAMETERS:
        return False
    return hash_parameters(unet) == DEMO_HASH


def guided_prediction(model: Any, guidance: Guidance, step: Step, batch: int) -> Tensor:
    """The model's guided prediction for the latents that the original received at ``step``."""
    chunks = [range(j, min(j + batch, len(step.sample))) for j in range(0, len(step.sample), batch)]
    parts = [guidance.prediction(model, step.sample[c.start : c.stop], step.timestep, c) for c in chunks]
    return torch.cat([part.float() for part in parts])


def _own_trajectory(
    name: str,
    model: Any,
    scheduler: Any,
    noise: Tensor,
    path: list[Tensor],
    keywords: dict[str, Any],
    on_step: OnStep | None,
) -> tuple[list[float], Tensor]:
    """(relative L2 distance to ``path`` after every step, final images) of the model fed its own latents."""
    errors: list[float] = []

    def follow(step: Step) -> None:
        expected = path[step.index].double()
        distance = float((step.previous.double() - expected).norm())
        errors.append(distance / max(float(expected.norm()), torch.finfo(torch.float32).tiny))
        if on_step is not None:
            on_step(name, step)

    images = denoise(model, scheduler, noise, on_step=follow, **keywords)
    return errors, images


def image_psnr(images: Tensor, reference: Tensor, pixels: bool) -> list[float]:
    """10 log10(peak^2 / mean (x - x_hat)^2) of every image in dB; ``images``, ``reference`` [n, C, H, W].

    Pixels are clamped to [-1, 1] and have peak 2; the peak of latents is the range of ``reference``.
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"images must have the shape {list(reference.shape)} of the reference, got {list(images.shape)}"
        )
    x, y = images.double(), reference.double()
    peak = PIXEL_PEAK if pixels else float(y.max() - y.min())
    if pixels:
        x, y = x.clamp(-1, 1), y.clamp(-1, 1)
    return [decibels(peak * peak, float(error)) for error in (x - y).square().flatten(1).mean(1)]


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise), kept within +-200 dB, which stand for no noise and for no signal."""
    if noise <= 0:
        return LIMIT_DB
    return max(-LIMIT_DB, min(LIMIT_DB, 10 * math.log10(signal / noise))) if signal > 0 else -LIMIT_DB
