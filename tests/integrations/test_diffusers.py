from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from families.wan import wan_t2v
from generations import layers_of, phases
from tiny_pipelines import (
    FOUR,
    HOOKED,
    OPTIONS,
    WAYS,
    compile_whole,
    expected,
    run,
    steps_of,
    text,
    wan_pipeline,
)
from toy_models import Stack

import sparse_compile
from sparse_compile.errors import SparseAttentionError, StrictModeError
from sparse_compile.runtime.clock import Clock
from sparse_compile.runtime.registry import REGISTRY

by_way = pytest.mark.parametrize("way", WAYS)

# ---------------------------------------------------------------------- attach


@by_way
def test_an_attached_pipeline_tells_steps_and_branches(way: str) -> None:
    pipe = wan_pipeline()
    clock = sparse_compile.attach(pipe)
    WAYS[way](pipe.transformer)
    run(pipe)
    assert steps_of(pipe) == expected(*FOUR)
    assert (clock.moment.step, clock.steps) == (4, 4)
    assert sparse_compile.explain(pipe).compilations == 3


@by_way
def test_a_pipeline_is_found_on_the_call_stack(way: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = wan_pipeline()
    WAYS[way](pipe.transformer)
    with caplog.at_level(logging.INFO, "sparse_compile"):
        found = run(pipe)
    assert [r.getMessage() for r in caplog.records].count("attached WanPipeline, found on the call stack") == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert steps_of(pipe) == expected(*FOUR)
    attached = wan_pipeline()
    sparse_compile.attach(attached)
    WAYS[way](attached.transformer)
    assert torch.equal(run(attached), found)
    run(pipe)
    assert steps_of(pipe) == expected(*FOUR)


def test_a_pipeline_is_found_when_its_model_was_compiled_before_by_itself() -> None:
    pipe = wan_pipeline()
    compile_whole(pipe.transformer)
    pipe.transformer(**wan_t2v()[1])
    run(pipe)
    assert steps_of(pipe) == expected(*FOUR)


@by_way
@pytest.mark.parametrize("method", [{}, {"method": "adaspa", "block_size": 8}], ids=["svg2", "adaspa"])
def test_a_search_in_the_call_that_finds_the_pipeline_is_that_of_its_branch(way: str, method: dict[str, Any]) -> None:
    """Few-step runs search in their first step; the next step of the branch goes on from there."""
    options = {"lowering": "eager", "min_tokens": 1, "dense_layers": 0, "dense_steps": 0, **method}
    pipe = wan_pipeline()
    how = {"backend": "sparse_attn", "options": options}
    if way == "whole":
        pipe.transformer.compile(**how)
    else:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, **how)
    first = run(pipe)
    assert steps_of(pipe) == expected("search", "sparse", "sparse", "sparse")
    assert torch.equal(run(pipe), first)


def test_a_compiled_wrapper_in_the_pipeline_is_attached_too() -> None:
    pipe = wan_pipeline()
    pipe.transformer = torch.compile(pipe.transformer, backend="sparse_attn", options=OPTIONS)
    sparse_compile.attach(pipe)
    run(pipe)
    assert steps_of(pipe) == expected(*FOUR)
    assert steps_of(pipe.transformer) == expected(*FOUR)


def test_attaching_twice_gives_the_same_clock_and_one_hook() -> None:
    pipe = wan_pipeline()
    clock = sparse_compile.attach(pipe)
    hooks = [vars(pipe.scheduler)[name] for name in HOOKED]
    assert sparse_compile.attach(pipe) is clock
    assert [vars(pipe.scheduler)[name] for name in HOOKED] == hooks


@pytest.mark.parametrize("thing", [None, "pipe", Stack(1), object()], ids=["none", "str", "module", "object"])
def test_only_a_pipeline_is_attached(thing: Any) -> None:
    with pytest.raises(SparseAttentionError, match=r"attach needs a diffusers pipeline.*denoising\(model"):
        sparse_compile.attach(thing)
    with pytest.raises(SparseAttentionError, match="attach needs a diffusers pipeline"):
        sparse_compile.enable(thing)


@pytest.mark.parametrize("thing", [None, "pipe", object()], ids=["none", "str", "object"])
def test_only_a_pipeline_is_disabled(thing: Any) -> None:
    with pytest.raises(SparseAttentionError, match="disable needs"):
        sparse_compile.disable(thing)


def test_a_pipeline_needs_a_transformer() -> None:
    pipe = wan_pipeline()
    pipe.transformer = None
    with pytest.raises(SparseAttentionError, match="with a scheduler and a transformer"):
        sparse_compile.attach(pipe)


def test_an_attach_that_fails_takes_nothing() -> None:
    pipe = wan_pipeline(second=True)
    with (
        sparse_compile.denoising(pipe.transformer_2, steps=4),
        pytest.raises(SparseAttentionError, match="one clock at a time"),
    ):
        sparse_compile.attach(pipe)
    assert "step" not in vars(pipe.scheduler)
    with sparse_compile.denoising(pipe.transformer, steps=4):
        pass


def test_a_model_that_a_pipeline_drives_is_not_driven_by_hand_too() -> None:
    pipe = wan_pipeline()
    sparse_compile.attach(pipe)
    with pytest.raises(SparseAttentionError, match="disable"), sparse_compile.denoising(pipe.transformer, steps=4):
        pass
    sparse_compile.disable(pipe)
    with sparse_compile.denoising(pipe.transformer, steps=4):
        pass


