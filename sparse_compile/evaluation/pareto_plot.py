"""Rows of a sweep as a picture: PSNR over the share of pairs computed, one line a series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_compile.evaluation.grids import control
from sparse_compile.evaluation.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDINGS = (".png", ".svg")
MARKERS = "osD^vP*X"
LINES = {"none": ":", "pooled": "--", "coupled": "-"}
INK, FAINT = "#2b2f36", "#8a8f98"
RANDOM = " rank_by=random"
"""What the series of a control adds to that of which it is the control."""
ROOM = 3.0
"""Decibels above the highest point that is no control."""


def draw(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Write the picture as PNG and SVG, and say where.

    Args:
        rows: of one protocol.
        stem: the path without its ending.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    drawn = [row for row in rows if row["density_run"] is not None]
    colours = _draw_series(axes, [row for row in drawn if control(row["options"]) is None])
    _draw_random(axes, [row for row in drawn if control(row["options"]) == "random"], colours)
    _draw_ceiling(axes, rows)
    axes.set_xlabel("density_run: share of the pairs that the whole run computes")
    axes.set_ylabel("PSNR against dense from the same noise, dB")
    axes.set_title(_title(rows[0]), loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    paths = [stem.with_suffix(ending) for ending in ENDINGS]
    for path in paths:
        figure.savefig(path, dpi=130)
    return paths


def _draw_series(axes: Axes, rows: Sequence[Row]) -> dict[str, str]:
    """One line each; the colour of each series."""
    colours = {}
    for number, series in enumerate(dict.fromkeys(row["series"] for row in rows)):
        own = [row for row in rows if row["series"] == series]
        colours[series] = f"C{number % 10}"
        axes.plot(
            *zip(*sorted((row["density_run"], row["psnr"]) for row in own), strict=True),
            color=colours[series],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            linestyle=LINES[own[0]["correction"]],
            label=series,
        )
    return colours


def _draw_random(axes: Axes, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    """Crosses, in the colour of the series that they are the control of."""
    for row in rows:
        colour = colours.get(row["series"].removesuffix(RANDOM), FAINT)
        axes.plot(row["density_run"], row["psnr"], "x", color=colour, markersize=7, markeredgewidth=2)
    if rows:
        axes.plot([], [], "x", color=FAINT, markersize=7, markeredgewidth=2, label="random plan, in that colour")


def _draw_ceiling(axes: Axes, rows: Sequence[Row]) -> None:
    """The ceiling as a line, or as words where it is far above everything."""
    ceiling = rows[0]["ceiling"]
    highest = max((row["psnr"] for row in rows if control(row["options"]) != "everything"), default=ceiling)
    if ceiling <= highest + ROOM:
        axes.axhline(ceiling, color=INK, linestyle="--", linewidth=1, label="noise ceiling")
    else:
        axes.set_ylim(top=highest + ROOM)
        axes.annotate(
            f"noise ceiling: {ceiling:.0f} dB, far above",
            (0.01, 0.985),
            xycoords="axes fraction",
            verticalalignment="top",
            color=INK,
            fontsize=8,
        )


def _title(row: Row) -> str:
    videos = row["videos"] * len(row["seeds"])
    return f"Mean PSNR of {videos} videos of {row['size']} pixels ({row['tokens']} tokens), {row['steps']} steps"
