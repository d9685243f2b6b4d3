"""Charts of a report as PNG bytes; time runs from left (noise) to right (image) in all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bops import Bops
from ..pictures import figure_png, make_figure
from ..tables import Table

COLOURS = ("#1f4e79", "#d9822b", "#3f8f6b", "#8a4f9e")
MODE_COLOURS = {"A4": "#f2b8a0", "A8": "#cfe3f5", "A16": "#d8ecd2"}
_SHOWN_BARS = 20
_LABELLED_SITES = 90
_AXIS = "timestep (noise on the left, image on the right)"


def over_timesteps(
    timesteps: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    label: str,
    modes: Sequence[str] | None = None,
    logarithmic: bool = False,
) -> bytes:
    """PNG of several quantities against the timestep; ``modes``, one per timestep, shade the ground.

    Args:
        lines: one value per timestep each; values that are not finite (or not positive on a logarithmic axis) are
            left out.
    """
    figure, (axis,) = make_figure(1, 1, size=(9, 3.4))
    for colour, (name, values) in zip(_cycled(len(lines)), lines.items(), strict=True):
        shown = [v if math.isfinite(v) and (v > 0 or not logarithmic) else math.nan for v in values]
        axis.plot(timesteps, shown, color=colour, lw=1.6, marker="o" if len(timesteps) < 12 else None, ms=3, label=name)
    if modes is not None:
        _shade(axis, timesteps, modes)
    if logarithmic and any(v > 0 for values in lines.values() for v in values):
        from matplotlib.ticker import LogLocator

        axis.set_yscale("log")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    _dress(axis, timesteps, label)
    figure.legend(loc="outside upper left", ncols=3, fontsize=9, frameon=False)
    return figure_png(figure)


def _cycled(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _shade(axis: Any, timesteps: Sequence[float], modes: Sequence[str]) -> None:
    """A band per run of equal modes, its edges half-way between timesteps."""
    named: set[str] = set()
    start = 0
    for i in range(1, len(modes) + 1):
        if i == len(modes) or modes[i] != modes[start]:
            mode = modes[start]
            label = None if mode in named else f"steps at {mode}"
            left, right = _edge(timesteps, start), _edge(timesteps, i)
            axis.axvspan(left, right, color=MODE_COLOURS[mode], alpha=0.6, lw=0, zorder=0, label=label)
            named.add(mode)
            start = i


def _edge(timesteps: Sequence[float], i: int) -> float:
    """Where the band of timestep i begins."""
    if len(timesteps) == 1:
        return timesteps[0] + (0.5 if i == 0 else -0.5)
    if i == 0:
        return timesteps[0] + (timesteps[0] - timesteps[1]) / 2
    if i == len(timesteps):
        return timesteps[-1] - (timesteps[-2] - timesteps[-1]) / 2
    return (timesteps[i - 1] + timesteps[i]) / 2


def _dress(axis: Any, timesteps: Sequence[float], label: str) -> None:
    axis.set_xlim(_edge(timesteps, 0), _edge(timesteps, len(timesteps)))
    axis.set_xlabel(_AXIS, fontsize=9)
    axis.set_ylabel(label, fontsize=9)
    axis.grid(alpha=0.25, lw=0.5)
    axis.tick_params(labelsize=8, which="both")
    axis.spines[["top", "right"]].set_visible(False)


def correction_lines(timesteps: Sequence[float], values: Tensor, label: str) -> bytes:
    """PNG of a correction table [R, C] or [R] against the timestep: the mean over channels and their span."""
    channels = values.double().reshape(len(timesteps), -1)
    figure, (axis,) = make_figure(1, 1, size=(9, 2.6))
    low, high = channels.amin(1).tolist(), channels.amax(1).tolist()
    axis.plot(timesteps, channels.mean(1).tolist(), color=COLOURS[0], lw=1.6, label="mean over channels")
    _dress(axis, timesteps, label)
    if channels.shape[1] > 1:
        axis.fill_between(timesteps, low, high, color=COLOURS[0], alpha=0.2, lw=0, label="span over channels")
        figure.legend(loc="outside upper left", ncols=2, fontsize=9, frameon=False)
    return figure_png(figure)


def range_heat_map(table: Table) -> bytes:
    """PNG of log10 max(|low|, |high|) of the range that each site's integers cover, sites by rows.

    low = s (-2^(b-1) - z), high = s (2^(b-1) - 1 - z); rows where a site floats are grey.
    """
    size = covered(table).T
    sites, rows = size.shape
    figure, (axis,) = make_figure(1, 1, size=(9, min(max(2.5, 0.11 * sites + 1), 10)))
    axis.set_facecolor("#d0d0d0")
    picture = axis.imshow(
        size.log10().numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        extent=(-0.5, rows - 0.5, sites, 0),
    )
    ticks = sorted({round(j * (rows - 1) / 9) for j in range(10)})
    axis.set_xticks(ticks, [f"{table.timesteps[r]:g}" for r in ticks])
    every = math.ceil(sites / _LABELLED_SITES)
    axis.set_yticks([s + 0.5 for s in range(0, sites, every)], [table.sites[s] for s in range(0, sites, every)])
    axis.tick_params(axis="y", labelsize=5.5)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel(_AXIS, fontsize=9)
    bar = figure.colorbar(picture, ax=axis, shrink=0.6, pad=0.01)
    bar.set_label("log10 of the largest value", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure_png(figure)


def covered(table: Table) -> Tensor:
    """float64 [R, S]: the largest magnitude that a site's integers reach; NaN where it floats."""
    bits = table.bits.double()
    scale, zero_point = table.scale.double(), table.zero_point.double()
    low, high = scale * (-(2 ** (bits - 1)) - zero_point), scale * (2 ** (bits - 1) - 1 - zero_point)
    return torch.maximum(low.abs(), high.abs()).masked_fill(bits == 16, math.nan)


def bops_by_layer(bops: Bops) -> bytes:
    """PNG of the layers' BOPs, the largest first; the many small ones together."""
    layers = sorted(bops.layers, key=lambda layer: -layer.gbops)
    shown = [(layer.name, layer.gbops, COLOURS[layer.weight_bits == 32]) for layer in layers[:_SHOWN_BARS]]
    rest = layers[_SHOWN_BARS:]
    if rest:
        shown.append((f"{len(rest)} smaller ones", math.fsum(layer.gbops for layer in rest), "#8c959f"))
    figure, (axis,) = make_figure(1, 1, size=(9, 0.24 * len(shown) + 1))
    places = range(len(shown))
    axis.barh(places, [value for _, value, _ in shown], color=[colour for *_, colour in shown])
    axis.set_yticks(places, [name for name, *_ in shown])
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.set_xlabel("GBOPs per sample and step (orange: floating point, 32 x 32 bits)", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    return figure_png(figure)
