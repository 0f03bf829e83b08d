"""The support matrix of docs/support.md, made from the table of families.

python -m families.support_matrix                            print it
python -m families.support_matrix --write docs/support.md    put it between its markers
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from families.case import SPARSE, Case, Row, Rows
from families.table import CASES

BEGIN = "<!-- support: begin (make support-matrix writes what follows) -->"
END = "<!-- support: end -->"
COLUMNS = (
    "family",
    "transformer",
    "becomes sparse",
    "tokens",
    "mask",
    "grid",
    "stays dense",
    "whole",
    "block by block",
)
NOTHING = "-"


def support_matrix() -> str:
    """One row a family, and below it what there is to say about some."""
    lines = [line_of(COLUMNS), line_of(["---"] * len(COLUMNS))]
    lines += [line_of(columns_of(case)) for case in CASES]
    notes = [f"- **{case.title}**: {remark}" for case in CASES for remark in remarks_on(case)]
    return "\n".join([*lines, "", *notes])


def line_of(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def columns_of(case: Case) -> list[str]:
    sparse = [row for row in case.whole if row.verdict == SPARSE]
    return [
        case.title,
        f"`{type(case.build()[0]).__name__}`",
        distinct(row.role for row in sparse),
        distinct(tokens_of(row) for row in sparse),
        distinct(row.mask.replace("_", " ") for row in sparse),
        distinct("yes" if row.grid else "no" for row in sparse),
        distinct(f"{row.role}: `{row.verdict}`" for row in case.whole if row.verdict != SPARSE),
        graphs_of(case.graphs, case.whole) + (", `fullgraph=True`" if case.fullgraph else ""),
        NOTHING if case.regional is None else graphs_of(case.regional.graphs, case.regional.rows),
    ]


def tokens_of(row: Row) -> str:
    """The roles of the parts of a layout in order, without their lengths."""
    roles = re.sub(r":\d+", "", row.layout).split("+")
    return ", ".join(dict.fromkeys(roles))


def graphs_of(graphs: int, rows: Rows) -> str:
    """How many graphs there are, and how many sites of them become sparse."""
    sparse = sum(count for row, count in rows.items() if row.verdict == SPARSE)
    return f"{graphs} graph{'s' * (graphs != 1)}, {sparse} of {sum(rows.values())} sites"


def distinct(words: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(words)) or NOTHING


def remarks_on(case: Case) -> list[str]:
    where = " in the whole model" if case.regional is not None and case.goes_sparse(regional=True) else ""
    dense = [f"nothing becomes sparse{where}: {case.dense_only}."] if case.dense_only else []
    return dense + [case.note] * bool(case.note)


def with_matrix(text: str) -> str:
    """The text with the matrix between its two markers replaced."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert begin and end, f"the text must hold both markers, {BEGIN} and {END}"
    return f"{head}{BEGIN}\n\n{support_matrix()}\n\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The support matrix.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write it between the markers of FILE")
    target = parser.parse_args(arguments).write
    if target is None:
        print(support_matrix())  # noqa: T201
    else:
        target.write_text(with_matrix(target.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
