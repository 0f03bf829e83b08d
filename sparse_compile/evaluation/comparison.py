"""Run the demo model densely and sparsely from the same noise, and measure how far apart the videos are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import WanPipeline
from torch import Tensor

from sparse_compile.config import Config
from sparse_compile.evaluation import metrics
from sparse_compile.evaluation.demo_model import Scene, VideoSize, generate

DEMO_OPTIONS: Mapping[str, object] = {"min_tokens": 64, "density": 0.3, "q_clusters": 24, "k_clusters": 72}
"""What suits a sequence of about a thousand tokens: the defaults are made for a hundred thousand."""
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


def demo_options(given: Mapping[str, object]) -> dict[str, object]:
    """The options of a demo run: what was given, else the environment, else `DEMO_OPTIONS`.

    Raises:
        SparseAttentionError: an option is unknown or out of range.
    """
    chosen = set(given) | set(Config.from_options({}).changed())
    options = {name: value for name, value in DEMO_OPTIONS.items() if name not in chosen}
    if "top_p" in chosen:
        options.pop("density", None)  # it would replace the top_p that was asked for
    options.update(given)
    Config.from_options(options)
    return options


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
