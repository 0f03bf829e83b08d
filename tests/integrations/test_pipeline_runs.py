"""What users do with one pipeline between two runs, and within a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import video_pipelines as tiny
from tiny_pipelines import FOUR, OPTIONS, expected, steps_of
from torch import Tensor
from video_pipeline_cases import wan_call
from video_pipelines import embeds

import sparse_compile


@pytest.fixture
def pipe() -> Any:
    found = tiny.wan()
    found.set_progress_bar_config(disable=True)
    found.transformer.compile(backend="sparse_attn", options=OPTIONS)
    sparse_compile.attach(found)
    return found


def run(pipe: Any, **how: Any) -> Tensor:
    arguments = {
        **wan_call(),
        "num_inference_steps": 4,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "return_dict": False,
    }
    found: Tensor = pipe(**{**arguments, **how})[0]
    return found


def test_an_interrupted_run_ends_its_generation_and_the_next_run_is_as_ever(pipe: Any) -> None:
    def interrupt(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return kwargs

    want = run(pipe)
    run(pipe, callback_on_step_end=interrupt)
    assert steps_of(pipe) == expected("dense", "search")
    assert sparse_compile.attach(pipe).over
    assert torch.equal(run(pipe), want)
    assert steps_of(pipe) == expected(*FOUR)


def test_a_run_left_by_an_exception_ends_its_generation(pipe: Any) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError

    with pytest.raises(KeyError):
        run(pipe, callback_on_step_end=fail)
    assert sparse_compile.attach(pipe).over


def test_guidance_that_a_callback_switches_off_and_on_leaves_each_branch_its_own_plan(pipe: Any) -> None:
    def guide(pipe: Any, step: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0 if step in (0, 2) else 3.0
        return kwargs

    first = run(pipe, num_inference_steps=5, callback_on_step_end=guide)
    assert steps_of(pipe) == [
        (0, "cond", "dense"),
        (0, "uncond", "dense"),
        (1, "cond", "search"),
        (2, "cond", "sparse"),
        (2, "uncond", "search"),
        (3, "cond", "sparse"),
        (4, "cond", "sparse"),
        (4, "uncond", "sparse"),
    ]
    assert torch.equal(run(pipe, num_inference_steps=5, callback_on_step_end=guide), first)


@pytest.mark.slow
def test_runs_at_other_resolutions_and_batches_in_between_change_nothing(pipe: Any) -> None:
    want = run(pipe)
    two = {"prompt_embeds": embeds(2, 20, 24), "negative_prompt_embeds": embeds(2, 20, 24, seed=2)}
    for other in ({"height": 160}, two, {"num_videos_per_prompt": 2}, {"num_inference_steps": 6}):
        first = run(pipe, **other)
        names = (*FOUR, "sparse", "sparse")[: other.get("num_inference_steps", 4)]
        assert steps_of(pipe) == expected(*names)
        assert torch.equal(run(pipe, **other), first)
    assert torch.equal(run(pipe), want)


@pytest.mark.slow
def test_a_modular_pipeline_is_attached_like_any_other() -> None:
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

    pipe, parts = WanCoreDenoiseStep().init_pipeline(), tiny.wan()
    pipe.update_components(transformer=parts.transformer, scheduler=parts.scheduler)
    pipe.transformer.compile(backend="sparse_attn", options=OPTIONS)
    sparse_compile.attach(pipe)
    call = {name: value for name, value in wan_call().items() if name != "guidance_scale"}

    def generate() -> Tensor:
        found: Tensor = pipe(**call, latents=embeds(1, 8, 3, 16, 16), num_inference_steps=4, output="latents")
        return found

    first = generate()
    assert steps_of(pipe) == expected(*FOUR, branches=("0", "1"))
    assert torch.equal(generate(), first)


@pytest.mark.slow
@pytest.mark.parametrize("bars", [True, False], ids=["shown", "hidden"])
def test_a_loop_that_steps_copies_of_its_scheduler_is_told_by_its_bar_when_it_is_found(bars: bool) -> None:
    pipe = tiny.skyreels(tiny.diffusers.SkyReelsV2DiffusionForcingPipeline)
    pipe.set_progress_bar_config(disable=not bars)
    pipe.transformer.compile(backend="sparse_attn", options=OPTIONS)
    first = run(pipe, prompt=None)
    assert steps_of(pipe) == expected(*FOUR)
    assert torch.equal(run(pipe, prompt=None), first)
