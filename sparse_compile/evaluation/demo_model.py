"""The small video model that ships with the package, in the pipeline that people use.

A Wan transformer trained on procedural scenes (see tiny_video_dit/README.md). It works on pixels: its latents
are the video, so the pipeline has no VAE and no text encoder. A prompt is ten integers, a `Scene` in words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from sparse_compile.errors import SparseAttentionError

CHECKPOINT = Path(__file__).parent / "tiny_video_dit"
TEXT_DIM = 64
SHIFT = 2.0
"""Timestep shift that the model was trained with."""
PATCH = 4
"""Pixels a side of one token."""

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "white")
TEXTURES = ("plain", "striped", "dotted")
SPEEDS = ("slow", "steady", "fast")
BACKGROUNDS = ("plain", "dotted", "drifting striped")
SLOTS = (SHAPES, COLOURS, TEXTURES, SPEEDS, SHAPES, COLOURS, TEXTURES, SPEEDS, BACKGROUNDS, COLOURS)
"""The words of each of the ten integers of a prompt."""


class VideoSize(NamedTuple):
    """Frames, height and width in pixels."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Tokens that the model attends over."""
        return self.frames * (self.height // PATCH) * (self.width // PATCH)

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


TRAINED_SIZES = (VideoSize(12, 32, 48), VideoSize(9, 32, 32))


@dataclass(frozen=True)
class Scene:
    """A prompt: two bouncing shapes, the second in front, over a background. Attributes index `SLOTS`."""

    attributes: tuple[int, ...]

    @classmethod
    def of(
        cls, behind: tuple[str, str, str, str], front: tuple[str, str, str, str], background: tuple[str, str]
    ) -> Scene:
        """A scene in words: twice (shape, colour, texture, speed), then (pattern, colour) behind them."""
        words = (*behind, *front, *background)
        for slot, word in zip(SLOTS, words, strict=True):
            if word not in slot:
                raise SparseAttentionError("a scene uses known words", word, f"Use one of {', '.join(slot)}.")
        return cls(tuple(slot.index(word) for slot, word in zip(SLOTS, words, strict=True)))

    def __str__(self) -> str:
        words = [slot[index] for slot, index in zip(SLOTS, self.attributes, strict=True)]
        behind, front = ("{3} {2} {1} {0}".format(*words[at : at + 4]) for at in (0, 4))
        return f"a {front} in front of a {behind}, {words[8]} {words[9]} background"


SHOWCASE = (
    Scene.of(("circle", "magenta", "plain", "steady"), ("square", "yellow", "plain", "slow"), ("dotted", "blue")),
    Scene.of(("square", "blue", "plain", "slow"), ("circle", "red", "striped", "fast"), ("plain", "white")),
    Scene.of(("triangle", "white", "plain", "slow"), ("circle", "blue", "dotted", "steady"), ("plain", "red")),
    Scene.of(("square", "red", "dotted", "fast"), ("triangle", "green", "plain", "steady"), ("plain", "blue")),
)
"""Prompts whose colours stand apart, so that a picture of them is easy to read."""


def demo_scenes(count: int, seed: int) -> list[Scene]:
    """The showcase, then random scenes, ``count`` together."""
    return [*SHOWCASE[:count], *draw_scenes(max(0, count - len(SHOWCASE)), seed)]


def draw_scenes(count: int, seed: int) -> list[Scene]:
    """Random scenes; the same seed gives the same scenes."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(0, len(slot), (count,), generator=generator) for slot in SLOTS]
    return [Scene(tuple(row)) for row in torch.stack(columns, dim=1).tolist()]


def prompt_embeds(scenes: Sequence[Scene]) -> Tensor:
    """What the model reads in place of encoded text: float32 [B, 10, 64], a fixed random vector a word."""
    generator = torch.Generator().manual_seed(1234)
    attributes = torch.tensor([scene.attributes for scene in scenes])  # [B, 10]
    columns = []
    for slot, words in enumerate(SLOTS):
        of_words = torch.randn(len(words), TEXT_DIM, generator=generator)
        of_slot = torch.randn(1, TEXT_DIM, generator=generator)
        columns.append((of_words + of_slot)[attributes[:, slot]])
    return torch.stack(columns, dim=1)


def load_pipeline(dtype: torch.dtype = torch.float32) -> WanPipeline:
    """The shipped model in diffusers' `WanPipeline`, on the CPU, without a progress bar of its own."""
    transformer = WanTransformer3DModel.from_pretrained(CHECKPOINT, torch_dtype=dtype).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: WanPipeline,
    scenes: Sequence[Scene],
    size: VideoSize,
    *,
    steps: int = 20,
    guidance: float = 2.0,
    seed: int = 0,
    latents: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Run the pipeline: two model calls a step, with and without the prompt.

    Args:
        pipeline: from `load_pipeline`; its transformer may be compiled.
        scenes: one prompt a video.
        size: frames, height and width; the model was trained at `TRAINED_SIZES`.
        steps: denoising steps.
        guidance: scale of the classifier-free guidance.
        seed: of the starting noise.
        latents: the starting noise itself, float32 [B, 3, T, H, W]; replaces ``seed``.
        on_step: called with the number of each step that is done.

    Returns:
        The videos, float32 [B, 3, T, H, W] in [-1, 1], on the CPU.
    """

    def step_done(_: WanPipeline, step: int, __: Tensor, ___: dict[str, Tensor]) -> dict[str, Tensor]:
        if on_step is not None:
            on_step(step)
        return {}

    embeds = prompt_embeds(scenes).to(pipeline.device)
    video: Tensor = pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros_like(embeds),
        num_frames=(size.frames - 1) * pipeline.vae_scale_factor_temporal + 1,
        height=size.height * pipeline.vae_scale_factor_spatial,
        width=size.width * pipeline.vae_scale_factor_spatial,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        latents=latents,
        callback_on_step_end=step_done,
        output_type="latent",
        return_dict=False,
    )[0]
    return video.float().clamp(-1, 1).cpu()