# ---------------------------------------------------------------------- generations


@by_way
def test_each_run_is_a_generation_and_equals_the_first(way: str) -> None:
    pipe = wan_pipeline()
    clock = sparse_compile.attach(pipe)
    WAYS[way](pipe.transformer)
    first = run(pipe)
    number = clock.generation
    assert torch.equal(run(pipe), first)
    assert clock.generation > number
    assert [steps_of(pipe, at) for at in (0, 1)] == [expected(*FOUR)] * 2
    assert sparse_compile.explain(pipe).compilations == 3


def test_without_guidance_there_is_one_branch() -> None:
    pipe = wan_pipeline()
    sparse_compile.attach(pipe)
    compile_whole(pipe.transformer)
    run(pipe, guidance_scale=1.0)
    assert steps_of(pipe) == expected(*FOUR, branches=("cond",))


def test_after_an_exception_inside_the_pipeline_a_new_run_is_right() -> None:
    pipe = wan_pipeline()
    clock = sparse_compile.attach(pipe)
    compile_whole(pipe.transformer)
    want = run(pipe)

    def fail(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 2:
            raise KeyError
        return kwargs

    with pytest.raises(KeyError):
        run(pipe, callback_on_step_end=fail)
    assert clock.branch_name is None
    assert torch.equal(run(pipe), want)
    assert steps_of(pipe) == expected(*FOUR)


def test_an_exception_inside_the_model_leaves_the_branch() -> None:
    pipe = wan_pipeline()
    clock = sparse_compile.attach(pipe)
    compile_whole(pipe.transformer)
    want = run(pipe)
    with pytest.raises(RuntimeError):
        pipe(prompt_embeds=torch.zeros(1, 20, 7), negative_prompt_embeds=text(2), height=128, width=128, num_frames=9)
    assert clock.branch_name is None
    assert torch.equal(run(pipe), want)


def test_strict_raises_at_the_end_of_a_run_that_stayed_dense() -> None:
    pipe = wan_pipeline()
    sparse_compile.enable(pipe, **{**OPTIONS, "dense_steps": 1.0, "strict": True})
    with pytest.raises(StrictModeError, match="WanTransformer3DModel, all dense"):
        run(pipe)


def test_two_transformers_share_the_generation() -> None:
    pipe = wan_pipeline(second=True, boundary_ratio=0.6)
    sparse_compile.enable(pipe, **{**OPTIONS, "strict": True, "dense_steps": 2})
    run(pipe, steps=6)
    report = sparse_compile.explain(pipe)
    assert {site.layer.split(".")[0] for site in report.sites} == {"transformer", "transformer_2"}
    early, late = (phases(model)[0] for model in (pipe.transformer, pipe.transformer_2))
    assert len(early) + len(late) == 12
    assert early[:4] == ["dense"] * 4
    assert late[:2] == ["search"] * 2
    assert set(late[2:]) == {"sparse"}
    assert [step for step, _, _ in steps_of(pipe)] == [step for step in range(6) for _ in range(2)]


# ---------------------------------------------------------------------- enable and disable


def test_disable_asks_nothing_of_a_pipeline_that_was_never_enabled() -> None:
    sparse_compile.disable(wan_pipeline())


def test_enable_refuses_unknown_options_before_it_touches_anything() -> None:
    pipe = wan_pipeline()
    with pytest.raises(SparseAttentionError, match="top_p"):
        sparse_compile.enable(pipe, topp=0.5)
    assert "step" not in vars(pipe.scheduler)
    assert REGISTRY.attached_clock(pipe.transformer) is None


def test_reset_keeps_the_pipeline_attached() -> None:
    pipe = wan_pipeline()
    sparse_compile.enable(pipe, **OPTIONS)
    want = run(pipe)
    torch.compiler.reset()
    assert torch.equal(run(pipe), want)
    assert steps_of(pipe) == expected(*FOUR)


# ---------------------------------------------------------------------- lifetime


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "found"])
@by_way
def test_a_pipeline_is_not_kept_alive(way: str, attached: bool) -> None:
    pipe = wan_pipeline()
    if attached:
        sparse_compile.attach(pipe)
    WAYS[way](pipe.transformer)
    run(pipe)
    clock = REGISTRY.attached_clock(pipe.transformer)
    assert clock is not None
    kept: list[Any] = [pipe, pipe.scheduler, pipe.transformer, clock, *pipe.transformer.parameters()]
    kept += layers_of(pipe.transformer)
    references = [*map(weakref.ref, kept)]
    del kept, clock, pipe
    gc.collect()
    assert [type(thing).__name__ for ref in references if (thing := ref()) is not None] == []
    assert REGISTRY.clocks() == []


def test_a_clock_whose_pipeline_died_lets_the_transformer_go() -> None:
    pipe = wan_pipeline()
    sparse_compile.attach(pipe)
    transformer, scheduler = pipe.transformer, pipe.scheduler
    del pipe
    gc.collect()
    assert "cache_context" not in vars(transformer)
    assert not set(HOOKED) & set(vars(scheduler))
    with sparse_compile.denoising(transformer, steps=2) as clock:
        assert isinstance(clock, Clock)
