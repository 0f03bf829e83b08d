"""Pictures of a report: density and kept mass by layer and step, and by layer and head.

One picture shows one method, narrow enough to be read on a phone; it comes in the colours of a `Theme`. matplotlib is
imported when something is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from sparse_compile.runtime.call_figures import CallReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.6
"""Inches; at `SCREEN_DPI` a picture is so wide on a page."""
SCREEN_DPI = 100
FONT_SIZE = 10
COLOUR_MAP = "viridis"
"""Even in lightness, so that it reads without colour vision and in grey."""
MOST_LINES = 10
"""Layers up to which each line has a name and a marker; of more, a colour bar tells the depth."""
MOST_TICKS = 13
MOST_ANNOTATED = 16
"""Heads up to which each cell holds its number."""
PNG_COLOURS = 192
MARKERS = "os^Dv<>Ph*"


@dataclass(frozen=True)
class Theme:
    """Colours of what is no data."""

    ink: str
    paper: str
    rule: str
    lines: tuple[float, float]
    """The part of the colour map that lines use, first layer to last: what stands out from the paper."""


LIGHT = Theme(ink="#20242a", paper="#ffffff", rule="#d8d9d6", lines=(0.0, 0.88))
DARK = Theme(ink="#e6e7e3", paper="#1d2025", rule="#44484f", lines=(1.0, 0.35))


class HeadMap(NamedTuple):
    """A figure of each head of each layer."""

    title: str
    values: Mapping[str, Sequence[float]]
    """By layer, from the input to the output of the model."""


def density_map(calls: Iterable[CallReport], title: str, theme: Theme = LIGHT) -> Figure:
    """Density by layer and step, mean over the branches and generations of the calls."""
    by_place = _mean_by_place(calls, "density")
    layers = list(dict.fromkeys(layer for layer, _ in by_place))
    steps = sorted({step for _, step in by_place})
    names, axis_name = short_names(layers)
    rows = [[by_place.get((layer, step), math.nan) for step in steps] for layer in layers]
    figure = new_figure(1.6 + min(0.24 * len(layers), 4.8), theme)
    axes = figure.subplots()
    picture = axes.imshow(rows, vmin=0, vmax=1, cmap=COLOUR_MAP, aspect="auto", interpolation="nearest")
    axes.set_title(title)
    axes.set_xlabel("denoising step")
    axes.set_ylabel(axis_name)
    _ticks(axes, list(map(str, steps)), names)
    bar = figure.colorbar(picture, ax=axes, pad=0.02)
    bar.set_label("density (1 = dense)")
    return dressed(figure, theme)


def kept_mass_by_step(calls: Iterable[CallReport], title: str, theme: Theme = LIGHT) -> Figure:
    """One line a layer: the attention mass its sparse calls kept, mean over branches and generations."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    by_place = _mean_by_place((call for call in calls if call.kept_mass is not None), "kept_mass")
    layers = list(dict.fromkeys(layer for layer, _ in by_place))
    names, axis_name = short_names(layers)
    colours = matplotlib.colormaps[COLOUR_MAP]
    first, last = theme.lines
    named = len(layers) <= MOST_LINES
    figure = new_figure(3.4, theme)
    axes = figure.subplots()
    for number, (layer, name) in enumerate(zip(layers, names, strict=True)):
        points = sorted((step, mass) for (of, step), mass in by_place.items() if of == layer)
        shade = first + (last - first) * number / max(1, len(layers) - 1)
        marker = MARKERS[number % len(MARKERS)] if named else ""
        axes.plot(*zip(*points, strict=True), color=colours(shade), marker=marker, markersize=5, label=name)
    axes.set_title(title)
    axes.set_xlabel("denoising step")
    axes.set_ylabel("kept share of attention mass")
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=theme.rule, linewidth=0.6)
    if named and layers:
        axes.legend(title=axis_name, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return dressed(figure, theme)


def head_maps(maps: Sequence[HeadMap], title: str, theme: Theme = LIGHT) -> Figure:
    """Heat maps of the same layers and heads side by side, on one scale from 0 to 1 (what is above looks like 1)."""
    layers = list(maps[0].values)
    names, axis_name = short_names(layers)
    heads = max((len(values) for values in maps[0].values.values()), default=0)
    figure = new_figure(1.9 + min(0.27 * len(layers), 5.4), theme)
    figure.suptitle(title)
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axes, shown in zip(panels, maps, strict=True):
        rows = [[*shown.values[layer], *[math.nan] * (heads - len(shown.values[layer]))] for layer in layers]
        picture = axes.imshow(rows, vmin=0, vmax=1, cmap=COLOUR_MAP, aspect="auto", interpolation="nearest")
        axes.set_title(shown.title)
        axes.set_xlabel("head")
        _ticks(axes, list(map(str, range(heads))), names)
        if heads * len(maps) <= MOST_ANNOTATED:
            _annotate(axes, rows)
    panels[0].set_ylabel(axis_name)
    bar = figure.colorbar(picture, ax=list(panels), pad=0.02)
    bar.set_label(" and ".join(shown.title for shown in maps))
    return dressed(figure, theme)


def short_names(layers: Sequence[str]) -> tuple[list[str], str]:
    """What tells dotted names apart, and one name for their axis: ``blocks.0.attn1`` is 0 of ``blocks.N.attn1``."""
    split = [layer.split(".") for layer in layers]
    if len(split) < 2 or len({len(parts) for parts in split}) > 1:
        return list(layers), "layer"
    differs = [len(set(column)) > 1 for column in zip(*split, strict=True)]
    names = [".".join(part for part, own in zip(parts, differs, strict=True) if own) for parts in split]
    pattern = ".".join("N" if own else part for part, own in zip(split[0], differs, strict=True))
    return names, f"layer N of {pattern}"


def new_figure(height: float, theme: Theme, width: float = WIDTH) -> Figure:
    """An empty figure that needs no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=SCREEN_DPI, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    return figure


def dressed(figure: Figure, theme: Theme) -> Figure:
    """The figure with all text and lines in the theme's colours and in one size."""
    for axes in figure.axes:
        axes.set_facecolor(theme.rule)  # shows through where there is no value
        if axes.lines:
            axes.set_facecolor(theme.paper)
        axes.tick_params(colors=theme.ink, labelsize=FONT_SIZE)
        for label in (axes.title, axes.xaxis.label, axes.yaxis.label):
            label.set(color=theme.ink, fontsize=FONT_SIZE)
        for spine in axes.spines.values():
            spine.set_color(theme.rule)
        if (legend := axes.get_legend()) is not None:
            legend.get_title().set(color=theme.ink, fontsize=FONT_SIZE)
            for text in legend.get_texts():
                text.set(color=theme.ink, fontsize=FONT_SIZE)
    if (heading := figure.get_suptitle()) != "":
        figure.suptitle(heading, color=theme.ink, fontsize=FONT_SIZE + 1)
    return figure


def png_of(figure: Figure, dpi: int = 2 * SCREEN_DPI) -> bytes:
    """The figure as the bytes of a PNG of few colours; twice as fine as a page shows it unless said otherwise."""
    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    with Image.open(whole) as picture:
        reduced = picture.convert("RGB").quantize(PNG_COLOURS, dither=Image.Dither.NONE)
    reduced.save(small, format="PNG", optimize=True)
    return small.getvalue()


def _mean_by_place(calls: Iterable[CallReport], what: str) -> dict[tuple[str, int], float]:
    """The mean of a figure by (layer, step)."""
    values: dict[tuple[str, int], list[float]] = {}
    for call in calls:
        name = f"{call.layer}, attention {call.ordinal + 1}" if call.ordinal else call.layer
        values.setdefault((name, call.step), []).append(getattr(call, what))
    return {place: fmean(found) for place, found in values.items()}


def _ticks(axes: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    """A name below each column and beside each row, less where they would touch."""
    for set_ticks, names in ((axes.set_xticks, columns), (axes.set_yticks, rows)):
        stride = -(-len(names) // MOST_TICKS)
        set_ticks(range(0, len(names), stride), names[::stride])


def _annotate(axes: Axes, rows: Sequence[Sequence[float]]) -> None:
    for place, row in enumerate(rows):
        for column, value in enumerate(row):
            if not math.isnan(value):
                colour = "black" if value > 0.6 else "white"
                axes.text(column, place, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=FONT_SIZE - 2)
