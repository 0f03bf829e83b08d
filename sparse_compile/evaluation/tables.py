"""Rows of a sweep as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparse_compile.evaluation.grids import control
from sparse_compile.evaluation.results import Row

TARGETS_DB = (25, 28, 30, 32)


@dataclass(frozen=True)
class Column:
    """One column: its heading, the field of the rows, and how to write it. Numbers stand at the right."""

    heading: str
    field: str
    format: str = ""

    def cell(self, row: Row) -> str:
        """What the column holds for a row."""
        value = row.get(self.field)
        return "-" if value is None else format(value, self.format)


FIGURES = (
    Column("density", "density", ".3f"),
    Column("density_run", "density_run", ".3f"),
    Column("kept mass", "kept_mass", ".2f"),
    Column("PSNR dB", "psnr", ".1f"),
    Column("lowest", "psnr_min", ".1f"),
    Column("SSIM", "ssim", ".3f"),
    Column("flicker gap", "flicker_gap", ".3f"),
)


def markdown(columns: Sequence[Column], rows: Iterable[Row]) -> str:
    """A table of rows, in their order."""
    lines = [
        _line([column.heading for column in columns]),
        _line(["---:" if column.format else "---" for column in columns]),
    ]
    return "\n".join([*lines, *(_line([column.cell(row) for column in columns]) for row in rows)])


def report(rows: Sequence[Row]) -> str:
    """All of a sweep: the noise ceiling, the controls, a table for each warm-up share, and what a PSNR costs."""
    first = rows[0]
    seeds = ", ".join(map(str, first["seeds"]))
    parts = [
        "# Quality",
        f"{first['videos']} scenes of {first['size']} pixels, {first['tokens']} tokens, from the noise of seeds "
        f"{seeds}; {first['steps']} steps, guidance {first['guidance']:g}. Means over all videos, against dense from "
        "the same noise.",
        f"Noise ceiling (dense eager against dense compiled): {first['ceiling']:.1f} dB",
        "## Controls",
        markdown([Column("configuration", "label"), *FIGURES], [row for row in rows if control(row["options"])]),
    ]
    measured = [row for row in rows if not control(row["options"])]
    for share in sorted({row["dense_steps"] for row in measured}):
        own = [row for row in measured if row["dense_steps"] == share]
        of_steps = f"{share:.0%}" if isinstance(share, float) else str(share)
        parts += [
            f"## First {of_steps} of the steps dense",
            markdown([Column("configuration", "label"), *FIGURES], own),
        ]
    parts += [
        "## Smallest density_run that reaches a PSNR",
        "Of what was measured. In brackets how many times fewer pairs that is than dense, over the whole run.",
        markdown(
            [Column("configuration without its budget", "series"), *(Column(f"{t} dB", str(t)) for t in TARGETS_DB)],
            cheapest(measured),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def cheapest(rows: Sequence[Row]) -> list[Row]:
    """For each series the smallest ``density_run`` that reaches each of `TARGETS_DB`, None where nothing does."""
    found: list[Row] = []
    for series in dict.fromkeys(row["series"] for row in rows):
        own = [row for row in rows if row["series"] == series and row["density_run"] is not None]
        costs: dict[str, str | None] = {"series": series}
        for target in TARGETS_DB:
            enough = [row["density_run"] for row in own if row["psnr"] >= target]
            costs[str(target)] = f"{min(enough):.3f} ({1 / min(enough):.1f}x)" if enough else None
        found.append(costs)
    return found


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
