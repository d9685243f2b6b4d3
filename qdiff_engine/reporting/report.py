"""A quantised model beside its float original, as a page: what was measured, and the pictures of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..alignment.agreement import LayerAgreement, layer_agreement
from ..bops import Bops, count_bops
from ..correction.measurement import moments
from ..evaluation import AUTO, Comparison, OnStep, compare_all, decibels
from ..graph.interpret import flatten_conditioning
from ..pictures import labelled_rows
from ..plans.snr import signal_to_noise
from ..quality import Extractor
from ..runtime.model import IntegerUNet
from ..runtime.summary import inspect
from ..samplers import mismatches, sampler_key
from ..sampling import Conditioning, conditioning_for, initial_noise, timestep_tensor
from ..tables import Table
from . import charts
from .page import Picture, Section, page

MODEL, PLAIN = "integers", "integers without correction"
_SHOWN_SAMPLES = 16


@dataclass(frozen=True)
class Report:
    """What `measure` found.

    Args:
        summary: the object of ``qdiff inspect``; ``bops``: the model's.
        comparisons: under `MODEL`, and under `PLAIN` where the model carries a correction.
        table: scales and corrections by row.
        signal_db: 10 log10(alpha_bar / (1 - alpha_bar)) of every step; None where the sampler does not tell.
        corrections: tables [R, C] or [R] to draw against the timestep, by title.
        noise: likewise what was measured of the quantisation noise.
        off: why the corrections are not for this sampler, and were off; empty where they were on.
        key: what the artifact belongs to.
        layers: each layer's integers beside the simulation of them.
    """

    summary: dict[str, Any]
    bops: Bops
    comparisons: dict[str, Comparison]
    table: Table
    signal_db: list[float] | None
    corrections: dict[str, Tensor]
    key: dict[str, Any]
    layers: Sequence[LayerAgreement] = ()
    noise: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    off: Sequence[str] = ()

    @property
    def steps_modes(self) -> list[str]:
        """The mode that served each step."""
        return [self.table.modes[self.table.row(t)] for t in self.comparisons[MODEL].timesteps]


def measure(
    model: IntegerUNet,
    unet: nn.Module,
    scheduler: Any,
    steps: int,
    samples: int = 16,
    seed: int = 0,
    *,
    eta: float = 0.0,
    guidance_scale: float | None = None,
    unconditional: Conditioning = None,
    conditioning: Conditioning = None,
    batch: int = 16,
    features: Extractor | str | None = AUTO,
    on_step: OnStep | None = None,
) -> Report:
    """Compare ``model`` with ``unet`` (with and without its correction, if it has one) and collect what a page shows.

    Args:
        steps, samples, seed, eta, guidance_scale, unconditional, conditioning, batch, features, on_step: as for
            `evaluation.compare`.
    """
    models = {MODEL: model}
    corrections = correction_tables(model)
    if corrections:
        models[PLAIN] = model.with_table(model.table.uncorrected())  # which drops what is for its sampler, too
    channels, height, width = (int(size) for size in model.graph.inputs["sample"][1:])
    comparisons = compare_all(
        models,
        unet,
        scheduler,
        (channels, height, width),
        steps,
        samples,
        seed,
        eta=eta,
        guidance_scale=guidance_scale,
        unconditional=unconditional,
        conditioning=conditioning,
        batch=batch,
        features=features,
        on_step=on_step,
    )
    try:
        signal = [decibels(v, 1.0) for v in signal_to_noise(scheduler, comparisons[MODEL].timesteps)]
    except ValueError:  # no alphas_cumprod, or timesteps that are no indices of it
        signal = None
    sampler = sampler_key(scheduler, steps, eta, guidance_scale)
    return Report(
        inspect(model),
        count_bops(model),
        comparisons,
        model.table,
        signal,
        corrections,
        model.key,
        simulated_layers(model, seed, conditioning),
        noise_tables(model),
        [] if model.correction is None else mismatches(model, sampler),
    )


def simulated_layers(model: IntegerUNet, seed: int, conditioning: Conditioning) -> list[LayerAgreement]:
    """Every layer's integers beside the simulation, on two samples of noise in the first row with most integers."""
    row = int((model.table.bits != 16).sum(1).argmax())
    sample = initial_noise((2, *(int(size) for size in model.graph.inputs["sample"][1:])), seed)
    given = flatten_conditioning(conditioning_for(conditioning, range(2)))
    return layer_agreement(
        model, {"sample": sample, "timestep": timestep_tensor(model.table.timesteps[row], 2), **given}
    )


