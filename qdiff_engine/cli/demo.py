"""``qdiff demo``: the whole story on the bundled model: calibrate, quantise, save, sample, compare, count, time."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from .options import Command, count_option, machine_options, pass_output, use_machine
from .output import Output, megabytes

RECIPES = ("w8a8", "w4a8")
_BATCH = 16
_ROUNDS = 12
_SHOWN_SITES = (
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.1.attentions.0.to_q",
    "mid_block.resnets.0.conv1",
    "up_blocks.2.resnets.2.conv2",
)


@dataclass(frozen=True)
class Settings:
    """What the demo computes; a finished artifact of other settings is made again."""

    steps: int
    samples: int
    n: int
    seed: int


@click.command(cls=Command)
@click.option("--out", default="qdiff-demo", show_default=True, metavar="DIR", help="Folder for everything it makes.")
@count_option("--steps", 50, "Denoising steps (DDIM).")
@count_option("--samples", 64, "Trajectories to calibrate on.")
@count_option("--n", 16, "Images to sample and compare.")
@count_option("--seed", 0, "Seed of calibration; the images use the next one.", least=0)
@machine_options
@pass_output
def demo(
    output: Output, out: str, steps: int, samples: int, n: int, seed: int, device: str, threads: int | None
) -> None:
    """Calibrate the bundled model, run it on integers, and show what changed; run again, it resumes."""
    start = time.monotonic()
    settings = Settings(steps, samples, n, seed)
    folder = Path(os.path.realpath(out))
    folder.mkdir(parents=True, exist_ok=True)
    output.resume = f"what is finished is in {folder}: run the same command to resume"
    import torch

    from ..models import ddim, demo_model

    use_machine(device, threads)
    if torch.cuda.is_available():
        output.note("There is a GPU here, but the engine is not verified on one yet: the demo runs on the CPU.")
    loaded = demo_model()
    scheduler = ddim(loaded.scheduler)
    make_artifacts(output, folder, settings, loaded.unet, scheduler)
    report = run_artifacts(output, folder, settings, loaded.unet, scheduler)
    report["seconds"] = round(time.monotonic() - start, 3)
    _write_report(folder, report)
    output.result(report, lambda console: _show(console, report))


def _artifact(folder: Path, recipe: str) -> Path:
    return folder / f"artifact-{recipe}"


def make_artifacts(output: Output, folder: Path, settings: Settings, unet: Any, scheduler: Any) -> None:
    """Calibrate once and save an artifact per recipe and the picture of ranges; nothing if all of it is there."""
    from ..runtime.artifact import FILES
    from ..runtime.files import check_replaceable

    ranges, partial = folder / "ranges.png", folder / "calibration.partial"
    if ranges.exists() and all(is_finished(_artifact(folder, r), r, settings, unet, scheduler) for r in RECIPES):
        output.note(f"the artifacts in {folder} are finished; sampling them")
        return
    for recipe in RECIPES:
        check_replaceable(_artifact(folder, recipe), FILES)
    from ..calibration.calibration import calibrate
    from ..pictures import activation_ranges
    from ..quantization import layers as integer_layers
    from ..quantization import quantize
    from ..recipe import Recipe
    from ..runtime.files import remove_folder, write_file

    with output.progress(f"calibrating on {settings.samples} trajectories", settings.steps) as advance:
        calibration = calibrate(
            unet,
            scheduler,
            steps=settings.steps,
            samples=settings.samples,
            seed=settings.seed,
            cache_dir=partial,
            batch=_BATCH,
            on_step=lambda _: advance(),
        )
    tables = {}
    layers = len(list(integer_layers(calibration.capture.graph)))
    with output.progress("quantising", layers * len(RECIPES)) as advance:
        for recipe in RECIPES:
            model = quantize(unet, calibration, Recipe.named(recipe), on_layer=lambda _: advance())
            tables["range of the 8-bit integers"] = model.table  # the same statistics, hence the same for both
            model.save_pretrained(_artifact(folder, recipe))
    write_file(ranges, activation_ranges(calibration, tables, _SHOWN_SITES))
    remove_folder(partial)


def is_finished(artifact: Path, recipe: str, settings: Settings, unet: Any, scheduler: Any) -> bool:
    """Whether an artifact is whole and was made with these settings."""
    from ..calibration.calibration import calibration_key
    from ..graph.capture import hash_parameters
    from ..recipe import Recipe
    from ..runtime.artifact import load_artifact
    from ..sampling import Guidance

    expected = calibration_key(
        hash_parameters(unet), scheduler, settings.steps, settings.samples, settings.seed, 0.0, Guidance()
    )
    with contextlib.suppress(ValueError, OSError):
        found = load_artifact(artifact)
        return found.key == expected and found.recipe == Recipe.named(recipe)
    return False


def run_artifacts(output: Output, folder: Path, settings: Settings, unet: Any, scheduler: Any) -> dict[str, Any]:
    """Sample float and integers from the same noise, write samples.png, and return the report."""
    from ..evaluation import compare_all
    from ..pictures import labelled_rows
    from ..runtime.files import write_file
    from ..runtime.model import load

    models = {recipe: load(_artifact(folder, recipe)) for recipe in RECIPES}
    total = settings.steps * (1 + len(models))
    with output.progress(f"sampling {settings.n} images in float and integers", total) as advance:
        compared = compare_all(
            models,
            unet,
            scheduler,
            steps=settings.steps,
            samples=settings.n,
            seed=settings.seed + 1,
            batch=_BATCH,
            on_step=lambda *_: advance(),
        )
    shown = {"float32": compared[RECIPES[0]].float_images}
    shown |= {f"{_label(r)}\n{compared[r].psnr_db:.1f} dB": compared[r].images for r in RECIPES}
    title = f"The same {settings.n} seeds, DDIM {settings.steps} steps, in floating point and on integers"
    write_file(folder / "samples.png", labelled_rows({k: v[:16] for k, v in shown.items()}, title))
    times = _time_models(output, models, unet, settings.n)
    return {
        "out": str(folder),
        "machine": machine(),
        "settings": {**vars(settings), "sampler": "ddim", "eta": 0.0, "batch": min(_BATCH, settings.n)},
        "rows": _rows(models, unet, compared, times),
        "comparisons": {recipe: compared[recipe].to_dict() for recipe in RECIPES},
        "files": ["samples.png", "ranges.png", *(f"artifact-{recipe}" for recipe in RECIPES)],
    }


def _label(recipe: str) -> str:
    return recipe.upper()


def _time_models(output: Output, models: dict[str, Any], unet: Any, n: int) -> dict[str, float]:
    """Median milliseconds of one denoising step at the sampling batch, float and integers in turn."""
    import torch

    from ..measuring import interleaved
    from ..sampling import initial_noise, predict

    batch = min(_BATCH, n)
    latents = initial_noise((batch, 1, 32, 32), 0).contiguous(memory_format=torch.channels_last)
    timestep = torch.full((batch,), int(next(iter(models.values())).table.timesteps[0]))
    named = {"float32": unet, **models}
    contestants = {name: lambda _, net=net: predict(net, latents, timestep, {}) for name, net in named.items()}
    with output.progress("timing one step", _ROUNDS + 2) as advance, torch.inference_mode():
        times = interleaved(contestants, _ROUNDS, on_round=lambda *_: advance())
    return {name: float(torch.tensor(values).median()) for name, values in times.items()}


def _rows(models: dict[str, Any], unet: Any, compared: dict[str, Any], times: dict[str, float]) -> list[dict[str, Any]]:
    """One row per precision, the float one first: what the table shows."""
    from ..benchmarking import weight_bytes
    from ..bops import count_bops

    counts = {recipe: count_bops(model) for recipe, model in models.items()}
    first = counts[RECIPES[0]]
    parameters = 4 * sum(p.numel() for p in unet.parameters())
    rows: list[dict[str, Any]] = [
        {
            "precision": "float32",
            "weight_bytes": parameters,
            "gbops": first.reference / 1e9,
            "bops_ratio": 1.0,
            "ms_per_step": times["float32"],
            "psnr_db": None,
            "psnr_db_min": None,
        }
    ]
    for recipe, model in models.items():
        rows.append(
            {
                "precision": recipe,
                "weight_bytes": weight_bytes(model),
                "gbops": counts[recipe].total / 1e9,
                "bops_ratio": counts[recipe].ratio,
                "ms_per_step": times[recipe],
                "psnr_db": compared[recipe].psnr_db,
                "psnr_db_min": compared[recipe].psnr_db_min,
            }
        )
    return rows


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    from .doctor import processor

    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    from ..runtime.canonical_json import dump
    from ..runtime.files import write_file

    write_file(folder / "report.json", dump(report))


def _show(console: Any, report: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    settings, computer = report["settings"], report["machine"]
    table = Table("precision", "weights", "", "GBOPs", "", "ms/step", "", "PSNR to float", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    base = report["rows"][0]
    for row in report["rows"]:
        gains = ("weight_bytes", "gbops", "ms_per_step")
        smaller, fewer, faster = ("" if row is base else f"{base[name] / row[name]:.1f}x" for name in gains)
        table.add_row(
            row["precision"] if row is base else _label(row["precision"]),
            *(megabytes(row["weight_bytes"]), smaller),
            *(f"{row['gbops']:.1f}", fewer),
            *(f"{row['ms_per_step']:.1f}", faster),
            "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB",
        )
    console.print(table)
    console.print(
        f"DDIM {settings['steps']} steps, {settings['n']} images, batch {settings['batch']}; {computer['cpu']}, "
        f"{computer['threads']} threads, torch {computer['torch']}; {report['seconds']:.0f} s in all",
        soft_wrap=True,
    )
    console.print(f"{report['out']}: {', '.join(report['files'])}, report.json", soft_wrap=True)
