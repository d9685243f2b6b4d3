"""``qdiff calibrate``, ``inspect`` and ``bops``: make an artifact, and look at one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

from .correcting import check_samplers, corrected
from .learning import (
    agreement,
    agreement_summary,
    align_options,
    align_settings,
    align_summary,
    aligned,
    check_pairs,
    learning_iterations,
    learning_now,
    rounding_note,
    rounding_options,
)
from .options import (
    Command,
    check_eta,
    count_option,
    guidance_arguments,
    machine_options,
    make_sampler,
    pass_output,
    read_conditioning,
    read_plan,
    sampling_options,
    use_machine,
)
from .output import Output, megabytes

_SHOWN_LAYERS = 12


@click.command(cls=Command)
@click.argument("model", metavar="MODEL")
@click.option(
    "--recipe", "recipe_name", default="w8a8", show_default=True, help="w8a8, w4a8, w4a4, w4a8-mixed, w8a16 or w4a16."
)
@count_option("--steps", 50, "Denoising steps of the deployment sampler.")
@count_option("--samples", 64, "Trajectories to calibrate on.")
@count_option("--seed", 0, "Seed of the trajectories.", least=0)
@click.option("--out", required=True, metavar="ART", help="Folder of the artifact; work in progress is in ART.partial.")
@click.option(
    "--sampler",
    type=click.Choice(["ddim", "ddpm", "folder"]),
    default="ddim",
    show_default=True,
    help="The deployment sampler; 'folder' is the scheduler saved with MODEL.",
)
@click.option("--observer", default="mse", show_default=True, help="How ranges are found: minmax, percentile or mse.")
@rounding_options
@click.option(
    "--equalise",
    type=click.Choice(["off", "on"]),
    default="off",
    show_default=True,
    help="Divide the channels of activations by factors that the weights absorb, where a search finds that it helps.",
)
@click.option("--rows", default="step", show_default=True, help="Rows that share a range: step, group:K or static.")
@click.option("--edges", default="a16", show_default=True, help="First layer's activations: a16 (floating) or a8.")
@click.option(
    "--plan",
    help="Activation bits of each step: uniform; snr[:THRESHOLD] or snr:share=SHARE, PTQD's rule (20 % of the steps at "
    "A4); budget:FRACTION[:MODES], least final error (1 is all A8, 0.5 all A4); preset:NAME; or a JSON file.  "
    "[default: the recipe's]",
)
@click.option(
    "--correct",
    "correction",
    default="none",
    show_default=True,
    help="Quantisation noise removed at run time: none, ptqd, mmse or ner, with '+ibc' or '+ibc+ivc' (the latents' "
    "bias, and their variance) and '+vsc' (the sampler's) appended.",
)
@count_option("--correct-samples", 256, "Trajectories that --correct measures the noise on.")
@align_options
@sampling_options
@machine_options
@pass_output
def calibrate(
    output: Output,
    model: str,
    recipe_name: str,
    steps: int,
    samples: int,
    seed: int,
    out: str,
    sampler: str,
    observer: str,
    weights: str | None,
    weight_group: str,
    learn_iterations: int,
    learn_samples: int,
    learn_pairs: str,
    learn_batch: int,
    step_sizes: str,
    equalise: str,
    rows: str,
    edges: str,
    plan: str | None,
    correction: str,
    correct_samples: int,
    align: str,
    align_iterations: int | None,
    align_batch: int | None,
    align_recompute: bool,
    align_pairs: str,
    align_rounding: bool,
    eta: float | None,
    guidance: float | None,
    conditioning: Path | None,
    batch: int,
    device: str,
    threads: int | None,
) -> None:
    """Calibrate MODEL, quantise it by a recipe and save the artifact; an interrupted run resumes."""
    start = time.monotonic()
    target, partial = artifact_paths(out)
    from ..alignment.alignment import check_settings
    from ..models import load_model
    from ..recipe import Recipe, check_correct
    from ..runtime.files import remove_folder
    from ..runtime.summary import layer_rows

    changes: dict[str, Any] = {"observer": observer, "rows": rows, "edges": edges, "equalise": equalise}
    changes |= {"weight_group": int(weight_group)}
    changes |= {"learn_iterations": learn_iterations, "learn_samples": learn_samples}
    changes |= {"learn_pairs": learn_pairs, "learn_batch": learn_batch}
    changes |= {"step_sizes": step_sizes} | ({} if weights is None else {"weights": weights})
    recipe = Recipe.named(recipe_name, **changes)
    check_correct(correction)
    alignment = align_settings(align, align_iterations, align_batch, align_recompute, align_pairs, align_rounding, seed)
    place = use_machine(device, threads)
    guided = guidance_arguments(conditioning, guidance)
    loaded = load_model(model)
    needed = example_conditioning(loaded.unet.config)
    if needed is not None and guided["conditioning"] is None:
        raise ValueError(f"{model} takes the conditioning {', '.join(needed)}; give it in --conditioning FILE")
    scheduler = make_sampler(sampler, loaded.scheduler, model)
    noise = check_eta(eta, scheduler)
    check_settings(alignment, scheduler, steps, samples, noise)
    check_pairs(recipe, scheduler, steps, samples)
    if plan is not None:
        recipe = Recipe.from_dict({**recipe.to_dict(), "plan": read_plan(plan, scheduler, steps)})
    check_samplers(recipe, correction, scheduler, steps)
    output.resume = f"the finished steps are in {partial}: run the same command to resume"

    from ..calibration.calibration import calibrate as run
    from ..quantization import equalised, quantize
    from ..quantization import layers as integer_layers

    with output.progress("calibrating", steps) as advance:
        calibration = run(
            loaded.unet,
            scheduler,
            recipe,
            steps=steps,
            samples=samples,
            seed=seed,
            cache_dir=partial,
            eta=noise,
            batch=batch,
            on_step=lambda _: advance(),
            **guided,
        )
    if recipe.equalise == "on":
        from ..equalisation import progress_steps

        with output.progress("equalising", progress_steps(calibration)) as advance:
            calibration = equalised(calibration, recipe, advance, partial / "equalise")
    choices: list[Any] = []
    total = len(list(integer_layers(calibration.capture.graph))) + plan_trials(recipe, len(calibration.timesteps))
    total += learning_iterations(recipe, calibration)
    with output.progress("quantising", total) as advance:
        quantized = quantize(
            loaded.unet,
            calibration,
            recipe,
            on_layer=lambda _: advance(),
            on_trial=advance,
            on_plan=choices.append,
            on_progress=lambda learnt: advance(learning_now(learnt), learnt.advanced),
            on_start=rounding_note(output, recipe),
            cache_dir=partial,
            device=place,
        )
    quantized, learning = aligned(output, quantized, calibration, alignment, partial, place)
    learns = learning is not None or learning_iterations(recipe, calibration) > 0
    compared = agreement(output, quantized, calibration) if learns else None
    if correction != "none":
        settings = {**guided, "samples": correct_samples, "seed": seed, "batch": batch}
        quantized = corrected(output, quantized, loaded.unet, scheduler, correction, partial, settings, calibration)
    quantized.save_pretrained(target)
    remove_folder(partial)
    layers = layer_rows(quantized)
    integers = sum(row["quantized"] for row in layers)
    data = {
        "artifact": str(target),
        "seconds": round(time.monotonic() - start, 3),
        "layers_quantized": integers,
        "layers_float": len(layers) - integers,
        "plan": choices[0].to_dict() if choices else None,
        "align": learning,
        "agreement": compared,
    }
    output.result(data, lambda console: console.print(_calibrated(data), soft_wrap=True))


def plan_trials(recipe: Any, rows: int) -> int:
    """How many trials choosing the recipe's plan takes."""
    from ..plans.choice import trials

    request = recipe.plan_to_measure()
    return 0 if request is None else trials(request, rows)


