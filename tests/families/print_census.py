"""``python -m families.print_census NAME …``: what is found in the graphs of these cases, as the table spells it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from families.case import CROSS, SPARSE, Case, Row
from families.generation import nothing_skipped
from families.table import CASES, case_of

NAMES = {SPARSE: "SPARSE", CROSS: "CROSS"}


def as_source(rows: Mapping[Row, int], indent: str) -> str:
    lines = []
    for row, count in rows.items():
        *fields, verdict = row
        arguments = ", ".join([*map(repr, fields), NAMES.get(verdict, repr(verdict))])
        lines.append(f"{indent}    Row({arguments}): {count},\n")
    return "{\n" + "".join(lines) + indent + "}"


def spelled(case: Case) -> str:
    found = nothing_skipped(case.name, False)
    lines = [f"{case.name}:", f"        whole={as_source(found.sites, ' ' * 8)},", f"        graphs={found.graphs},"]
    if getattr(case.build()[0], "_repeated_blocks", None):
        found = nothing_skipped(case.name, True)
        lines.append(
            f"        regional=Regional(\n            {found.graphs},\n            "
            f"{as_source(found.sites, ' ' * 12)},\n        ),"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    for case in map(case_of, sys.argv[1:]) if sys.argv[1:] else CASES:
        print(spelled(case), flush=True)  # noqa: T201
