"""The Report: what was rewritten and why not, and what each step and head cost and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import nn

from sparse_compile.phases import Phase
from sparse_compile.runtime.budget_notes import unreached_warning, verdict_notes, whole_heads_warning
from sparse_compile.runtime.call_figures import CallReport, calls_of
from sparse_compile.runtime.figures import (
    GenerationReport,
    HeadReport,
    StepReport,
    generations_of,
    heads_of,
    mean_of_known,
    uniformity_warning,
)
from sparse_compile.sites import Reason, Site

if TYPE_CHECKING:
    from sparse_compile.runtime.registry import Registry
    from sparse_compile.runtime.state import Layer

NOTHING_FOUND = (
    "no scaled_dot_product_attention in what was compiled: attention written by hand, flex attention and back ends that"
    " call kernels of their own cannot be rewritten (in diffusers, set_attention_backend('native') goes back)"
)
MOST_HEADS = 8
"""Heads whose values the printed report lists; of more it gives range and mean."""


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
    def of(cls, site: Site, kernel: str, why_kernel: str = "") -> SiteRecord:
        """The record of a classified site, and of the implementation that its ops would call, and why that one."""
        decision = site.decision
        assert decision is not None, "classify_sites decides every site"
        reason = decision.reason
        sentence = "" if reason is None else reason.sentence
        slow = f"plain torch: {why_kernel}" if decision.sparse and why_kernel else ""
        detail = "; ".join(part for part in (sentence, decision.note, reason.remedy if reason else "", slow) if part)
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
class Report:
    """What `sparse_compile.explain` returns; prints as a table."""

    sites: list[SiteRecord] = field(default_factory=list)
    compilations: int = 0
    other_compilations: int = 0
    """Graphs of this process without any Parameter: pieces around a graph break, of this model or another."""
    generations: list[GenerationReport] = field(default_factory=list)
    heads: list[HeadReport] = field(default_factory=list)
    """Of the newest generation, in the order of the layers."""
    calls: list[CallReport] = field(default_factory=list, repr=False)
    """Every call of every layer, of which the generations are the means. Not in `to_dict`: a run of 60 layers and 50
    steps has 6000."""
    warnings: list[str] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    """What `enable` compiled of each model, and why that."""

    @property
    def density(self) -> float | None:
        """Mean density of the sparse calls of the last generation; None where there was none."""
        return self.generations[-1].density if self.generations else None

    @property
    def density_run(self) -> float | None:
        """The same with dense calls counted as 1."""
        return self.generations[-1].density_run if self.generations else None

    @property
    def kept_mass(self) -> float | None:
        """Mean share of the attention mass that the same sparse calls kept; None where it was not measured."""
        return self.generations[-1].kept_mass if self.generations else None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "sites": [asdict(site) for site in self.sites],
            "compilations": self.compilations,
            "other_compilations": self.other_compilations,
            "density": self.density,
            "density_run": self.density_run,
            "kept_mass": self.kept_mass,
            "generations": [asdict(generation) for generation in self.generations],
            "heads": [asdict(heads) for heads in self.heads],
            "warnings": list(self.warnings),
            "compiled": list(self.compiled),
        }

    def __str__(self) -> str:
        header = ("layer", "role", "layout", "decision", "reason")
        rows = [(s.layer, s.role, s.layout, s.decision, s.detail or s.reason or "") for s in self.sites]
        nothing = "no attention was found" if self.compilations else "no attention was compiled yet"
        lines = table(header, rows) if rows else [nothing]
        sparse = sum(site.decision == "sparse" for site in self.sites)
        lines += ["", *(f"compiled: {compiled}" for compiled in self.compiled)]
        lines += [f"{sparse} of {len(self.sites)} sites sparse, {self.compilations} compilations"]
        if self.other_compilations:
            lines.append(f"{self.other_compilations} more of graphs without Parameters, of this model or another")
        for number, generation in enumerate(self.generations, 1):
            lines += ["", f"generation {number}: {_summary(generation)}"]
            lines += table(("steps", "branch", "phase", "density", "kept mass"), _runs(generation.steps))
            lines += [f"step {step.step}: {step.note}" for step in generation.steps if step.note]
        if self.heads:
            lines += ["", "newest sparse call, per head"]
            lines += table(("layer", "branch", "density", "kept mass"), [_head_row(heads) for heads in self.heads])
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def build_report(models: Mapping[str, nn.Module], registry: Registry) -> Report:
    """Gather what the registry knows of some models.

    Args:
        models: by the prefix that their layers' names get ("" for none).
        registry: where to look.
    """
    report = Report()
    layers: list[tuple[str, Layer]] = []
    for prefix, model in models.items():
        enabled = registry.enabled.get(model)
        if enabled is not None:
            report.compiled.append(f"{prefix or type(model).__name__}: {enabled.choice}")
            report.warnings += [enabled.warning] if enabled.warning else []
        names = {parameter: layer_name(prefix, name) for name, parameter in model.named_parameters()}
        for parameter, records in registry.recorded(names):
            path = names[parameter]  # type: ignore[index]  # a Parameter
            report.compilations += len(records.graphs)
            report.warnings += [graph.warning for graph in records.graphs if graph.warning]
            own = registry.layers_of(parameter)
            kept_dense = bool(own) and all(layer.kept_dense for layer in own)
            report.sites += [_site_row(record, path, kept_dense) for record in records.sites.values()]
            report.sites += [site for graph in records.graphs for site in graph.sites]
        layers += [(path, layer) for parameter, path in names.items() for layer in registry.layers_of(parameter)]
    unowned = list(registry.unowned)
    report.other_compilations = len(unowned)
    report.sites += [
        replace(site, layer=f"{site.layer} (in a graph without Parameters)")
        for graph in unowned
        for site in graph.sites
    ]
    report.warnings += [graph.warning for graph in unowned if graph.warning]
    report.sites = list(dict.fromkeys(report.sites))
    if report.compilations and not report.sites:
        report.warnings.append(NOTHING_FOUND)
    report.calls = calls_of(layers)
    report.generations = generations_of(report.calls, verdict_notes(layers))
    report.heads = heads_of(layers)
    report.warnings += _warnings_of_time([layer for _, layer in layers], bool(report.generations))
    configs = {name: layer.planner.config for name, layer in layers}
    least = {
        name: None if config.target_recall is not None or config.sparsity_at_work == 0 else config.min_recall
        for name, config in configs.items()
    }
    found = (
        uniformity_warning(report.heads),
        unreached_warning(report.calls),
        whole_heads_warning(report.heads, least),
    )
    report.warnings += [warning for warning in found if warning]
    return report


def _warnings_of_time(layers: Sequence[Layer], timed: bool) -> list[str]:
    """What went wrong with the clock of these layers; ``timed``: whether any of their calls was in a generation."""
    warnings = []
    claims = dict.fromkeys(layer.claim for layer in layers if layer.claim is not None)
    if layers and not claims and not timed:
        warnings.append(
            "every call was dense, since no clock told the denoising step: attach the pipeline, or call the model"
            " inside `with sparse_compile.denoising(model, steps=...)`"
        )
    if mismatches := sum(claim.mismatches for claim in claims):
        warnings.append(f"{mismatches} calls ran a graph of another phase; is a guard filter in use?")
    if repeated := sum(claim.repeated_calls for claim in claims):
        warnings.append(
            f"{repeated} calls came again in the same step and branch and attended to everything: give them a branch"
            " name of their own, or move the clock"
        )
    if foreign := sum(claim.foreign_calls for claim in claims):
        warnings.append(
            f"{foreign} calls of layers came from outside of the pipeline that tells the time, and attended to"
            " everything: let pipelines around one transformer take turns"
        )
    return warnings


def layer_name(prefix: str, parameter: str) -> str:
    """The module around the projection that a Parameter belongs to: the name of a layer."""
    return ".".join([*([prefix] if prefix else []), *parameter.split(".")[:-2]])


def _site_row(record: SiteRecord, path: str, kept_dense: bool) -> SiteRecord:
    values = {**record.__dict__, "layer": path}
    if kept_dense and record.decision == "sparse":
        reason = Reason.DENSE_LAYER
        values.update(decision="dense", reason=reason.code, detail=reason.sentence, kernel=None)
    return SiteRecord(**values)


def _summary(generation: GenerationReport) -> str:
    if generation.density is None:
        return f"{len(generation.steps)} calls, all dense"
    mass = "" if generation.kept_mass is None else f", kept mass {generation.kept_mass:.3f}"
    held = ""
    if generation.at_floor is not None and generation.at_ceiling is not None:
        held = f", {generation.at_floor:.1%} of the queries at the floor, {generation.at_ceiling:.1%} at the ceiling"
    run = f"density_run {generation.density_run:.3f} over all"
    return f"density {generation.density:.3f} in sparse calls, {run}{mass}{held}"


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
        mass = mean_of_known(step.kept_mass for step in run)
        rows.append(
            (
                str(first.step) if first is last else f"{first.step}-{last.step}",
                first.branch,
                first.phase,
                f"{fmean(step.density for step in run):.3f}",
                "-" if mass is None else f"{mass:.3f}",
            )
        )
    return rows


def _head_row(heads: HeadReport) -> tuple[str, ...]:
    layer = f"{heads.layer}, attention {heads.ordinal + 1}" if heads.ordinal else heads.layer
    masses = "-" if heads.kept_mass is None else _of_heads(heads.kept_mass)
    return (layer, heads.branch, _of_heads(heads.density), masses)


def _of_heads(values: Sequence[float]) -> str:
    """One number where all heads agree, else all of them, or range and mean where there are many."""
    least, most = f"{min(values):.3f}", f"{max(values):.3f}"
    if least == most:
        return least
    if len(values) > MOST_HEADS:
        return f"{least}-{most}, mean {fmean(values):.3f}"
    return " ".join(f"{value:.2f}" for value in values)


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table: a header, a rule, and one line a row."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
