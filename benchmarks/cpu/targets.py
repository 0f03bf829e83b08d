"""What the CPU path is held to, and whether the rows of a run reach it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.cpu.records import Row, threads_of

BF16_LEVELS = ("avx512_bf16", "amx")
"""Levels with instructions that multiply bfloat16."""
FEWEST_TOKENS, LONG_TOKENS = 4096, 8192


class Target(NamedTuple):
    """A bound on a value of some rows: for other rows, and for bfloat16 on a CPU that multiplies it."""

    name: str
    applies: Callable[[Row], bool]
    value: Callable[[Row], float]
    other: float
    bf16: float
    at_most: bool = False

    def bound(self, row: Row) -> float:
        """Of this row."""
        return self.bf16 if multiplies_bf16(row) else self.other

    def reached(self, row: Row) -> bool:
        """Whether this row does."""
        value = self.value(row)
        return value <= self.bound(row) if self.at_most else value >= self.bound(row)


def multiplies_bf16(row: Row) -> bool:
    """Whether the CPU has instructions for the products of this row in its dtype."""
    return row["dtype"] == "bfloat16" and row["isa"] in BF16_LEVELS


def _kernel(plan: str) -> Callable[[Row], bool]:
    return lambda row: row["part"] == "kernel" and row["plan"] == plan and row["tokens"] >= FEWEST_TOKENS


def _op(*calls: str, exactly: int | None = None) -> Callable[[Row], bool]:
    return lambda row: (
        row["part"] == "op"
        and row["call"] in calls
        and (row["tokens"] == exactly if exactly else row["tokens"] >= LONG_TOKENS)
    )


def _speedup(row: Row) -> float:
    return float(row["speedup"])


TARGETS = (
    Target("kernel, uniform: efficiency", _kernel("uniform"), lambda row: float(row["efficiency"]), 0.85, 1.5),
    Target("kernel, ragged: efficiency", _kernel("ragged"), lambda row: float(row["efficiency"]), 0.75, 1.2),
    Target("SVG2 warm step: speed-up", _op("svg2 warm", exactly=LONG_TOKENS), _speedup, 1.8, 2.5),
    Target("AdaSpa sparse step: speed-up", _op("adaspa sparse", exactly=LONG_TOKENS), _speedup, 3.0, 4.0),
    Target(
        "routing: share of dense",
        _op("svg2 warm", "adaspa sparse"),
        lambda row: float(row["routing_share"]),
        0.15,
        0.15,
        True,
    ),
    Target("generation: speed-up", lambda row: row["part"] == "generation", _speedup, 1.0, 1.0),
)


def summary(rows: Sequence[Row]) -> list[str]:
    """A line for each target and kind of arithmetic: how many rows reach it, and the worst one."""
    lines = []
    sound = [row for row in rows if "error" not in row]
    for target in TARGETS:
        for kind in (False, True):
            found = [row for row in sound if target.applies(row) and multiplies_bf16(row) is kind]
            if found:
                lines.append(_line(target, kind, found))
    failed = len(rows) - len(sound)
    return [*lines, *([f"{failed} groups of rows failed"] if failed else [])]


def _line(target: Target, kind: bool, rows: list[Row]) -> str:
    reached = sum(target.reached(row) for row in rows)
    ordered = sorted(rows, key=target.value, reverse=target.at_most)
    worst = ordered[0]
    where = f"{worst['dtype']} N {worst['tokens']} D {worst['head_size']}, {threads_of(worst)}"
    if worst.get("density") is not None:
        where += f", density {worst['density']:.2f}"
    arithmetic = "bfloat16 products" if kind else "float32 products"
    sign = "<=" if target.at_most else ">="
    middle = target.value(ordered[len(ordered) // 2])
    return (
        f"{'reached' if reached == len(rows) else 'MISSED ':7s} {target.name} {sign} {target.bound(worst):g}"
        f" ({arithmetic}, {worst['isa']}): {reached} of {len(rows)} rows, median {middle:.3f},"
        f" worst {target.value(worst):.3f} ({where})"
    )
