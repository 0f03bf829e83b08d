"""What all configurations of a sweep share, so that their rows can be compared: scenes, noise, steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from diffusers import WanPipeline
from torch import Tensor

from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation import metrics
from sparse_compile.evaluation.demo_model import TRAINED_SIZES, Scene, VideoSize, draw_scenes, generate

CONDITIONS_SEED = 1000
"""Scenes are the same under every seed: seeds differ in their noise only."""
NOISE_SPACING = 1000
"""Video n under seed s starts from the noise of s * NOISE_SPACING + n, so there may be as many videos a seed."""

OnStep = Callable[[int], None]
Started = Callable[[str, int], OnStep | None]
"""Called with a label and a number of generations before these begin; gives what to call after each step, or None."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The videos of a sweep: ``videos`` scenes under each of ``seeds``; one batched generation a seed."""

    size: VideoSize = TRAINED_SIZES[1]
    videos: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 20
    guidance: float = 2.0
    """Above 1, so that each step calls the model twice."""

    def __post_init__(self) -> None:
        if not 1 <= self.videos <= NOISE_SPACING:
            raise SparseAttentionError(
                f"a seed has 1 to {NOISE_SPACING} videos", self.videos, "Take more seeds for more videos."
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise SparseAttentionError(
                "seeds are different integers from 0 on, at least one", self.seeds, "Leave out what repeats."
            )

    def scenes(self) -> list[Scene]:
        """The prompts."""
        return draw_scenes(self.videos, CONDITIONS_SEED)

    def noise(self, seed: int) -> Tensor:
        """The starting noise of each video, from a generator of its own: float32 [videos, 3, T, H, W]."""
        generators = (torch.Generator().manual_seed(seed * NOISE_SPACING + number) for number in range(self.videos))
        return torch.stack([torch.randn(3, *self.size, generator=generator) for generator in generators])

    def generate(self, pipeline: WanPipeline, seed: int, on_step: OnStep | None = None) -> Tensor:
        """The videos of one seed, made as one batch: float32 [videos, 3, T, H, W] in [0, 1]."""
        made = generate(
            pipeline,
            self.scenes(),
            self.size,
            steps=self.steps,
            guidance=self.guidance,
            latents=self.noise(seed),
            on_step=on_step,
        )
        return metrics.to_unit_range(made)

    def to_dict(self) -> dict[str, object]:
        """The fields as a row shows them."""
        return {**asdict(self), "size": str(self.size), "tokens": self.size.tokens, "seeds": list(self.seeds)}
