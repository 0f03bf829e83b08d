"""Rows of a sweep as a picture: PSNR over the share of pairs computed, one line a series."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_compile.evaluation.grids import control
from sparse_compile.evaluation.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDINGS = (".png", ".svg")
MARKERS = "osD^vP*X"
RANDOM_COLOUR, CEILING_COLOUR = "#8a8f98", "#2b2f36"
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
    _draw_series(axes, [row for row in drawn if control(row["options"]) is None])
    _draw_random(axes, [row for row in drawn if control(row["options"]) == "random"])
    _draw_ceiling(axes, rows)
    axes.set_xlabel("density_run: share of the pairs computed over the whole run, dense steps included")
    axes.set_ylabel("PSNR against dense from the same noise, dB")
    axes.set_title(_title(rows[0]), loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    paths = [stem.with_suffix(ending) for ending in ENDINGS]
    for path in paths:
        figure.savefig(path, dpi=130)
    return paths


def _draw_series(axes: Axes, rows: Sequence[Row]) -> None:
    for number, series in enumerate(dict.fromkeys(row["series"] for row in rows)):
        points = sorted((row["density_run"], row["psnr"]) for row in rows if row["series"] == series)
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(*zip(*points, strict=True), f"{marker}-", color=f"C{number % 10}", label=series, markersize=5)


def _draw_random(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        point = (row["density_run"], row["psnr"])
        axes.plot(*point, "x", color=RANDOM_COLOUR, label=f"random plan: {row['method']} {row['correction']}")
        axes.annotate(f"{row['method']} {row['correction']}", point, (6, -3), textcoords="offset points", fontsize=7)


def _draw_ceiling(axes: Axes, rows: Sequence[Row]) -> None:
    """The ceiling as a line, or as words where it is far above everything."""
    ceiling = rows[0]["ceiling"]
    highest = max((row["psnr"] for row in rows if control(row["options"]) != "everything"), default=ceiling)
    if ceiling <= highest + ROOM:
        axes.axhline(ceiling, color=CEILING_COLOUR, linestyle="--", linewidth=1, label="noise ceiling")
    else:
        axes.set_ylim(top=highest + ROOM)
        axes.annotate(
            f"noise ceiling: {ceiling:.0f} dB, far above",
            (0.01, 0.985),
            xycoords="axes fraction",
            verticalalignment="top",
            color=CEILING_COLOUR,
            fontsize=8,
        )


def _title(row: Row) -> str:
    videos = row["videos"] * len(row["seeds"])
    return f"{videos} videos of {row['size']}, {row['tokens']} tokens, {row['steps']} steps; mean PSNR"
