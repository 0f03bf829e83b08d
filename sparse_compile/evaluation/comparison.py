"""Run the demo model densely and sparsely from the same noise, and measure how far apart the videos are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import WanPipeline
from torch import Tensor

from sparse_compile.budgets import BUDGETS
from sparse_compile.config import BUILT_IN_METHODS, Config, belongs, declared_options, set_in_environment
from sparse_compile.evaluation import metrics
from sparse_compile.evaluation.demo_model import Scene, VideoSize, generate

DEMO_OPTIONS: Mapping[str, Mapping[str, object]] = {
    "svg2": {"min_tokens": 64, "dense_layers": 0, "density": 0.25, "q_clusters": 24, "k_clusters": 72},
    "adaspa": {"min_tokens": 64, "dense_layers": 0, "sparsity": 0.75, "block_size": 16},
}
"""What suits a sequence of about a thousand tokens, by method: the defaults are made for a hundred thousand."""
PLUG_IN_OPTIONS: Mapping[str, object] = {"min_tokens": 64, "dense_layers": 0}
"""The same for a method that is not built in, whose options nobody knows here."""
METRICS = (metrics.psnr, metrics.psnr_frame, metrics.ssim, metrics.flicker_gap)


@dataclass(frozen=True)
class Run:
    """Videos of one model and how long they took.

    ``videos`` is float32 [N, 3, T, H, W] in [0, 1]. ``first_seconds`` is one generation that also compiles,
    ``seconds`` are the generations of the videos, after it.
    """

    videos: Tensor
    first_seconds: float
    seconds: tuple[float, ...]

    @property
    def mean_seconds(self) -> float:
        """Seconds a generation takes once everything is compiled."""
        return sum(self.seconds) / len(self.seconds)

    @property
    def compile_seconds(self) -> float:
        """How much longer the first generation took than the same one repeated."""
        return max(0.0, self.first_seconds - self.seconds[0])


def demo_runs(given: Mapping[str, object], environ: Mapping[str, str] | None = None) -> dict[str, dict[str, object]]:
    """The options of each run of the demo, by method.

    A method that was chosen, in ``given`` or in the environment, runs alone with everything that was given. Otherwise
    each built-in method runs, with what belongs to it and what belongs to no method.

    Args:
        given: what the user asked for.
        environ: the variables to read; the process's own by default.

    Raises:
        SparseAttentionError: an option is unknown, out of range, or belongs to another method than the chosen one.
    """
    variables = set_in_environment(environ)
    if "method" in given or "method" in variables:
        options = demo_options(given, environ)
        return {str(options["method"]): options}
    runs = {}
    for method in BUILT_IN_METHODS:
        # The backend reads the environment too: what it holds for the other method is set back to its default.
        others = {name: getattr(Config, name) for name in variables if not belongs(name, method)}
        own = {name: value for name, value in given.items() if belongs(name, method)}
        runs[method] = demo_options({"method": method, **others, **own}, environ)
    return runs


def demo_options(given: Mapping[str, object], environ: Mapping[str, str] | None = None) -> dict[str, object]:
    """The options of one run: what was given, else the environment, else what suits the method in a small video.

    Args:
        given: what the user asked for; without ``method``, that of the environment or the default runs.
        environ: the variables to read; the process's own by default.

    Raises:
        SparseAttentionError: an option is unknown, out of range, or belongs to another method.
    """
    variables = set_in_environment(environ)
    method = str(given.get("method", variables.get("method", Config.method)))
    chosen = {name for name in (*given, *variables) if belongs(name, method)}
    taken = {*chosen, *BUDGETS} if chosen & {*BUDGETS, "preset"} else chosen  # one goes by a single budget
    options = {name: value for name, value in _suited_to(method).items() if name not in taken}
    options = {"method": method, **options, **given}
    Config.from_options(options, environ)
    return options


def resolved_options(options: Mapping[str, object], environ: Mapping[str, str] | None = None) -> dict[str, object]:
    """The options of a run as the backend reads them: its values for all that were set, and the correction at work.

    Args:
        options: from `demo_options` or `demo_runs`.
        environ: the variables to read; the process's own by default.
    """
    config = Config.from_options(options, environ)
    chosen = {"method", "correction", *options, *set_in_environment(environ)}
    resolved = {
        name: getattr(config, name) for name in declared_options() if name in chosen and belongs(name, config.method)
    }
    if config.method in BUILT_IN_METHODS:
        resolved["correction"] = config.correction_at_work
    return resolved


def _suited_to(method: str) -> Mapping[str, object]:
    return DEMO_OPTIONS.get(method, PLUG_IN_OPTIONS)


def compile_transformer(
    pipeline: WanPipeline,
    backend: str,
    options: Mapping[str, object] | None = None,
    *,
    regional: bool = False,
) -> None:
    """Compile the pipeline's transformer as a whole, or each of its equal blocks, in place.

    Whatever was compiled in this process before is forgotten, so that counts and times are those of this run.
    """
    torch.compiler.reset()
    given = dict(options) if options else None
    if regional:
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend=backend, options=given)
    else:
        pipeline.transformer.compile(backend=backend, options=given)


def run_generations(
    pipeline: WanPipeline,
    scenes: Sequence[Scene],
    size: VideoSize,
    *,
    steps: int,
    seed: int,
    on_step: Callable[[int], None] | None = None,
) -> Run:
    """Generate the first scene once to compile, then every scene with the clock running.

    Video n starts from the noise of seed + n.
    """

    def timed(index: int) -> tuple[Tensor, float]:
        start = time.perf_counter()
        video = generate(pipeline, [scenes[index]], size, steps=steps, seed=seed + index, on_step=on_step)
        return video, time.perf_counter() - start

    _, first_seconds = timed(0)
    results = [timed(index) for index in range(len(scenes))]
    videos = metrics.to_unit_range(torch.cat([video for video, _ in results]))
    return Run(videos, first_seconds, tuple(seconds for _, seconds in results))


def measure(videos: Tensor, reference: Tensor) -> list[dict[str, float]]:
    """Every metric of each video against its reference; both float [N, 3, T, H, W] in [0, 1]."""
    columns = {metric.__name__: metric(videos, reference).tolist() for metric in METRICS}
    return [{name: values[index] for name, values in columns.items()} for index in range(len(videos))]