def _calibrated(data: dict[str, Any]) -> str:
    plan = data["plan"]
    text = (
        f"{data['artifact']}: {data['layers_quantized']} layers on integers, {data['layers_float']} in floating point"
        f" ({data['seconds']:.0f} s)"
    )
    if data["align"] is not None:
        text += f"\n{align_summary(data['align'])}"
    if data["agreement"] is not None:
        text += f"\n{agreement_summary(data['agreement'])}"
    if plan is None:
        return text
    shares = ", ".join(f"{share:.0%} of the steps at {mode}" for mode, share in plan["shares"].items() if share)
    why = "least final error" if plan["final_error"] is not None else "PTQD's SNR rule"
    why = f"SNR threshold {plan['threshold']:.3g}" if plan["threshold"] is not None else why
    return f"{text}\nplan for {plan['serves']}: {shares}; {plan['switchable_fraction']:.3g} of the BOPs at A8 ({why})"


def artifact_paths(out: str) -> tuple[Path, Path]:
    """(the artifact's folder, the folder of work in progress beside it); refused early where they cannot be written."""
    from ..runtime.artifact import FILES
    from ..runtime.files import check_replaceable

    target = Path(os.path.realpath(out))
    if not out or not target.name:
        raise ValueError(f"--out {out!r} is not the name of a folder; name one, such as unet-w8a8")
    check_replaceable(target, FILES)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    if os.path.lexists(partial) and not partial.is_dir():
        raise FileExistsError(f"{partial} is a file where work in progress would go; move it away")
    return target, partial


