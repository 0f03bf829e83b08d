"""The section of the report page about the results of ``sparse-attn bench quality``: its tables and its plot."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from sparse_compile.evaluation.grids import control
from sparse_compile.evaluation.page import DataTable, Part, Section, from_file
from sparse_compile.evaluation.pareto_plot import draw
from sparse_compile.evaluation.results import Row
from sparse_compile.evaluation.tables import FIGURES, TARGETS_DB, Column, cheapest

PLOT_SCALE = 0.8
NEEDED = ("videos", "seeds", "label", "series", "options", "dense_steps", "density_run", "psnr", "ceiling")
"""What a row of a sweep has."""


def quality_sections(results: Sequence[tuple[str, Sequence[Row]]]) -> list[Section]:
    """One section a file of results.

    Args:
        results: names and rows of the files; lines of another kind are left out.
    """
    sections = []
    for name, rows in results:
        own = [row for row in rows if all(field in row for field in NEEDED)]
        title = f"Quality sweep: {name}"
        sections.append(_section(title, own) if own else Section(title, ["It holds no rows of a sweep."], []))
    return sections


def _section(title: str, rows: Sequence[Row]) -> Section:
    first = rows[0]
    seeds = ", ".join(map(str, first["seeds"]))
    text = (
        f"Scenes: {first['videos']} of {first['size']} pixels, {first['tokens']} tokens; noise of seeds {seeds}; "
        f"{first['steps']} steps, guidance {first['guidance']:g}. Means over all videos, against dense from the same "
        f"noise. Noise ceiling (dense eager against dense compiled): {first['ceiling']:.1f} dB.",
        "Compare at equal density_run and equal dense steps only; less than 0.3 dB is a tie.",
    )
    measured = [row for row in rows if control(row["options"]) is None]
    targets = [Column("configuration without its budget", "series"), *(Column(f"{t} dB", str(t)) for t in TARGETS_DB)]
    cost = _table("Smallest density_run that reaches a PSNR, of what was measured", targets, cheapest(measured))
    columns = [Column("configuration", "label"), *FIGURES]
    parts = [_plot(rows, measured), Part(tables=[cost])]
    if controls := [row for row in rows if control(row["options"]) is not None]:
        parts.append(Part(tables=[_table("Controls", columns, controls)]))
    for share in sorted({row["dense_steps"] for row in measured}):
        of_steps = f"{share:.0%}" if isinstance(share, float) else str(share)
        own = [row for row in measured if row["dense_steps"] == share]
        parts.append(Part(details=[_table(f"First {of_steps} of the steps dense", columns, own)]))
    return Section(title, text, parts)


def _plot(rows: Sequence[Row], measured: Sequence[Row]) -> Part:
    with tempfile.TemporaryDirectory() as folder:
        picture = next(path for path in draw(rows, Path(folder) / "pareto") if path.suffix == ".png")
        alt = (
            f"PSNR over density_run, {len({row['series'] for row in measured})} series. The numbers are in the tables "
            "below."
        )
        return Part(pictures=[from_file(picture, alt, scale=PLOT_SCALE)], columns=1)


def _table(caption: str, columns: Sequence[Column], rows: Sequence[Row]) -> DataTable:
    return DataTable(
        caption, [column.heading for column in columns], [[column.cell(row) for column in columns] for row in rows]
    )
