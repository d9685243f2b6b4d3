"""``qdiff report``: an artifact beside its float original, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import (
    Command,
    check_conditioning,
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
    use_machine,
)
from .output import Output, megabytes
from .running import eta_of, load_reference

PAGE = "index.html"


@click.command(cls=Command)
@click.argument("artifact", metavar="ART")
@click.option("--reference", required=True, metavar="MODEL", help="The float network that ART was made from.")
@click.option("--out", required=True, metavar="DIR", help="Folder for index.html, which needs no other file.")
@count_option("--steps", None, "Denoising steps; those of the calibration otherwise.")
@count_option("--n", 16, "Images to compare.")
@count_option("--seed", 0, "Seed of the initial noise.", least=0)
@features_option
@sampler_option
@sampling_options
@machine_options
@pass_output
def report(
    output: Output,
    artifact: str,
    reference: str,
    out: str,
    steps: int | None,
    n: int,
    seed: int,
    features: str,
    sampler: str,
    eta: float | None,
    guidance: float | None,
    conditioning: Path | None,
    batch: int,
    device: str,
    threads: int | None,
) -> None:
    """Show what quantisation did to ART: samples, errors, signal to noise, ranges and BOPs, on one page."""
    guided, extractor = guidance_arguments(conditioning, guidance), read_features(features)
    from ..reporting.report import correction_tables, measure, render
    from ..runtime.files import write_file
    from ..runtime.model import load

    model = load(artifact, device=use_machine(device, threads))
    check_conditioning(model, guided["conditioning"], artifact)
    unet = load_reference(reference, artifact, model.key)
    scheduler = make_sampler(sampler, scheduler_of(model.key), artifact)
    steps = steps or int(model.key.get("steps", 50))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    runs = 3 if correction_tables(model) else 2
    with output.progress("comparing", runs * steps) as advance:
        found = measure(
            model,
            unet,
            scheduler,
            steps,
            n,
            seed,
            eta=eta_of(eta, model.key, scheduler),
            batch=batch,
            features=extractor,
            on_step=lambda *_: advance(),
            **guided,
        )
    text = render(found, f"{Path(artifact).resolve().name}: integers beside floating point").encode()
    write_file(folder / PAGE, text)
    data: dict[str, Any] = {
        "page": str(folder / PAGE),
        "bytes": len(text),
        "comparisons": {name: comparison.to_dict() for name, comparison in found.comparisons.items()},
    }
    output.result(data, lambda console: console.print(f"{data['page']}: {megabytes(len(text))}", soft_wrap=True))
