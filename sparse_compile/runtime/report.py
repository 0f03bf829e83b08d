"""The Report: what was rewritten and why not, and what each step cost and kept.

The host logs (step, branch, phase) of every call; the device logs (density, kept mass, non-finite). They are joined
here, when somebody asks, which is the only time the host reads the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from sparse_compile.call_log import CallRow, read_rows
from sparse_compile.phases import Phase
from sparse_compile.sites import Reason, Site

if TYPE_CHECKING:
    from sparse_compile.runtime.registry import Registry
    from sparse_compile.runtime.state import Call, Layer


@dataclass(frozen=True)
class SiteRecord:
    """One attention, as the report shows it."""

    layer: str
    role: str
    layout: str
    decision: str
    reason: str | None
    detail: str
    by_design: bool
    mask: str
    grid: tuple[int, ...]
    query_tokens: int
    key_tokens: int
    heads: int
    head_dim: int
    kernel: str | None
    ordinal: int

    @classmethod
    def of(cls, site: Site, kernel: str) -> SiteRecord:
        """The record of a classified site."""
        decision = site.decision
        assert decision is not None, "classify_sites decides every site"
        reason = decision.reason
        sentence = "" if reason is None else reason.sentence
        detail = "; ".join(part for part in (sentence, decision.note, reason.remedy if reason else "") if part)
        heads, head_dim = (site.query_sizes[1], site.query_sizes[3]) if len(site.query_sizes) == 4 else (0, 0)
        return cls(
            layer=site.name,
            role=site.role,
            layout="" if site.layout is None else str(site.layout),
            decision="sparse" if decision.sparse else "dense",
            reason=None if reason is None else reason.code,
            detail=detail,
            by_design=True if reason is None else reason.by_design,
            mask=str(site.mask_form),
            grid=() if site.layout is None else site.layout.grid,
            query_tokens=site.query_sizes[-2] if len(site.query_sizes) > 1 else 0,
            key_tokens=site.key_sizes[-2] if len(site.key_sizes) > 1 else 0,
            heads=heads,
            head_dim=head_dim,
            kernel=kernel if decision.sparse else None,
            ordinal=site.ordinal,
        )


@dataclass(frozen=True)
class GraphRecord:
    """One compilation: its phase, the sites without an owner, and what the user should know."""

    phase: Phase
    sites: tuple[SiteRecord, ...] = ()
    warning: str = ""


@dataclass
class StepReport:
    """One step of one branch. Densities are means over the layers that ran sparsely, 1.0 where none did."""

    step: int
    branch: str
    phase: str
    density: float
    kept_mass: float | None
    non_finite: int
    density_run: float
    """The same with dense calls counted as 1."""


@dataclass
class GenerationReport:
    """One generation, oldest step first."""

    steps: list[StepReport]
    density: float | None
    density_run: float | None


@dataclass
class Report:
    """What `sparse_compile.explain` returns; prints as a table."""

    sites: list[SiteRecord] = field(default_factory=list)
    compilations: int = 0
    other_compilations: int = 0
    """Graphs of this process without any Parameter: pieces around a graph break, of this model or another."""
    generations: list[GenerationReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def density(self) -> float | None:
        """Mean density of the sparse calls of the last generation; None where there was none."""
        return self.generations[-1].density if self.generations else None

    @property
    def density_run(self) -> float | None:
        """The same with dense calls counted as 1."""
        return self.generations[-1].density_run if self.generations else None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "sites": [asdict(site) for site in self.sites],
            "compilations": self.compilations,
            "other_compilations": self.other_compilations,
            "density": self.density,
            "density_run": self.density_run,
            "generations": [asdict(generation) for generation in self.generations],
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        header = ("layer", "role", "layout", "decision", "reason")
        rows = [(s.layer, s.role, s.layout, s.decision, s.detail or s.reason or "") for s in self.sites]
        lines = _table(header, rows) if rows else ["no attention was compiled yet"]
        sparse = sum(site.decision == "sparse" for site in self.sites)
        lines += ["", f"{sparse} of {len(self.sites)} sites sparse, {self.compilations} compilations"]
        if self.other_compilations:
            lines.append(f"{self.other_compilations} more of graphs without Parameters, of this model or another")
        for number, generation in enumerate(self.generations, 1):
            lines += ["", f"generation {number}: {_summary(generation)}"]
            lines += _table(("steps", "branch", "phase", "density", "kept mass"), _runs(generation.steps))
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def build_report(models: Mapping[str, nn.Module], registry: Registry) -> Report:
    """Gather what the registry knows of some models.

    Args:
        models: by the prefix that their layers' names get ("" for none).
        registry: where to look.
    """
    report = Report()
    layers: list[Layer] = []
    for prefix, model in models.items():
        names = {parameter: name for name, parameter in model.named_parameters()}
        for parameter, records in registry.recorded(names):
            path = ".".join([*([prefix] if prefix else []), *names[parameter].split(".")[:-2]])  # type: ignore[index]  # a Parameter
            report.compilations += len(records.graphs)
            report.warnings += [graph.warning for graph in records.graphs if graph.warning]
            own = registry.layers_of(parameter)
            kept_dense = bool(own) and all(layer.kept_dense for layer in own)
            report.sites += [_site_row(record, path, kept_dense) for record in records.sites.values()]
            report.sites += [site for graph in records.graphs for site in graph.sites]
        for parameter in names:
            layers += registry.layers_of(parameter)
    unowned = list(registry.unowned)
    report.other_compilations = len(unowned)
    report.sites += [
        replace(site, layer=f"{site.layer} (in a graph without Parameters)")
        for graph in unowned
        for site in graph.sites
    ]
    report.warnings += [graph.warning for graph in unowned if graph.warning]
    report.sites = list(dict.fromkeys(report.sites))
    claims = dict.fromkeys(layer.claim for layer in layers if layer.claim is not None)
    if mismatches := sum(claim.mismatches for claim in claims):
        report.warnings.append(f"{mismatches} calls ran a graph of another phase; is a guard filter in use?")
    if repeated := sum(claim.repeated_calls for claim in claims):
        report.warnings.append(
            f"{repeated} calls came again in the same step and branch and attended to everything: give them a branch"
            " name of their own, or move the clock"
        )
    report.generations = _generations(layers)
    return report


def _site_row(record: SiteRecord, path: str, kept_dense: bool) -> SiteRecord:
    values = {**record.__dict__, "layer": path}
    if kept_dense and record.decision == "sparse":
        reason = Reason.DENSE_LAYER
        values.update(decision="dense", reason=reason.code, detail=reason.sentence, kernel=None)
    return SiteRecord(**values)


def _generations(layers: Iterable[Layer]) -> list[GenerationReport]:
    calls: dict[tuple[int, int, str], list[tuple[Call, CallRow | None]]] = {}
    for layer in layers:
        logs = {branch: [read_rows(log) for log in state.logs.values()] for branch, state in layer.branches.items()}
        for call in layer.history:
            key = (call.generation, call.step, str(call.branch))
            if call.row is None:
                calls.setdefault(key, []).append((call, None))
            for row in _rows_of(call, logs.get(call.branch, [])):
                calls.setdefault(key, []).append((call, row))
    generations: dict[int, list[StepReport]] = {}
    for (generation, step, branch), made in sorted(calls.items(), key=lambda item: item[0][:2]):
        generations.setdefault(generation, []).append(_step(step, branch, made))
    return [_generation(steps) for _, steps in sorted(generations.items())]


def _generation(steps: list[StepReport]) -> GenerationReport:
    sparse = [step.density for step in steps if step.phase != Phase.DENSE]
    return GenerationReport(steps, _mean(sparse) if sparse else None, _mean(step.density_run for step in steps))


def _rows_of(call: Call, logs: list[tuple[int, list[CallRow]]]) -> list[CallRow]:
    """The device's rows of one call, one per site of the layer, less those that the ring has lost."""
    if call.row is None:
        return []
    places = [(call.row - (written - len(rows)), rows) for written, rows in logs]
    return [rows[at] for at, rows in places if 0 <= at < len(rows)]


