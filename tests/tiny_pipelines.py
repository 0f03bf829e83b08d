"""Tiny pipelines, run to their latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline
from families.cogvideox import cogvideox
from families.wan import wan_t2v
from generations import QUICK
from torch import Tensor, nn

import sparse_compile

OPTIONS = {**QUICK, "min_tokens": 64}
HOOKED = ("set_timesteps", "step", "set_begin_index")


def wan_pipeline(scheduler: Any = None, second: bool = False, **config: Any) -> WanPipeline:
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
        transformer=wan_t2v()[0],
        transformer_2=wan_t2v()[0] if second else None,
        **config,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text(seed: int) -> Tensor:
    return torch.randn(1, 20, 24, generator=torch.Generator().manual_seed(seed))


def run(pipe: WanPipeline, steps: int = 4, seed: int = 0, guidance_scale: float = 3.0, **how: Any) -> Tensor:
    """The latents of a tiny video: 3 x 8 x 8 tokens."""
    out = pipe(
        prompt_embeds=text(1),
        negative_prompt_embeds=text(2),
        height=128,
        width=128,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        return_dict=False,
        **how,
    )
    return out[0]


def compile_whole(model: nn.Module, **options: Any) -> None:
    model.compile(backend="sparse_attn", options={**OPTIONS, **options})


def compile_regional(model: nn.Module, **options: Any) -> None:
    model.compile_repeated_blocks(backend="sparse_attn", options={**OPTIONS, **options})  # type: ignore[operator]


WAYS: dict[str, Callable[..., None]] = {"whole": compile_whole, "regional": compile_regional}


def steps_of(thing: Any, generation: int = -1) -> list[tuple[int, str, str]]:
    return [
        (step.step, step.branch, step.phase) for step in sparse_compile.explain(thing).generations[generation].steps
    ]


def expected(*names: str, branches: tuple[str, ...] = ("cond", "uncond"), first: int = 0) -> list[tuple[int, str, str]]:
    return [(step, branch, name) for step, name in enumerate(names, first) for branch in branches]


FOUR = ("dense", "search", "sparse", "sparse")


def cog_pipeline() -> CogVideoXPipeline:
    pipe = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=cogvideox()[0], scheduler=CogVideoXDDIMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_cog(pipe: CogVideoXPipeline, steps: int = 4) -> Tensor:
    embeds = torch.randn(2, 1, 18, 24, generator=torch.Generator().manual_seed(1))
    out = pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        height=128,
        width=128,
        num_frames=9,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        return_dict=False,
    )
    return out[0]
