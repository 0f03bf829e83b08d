"""Many configurations on the same videos: how close each comes to dense, at which density.

Rows are only comparable at equal ``density_run``. PSNR against dense at one seed is a trajectory metric: single
videos differ by several decibels, so compare means over the same videos, and take less than 0.3 dB for a tie.
"""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor

from sparse_compile.api import explain
from sparse_compile.evaluation import metrics
from sparse_compile.evaluation.comparison import DEMO_OPTIONS, PLUG_IN_OPTIONS, compile_transformer, measure
from sparse_compile.evaluation.demo_model import Scene, VideoSize, draw_scenes, generate, load_pipeline

CORRECTIONS = ("none", "pooled", "coupled")
METHODS: Mapping[str, Mapping[str, object]] = {
    "svg2": {**DEMO_OPTIONS["svg2"], "kmeans_iters_init": 10},
    "adaspa": DEMO_OPTIONS["adaspa"],
}
"""Both methods at a quarter of the pairs, in sizes that suit a thousand tokens."""
GUIDANCE = 2.0

OnStep = Callable[[int], None]


@dataclass(frozen=True)
class Protocol:
    """What all configurations of a sweep share. Video n starts from the noise of seed + n."""

    size: VideoSize
    videos: int
    steps: int
    seed: int
    dense_steps: float = 0.2


@dataclass(frozen=True)
class Row:
    """One configuration: what it kept, and how close its videos come to dense: means, ``psnr_each`` by video."""

    method: str
    correction: str
    options: dict[str, object]
    psnr: float
    psnr_min: float
    psnr_each: list[float]
    ssim: float
    flicker_gap: float
    density: float | None
    density_run: float | None
    kept_mass: float | None
    compilations: int
    recompilations: int
    """Compilations after the first generation; must be 0."""
    seconds: float
    """Mean of one generation, everything compiled; CPU times of the demo model say nothing about large ones."""


@dataclass(frozen=True)
class Sweep:
    """The context that every row needs, and the rows."""

    protocol: Protocol
    noise_ceiling: float
    """Mean PSNR in dB between dense eager and dense compiled: a sparse run near it is lossless."""
    provenance: dict[str, object]
    rows: list[Row] = field(default_factory=list)

    def lines(self) -> Iterator[dict[str, Any]]:
        """One dict a row, each with the whole context."""
        protocol = {**asdict(self.protocol), "size": str(self.protocol.size), "tokens": self.protocol.size.tokens}
        context = {**self.provenance, **protocol, "guidance": GUIDANCE, "noise_ceiling": self.noise_ceiling}
        return ({**context, **asdict(row)} for row in self.rows)


def corrections_grid() -> list[dict[str, object]]:
    """Options of both methods with each correction."""
    return [
        {"method": method, **options, "correction": correction}
        for method, options in METHODS.items()
        for correction in CORRECTIONS
    ]


def run_sweep(
    protocol: Protocol, grid: Sequence[Mapping[str, object]], on_step: Callable[[str], OnStep | None]
) -> Sweep:
    """Generate densely, eager and compiled, then with each configuration, and measure against the compiled one.

    Args:
        protocol: videos, size, steps, seed.
        grid: options of each configuration.
        on_step: called with a label before each run; gives what to call after each step of it, or None. A sparse run
            makes one video more, the first, which compiles.
    """
    scenes = draw_scenes(protocol.videos, protocol.seed + 1000)

    def videos_of(pipeline: WanPipeline, told: OnStep | None) -> Tensor:
        made = [_generate(pipeline, scene, protocol, number, told) for number, scene in enumerate(scenes)]
        return metrics.to_unit_range(torch.cat(made))

    eager = videos_of(load_pipeline(), on_step("dense, eager"))
    pipeline = load_pipeline()
    compile_transformer(pipeline, "inductor")
    dense = videos_of(pipeline, on_step("dense, compiled"))
    sweep = Sweep(protocol, float(metrics.psnr(eager, dense).mean()), provenance())
    for chosen in grid:
        options = {**PLUG_IN_OPTIONS, "dense_steps": protocol.dense_steps, **chosen}
        told = on_step(f"{chosen['method']}, {chosen['correction']}")
        pipeline = load_pipeline()
        compile_transformer(pipeline, "sparse_attn", options)
        _generate(pipeline, scenes[0], protocol, 0, told)
        compilations = explain(pipeline).compilations
        start = time.perf_counter()
        videos = videos_of(pipeline, told)
        seconds = (time.perf_counter() - start) / len(scenes)
        report = explain(pipeline).to_dict()
        sweep.rows.append(_row(options, measure(videos, dense), report, compilations, seconds))
    return sweep


def _generate(pipeline: WanPipeline, scene: Scene, protocol: Protocol, number: int, told: OnStep | None) -> Tensor:
    seed = protocol.seed + number
    size, steps = protocol.size, protocol.steps
    return generate(pipeline, [scene], size, steps=steps, guidance=GUIDANCE, seed=seed, on_step=told)


def _row(
    options: dict[str, object],
    measured: Sequence[Mapping[str, float]],
    report: Mapping[str, Any],
    first_compilations: int,
    seconds: float,
) -> Row:
    def mean(name: str) -> float:
        return fmean(video[name] for video in measured)

    generations = report["generations"][-len(measured) :]

    def mean_of_generations(name: str) -> float | None:
        values = [generation[name] for generation in generations if generation[name] is not None]
        return fmean(values) if values else None

    each = [video["psnr"] for video in measured]
    return Row(
        method=str(options["method"]),
        correction=str(options["correction"]),
        options=options,
        psnr=mean("psnr"),
        psnr_min=min(each),
        psnr_each=each,
        ssim=mean("ssim"),
        flicker_gap=mean("flicker_gap"),
        density=mean_of_generations("density"),
        density_run=mean_of_generations("density_run"),
        kept_mass=mean_of_generations("kept_mass"),
        compilations=report["compilations"],
        recompilations=report["compilations"] - first_compilations,
        seconds=seconds,
    )


def provenance() -> dict[str, object]:
    """Versions, threads, and the git revision where the package lies in a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        revision = git.stdout.strip() or None
    except OSError:
        revision = None
    return {
        "sparse_compile": version("sparse_compile"),
        "revision": revision,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
    }
