"""Many configurations on the same videos: how close each comes to dense, at which density.

Rows are only comparable at equal ``density_run``. PSNR against dense at one seed is a trajectory metric: single
videos differ by several decibels, so compare means over the same videos, and take less than 0.3 dB for a tie.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import NamedTuple

import torch
from diffusers import WanPipeline
from torch import Tensor

from sparse_compile.api import explain
from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation.comparison import compile_transformer, measure
from sparse_compile.evaluation.demo_model import load_pipeline
from sparse_compile.evaluation.grids import Configuration
from sparse_compile.evaluation.protocol import OnStep, Protocol, Started
from sparse_compile.evaluation.reference import Reference
from sparse_compile.evaluation.results import ResultsFile, checkpoint_digest, key_of, options_at_work, provenance
from sparse_compile.phases import Phase

COMPILE: Mapping[str, object] = {"lowering": "eager"}
"""How configurations are compiled, unless they say otherwise: the same graphs and kernels without Inductor's code.

The least work for three generations: in CPU seconds on a busy machine, 75 for SVG2 against 148 with Inductor, which
takes 90 for its three graphs and 19 instead of 21 a generation. SVG2 coupled at a quarter of the pairs, all twelve
videos: both ways agree to 48 dB or more, eight videos to 120 dB (where they differ, rounding decided what is kept), and
the mean PSNR against dense is 34.990 dB with Inductor and 34.992 dB so.
"""
LOSSLESS_WITHIN = 1.0
"""Decibels below the noise ceiling in which a result cannot be told from dense."""
SEARCHING = (Phase.SEARCH, Phase.REFINE)
DENSITY_TOLERANCE = 0.006
FARTHEST_DENSITY = 0.02
MOST_PROBES = 8
"""Of the search for a top_p: when it ends, when it has failed, and how many generations it may take."""


@dataclass(frozen=True)
class Figures:
    """What one configuration kept, and how close its videos come to dense: means over all of them."""

    psnr: float
    psnr_min: float
    psnr_by_seed: list[float]
    psnr_each: list[float]
    ssim: float
    flicker_gap: float
    lossless: bool
    density: float | None
    density_run: float | None
    kept_mass: float | None
    at_floor: float | None
    at_ceiling: float | None
    """Shares of the queries that the bounds of a recall target hold; None without one."""
    searches: int
    """Steps of the last generation that made a plan to hold, or k-means from scratch."""
    compilations: int
    recompilations: int
    """Compilations after the first generation; must be 0."""
    generation_seconds: float
    """Mean of one batch with everything compiled; CPU times of the demo model say nothing about large ones."""
    seconds: float
    """All that the configuration took."""
    cpu_seconds: float
    """The same by the clock of the process, which others on the machine hardly touch."""
    warnings: list[str]
    """Of the report."""


def run_sweep(
    protocol: Protocol,
    configurations: Sequence[Configuration],
    reference: Reference,
    results: ResultsFile,
    started: Started,
    grid: str,
) -> None:
    """Measure each configuration that has no row yet, and write its row at once.

    Args:
        protocol: the videos.
        configurations: all are checked before any is measured.
        reference: the dense videos of the protocol.
        results: where rows are and go.
        started: see `Started`; a configuration that has a row is passed over in silence.
        grid: what the rows shall say they belong to.

    Raises:
        SparseAttentionError: the installed version refuses a configuration.
    """
    keys = {configuration.label: key_of_configuration(protocol, configuration) for configuration in configurations}
    for configuration in configurations:
        if keys[configuration.label] in results.by_key():
            continue
        options = dict(configuration.options)
        if configuration.matched_density is not None:
            options["top_p"] = match_density(protocol, configuration, started)
        figures = measured(protocol, options, reference, started(configuration.label, len(protocol.seeds)))
        config = checked(configuration, options)
        row = {
            "key": keys[configuration.label],
            "label": configuration.label,
            "series": configuration.series,
            "grid": grid,
            **provenance(),
            **protocol.to_dict(),
            "checkpoint": checkpoint_digest(),
            "ceiling": reference.ceiling,
            "compile": config.lowering,
            **{name: getattr(config, name) for name in ("method", "dense_steps", "dense_layers")},
            "correction": config.correction_at_work,
            "options": options_at_work(config),
            **asdict(figures),
        }
        results.append(row)


def key_of_configuration(protocol: Protocol, configuration: Configuration) -> str:
    """The key of its row. Where top_p has yet to be found, what it is to match stands for it.

    Raises:
        SparseAttentionError: the installed version refuses the configuration.
    """
    options = options_at_work(checked(configuration, configuration.options))
    if configuration.matched_density is not None:
        options["matched_density"] = configuration.matched_density
    return key_of(protocol, options)


def checked(configuration: Configuration, options: Mapping[str, object]) -> Config:
    """The options as the backend reads them.

    Raises:
        SparseAttentionError: it refuses them; the message names the configuration.
    """
    try:
        return Config.from_options({**COMPILE, **options})
    except SparseAttentionError as error:
        raise refused(configuration, error) from error


def refused(configuration: Configuration, reason: SparseAttentionError) -> SparseAttentionError:
    """The error of a configuration that cannot run."""
    rule = "this version must accept every configuration of a sweep"
    return SparseAttentionError(rule, configuration.label, f"It says: {reason}")


def compiled_pipeline(options: Mapping[str, object]) -> WanPipeline:
    """The demo model, compiled with the backend as every configuration of a sweep is."""
    pipeline = load_pipeline()
    compile_transformer(pipeline, "sparse_attn", {**COMPILE, **options})
    return pipeline


def measured(
    protocol: Protocol, options: Mapping[str, object], reference: Reference, told: OnStep | None = None
) -> Figures:
    """Generate the videos of all seeds with some options, and measure them."""
    start, cpu_start = time.perf_counter(), time.process_time()
    pipeline = compiled_pipeline(options)
    made: list[Tensor] = []
    seconds: list[float] = []
    first_compilations = 0
    for number, seed in enumerate(protocol.seeds):
        before = time.perf_counter()
        made.append(protocol.generate(pipeline, seed, told))
        seconds.append(time.perf_counter() - before)
        if number == 0:
            first_compilations = explain(pipeline).compilations
    videos = measure(torch.cat(made), reference.compiled)
    report = explain(pipeline)
    psnr = [video["psnr"] for video in videos]
    by_seed = [fmean(psnr[at : at + protocol.videos]) for at in range(0, len(psnr), protocol.videos)]

    def of_generations(name: str) -> float | None:
        values = [getattr(generation, name) for generation in report.generations]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    return Figures(
        psnr=fmean(psnr),
        psnr_min=min(psnr),
        psnr_by_seed=by_seed,
        psnr_each=psnr,
        ssim=fmean(video["ssim"] for video in videos),
        flicker_gap=fmean(video["flicker_gap"] for video in videos),
        lossless=fmean(psnr) >= reference.ceiling - LOSSLESS_WITHIN,
        density=of_generations("density"),
        density_run=of_generations("density_run"),
        kept_mass=of_generations("kept_mass"),
        at_floor=of_generations("at_floor"),
        at_ceiling=of_generations("at_ceiling"),
        searches=len({step.step for step in report.generations[-1].steps if step.phase in SEARCHING}),
        compilations=report.compilations,
        recompilations=report.compilations - first_compilations,
        generation_seconds=fmean(seconds[1:] or seconds),
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu_start,
        warnings=report.warnings,
    )


def match_density(protocol: Protocol, configuration: Configuration, started: Started) -> float:
    """The top_p at which a configuration keeps its ``matched_density``, found on the videos of the first seed.

    Equal density in the sparse calls is equal ``density_run`` too, where the dense steps are the same.

    Raises:
        SparseAttentionError: no top_p comes near it, as below the share that ``min_kept`` keeps anyway.
    """
    wanted = configuration.matched_density
    assert wanted is not None
    one_seed = replace(protocol, seeds=protocol.seeds[:1])

    def density_at(top_p: float) -> float:
        told = started(f"{configuration.label}: top_p={top_p:.4f}", 1)
        pipeline = compiled_pipeline({**configuration.options, "top_p": top_p})
        one_seed.generate(pipeline, one_seed.seeds[0], told)
        return explain(pipeline).density or 1.0

    found = interpolated_root(density_at, wanted, tolerance=DENSITY_TOLERANCE, most=MOST_PROBES)
    if abs(found.value - wanted) > FARTHEST_DENSITY:
        raise SparseAttentionError(
            f"a top_p must keep about {wanted:g} of the pairs in {configuration.label!r}",
            f"{found.value:.3f} at top_p={found.at:.4f}",
            "Ask for another density, or lower min_kept.",
        )
    return found.at


class Probe(NamedTuple):
    """An argument of a function, and its value."""

    at: float
    value: float


def interpolated_root(function: Callable[[float], float], wanted: float, *, tolerance: float, most: int) -> Probe:
    """Where a function that rises from 0 at 0 to 1 at 1 has a wanted value, or the nearest of ``most`` probes.

    Linear interpolation between the two nearest probes, but never close to either, so that both move.
    """
    low, high = Probe(0.0, 0.0), Probe(1.0, 1.0)
    best = high
    for _ in range(most):
        part = (wanted - low.value) / max(high.value - low.value, 1e-9)
        at = low.at + min(max(part, 0.1), 0.9) * (high.at - low.at)
        probe = Probe(at, function(at))
        best = min(best, probe, key=lambda each: abs(each.value - wanted))
        if abs(probe.value - wanted) <= tolerance:
            break
        low, high = (probe, high) if probe.value < wanted else (low, probe)
    return best
