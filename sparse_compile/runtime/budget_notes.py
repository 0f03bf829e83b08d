"""What the report says of budgets that follow the content: the monitor's verdicts, and targets out of reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from sparse_compile.runtime.call_figures import CallReport

if TYPE_CHECKING:
    from sparse_compile.runtime.figures import HeadReport
    from sparse_compile.runtime.monitor import Verdict
    from sparse_compile.runtime.state import Layer

LEAST_SHARE = 0.01
"""Of the queries at the ceiling, from which on it is worth a line."""
MOST_NAMES = 6
"""Layers that one line names; it counts the others."""


def verdict_notes(layers: Iterable[tuple[str, Layer]]) -> dict[tuple[int, int], str]:
    """One line for each generation and step at which the monitor decided something.

    Args:
        layers: with the names that the report gives them, in its order.
    """
    found: dict[tuple[int, int], list[tuple[str, Verdict]]] = {}
    for name, layer in layers:
        for verdict in layer.verdicts:
            found.setdefault((verdict.generation, verdict.step), []).append((name, verdict))
    return {when: _note(told) for when, told in found.items()}


def _note(told: Sequence[tuple[str, Verdict]]) -> str:
    worst, verdict = max(told, key=lambda item: item[1].drop)
    sites = "1 layer and branch" if len(told) == 1 else f"{len(told)} layers and branches"
    if verdict.stale:
        return (
            f"searched again: the plans of {sites} had gone stale, most in {worst} ({verdict.branch}), which kept"
            f" {verdict.drop:.3f} less of the mass than when it was made"
        )
    lost = f"have lost at most {verdict.drop:.3f} of the mass" if verdict.drop > 0 else "keep no less of the mass"
    return f"no search: the plans of {sites} {lost} since they were made"


def unreached_warning(calls: Sequence[CallReport]) -> str | None:
    """One line about the layers whose recall target lay above the ceiling in the newest generation."""
    newest = max((call.generation for call in calls), default=None)
    shares: dict[str, float] = {}
    for call in calls:
        if call.generation == newest and call.at_ceiling is not None and call.at_ceiling >= LEAST_SHARE:
            shares[call.layer] = max(shares.get(call.layer, 0.0), call.at_ceiling)
    if not shares:
        return None
    return (
        f"max_density keeps up to {max(shares.values()):.0%} of the queries below target_recall in {named(shares)};"
        " heads with more than half of such queries attend to everything; raise max_density, or lower target_recall"
    )


def whole_heads_warning(heads: Iterable[HeadReport], min_recall: Mapping[str, float | None]) -> str | None:
    """One line about the heads that ``min_recall`` has put back to dense.

    Args:
        heads: of the newest sparse calls.
        min_recall: the option, by the name of the layer; None where it is off, or something else may keep a head whole.
    """
    found: dict[str, int] = {}
    for report in heads:
        whole = sum(density >= 1 for density in report.density)
        if whole and min_recall.get(report.layer) is not None:
            found[report.layer] = max(found.get(report.layer, 0), whole)
    if not found:
        return None
    return (
        f"{sum(found.values())} heads attend to everything, for a plan would keep less than min_recall: {named(found)}"
    )


def named(layers: Iterable[str]) -> str:
    """Layers as a line names them: the first few, and how many more."""
    names = list(layers)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
