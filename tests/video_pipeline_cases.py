"""Pipelines and their ways of telling the time: one row each.

A row says which calls of the transformer a pipeline makes in each step, and so what the report must show. The table in
docs/pipelines.md is made of the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import video_pipelines as tiny
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor
from video_pipelines import SIZE, embeds, prompts


@dataclass(frozen=True)
class PipelineCase:
    """One pipeline in one way of calling it."""

    build: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    """The keyword arguments of a call, made anew: pipelines write into some of them."""
    branches: tuple[str, ...]
    """Of the calls within a step: their names, or ordinals where a pipeline names none."""
    told_apart: str
    """How, in the words of the documentation."""
    note: str = ""
    steps: tuple[int, ...] = (4,)
    """Of each generation that one call makes, where they are not the four asked for."""
    first: int = 0
    """The step that a call begins with."""
    scheduler: Callable[[], Any] | None = None
    fullgraph: bool = False
    fewer: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Steps with other branches."""
    second_from: int = 1000
    """The step from which on a second transformer is called."""
    quick: bool = False

    def pipe(self) -> Any:
        pipe = self.build()
        if self.scheduler is not None:
            pipe.scheduler = self.scheduler()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe: Any, **how: Any) -> Tensor:
        arguments = {
            "num_inference_steps": 4,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "latent",
            "return_dict": False,
            **self.call(),
            **how,
        }
        out = pipe(**arguments)[0]
        return torch.cat([part.flatten() for part in out]) if isinstance(out, list) else out

    def expected_phases(self) -> list[list[tuple[int, str, str]]]:
        """What the report shows of each generation: the first step dense, then a search of every branch."""
        return [self._generation(steps) for steps in self.steps]

    def _generation(self, steps: int) -> list[tuple[int, str, str]]:
        found, searched = [], set()
        for step in range(self.first, steps):
            model = step >= self.second_from
            for branch in self.fewer.get(step, self.branches):
                phase = "dense" if step == 0 else "sparse" if (model, branch) in searched else "search"
                if step:
                    searched.add((model, branch))
                found.append((step, branch, phase))
        return found


NAMED, ORDER, ONE = "by name", "by their order", "one call"


def wan_call() -> dict[str, Any]:
    return {**prompts(20, 24), **SIZE, "guidance_scale": 3.0}


def image_call() -> dict[str, Any]:
    return {**wan_call(), "image": embeds(1, 3, 128, 128).sigmoid()}


def edited_video_call() -> dict[str, Any]:
    return {**wan_call(), "num_frames": None, "strength": 0.5}