def correction_tables(model: IntegerUNet) -> dict[str, Tensor]:
    """What corrects the model, by row and title: e' = a e + b, g, B and s' / s; only what acts."""
    tables: dict[str, Tensor] = {}
    if model.table.corrects():
        tables |= {"scale a": model.table.output_scale, "shift b": model.table.output_shift}
    if model.correction is not None and model.correction.has_input_bias:
        bias = model.correction.input_bias.unflatten(1, (-1, 1)).flatten(2)  # [R, C, P]
        tables["input bias B (root mean square)"] = bias.square().mean(-1).sqrt()
    if model.correction is not None and bool((model.correction.input_scale != 1).any()):
        tables["input scale g"] = model.correction.input_scale
    if model.correction is not None and bool((model.correction.sigma_scale != 1).any()):
        tables["sigma' / sigma"] = model.correction.sigma_scale
    return tables


def noise_tables(model: IntegerUNet) -> dict[str, Tensor]:
    """What was measured of d = e_hat - e in the mode of each row, by title; empty where that was not measured."""
    try:
        found = None if model.noise is None else moments(model.noise, model.table.modes)
    except ValueError:  # measured in other modes
        found = None
    if found is None:
        return {}
    normality = found.normality(found.k)
    return {
        "k = Cov(d, e) / Var(e)": found.k,
        "|e| / |d|": found.snr.clamp(max=1e6),  # infinite where nothing is rounded
        "skewness of d - k e": normality.skewness,
        "excess kurtosis of d - k e": normality.excess_kurtosis,
    }


def render(report: Report, title: str) -> str:
    """The page of ``report``; one file that loads nothing."""
    comparison = report.comparisons[MODEL]
    lead = (
        f"{comparison.samples} samples of the same seeds in floating point and on integers, "
        f"{len(comparison.timesteps)} steps. Recipe: {_recipe(report.summary['recipe'])}."
    )
    sections = [
        Section("Summary", rows=summary_rows(report)),
        _samples(report),
        _signal_to_noise(report),
        _errors(report),
        *_corrections(report),
        Section(
            "Activation ranges",
            "The largest value that each quantiser's integers can hold, by layer and timestep. Grey: floating point.",
            [Picture(charts.range_heat_map(report.table), "activation ranges, layers by timesteps")],
        ),
        Section(
            "BOPs by layer",
            f"Multiplications times bit widths, per sample and step, averaged over the plan: "
            f"{report.bops.total / 1e9:.1f} GBOPs against {report.bops.reference / 1e9:.1f} in floating point.",
            [Picture(charts.bops_by_layer(report.bops), "BOPs of the largest layers")],
        ),
        *_layers(report),
        Section("What it belongs to", rows=[["field", "value"], *_key_rows(report.key)]),
    ]
    return page(title, lead, sections)


def _recipe(recipe: Mapping[str, Any]) -> str:
    plain = {name: value if not isinstance(value, list) else "given by row" for name, value in recipe.items()}
    return ", ".join(f"{name} {value}" for name, value in plain.items())


def _key_rows(key: Mapping[str, Any]) -> list[list[str]]:
    return [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in sorted(key.items())]


def summary_rows(report: Report) -> list[list[str]]:
    """The summary table, one column per comparison."""
    columns, bops, sizes = list(report.comparisons), report.bops, report.summary
    rows = [["", *columns]]

    def row(name: str, *values: str) -> None:
        rows.append([name, *values, *[""] * (len(columns) - len(values))])

    modes = report.table.modes
    row("plan", ", ".join(f"{modes.count(m)} of {len(modes)} rows at {m}" for m in dict.fromkeys(modes)))
    size, full = sizes["size_bytes"], sizes["float_size_bytes"]
    row("size", f"{size / 1e6:.2f} MB ({full / max(size, 1):.1f} times smaller than float32)")
    row("BOPs", f"{bops.total / 1e9:.1f} GBOPs ({bops.ratio:.1f} times fewer than in floating point)")
    if bops.switchable_fraction is not None:
        row("BOPs of the layers that the plan switches", f"{bops.switchable_fraction:.3g} of those at A8")
    found = [report.comparisons[name] for name in columns]
    row("PSNR to float", *(f"{c.psnr_db:.2f} dB (worst {c.psnr_db_min:.2f} dB)" for c in found))
    row("SSIM to float", *(f"{sum(c.ssim) / len(c.ssim):.4f}" for c in found))
    row("latent error at the end", *(f"{c.latent_error[-1]:.4f}" for c in found))
    row("Fréchet distance of features to float", *(_distance(c) for c in found))
    seen = [c.perception for c in found]
    if seen[0].class_accuracy is not None:
        row("same class as the float image", *(f"{p.class_accuracy:.1%}" for p in seen))
        row("entropy of an image's class (float)", *(_pair(p.class_entropy, p.class_entropy_float) for p in seen))
        row("entropy of the set's classes (float)", *(_pair(p.class_diversity, p.class_diversity_float) for p in seen))
    return rows


