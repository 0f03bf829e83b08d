"""``python -m families.print_census NAME …``: what is found in the graphs of these cases, as the table spells it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from dynamo_capture import capture_case, census
from families.case import CROSS, SPARSE, Case, Row
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
    graphs = capture_case(case)
    lines = [f"{case.name}:", f"        whole={as_source(census(graphs), ' ' * 8)},", f"        graphs={len(graphs)},"]
    if getattr(case.build()[0], "_repeated_blocks", None):
        graphs = capture_case(case, regional=True)
        lines.append(
            f"        regional=Regional(\n            {len(graphs)},\n            "
            f"{as_source(census(graphs), ' ' * 12)},\n        ),"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    for case in map(case_of, sys.argv[1:]) if sys.argv[1:] else CASES:
        print(spelled(case), flush=True)  # noqa: T201