CASES = {
    "Wan": PipelineCase(tiny.wan, wan_call, ("cond", "uncond"), NAMED, quick=True),
    "Wan, without guidance": PipelineCase(tiny.wan, lambda: {**wan_call(), "guidance_scale": 1.0}, ("cond",), ONE),
    "Wan 2.2": PipelineCase(
        tiny.wan_two,
        lambda: {**wan_call(), "num_inference_steps": 6},
        ("cond", "uncond"),
        NAMED,
        "two transformers share the generation; each searches",
        (6,),
        second_from=3,
    ),
    "Wan, Heun": PipelineCase(
        tiny.wan,
        wan_call,
        ("cond", "uncond"),
        NAMED,
        "two halves a step, each counted",
        (7,),
        scheduler=diffusers.FlowMatchHeunDiscreteScheduler,
    ),
    "Wan image to video": PipelineCase(tiny.wan_i2v, image_call, ("cond", "uncond"), NAMED),
    "SkyReels-V2": PipelineCase(tiny.skyreels, wan_call, ("cond", "uncond"), NAMED),
    "SkyReels-V2 diffusion forcing, long": PipelineCase(
        lambda: tiny.skyreels(diffusers.SkyReelsV2DiffusionForcingPipeline),
        lambda: {
            **wan_call(),
            "num_frames": 17,
            "base_num_frames": 9,
            "overlap_history": 5,
            "addnoise_condition": 0,
            "prompt": None,
        },
        ("cond", "uncond"),
        NAMED,
        "copies of the scheduler step, so the progress bar tells; a generation a section",
        (4, 4, 4),
    ),
    "SkyReels-V2 diffusion forcing, asynchronous": PipelineCase(
        lambda: tiny.skyreels(diffusers.SkyReelsV2DiffusionForcingPipeline),
        lambda: {**wan_call(), "prompt": None, "ar_step": 2, "causal_block_size": 1},
        ("cond", "uncond"),
        NAMED,
        "more steps than the scheduler has",
        (8,),
    ),
    "CogVideoX": PipelineCase(
        tiny.cogvideox,
        lambda: {**prompts(18, 24), **SIZE},
        ("cond_uncond",),
        "one batch",
        "the scheduler knows no step: its calls are counted",
    ),
    "CogVideoX video to video": PipelineCase(
        lambda: tiny.cogvideox(diffusers.CogVideoXVideoToVideoPipeline),
        lambda: {
            **prompts(18, 24),
            "height": 128,
            "width": 128,
            "latents": embeds(1, 3, 4, 16, 16),
            "strength": 0.5,
        },
        ("cond_uncond",),
        "one batch",
        "begins in the middle, which the progress bar tells",
        first=2,
    ),
    "HunyuanVideo": PipelineCase(
        tiny.hunyuan, lambda: {**tiny.hunyuan_text(negative=False), **SIZE}, ("cond",), ONE, "guidance is distilled"
    ),
    "HunyuanVideo, true CFG": PipelineCase(
        tiny.hunyuan, lambda: {**tiny.hunyuan_text(negative=True), **SIZE}, ("cond", "uncond"), NAMED
    ),
    "HunyuanVideo-1.5": PipelineCase(
        lambda: tiny.hunyuan_15(ClassifierFreeGuidance),
        lambda: {**tiny.hunyuan_15_text(), **SIZE},
        ("pred_cond", "pred_uncond"),
        NAMED,
        "the guider names its batches",
    ),
    "HunyuanVideo-1.5, guidance on part of the steps": PipelineCase(
        lambda: tiny.hunyuan_15(lambda: ClassifierFreeGuidance(start=0.0, stop=0.5)),
        lambda: {**tiny.hunyuan_15_text(), **SIZE},
        ("pred_cond",),
        NAMED,
        fewer=dict.fromkeys((0, 1), ("pred_cond", "pred_uncond")),
    ),
    "Framepack": PipelineCase(
        tiny.framepack,
        lambda: {
            **tiny.hunyuan_text(negative=True),
            "image": embeds(1, 3, 128, 128).sigmoid(),
            "height": 128,
            "width": 128,
            "num_frames": 18,
            "latent_window_size": 3,
            "sampling_type": "vanilla",
        },
        ("0", "1"),
        ORDER,
        "each section is a generation",
        (4, 4),
    ),
    "Cosmos 1": PipelineCase(
        tiny.cosmos_1,
        lambda: {**prompts(13, 24), **SIZE, "num_frames": 17},
        ("0", "1"),
        ORDER,
        "the scheduler steps twice a step, and is put back in between",
    ),
    "Kandinsky 5": PipelineCase(tiny.kandinsky, lambda: {**tiny.kandinsky_text(), **SIZE}, ("0", "1"), ORDER),
    "LTX-Video": PipelineCase(
        tiny.ltx,
        lambda: {**prompts(22, 24, mask=True), "height": 256, "width": 256, "num_frames": 17},
        ("cond_uncond",),
        "one batch",
    ),
    "LTX-2, perturbed and modality-isolated": PipelineCase(
        tiny.ltx2,
        lambda: {
            **prompts(22, 24, mask=True),
            "height": 256,
            "width": 256,
            "num_frames": 17,
            "stg_scale": 1.0,
            "spatio_temporal_guidance_blocks": [1],
            "modality_scale": 3.0,
        },
        ("cond_uncond", "uncond_stg", "uncond_modality"),
        NAMED,
        "audio steps a copy of the scheduler",
    ),
    "Mochi": PipelineCase(
        tiny.mochi,
        lambda: {**prompts(16, 24, mask=True), "height": 128, "width": 128, "num_frames": 13},
        ("cond_uncond",),
        "one batch",
        "compile it with fullgraph=True",
        fullgraph=True,
    ),
    "Allegro": PipelineCase(
        tiny.allegro,
        lambda: {**prompts(17, 20, mask=True), "height": 128, "width": 128, "num_frames": 12, "negative_prompt": None},
        ("0",),
        "one batch",
    ),
    "Stable Diffusion 3, skip-layer guidance": PipelineCase(
        tiny.stable_diffusion_3,
        lambda: {
            **prompts(23, 24),
            "pooled_prompt_embeds": embeds(1, 20),
            "negative_pooled_prompt_embeds": embeds(1, 20, seed=2),
            "height": 256,
            "width": 256,
            "skip_guidance_layers": [1],
            "skip_layer_guidance_start": 0.2,
            "skip_layer_guidance_stop": 1.0,
        },
        ("0", "1"),
        ORDER,
        "the second call is another one than guidance: a layer counts its own calls",
        fewer={0: ("0",)},
    ),
}
