"""What the model is trained to do: to name the velocity from a video to noise, at a random time between them."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from sparse_compile.evaluation.demo_model import SHIFT, VideoSize
from training.data import draw_attributes, embed, render

NULL_PROMPT_SHARE = 0.1
"""Prompts replaced by zeros in training, so that classifier-free guidance has a model without a prompt."""
UNIFORM_SHARE = 0.2
"""Times drawn evenly; the others are concentrated in the middle, where most is to be learnt."""


class Randomness(NamedTuple):
    """Where a batch comes from."""

    scenes: torch.Generator
    """On the CPU: prompts, positions, times."""
    noise: torch.Generator
    """On the device of the model, where most numbers are drawn."""

    @classmethod
    def of(cls, seed: int, device: torch.device) -> Self:
        """Two generators, which do not give the same numbers, from one seed."""
        scenes = torch.Generator().manual_seed(seed)
        other_seed = int(torch.randint(2**31, (), generator=scenes))
        return cls(scenes, torch.Generator(device).manual_seed(other_seed))


class Batch(NamedTuple):
    """Noised videos and what the model shall answer."""

    noised: Tensor
    """float32 [B, 3, T, H, W]."""
    times: Tensor
    """float32 [B], 0 (video) to 1 (noise)."""
    prompts: Tensor
    """float32 [B, 10, 64]."""
    velocity: Tensor
    """Noise minus video, float32 [B, 3, T, H, W]."""


def draw_batch(count: int, size: VideoSize, random: Randomness, *, null_share: float = NULL_PROMPT_SHARE) -> Batch:
    """Random videos at random times, on the device of the noise."""
    scenes, device = random.scenes, random.noise.device
    attributes = draw_attributes(count, scenes)
    video = render(attributes.to(device), size, scenes)
    prompts = embed(attributes)
    prompts[torch.rand(count, generator=scenes) < null_share] = 0
    times = draw_times(count, scenes).to(device)
    noise = torch.randn(video.shape, generator=random.noise, device=device)
    mix = times.view(-1, 1, 1, 1, 1)
    return Batch((1 - mix) * video + mix * noise, times, prompts.to(device), noise - video)


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """Times in (0, 1), shifted towards the noise as in sampling."""
    times = torch.sigmoid(torch.randn(count, generator=generator))
    even = torch.rand(count, generator=generator)
    times = torch.where(torch.rand(count, generator=generator) < UNIFORM_SHARE, even, times)
    return SHIFT * times / (1 + (SHIFT - 1) * times)


def velocity_loss(model: WanTransformer3DModel, batch: Batch, *, autocast: bool = False) -> Tensor:
    """Mean squared error of the model's velocity."""
    with torch.autocast(batch.noised.device.type, torch.bfloat16, enabled=autocast):
        answer = model(batch.noised, batch.times * 1000, batch.prompts, return_dict=False)[0]
    return F.mse_loss(answer.float(), batch.velocity)
