"""Pipelines of our own around a small stack: two unnamed calls a step, in loops that can be held in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import OPTIONS
from torch import Tensor, nn
from toy_models import Stack, tokens


class BarePipeline(DiffusionPipeline):
    """Two calls a step, without any name for them and without a progress bar."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, steps: int, seed: int = 0, after_step: Callable[[int], None] = lambda step: None) -> Tensor:
        latents = []
        for step, x in enumerate(self.latents_of(steps, seed)):
            latents.append(x)
            after_step(step)
        return latents[-1]

    def latents_of(self, steps: int, seed: int = 0) -> Iterator[Tensor]:
        """The latents after each step, computed when they are asked for."""
        self.scheduler.set_timesteps(steps)
        x, text = tokens(seed=seed), tokens(seed=seed + 1)
        for timestep in self.scheduler.timesteps:
            cond, uncond = self.transformer(x), self.transformer(x + text)
            x = self.scheduler.step(2 * cond - uncond, timestep, x, return_dict=False)[0]
            yield x


def bare_pipeline(transformer: nn.Module | None = None, scheduler: Any = None) -> BarePipeline:
    """Around a stack of its own that is not compiled, or around another one's."""
    return BarePipeline(transformer or Stack(2), scheduler or FlowMatchEulerDiscreteScheduler())


def compiled_stack(**options: object) -> Stack:
    stack = Stack(2)
    stack.compile(backend="sparse_attn", options={**OPTIONS, **options})
    return stack
