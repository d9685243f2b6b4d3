"""Pictures as PNG bytes: grids of samples, labelled rows of them, and activation ranges against the timestep."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .calibration.calibration import Calibration
from .tables import Table

_LEAST_SIDE = 64  # pixels of a picture in a grid; smaller ones are enlarged by a whole factor
_GAP = 2
_BACKGROUND = 255
_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0")


def pixels(images: Tensor) -> Tensor:
    """uint8 [n, H, W, C] of images [n, C, H, W] in [-1, 1]; C is 1 or 3, values outside are clamped, NaN is black."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [n, 1 or 3, H, W], got {list(images.shape)}")
    scaled = (images.float().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def grid(images: Tensor, columns: int | None = None) -> bytes:
    """PNG of images [n, C, H, W] in [-1, 1], in rows of ``columns`` (near-square by default)."""
    values = pixels(images)
    columns = columns or math.ceil(math.sqrt(len(values)))
    return _png(_tiled(values, columns))


def _tiled(values: Tensor, columns: int) -> Tensor:
    """uint8 [n, H, W, C] -> one picture [rows H, columns W, C] with white gaps, small pictures enlarged."""
    n, height, width, channels = values.shape
    factor = max(1, math.ceil(_LEAST_SIDE / max(height, width)))
    values = values.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    height, width = height * factor + _GAP, width * factor + _GAP
    rows = math.ceil(n / columns)
    picture = torch.full((rows * height + _GAP, columns * width + _GAP, channels), _BACKGROUND, dtype=torch.uint8)
    for i, value in enumerate(values):
        top, left = (i // columns) * height + _GAP, (i % columns) * width + _GAP
        picture[top : top + len(value), left : left + value.shape[1]] = value
    return picture


def _png(picture: Tensor) -> bytes:
    from PIL import Image

    array = picture.numpy()
    file = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, format="PNG")
    return file.getvalue()


def labelled_rows(rows: Mapping[str, Tensor], title: str) -> bytes:
    """PNG with one labelled row of images [n, C, H, W] per entry of ``rows``, in order, equal columns equal seeds."""
    longest = max(len(images) for images in rows.values())
    figure, axes = make_figure(len(rows), 1, size=(max(6.0, 1.3 + 0.68 * longest), 0.45 + 0.72 * len(rows)))
    for axis, (label, images) in zip(axes, rows.items(), strict=True):
        picture = _tiled(pixels(images), len(images)).numpy()
        axis.imshow(picture if picture.shape[2] == 3 else picture[:, :, 0], cmap="gray", vmin=0, vmax=255)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
        axis.set_xticks([]), axis.set_yticks([])
        axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure_png(figure)


def activation_ranges(calibration: Calibration, tables: Mapping[str, Table], sites: Sequence[str]) -> bytes:
    """PNG with a panel per site: observed range and, for every table, the range its integers cover, against t.

    The covered range of b bits is [s (-2^(b-1) - z), s (2^(b-1) - 1 - z)]; rows where the site floats are left out.
    """
    columns = min(2, len(sites))
    rows = math.ceil(len(sites) / columns)
    figure, axes = make_figure(rows, columns, size=(5.5 * columns, 2.7 * rows + 0.6))
    for axis in axes[len(sites) :]:
        axis.set_visible(False)
    timesteps = list(calibration.timesteps)
    for axis, site in zip(axes, sites, strict=False):
        observed = calibration.ranges[:, calibration.sites.index(site)]
        low, high = observed[:, 0].tolist(), observed[:, 1].tolist()
        axis.fill_between(timesteps, low, high, color="#9498a0", alpha=0.3, lw=0, label="observed values")
        for colour, (name, table) in zip(_COLOURS, tables.items(), strict=False):
            _draw_covered(axis, table, site, name, colour)
        axis.set_title(site, fontsize=9, loc="left")
        axis.axhline(0, color="black", lw=0.5, alpha=0.5)
        axis.set_xlim(max(timesteps), min(timesteps) - (1 if len(timesteps) == 1 else 0))
        axis.grid(alpha=0.25, lw=0.5)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[max(0, len(sites) - columns) : len(sites)]:
        axis.set_xlabel("timestep (noise on the left, image on the right)", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=9, frameon=False)
    return figure_png(figure)


def _draw_covered(axis: Any, table: Table, site: str, name: str, colour: str) -> None:
    column = table.sites.index(site)
    bits = table.bits[:, column].double()
    scale, zero_point = table.scale[:, column].double(), table.zero_point[:, column].double()
    low, high = scale * (-(2 ** (bits - 1)) - zero_point), scale * (2 ** (bits - 1) - 1 - zero_point)
    floating = bits == 16
    for i, edge in enumerate((low, high)):
        values = edge.masked_fill(floating, math.nan).tolist()
        axis.plot(table.timesteps, values, color=colour, lw=1.4, label=name if i == 0 else None)


def make_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure of its own, without pyplot's global state, and its axes in reading order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def figure_png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