def _distance(comparison: Comparison) -> str:
    seen = comparison.perception
    value = "not taken" if seen.frechet_to_float is None else f"{seen.frechet_to_float:.4g}"
    return f"{value} ({seen.frechet_note})" if seen.frechet_note else value


def _pair(value: float | None, float_value: float | None) -> str:
    return f"{value:.3f} nats ({float_value:.3f})"


def _samples(report: Report) -> Section:
    comparison = report.comparisons[MODEL]
    if comparison.images.shape[1] not in (1, 3):
        return Section("Samples", f"Latents of {comparison.images.shape[1]} channels make no picture.")
    rows = {"float32": comparison.float_images[:_SHOWN_SAMPLES]}
    for name, other in report.comparisons.items():
        rows[name.replace(" without", "\nwithout")] = other.images[:_SHOWN_SAMPLES]
    png = labelled_rows(rows, "equal columns have equal seeds")
    return Section("Samples", "", [Picture(png, "samples of the float network above those of the integer model")])


def _signal_to_noise(report: Report) -> Section:
    lines: dict[str, list[float]] = {}
    if report.signal_db is not None:
        lines["signal in the latents"] = report.signal_db
    for name, comparison in report.comparisons.items():
        lines[f"prediction of {name}"] = comparison.step_sqnr_db
    png = charts.over_timesteps(
        report.comparisons[MODEL].timesteps, lines, "signal to noise, dB", modes=report.steps_modes
    )
    text = (
        "Signal to diffusion noise in the latents, and the float prediction to the quantisation noise in it, both fed "
        "the float trajectory. The ground shows the precision at which each step runs."
    )
    return Section("Signal to noise", text, [Picture(png, "signal to noise ratios against the timestep")])


def _errors(report: Report) -> Section:
    lines = {name: comparison.latent_error for name, comparison in report.comparisons.items()}
    png = charts.over_timesteps(
        report.comparisons[MODEL].timesteps, lines, "relative distance", modes=report.steps_modes, logarithmic=True
    )
    text = "Distance of the latents to the float trajectory after each step, relative to their size."
    return Section("Accumulated error", text, [Picture(png, "latent error against the timestep")])


def _layers(report: Report) -> list[Section]:
    if not report.layers:
        return []
    rows = [["layer", "input integers that differ", "by at most", "largest difference of the output, relative"]]
    rows += [[x.name, f"{x.flipped:.3%}", str(x.furthest), f"{x.error:.1e}"] for x in report.layers]
    text = (
        "What is learnt is learnt on a simulation in floating point. Each layer beside it, fed the simulation's input: "
        "integers that differ are rounding ties seen differently."
    )
    return [Section("Simulation and integers", text, rows=rows)]


def _corrections(report: Report) -> list[Section]:
    """What was measured of the noise, and what corrects it."""
    measured = (
        "What quantisation adds, d = e_hat - e, both fed the float trajectory, as measured for the corrections. "
        "Skewness and excess kurtosis are 0 for normal noise."
    )
    what = "What the artifact's corrections do at each timestep."
    if report.off:
        what = f"The artifact's corrections are for another setting and were off here: {'; '.join(report.off)}."
    named = (("Quantisation noise", measured, report.noise), ("Corrections", what, report.corrections))
    return [
        Section(
            title,
            text,
            [
                Picture(charts.correction_lines(report.table.timesteps, values, name), f"{name} against the timestep")
                for name, values in tables.items()
            ],
        )
        for title, text, tables in named
        if tables
    ]
