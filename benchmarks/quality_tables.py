"""Quality figures in README.md and docs/*.md, from the committed results in benchmarks/results.

python -m benchmarks.quality_tables            name the documents that differ from the results; exit code 1 if any
python -m benchmarks.quality_tables --write    write the figures into them

A table stands between two markers that name it, and is one of `TABLES`:

    <!-- quality: NAME begin -->
    <!-- quality: NAME end -->

A single figure in a sentence names the file, the label of the row, the field, and its format:

    <!-- figure: FILE / LABEL / FIELD / .1f -->35.9<!-- end -->
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation import grids
from sparse_compile.evaluation.grids import Configuration, control
from sparse_compile.evaluation.results import ResultsFile, Row
from sparse_compile.evaluation.tables import FIGURES, TARGETS_DB, Column, cheapest, markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- quality: (?P<name>\S+) begin -->\n).*?(<!-- quality: (?P=name) end -->)", re.DOTALL)
FIGURE = re.compile(r"(<!-- figure: (?P<place>[^>]*?) -->)[^<]*(<!-- end -->)")
MARKER = re.compile(r"<!-- (?:quality|figure): ")


@dataclass(frozen=True)
class Table:
    """Some rows of a file of results, in this order, and some of their fields."""

    file: str
    labels: tuple[str, ...]
    columns: tuple[Column, ...]

    def markdown(self) -> str:
        """The table."""
        return markdown(self.columns, [row_of(self.file, label) for label in self.labels])


@dataclass(frozen=True)
class CostTable:
    """For each series of a file, the smallest ``density_run`` that reaches each PSNR: see `cheapest`."""

    file: str
    labels: tuple[str, ...]

    def markdown(self) -> str:
        """The table."""
        columns = [Column("configuration without its budget", "series")]
        columns += [Column(f"{target} dB", str(target)) for target in TARGETS_DB]
        return markdown(columns, cheapest([row_of(self.file, label) for label in self.labels]))


def labels_of(*configurations: Configuration, without_controls: bool = False) -> tuple[str, ...]:
    """The labels of configurations, each once."""
    shown = (each.label for each in configurations if not (without_controls and control(each.options)))
    return tuple(dict.fromkeys(shown))


SWEEP = "quality_cpu"
CONFIGURATION = (Column("configuration", "label"),)
BOUNDS = (Column("at floor", "at_floor", ".1%"), Column("at ceiling", "at_ceiling", ".1%"))
METHOD_AND_CORRECTION = (Column("method", "method"), Column("correction", "correction"))
SHORT = (
    Column("density", "density", ".2f"),
    Column("kept mass", "kept_mass", ".2f"),
    Column("PSNR dB", "psnr", ".1f"),
    Column("SSIM", "ssim", ".3f"),
)

TABLES: Mapping[str, Table | CostTable] = {
    "pareto": Table(SWEEP, labels_of(*grids.pareto()), (*CONFIGURATION, *FIGURES)),
    "costs": CostTable(SWEEP, labels_of(*grids.pareto(), without_controls=True)),
    "front": Table(SWEEP, labels_of(*grids.front(), without_controls=True), (*CONFIGURATION, *FIGURES)),
    "selection": Table(SWEEP, labels_of(*grids.selection(), without_controls=True), (*CONFIGURATION, *FIGURES)),
    "paper": Table(SWEEP, labels_of(*grids.paper(), without_controls=True), (*CONFIGURATION, *FIGURES)),
    "recall": Table(SWEEP, labels_of(*grids.recall(), without_controls=True), (*CONFIGURATION, *BOUNDS, *FIGURES)),
    "presets": Table(SWEEP, labels_of(*grids.presets(), without_controls=True), (*CONFIGURATION, *FIGURES)),
    "corrections": Table(
        SWEEP,
        tuple(
            f"{method} {correction} {budget}"
            for method, budget in (("svg2", "density=0.25"), ("adaspa", "sparsity=0.75"))
            for correction in ("none", "pooled", "coupled")
        ),
        (*METHOD_AND_CORRECTION, *SHORT),
    ),
}


def row_of(file: str, label: str) -> Row:
    """The newest row with a label.

    Raises:
        SparseAttentionError: there is no such file, or no such row.
    """
    rows = _rows(RESULTS / f"{file}.jsonl")
    if label not in rows:
        raise SparseAttentionError(f"{file}.jsonl must have the row", label, f"It has: {', '.join(rows) or 'none'}.")
    return rows[label]


@functools.cache
def _rows(path: Path) -> Mapping[str, Row]:
    return {row["label"]: row for row in ResultsFile(path).rows()}


def figure(place: str) -> str:
    """A single figure, by file, label, field and format with slashes between them.

    Raises:
        SparseAttentionError: that is no such place.
    """
    parts = [part.strip() for part in place.split("/")]
    if len(parts) != 4:
        raise SparseAttentionError("a figure is FILE / LABEL / FIELD / FORMAT", place, "Write all four.")
    file, label, field, form = parts
    row = row_of(file, label)
    if field not in row:
        raise SparseAttentionError(f"the row {label!r} must have the field", field, f"It has: {', '.join(row)}.")
    return Column("", field, form).cell(row)


def with_figures(text: str) -> str:
    """The text with what its markers name.

    Raises:
        SparseAttentionError: a marker names what is not there, or has no end.
    """

    def table(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            raise SparseAttentionError("a marker must name a table", name, f"Known: {', '.join(TABLES)}.")
        return f"{found[1]}{TABLES[name].markdown()}\n{found[3]}"

    text, tables = TABLE.subn(table, text)
    text, figures = FIGURE.subn(lambda found: f"{found[1]}{figure(found['place'])}{found[3]}", text)
    if len(MARKER.findall(text)) != 2 * tables + figures:
        raise SparseAttentionError(
            "every marker must have its end", MARKER.findall(text), f"Compare with {Path(__file__).name}."
        )
    return text


def documents() -> list[Path]:
    """What may hold figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the documents, or say which differ."""
    parser = argparse.ArgumentParser(description="Quality figures in README.md and docs/*.md.")
    parser.add_argument("--write", action="store_true", help="write them")
    write = parser.parse_args(arguments).write
    differ = {path: new for path in documents() if (new := with_figures(path.read_text())) != path.read_text()}
    for path, new in differ.items():
        if write:
            path.write_text(new)
        print(f"{path.relative_to(ROOT)}: {'written' if write else 'differs from the results'}")
    return 1 if differ and not write else 0


if __name__ == "__main__":
    sys.exit(main())
