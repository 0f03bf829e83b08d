"""How large the measured calls are, and how long each is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.shapes import Shape

PARTS = ("kernel", "op", "generation")
TOKENS_PER_QUERY_CLUSTER, TOKENS_PER_KEY_CLUSTER = 256, 64
"""Of a ragged plan, on average."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class VideoModel(NamedTuple):
    """A transformer with the blocks of Wan, and its latents."""

    layers: int
    heads: int
    head_size: int
    frames: int
    height: int
    width: int
    """Latents; a token has one frame, two rows and two columns."""
    text: int
    steps: int

    @property
    def tokens(self) -> int:
        """Video tokens."""
        return self.frames * (self.height // 2) * (self.width // 2)


SMALL_WAN = VideoModel(2, 4, 128, 8, 64, 64, 128, 20)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a run measures."""

    threads: tuple[int, ...] = (1, 2)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    head_sizes: tuple[int, ...] = (128, 64)
    heads: int = 2
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16_384)
    """Of the part ``kernel``."""
    densities: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    op_lengths: tuple[int, ...] = (4096, 8192, 16_384)
    op_density: float = 0.25
    long: int = 16_384
    """From this length on only the densities of `long_densities`, and `few_repeats`; two threads only in ``kernel``."""
    long_densities: tuple[float, ...] = (0.25, 0.125)
    block: int = 128
    repeats: int = 11
    few_repeats: int = 3
    seconds: float = 6.0
    """About how long the calls of one shape are measured where they are quick; slow ones have five rounds."""
    model: VideoModel = SMALL_WAN
    methods: tuple[str, ...] = ("svg2", "adaspa")
    options: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "svg2": {"density": 0.25, "strict": True, "min_tokens": 1},
            "adaspa": {"strict": True, "min_tokens": 1},
        }
    )
    """Of the generations. Weights are random, so their attention is flat and SVG2's top-p would keep nearly all keys:
    it is given the density. ``strict`` only turns a model that stays dense into an error."""

    def densities_of(self, tokens: int) -> tuple[float, ...]:
        """The densities measured at a length."""
        if tokens < self.long:
            return self.densities
        return tuple(density for density in self.densities if density in self.long_densities)

    def repeats_of(self, tokens: int) -> int:
        """Rounds at a length, where there is time for them."""
        return self.repeats if tokens < self.long else self.few_repeats

    def shape_of(self, tokens: int, head_size: int) -> Shape:
        """One attention call."""
        clusters = (max(1, tokens // TOKENS_PER_QUERY_CLUSTER), max(2, tokens // TOKENS_PER_KEY_CLUSTER))
        return Shape(f"{tokens}x{head_size}", tokens, 0, self.heads, head_size, *clusters)


FULL = Sizes()
QUICK = Sizes(
    threads=(1,),
    dtypes=("bfloat16",),
    head_sizes=(128,),
    lengths=(4096,),
    densities=(0.25,),
    op_lengths=(4096,),
    repeats=5,
    seconds=2.0,
    model=VideoModel(1, 2, 64, 4, 64, 64, 32, 20),
)
TINY = Sizes(
    threads=(1,),
    dtypes=("float32",),
    head_sizes=(32,),
    lengths=(256,),
    densities=(1.0, 0.5),
    op_lengths=(256,),
    op_density=0.5,
    block=32,
    repeats=2,
    seconds=0.01,
    model=VideoModel(1, 2, 32, 4, 16, 16, 8, 20),
    options={
        "svg2": {"density": 0.5, "strict": True, "min_tokens": 1, "q_clusters": 4, "k_clusters": 8},
        "adaspa": {"strict": True, "min_tokens": 1, "block_size": 16},
    },
)
"""For tests."""