def _step(step: int, branch: str, made: list[tuple[Call, CallRow | None]]) -> StepReport:
    rows = [row for _, row in made if row is not None]
    phases = [str(call.phase) for call, _ in made if call.phase is not Phase.DENSE]
    masses = [row.kept_mass for row in rows if row.kept_mass is not None]
    return StepReport(
        step=step,
        branch=branch,
        phase="+".join(dict.fromkeys(phases)) or str(Phase.DENSE),
        density=_mean([row.density for row in rows] or [1.0]),
        kept_mass=_mean(masses) if masses else None,
        non_finite=sum(row.non_finite for row in rows),
        density_run=_mean(1.0 if row is None else row.density for _, row in made),
    )


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _summary(generation: GenerationReport) -> str:
    if generation.density is None:
        return f"{len(generation.steps)} calls, all dense"
    return f"density {generation.density:.3f} in sparse calls, density_run {generation.density_run:.3f} over all"


def _runs(steps: list[StepReport]) -> list[tuple[str, ...]]:
    """One row for each run of steps that a branch spent in one phase."""
    runs: list[list[StepReport]] = []
    open_runs: dict[str, list[StepReport]] = {}
    for step in steps:
        run = open_runs.get(step.branch)
        if run is None or run[-1].phase != step.phase:
            run = open_runs[step.branch] = []
            runs.append(run)
        run.append(step)
    rows: list[tuple[str, ...]] = []
    for run in runs:
        first, last = run[0], run[-1]
        masses = [step.kept_mass for step in run if step.kept_mass is not None]
        rows.append(
            (
                str(first.step) if first is last else f"{first.step}-{last.step}",
                first.branch,
                first.phase,
                f"{_mean(step.density for step in run):.3f}",
                f"{_mean(masses):.3f}" if masses else "-",
            )
        )
    return rows


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
