"""``qdiff sample``, ``compare`` and ``bench``: run an artifact."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from .options import (
    Command,
    check_conditioning,
    check_eta,
    correction_option,
    count_option,
    features_option,
    guidance_arguments,
    machine_options,
    make_sampler,
    pass_output,
    read_features,
    sampler_option,
    sampling_options,
    scheduler_of,
    takes_eta,
    use_machine,
)
from .output import Output, megabytes

_PICTURES, _TENSORS = (".png",), (".safetensors",)


@click.command(cls=Command)
@click.argument("artifact", metavar="ART")
@count_option("--n", 16, "Images to draw.")
@count_option("--steps", None, "Denoising steps; those of the calibration otherwise.")
@count_option("--seed", 0, "Seed of the initial noise.", least=0)
@click.option("--out", required=True, metavar="FILE", help="FILE.png, a grid; or FILE.safetensors, the raw samples.")
@sampler_option
@correction_option
@sampling_options
@machine_options
@pass_output
def sample(
    output: Output,
    artifact: str,
    n: int,
    steps: int | None,
    seed: int,
    out: str,
    sampler: str,
    correction: bool,
    eta: float | None,
    guidance: float | None,
    conditioning: Path | None,
    batch: int,
    device: str,
    threads: int | None,
) -> None:
    """Draw images with an artifact; the same seed gives the same images, whatever --batch is."""
    path = _sample_path(out)
    guided = guidance_arguments(conditioning, guidance)
    from ..runtime.model import load

    model = load(artifact, device=use_machine(device, threads))
    check_conditioning(model, guided["conditioning"], artifact)
    channels, height, width = (int(size) for size in model.graph.inputs["sample"][1:])
    if path.suffix in _PICTURES and channels not in (1, 3):
        raise ValueError(
            f"samples of {channels} channels make no picture; use --out {path.with_suffix('.safetensors')}"
        )
    scheduler = make_sampler(sampler, scheduler_of(model.key), artifact)
    steps = steps or int(model.key.get("steps", 50))
    from ..sampling import sample as draw

    start = time.monotonic()
    with output.progress("sampling", steps) as advance:
        images = draw(
            model,
            scheduler,
            (n, channels, height, width),
            steps,
            seed,
            eta=eta_of(eta, model.key, scheduler),
            batch=batch,
            correction=correction,
            on_step=lambda _: advance(),
            **guided,
        )
    seconds = time.monotonic() - start
    _write_samples(path, images)
    data = {"images": n, "seconds": round(seconds, 3), "finite": bool(images.isfinite().all()), "out": str(path)}
    output.result(data, lambda console: console.print(f"{path}: {n} images in {seconds:.1f} s", soft_wrap=True))


def eta_of(given: float | None, key: dict[str, Any], scheduler: Any) -> float:
    """``--eta``, or the one that the artifact was calibrated with, where the sampler takes one."""
    if given is not None:
        return check_eta(given, scheduler)
    return float(key.get("eta", 0.0)) if takes_eta(scheduler) else 0.0


def _sample_path(out: str) -> Path:
    path = Path(out)
    if path.suffix not in _PICTURES + _TENSORS:
        raise ValueError(f"--out {out}: name a .png for a grid of images, or a .safetensors for the raw samples")
    if path.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_samples(path: Path, images: Any) -> None:
    from ..runtime.files import write_file

    if path.suffix in _PICTURES:
        from ..pictures import grid

        write_file(path, grid(images))
    else:
        import safetensors.torch

        write_file(path, safetensors.torch.save({"samples": images.contiguous()}))


@click.command(cls=Command)
@click.argument("artifact", metavar="ART")
@click.option("--reference", required=True, metavar="MODEL", help="The float network that ART was made from.")
@count_option("--steps", None, "Denoising steps; those of the calibration otherwise.")
@count_option("--n", 16, "Images to compare.")
@count_option("--seed", 0, "Seed of the initial noise.", least=0)
@features_option
@sampler_option
@correction_option
@sampling_options
@machine_options
@pass_output
def compare(
    output: Output,
    artifact: str,
    reference: str,
    steps: int | None,
    n: int,
    seed: int,
    features: str,
    sampler: str,
    correction: bool,
    eta: float | None,
    guidance: float | None,
    conditioning: Path | None,
    batch: int,
    device: str,
    threads: int | None,
) -> None:
    """Sample ART and its float original from the same noise, and measure how far they are apart."""
    guided = guidance_arguments(conditioning, guidance)
    extractor = read_features(features)
    from ..evaluation import compare as run
    from ..runtime.model import load

    model = load(artifact, device=use_machine(device, threads))
    check_conditioning(model, guided["conditioning"], artifact)
    unet = load_reference(reference, artifact, model.key)
    scheduler = make_sampler(sampler, scheduler_of(model.key), artifact)
    steps = steps or int(model.key.get("steps", 50))
    channels, height, width = (int(size) for size in model.graph.inputs["sample"][1:])
    with output.progress("comparing", 2 * steps) as advance:
        report = run(
            model,
            unet,
            scheduler,
            (channels, height, width),
            steps,
            n,
            seed,
            eta=eta_of(eta, model.key, scheduler),
            batch=batch,
            correction=correction,
            features=extractor,
            on_step=lambda *_: advance(),
            **guided,
        )
    output.result(report.to_dict(), lambda console: _show_comparison(console, report))


def load_reference(reference: str, artifact: str, key: dict[str, Any]) -> Any:
    """The float network ``reference``, refused unless the artifact was made from these very parameters."""
    from ..graph.capture import hash_parameters
    from ..models import load_model

    unet = load_model(reference).unet
    if hash_parameters(unet) != key.get("model_hash"):
        raise ValueError(
            f"--reference {reference} is not the network that {artifact} was made from: its parameters have another "
            "hash; name the one that was calibrated"
        )
    return unet


def _show_comparison(console: Any, report: Any) -> None:
    from rich.table import Table

    table = Table("step", "timestep", "SQNR of the prediction, dB", "distance of the latents")
    for column in table.columns:
        column.justify = "right"
    count = len(report.timesteps)
    for i in sorted({round(j * (count - 1) / 9) for j in range(10)}):
        values = f"{report.timesteps[i]:g}", f"{report.step_sqnr_db[i]:.1f}", f"{report.latent_error[i]:.4f}"
        table.add_row(str(i), *values)
    console.print(table)
    console.print(
        f"PSNR to float: {report.psnr_db:.2f} dB, mean of {report.samples} images, "
        f"{report.psnr_db_min:.2f} dB for the worst; SSIM {report.to_dict()['ssim']:.4f}",
        soft_wrap=True,
    )
    console.print(_perceived(report.perception), soft_wrap=True)


def _perceived(seen: Any) -> str:
    """What the feature extractor saw, in a line or two."""
    distance = "none" if seen.frechet_to_float is None else f"{seen.frechet_to_float:.4g}"
    text = f"Fréchet distance of features to float: {distance}"
    text += f" ({seen.frechet_note})" if seen.frechet_note else ""
    if seen.class_accuracy is not None:
        text += (
            f"\nthe class of the float image in {seen.class_accuracy:.1%}; entropy of an image's class "
            f"{seen.class_entropy:.3f} nats ({seen.class_entropy_float:.3f} in float), of the set's "
            f"{seen.class_diversity:.3f} ({seen.class_diversity_float:.3f})"
        )
    return text


@click.command(cls=Command)
@click.argument("artifact", metavar="ART")
@click.option("--reference", metavar="MODEL", help="The float network, for the baselines.")
@count_option("--batch", 8, "Samples per call of the network; with --guidance, each makes two rows.")
@count_option("--repetitions", 20, "Timed calls of every contestant.")
@click.option(
    "--conditioning", type=click.Path(path_type=Path), metavar="FILE", help="As for sample; needed if ART takes any."
)
@click.option("--guidance", type=float, help="Time both branches of classifier-free guidance in one call.")
@click.option("--eta", type=click.FloatRange(0, 1), help="Taken as by sample; one call costs the same for every eta.")
@click.option("--compile", "compile_", is_flag=True, help="On a GPU, time torch.compile too; it compiles for minutes.")
@correction_option
@machine_options
@pass_output
def bench(
    output: Output,
    artifact: str,
    reference: str | None,
    batch: int,
    repetitions: int,
    conditioning: Path | None,
    guidance: float | None,
    eta: float | None,
    compile_: bool,
    correction: bool,
    device: str,
    threads: int | None,
) -> None:
    """Time one call of an artifact beside float baselines, interleaved in one process."""
    from ..benchmarking import bench as run
    from ..runtime.model import load

    target = use_machine(device, threads)
    if compile_ and (target.type == "cpu" or reference is None):
        raise ValueError("--compile needs --device cuda and --reference MODEL, the network that is compiled")
    guided = guidance_arguments(conditioning, guidance)
    model = load(artifact, device=target)
    check_conditioning(model, guided["conditioning"], artifact)
    unet = load_reference(reference, artifact, model.key) if reference else None
    rows = batch if guidance is None else 2 * batch
    with output.progress("timing", 1) as advance, model.correcting(correction):
        given = guided["conditioning"]
        data = run(model, unet, batch=rows, repetitions=repetitions, conditioning=given, compile_=compile_)
        advance()
    data |= {"batch": batch, "rows_per_call": rows}
    output.result(data, lambda console: _show_timing(console, data))


def _show_timing(console: Any, data: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("", "median ms", "p05", "p95", "engine is faster by")
    for column in table.columns[1:]:
        column.justify = "right"
    times = {"engine": data["engine_ms"], **data["baselines"]}
    for name, row in times.items():
        speedup = f"{data['speedup'][name]:.2f}x" if name in data["speedup"] else ""
        table.add_row(name, f"{row['median']:.2f}", f"{row['p05']:.2f}", f"{row['p95']:.2f}", speedup)
    console.print(table)
    if len(data["modes_ms"]) > 1:
        modes = ", ".join(f"{mode} {value:.2f} ms" for mode, value in data["modes_ms"].items())
        console.print(
            f"{data['plan_ms']:.2f} ms on average over the plan's steps ({modes}); the gains are of that",
            soft_wrap=True,
        )
    for name, reason in data.get("baselines_absent", {}).items():
        console.print(f"not run: {name} ({reason})", soft_wrap=True)
    peak = data["peak_memory_bytes"]
    memory = f", peak memory {megabytes(peak)}" if peak else ""
    console.print(
        f"{data['device']}, batch {data['batch']}, weights {megabytes(data['weight_bytes'])}{memory}", soft_wrap=True
    )
