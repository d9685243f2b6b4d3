"""The report: a page that loads nothing, whose text cannot become markup, with the figures that `compare` gives."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from typing import Any

import networks
import numpy
import pytest
import torch
from PIL import Image

import qdiff_engine as qe
from qdiff_engine.correction.measurement import moments
from qdiff_engine.reporting import charts
from qdiff_engine.reporting.page import Picture, Section, page
from qdiff_engine.reporting.report import MODEL, PLAIN, Report, correction_tables, measure, render
from qdiff_engine.runtime.model import IntegerUNet
from qdiff_engine.tables import Correction

FETCHING = {
    "src",
    "href",
    "srcset",
    "action",
    "formaction",
    "poster",
    "data",
    "background",
    "cite",
    "ping",
    "xlink:href",
}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "section", "h1", "h2", "p", "div", "img"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}


class Reader(HTMLParser):
    """Collects tags, what they fetch, styles, cells of tables and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.styles: list[str] = []
        self.images: list[tuple[str, bytes]] = []
        self.policy = ""
        self.cells: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.fetched += [value for name, value in given.items() if name in FETCHING]
        self.styles += [value for name, value in given.items() if name == "style"]
        assert not [name for name in given if name.startswith("on")]
        if tag == "img":
            self.images.append((given["alt"], base64.b64decode(given["src"].partition(",")[2], validate=True)))
        if given.get("http-equiv"):
            self.policy = given["content"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "style":
            self.styles.append(data)
        elif inside in ("td", "th"):
            self.cells.append(data)
        elif inside in ("h1", "h2"):
            self.headings.append(data)


def read(text: str) -> Reader:
    """The page's parts, after checking that a browser would load nothing for it from anywhere."""
    reader = Reader(text)
    assert reader.open == [] and set(reader.tags) <= ALLOWED
    assert all(value.startswith("data:image/png;base64,") for value in reader.fetched)
    for style in reader.styles:
        assert not re.search(r"url\(|@import|image-set|expression", style, re.IGNORECASE)
    assert reader.policy.split(";")[0] == "default-src 'none'"
    assert not re.search(r"https?:|//", re.sub(r'"data:[^"]*"', "", text).replace("<!doctype html>", ""))
    return reader


def decoded(png: bytes) -> numpy.ndarray:
    """The picture, checked to show something."""
    picture = numpy.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert min(picture.shape[:2]) > 100 and len(numpy.unique(picture.reshape(-1, 3), axis=0)) > 3
    return picture


def mixed_model() -> IntegerUNet:
    recipe = qe.Recipe.named("w4a8", plan=("A16", "A8", "A4", "A4"))
    return qe.quantize(networks.network("unet2d"), networks.calibration("unet2d"), recipe)


def corrected(model: IntegerUNet) -> IntegerUNet:
    shape = model.table.output_scale.shape
    scale, shift = torch.full(shape, 0.8), 0.1 * networks.normal(*shape)
    return networks.rebuilt(model, table=dataclasses.replace(model.table, output_scale=scale, output_shift=shift))


def measured(model: IntegerUNet, **changes: Any) -> Report:
    return measure(
        model, networks.network("unet2d"), networks.ddim(), networks.STEPS, **{"samples": 2, "batch": 2, **changes}
    )


def test_a_page_holds_everything_it_shows() -> None:
    model = mixed_model()
    report = measured(model)
    reader = read(render(report, "art: integers beside floating point"))
    assert reader.headings[0] == "art: integers beside floating point"
    assert reader.headings[1:] == [
        *("Summary", "Samples", "Signal to noise", "Accumulated error", "Activation ranges", "BOPs by layer"),
        *("Simulation and integers", "What it belongs to"),
    ]
    assert len(reader.images) == 5
    for description, png in reader.images:
        assert description and decoded(png) is not None
    expected = qe.compare(model, networks.network("unet2d"), networks.ddim(), (3, 16, 16), 4, 2)
    assert report.comparisons[MODEL].to_dict() == expected.to_dict()
    assert f"{expected.psnr_db:.2f} dB (worst {expected.psnr_db_min:.2f} dB)" in reader.cells
    assert "1 of 4 rows at A16, 1 of 4 rows at A8, 2 of 4 rows at A4" in reader.cells
    assert f"{(16 + 8 + 4 + 4) / 32:.3g} of those at A8" in reader.cells
    assert report.steps_modes == ["A16", "A8", "A4", "A4"]


def test_a_corrected_model_is_shown_with_and_without_its_correction() -> None:
    plain = mixed_model()
    report = measured(corrected(plain))
    assert list(report.comparisons) == [MODEL, PLAIN]
    assert report.comparisons[PLAIN].to_dict() == measured(plain).comparisons[MODEL].to_dict()
    assert report.comparisons[MODEL].psnr_db != report.comparisons[PLAIN].psnr_db
    assert list(report.corrections) == ["scale a", "shift b"]
    reader = read(render(report, "corrected"))
    assert "Corrections" in reader.headings and len(reader.images) == 7
    assert {MODEL, PLAIN} <= set(reader.cells)
    assert correction_tables(plain) == {}


def test_the_noise_that_was_measured_is_shown_and_corrections_that_were_off() -> None:
    plain, unet, scheduler = mixed_model(), networks.network("unet2d"), networks.ddim()
    noise = qe.measure_noise(plain, unet, scheduler, samples=2)
    found = qe.correct(plain, unet, scheduler, noise, "ptqd")
    fitting = measured(found)
    k, ratio, *_ = fitting.noise.values()
    own = moments(noise, plain.table.modes)
    assert torch.equal(k, own.k) and torch.equal(ratio, own.snr)
    reader = read(render(fitting, "fits"))
    assert reader.headings.count("Quantisation noise") == 1 and len(reader.images) == 5 + 4 + 2
    assert not fitting.off and "were off here" not in render(fitting, "fits")
    with pytest.warns(UserWarning, match="they are off"):
        other = measured(found, eta=0.5)
    assert "were off here: eta 0.5, not 0.0" in render(other, "does not")
    assert other.comparisons[MODEL].psnr_db == other.comparisons[PLAIN].psnr_db


def test_the_samplers_corrections_are_shown_too() -> None:
    plain = mixed_model()
    bias = 0.1 * networks.normal(*plain.table.output_scale.shape, 4, 5)
    scale, gain = torch.rand(2, len(plain.table.timesteps)) + 0.001
    correction = Correction("none+ibc+ivc+vsc", {}, plain.table.timesteps, bias, scale.clamp(max=1), gain)
    tables = correction_tables(plain.with_table(plain.table, correction=correction))
    b, g, sigma = tables.values()
    assert list(tables) == ["input bias B (root mean square)", "input scale g", "sigma' / sigma"]
    assert torch.allclose(b, bias.square().mean((2, 3)).sqrt())
    assert torch.equal(g, gain) and torch.equal(sigma, scale.clamp(max=1))
    report = dataclasses.replace(measured(plain), corrections=tables)
    assert "Corrections" in read(render(report, "corrected")).headings


def test_layers_are_shown_beside_their_simulation() -> None:
    """One row a layer, in a row of the plan that runs on integers; what is learnt rests on them being alike."""
    report = measure(model := mixed_model(), networks.network("unet2d"), networks.ddim(), steps=2, samples=2)
    assert {layer.name for layer in report.layers} == set(model.weights)
    assert all(layer.error < 1e-5 and layer.furthest <= 1 for layer in report.layers)
    reader = read(render(report, "page"))
    assert "Simulation and integers" in reader.headings and set(model.weights) <= set(reader.cells)
    assert "Simulation and integers" not in render(dataclasses.replace(report, layers=()), "page")


def test_text_from_a_stranger_stays_text() -> None:
    evil = '<script src="https://evil.example/x.js"></script><img src=x onerror=alert(1)>&amp;'
    report = dataclasses.replace(measured(mixed_model()), key={"model_hash": evil, evil: [evil]})
    text = render(report, evil)
    reader = Reader(text)
    assert set(reader.tags) <= ALLOWED and all(value.startswith("data:") for value in reader.fetched)
    assert evil in reader.headings and evil in reader.cells


def test_page_by_hand() -> None:
    text = page("a < b", "lead & more", [Section("one", "t", [Picture(b"png", 'x"y')], [["h"], ["c"]])])
    reader = Reader(text)
    assert reader.images == [('x"y', b"png")] and reader.cells == ["h", "c"]
    assert "a &lt; b" in text and "lead &amp; more" in text


def test_ranges_by_hand() -> None:
    table = mixed_model().table
    values = charts.covered(table)
    assert bool(values[0, table.bits[0] == 16].isnan().all()) and bool((table.bits[0] == 16).any())
    row, site = (table.bits == 4).nonzero()[0].tolist()
    s, z = float(table.scale[row, site]), int(table.zero_point[row, site])
    assert float(values[row, site]) == pytest.approx(max(abs(s * (-8 - z)), abs(s * (7 - z))))
    assert decoded(charts.range_heat_map(table)).shape[1] > 1000


def test_modes_shade_the_ground_as_widely_as_their_steps() -> None:
    """Bands meet half-way between timesteps: of 1350, A8 has 500 at the noisy end, A4 the rest."""
    png = charts.over_timesteps([900.0, 400.0, 0.0], {"x": [1.0, float("inf"), -3.0]}, "dB", ["A8", "A4", "A4"])
    picture = decoded(png)
    columns = {}
    for mode in ("A8", "A4"):
        colour = [int(charts.MODE_COLOURS[mode][i : i + 2], 16) for i in (1, 3, 5)]
        blended = [round(0.6 * c + 0.4 * 255) for c in colour]
        shaded = (abs(picture.astype(int) - blended) <= 1).all(2)
        columns[mode] = numpy.flatnonzero(shaded.sum(0) > picture.shape[0] // 3)
    assert columns["A8"].max() < columns["A4"].min()
    assert len(columns["A8"]) / len(columns["A4"]) == pytest.approx(500 / 850, rel=0.03)


@pytest.mark.parametrize("timesteps", [[500.0], [800.0, 100.0]])
def test_charts_of_few_steps(timesteps: list[float]) -> None:
    decoded(charts.over_timesteps(timesteps, {"x": [0.0] * len(timesteps)}, "x", ["A4"] * len(timesteps), True))
    decoded(charts.correction_lines(timesteps, torch.rand(len(timesteps), 3), "k"))


def test_latents_make_no_picture() -> None:
    model = networks.integer_model("sd")
    given = networks.CASES["sd"].conditioning
    report = measure(model, networks.network("sd"), networks.ddim(), 2, 2, conditioning=given)
    text = render(report, "latents")
    assert "Latents of 4 channels make no picture." in text and len(read(text).images) == 4
