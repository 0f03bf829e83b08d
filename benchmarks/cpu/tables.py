"""The tables of docs/cpu.md, from the rows of a run.

python -m benchmarks.cpu.tables FILE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu.records import Row, threads_of

SHORT = {"bfloat16": "bf16", "float32": "fp32"}


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def kernel_tables(rows: Sequence[Row]) -> Iterable[str]:
    """For each number of threads: efficiency of uniform / ragged plans by density, and FlexAttention at one of them."""
    for threads in dict.fromkeys(row["threads"] for row in rows):
        own = [row for row in rows if row["threads"] == threads]
        densities = list(dict.fromkeys(row["asked_density"] for row in own))
        telling = min(densities, key=lambda density: abs(density - 0.25))
        lines = []
        for dtype, size, tokens in sorted({(row["dtype"], row["head_size"], row["tokens"]) for row in own}):
            found = {
                (row["plan"], row["asked_density"]): row
                for row in own
                if (row["dtype"], row["head_size"], row["tokens"]) == (dtype, size, tokens)
            }
            dense = next(iter(found.values()))["dense_ms"]
            cells = [_pair(found, density) for density in densities]
            flex = found.get(("uniform", telling), {}).get("flex_efficiency")
            cells.append("" if flex is None else f"{flex:.2f}")
            lines.append([f"{SHORT[dtype]}, D {size}, N {tokens}", f"{dense:.1f}", *cells])
        header = [threads_of({"threads": threads}), "dense ms", *(f"density {density:g}" for density in densities)]
        yield table([*header, f"FlexAttention, {telling:g}"], lines)


def _pair(found: dict[tuple[str, float], Row], density: float) -> str:
    pair = [found.get((plan, density)) for plan in ("uniform", "ragged")]
    return " / ".join(f"{row['efficiency']:.2f}" for row in pair if row is not None)


def op_tables(rows: Sequence[Row]) -> Iterable[str]:
    """Speed-up of each call and what its routing costs; then what each op costs."""
    lines = []
    for row in rows:
        where = f"{SHORT[row['dtype']]}, D {row['head_size']}, N {row['tokens']}, {threads_of(row)}"
        times = [f"{row['dense_ms']:.0f}", f"{row['sparse_ms']:.0f}", f"{row['speedup']:.2f} x"]
        costs = ", ".join(f"{part} {share:.3f}" for part, share in row["parts_share"].items())
        lines.append([row["call"], where, f"{row['density']:.2f}", *times, f"{row['routing_share']:.3f}", costs])
    header = ["call", "of", "density", "dense ms", "all ms", "faster", "routing", "each op, in times of dense"]
    yield table(header, sorted(lines, key=lambda cells: cells[0]))


def generation_tables(rows: Sequence[Row]) -> Iterable[str]:
    """Whole generations."""
    lines = []
    for row in rows:
        times = [f"{row[name] / 1e3:.1f}" for name in ("eager_ms", "dense_ms", "sparse_ms")]
        phases = ", ".join(f"{phase} {milliseconds / 1e3:.2f}" for phase, milliseconds in row["phase_ms"].items())
        gains = [f"{row['speedup']:.2f} x", f"{row['speedup_of_sparse_steps']:.2f} x"]
        head = f"{row['method']}, {SHORT[row['dtype']]}, {threads_of(row)}"
        lines.append([head, f"{row['density']:.2f}", *times, *gains, phases])
    header = ["method", "density", "eager s", "inductor s", "sparse s", "faster", "sparse steps", "seconds a step"]
    yield table(header, lines)


def tables(document: dict[str, Any]) -> str:
    """All tables of a run, its machine above and its summary below."""
    machine = document["machine"]
    sound = [row for row in document["rows"] if "error" not in row]
    parts = {"kernel": kernel_tables, "op": op_tables, "generation": generation_tables}
    made = [f"{machine['cpu']}, {machine['isa']}, {machine['cores']} cores, torch {machine['torch']}"]
    for part, make in parts.items():
        rows = [row for row in sound if row["part"] == part]
        made += make(rows) if rows else []
    summary = "\n".join(f"- {line}" for line in document["summary"])
    return "\n\n".join([*made, summary])


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