@click.command(cls=Command)
@click.argument("artifact", metavar="ART")
@click.option("--tune", is_flag=True, help="Measure every layer on --device, on integers and in floating point.")
@count_option("--batch", 2, "With --tune: samples per call.")
@machine_options
@pass_output
def inspect(output: Output, artifact: str, tune: bool, batch: int, device: str, threads: int | None) -> None:
    """Show what an artifact holds: sizes, plan, and every layer with the reason why it is not on integers."""
    from ..runtime.summary import inspect as summarise

    timings = None
    if not tune and (device, threads) != ("cpu", None):
        raise ValueError("--device and --threads say where --tune measures; give --tune, too")
    if tune:
        from ..runtime.model import load

        target = use_machine(device, threads)
        with output.progress("measuring layers", 1) as advance:
            timings = load(artifact, device=target, tune=True, tune_batch=batch).timings
            advance()
    data = summarise(artifact, timings)
    output.result(data, lambda console: _show_summary(console, data))


def _show_summary(console: Any, data: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=None)
    timed = any("integer_ms" in row for row in data["layers"])
    columns = ["layer", "operator", "shape", "weights", *(["integer ms", "float ms"] if timed else []), ""]
    for name in columns:
        right = name in ("weights", "integer ms", "float ms")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in data["layers"]:
        bits = f"int{row['weight_bits']}" if row["quantized"] else "float"
        times = [f"{row[key]:.4f}" if key in row else "" for key in ("integer_ms", "float_ms")] if timed else []
        table.add_row(row["name"], row["op"], "x".join(map(str, row["shape"])), bits, *times, row["reason"] or "")
    console.print(table)
    recipe, modes = data["recipe"], [row["mode"] for row in data["plan"]]
    integers = sum(row["quantized"] for row in data["layers"])
    console.print(f"{integers} layers on integers, {len(data['layers']) - integers} in floating point")
    ratio = data["size_bytes"] / max(data["float_size_bytes"], 1)
    console.print(f"{megabytes(data['size_bytes'])}, {ratio:.3f} of {megabytes(data['float_size_bytes'])} in float32")
    counted = ", ".join(f"{modes.count(mode)} x {mode}" for mode in dict.fromkeys(modes))
    console.print(
        f"{data['rows']} rows ({counted}); recipe {', '.join(f'{k} {v}' for k, v in recipe.items())}", soft_wrap=True
    )


