"""What the calls of the layers cost and kept, by generation, step and head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from sparse_compile.call_log import read_heads
from sparse_compile.phases import Phase
from sparse_compile.runtime.budget_notes import named
from sparse_compile.runtime.call_figures import CallReport

if TYPE_CHECKING:
    from sparse_compile.runtime.state import Branch, Layer

LEAST_GAIN = 0.1
"""Gain (kept mass - density) / (1 - density) up to which a head counts as nearly uniform.

0 is what a random choice of keys keeps, 1 is all mass. Heads of a small trained model gained 0.13 to 0.32, those of the
same architecture with random weights 0.02 to 0.09.
"""
DENSE_ENOUGH = 0.9
"""From this density on the gain says little: so small a rest is skipped that probe rows cannot weigh it."""


@dataclass
class StepReport:
    """One step of one branch. Density and kept mass are means over its sparse calls."""

    step: int
    branch: str
    phase: str
    density: float
    """1.0 where no call was sparse, as in a search that attends densely."""
    kept_mass: float | None
    non_finite: int
    density_run: float
    """The density with dense calls counted as 1."""
    sparse_calls: int
    """How many calls the means are over: one for each site that ran sparsely."""
    planned_mass: float | None = None
    """What the plans kept when they were made; None where each call makes its own."""
    at_floor: float | None = None
    """Share of the queries that the floor of a recall target holds up; None without a target."""
    at_ceiling: float | None = None
    """The same of its ceiling, which holds down."""
    note: str = ""
    """What the monitor decided when this step began; told once, whatever the number of branches."""


@dataclass
class GenerationReport:
    """One generation, oldest step first. Density and kept mass are means over the steps with sparse calls."""

    steps: list[StepReport]
    density: float | None
    density_run: float | None
    kept_mass: float | None
    at_floor: float | None = None
    at_ceiling: float | None = None


@dataclass
class HeadReport:
    """Each query head of one site, in the newest sparse call of its branch in the newest generation."""

    layer: str
    ordinal: int
    branch: str
    density: list[float]
    kept_mass: list[float] | None
    """None unless it was measured in every head."""

    @property
    def nearly_uniform(self) -> bool:
        """Whether no head keeps much more mass than as many keys at random would."""
        return self.kept_mass is not None and all(
            density < DENSE_ENOUGH and mass <= density + LEAST_GAIN * (1 - density)
            for density, mass in zip(self.density, self.kept_mass, strict=True)
        )


def generations_of(
    calls: Iterable[CallReport], notes: Mapping[tuple[int, int], str] | None = None
) -> list[GenerationReport]:
    """Every generation that the calls belong to, oldest first.

    Args:
        calls: of all layers.
        notes: what the monitor decided, by generation and step.
    """
    untold = dict(notes or {})
    by_step: dict[tuple[int, int, str], list[CallReport]] = {}
    for call in calls:
        by_step.setdefault((call.generation, call.step, call.branch), []).append(call)
    generations: dict[int, list[StepReport]] = {}
    for (generation, step, branch), made in sorted(by_step.items(), key=lambda item: item[0][:2]):
        report = _step(step, branch, made)
        passed = [when for when in sorted(untold) if when[0] == generation and when[1] <= step]
        report.note = "; ".join(untold.pop(when) for when in passed)  # also those of steps whose calls were skipped
        generations.setdefault(generation, []).append(report)
    return [_generation(steps) for _, steps in sorted(generations.items())]


def heads_of(layers: Sequence[tuple[str, Layer]]) -> list[HeadReport]:
    """The heads of every site and branch that ran sparsely in the newest generation.

    Args:
        layers: with the names that the report gives them, in its order.
    """
    generation = max((layer.history[-1].generation for _, layer in layers if layer.history), default=None)
    reports = []
    for name, layer in layers:
        for branch, state in layer.branches.items():
            if _newest_sparse_generation(layer, branch) != generation:
                continue
            for ordinal, log in sorted(state.logs.items()):
                if heads := read_heads(log):
                    masses = [head.kept_mass for head in heads if head.kept_mass is not None]
                    measured = masses if len(masses) == len(heads) else None
                    reports.append(HeadReport(name, ordinal, str(branch), [head.density for head in heads], measured))
    return reports


def uniformity_warning(heads: Iterable[HeadReport]) -> str | None:
    """One line about all layers whose attention is nearly uniform, if there are any."""
    found = [report for report in heads if report.nearly_uniform]
    if not found:
        return None
    names = list(dict.fromkeys(report.layer for report in found))
    density = fmean(value for report in found for value in report.density)
    mass = fmean(value for report in found for value in report.kept_mass or [])
    return (
        f"attention is nearly uniform in {named(names)}: a density of {density:.2f} keeps only"
        f" {mass:.2f} of the mass; what is skipped matters as much as what is kept; keep these layers dense"
        " (dense_layers), or compute more of them"
    )


def _newest_sparse_generation(layer: Layer, branch: Branch) -> int | None:
    """The generation of the newest call of a branch that wrote to the call log."""
    calls = (call for call in reversed(layer.history) if call.branch == branch and call.row is not None)
    return next((call.generation for call in calls), None)


def _step(step: int, branch: str, made: Sequence[CallReport]) -> StepReport:
    sparse = [call for call in made if call.sparse]
    phases = [call.phase for call in made if call.phase != Phase.DENSE]
    return StepReport(
        step=step,
        branch=branch,
        phase="+".join(dict.fromkeys(phases)) or str(Phase.DENSE),
        density=fmean([call.density for call in sparse] or [1.0]),
        kept_mass=mean_of_known(call.kept_mass for call in sparse),
        non_finite=sum(call.non_finite for call in sparse),
        density_run=fmean(call.density for call in made),
        sparse_calls=len(sparse),
        planned_mass=mean_of_known(call.planned_mass for call in sparse),
        at_floor=mean_of_known(call.at_floor for call in sparse),
        at_ceiling=mean_of_known(call.at_ceiling for call in sparse),
    )


def _generation(steps: list[StepReport]) -> GenerationReport:
    sparse = [step for step in steps if step.sparse_calls]
    return GenerationReport(
        steps,
        density=mean_of_known(step.density for step in sparse),
        density_run=fmean(step.density_run for step in steps),
        kept_mass=mean_of_known(step.kept_mass for step in sparse),
        at_floor=mean_of_known(step.at_floor for step in sparse),
        at_ceiling=mean_of_known(step.at_ceiling for step in sparse),
    )


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are there; None where none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
