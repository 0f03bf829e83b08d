"""A diffusers pipeline around a toy transformer, where a real one would only be slower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from toy_models import Block, Stack, tokens

Moved = Callable[["ToyPipeline", int], None]


class ToyBlock(Block):
    """Attention as diffusers' modules show it: by a processor."""

    processor = staticmethod(len)


class ToyTransformer(Stack):
    """Equal blocks, which it names as repeated."""

    _repeated_blocks = ("ToyBlock",)

    def __init__(self, layers: int = 2) -> None:
        super().__init__(layers)
        for place, block in enumerate(self.blocks):
            twin = ToyBlock()
            twin.load_state_dict(block.state_dict())
            self.blocks[place] = twin
        self.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class ToyPipeline(DiffusionPipeline):
    """Denoises tokens by one call of the transformer, or of its successor in the second half, in each step."""

    _optional_components = ("transformer_2",)

    def __init__(self, transformer: nn.Module, scheduler: Any, transformer_2: nn.Module | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, transformer_2=transformer_2)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, steps: int = 4, seed: int = 0, size: int = 128, after: Moved | None = None) -> Tensor:
        """The tokens after the last step; ``after`` is called at the end of each."""
        x = tokens(size, seed=seed)
        self.scheduler.set_timesteps(steps)
        with self.progress_bar(total=steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                late = self.transformer_2 is not None and 2 * step >= steps
                noise = (self.transformer_2 if late else self.transformer)(x.to(self.transformer.dtype))
                x = self.scheduler.step(noise.float(), timestep, x).prev_sample
                if after is not None:
                    after(self, step)
                progress.update()
        return x


def toy_pipeline(transformer: nn.Module | None = None, second: nn.Module | None = None) -> ToyPipeline:
    return ToyPipeline(transformer or ToyTransformer(), FlowMatchEulerDiscreteScheduler(), second)