@click.command(cls=Command)
@click.argument("source", metavar="MODEL_OR_ART")
@click.option("--recipe", "recipe_name", help="Count MODEL as this recipe would quantise it (no calibration needed).")
@click.option("--edges", default="a16", show_default=True, help="With --recipe: a16 or a8.")
@click.option(
    "--conditioning",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keyword arguments of the network, for their shapes; found from the configuration of diffusers' own UNets.",
)
@pass_output
def bops(output: Output, source: str, recipe_name: str | None, edges: str, conditioning: Path | None) -> None:
    """Count multiplications times their bit widths, per sample and step."""
    from ..recipe import Recipe

    recipe = Recipe.named(recipe_name, edges=edges) if recipe_name else None
    if is_artifact(source):
        if recipe is not None or conditioning is not None:
            raise ValueError(f"{source} is an artifact with a recipe of its own; --recipe is for a MODEL")
        from ..bops import count_bops
        from ..runtime.model import load

        counted = count_bops(load(source))
    else:
        counted = _count_model(source, recipe, conditioning)
    data = counted.to_dict()
    output.result(data, lambda console: _show_bops(console, data))


def is_artifact(source: str) -> bool:
    """Whether a folder looks like an artifact rather than a diffusers model."""
    from ..runtime.artifact_config import GRAPH
    from ..runtime.files import previous_of

    return os.path.exists(os.path.join(source if os.path.isdir(source) else previous_of(source), GRAPH))


def _count_model(source: str, recipe: Any, conditioning: Path | None) -> Any:
    from ..bops import count_recipe
    from ..calibration.calibration import captured, sample_shape
    from ..models import load_model
    from ..sampling import Guidance

    given, _ = read_conditioning(conditioning)
    unet = load_model(source).unet
    guidance = Guidance(conditioning=given if given is not None else example_conditioning(unet.config))
    capture = captured(unet, sample_shape(unet, None), guidance)
    return count_recipe(capture.graph, capture.constants, recipe)


def example_conditioning(config: Any) -> dict[str, Any] | None:
    """Zeros in the shapes that a diffusers UNet's configuration asks for; 77 tokens of text, as CLIP gives."""
    import torch

    given: dict[str, Any] = {}
    width = getattr(config, "cross_attention_dim", None)
    if isinstance(width, int) and str(getattr(config, "_class_name", "")) == "UNet2DConditionModel":
        given["encoder_hidden_states"] = torch.zeros(1, 77, width)
    embedding = getattr(config, "class_embed_type", None)
    if getattr(config, "num_class_embeds", None) is not None or embedding == "timestep":
        given["class_labels"] = torch.zeros(1, dtype=torch.int64)
    if getattr(config, "addition_embed_type", None) == "text_time":
        times = 6 * int(config.addition_time_embed_dim)
        text = torch.zeros(1, int(config.projection_class_embeddings_input_dim) - times)
        given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": torch.zeros(1, 6)}
    return given or None


def _show_bops(console: Any, data: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("layer", overflow="fold")
    for name in ("MMAC", "weight bits", "activation bits", "GBOPs", "share"):
        table.add_column(name, justify="right")
    rows = sorted(data["layers"], key=lambda row: -row["gbops"])
    for row in rows[:_SHOWN_LAYERS]:
        share = row["gbops"] / data["total_gbops"] if data["total_gbops"] else 0.0
        bits = f"{row['weight_bits']:g}", f"{row['activation_bits']:.3g}"
        table.add_row(row["name"], f"{row['macs'] / 1e6:.2f}", *bits, f"{row['gbops']:.3f}", f"{share:.1%}")
    console.print(table)
    if len(rows) > _SHOWN_LAYERS:
        console.print(f"and {len(rows) - _SHOWN_LAYERS} smaller ones (all with --json)")
    macs = sum(row["macs"] for row in rows)
    console.print(
        f"{macs / 1e9:.3f} GMAC per sample and step; {data['total_gbops']:.1f} GBOPs, "
        f"{data['float_gbops']:.1f} in floating point: {data['ratio']:.2f} times fewer",
        soft_wrap=True,
    )
    if data["switchable_fraction"] is not None:
        console.print(f"layers that a plan switches: {data['switchable_fraction']:.3g} of their BOPs at A8")
