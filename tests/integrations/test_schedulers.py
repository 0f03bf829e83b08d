from __future__ import annotations

import copy
import gc
import inspect
import pickle
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from generations import phases
from tiny_pipelines import (
    FOUR,
    HOOKED,
    OPTIONS,
    WAYS,
    cog_pipeline,
    compile_whole,
    expected,
    run,
    run_cog,
    steps_of,
    wan_pipeline,
)
from toy_pipelines import bare_pipeline

import sparse_compile
from sparse_compile.phases import Moment

by_way = pytest.mark.parametrize("way", WAYS)

# ---------------------------------------------------------------------- schedulers


def test_a_scheduler_with_step_index_other_than_flow_matching_works_too() -> None:
    pipe = wan_pipeline(UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))
    sparse_compile.attach(pipe)
    compile_whole(pipe.transformer)
    run(pipe)
    assert steps_of(pipe) == expected(*FOUR)


@by_way
def test_a_replaced_scheduler_is_followed(way: str) -> None:
    pipe = wan_pipeline()
    sparse_compile.attach(pipe)
    WAYS[way](pipe.transformer)
    run(pipe)
    old = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    run(pipe, steps=5)
    assert steps_of(pipe) == expected(*FOUR, "sparse")
    assert not set(HOOKED) & set(vars(old))


def test_signatures_of_hooked_methods_stay() -> None:
    plain = FlowMatchEulerDiscreteScheduler()
    want = {name: inspect.signature(getattr(plain, name)) for name in HOOKED}
    pipe = wan_pipeline()
    context = inspect.signature(pipe.transformer.cache_context)
    sparse_compile.attach(pipe)
    assert {name: inspect.signature(getattr(pipe.scheduler, name)) for name in HOOKED} == want
    assert inspect.signature(pipe.transformer.cache_context) == context
    assert pipe.scheduler.step.__doc__ == plain.step.__doc__


def test_a_deep_copy_of_a_scheduler_has_plain_methods() -> None:
    pipe = wan_pipeline()
    clock = sparse_compile.attach(pipe)
    pipe.scheduler.set_timesteps(5)
    moment, generation = clock.moment, clock.generation
    twin = copy.deepcopy(pipe.scheduler)
    assert all(inspect.ismethod(getattr(twin, name)) and getattr(twin, name).__self__ is twin for name in HOOKED)
    sample = torch.zeros(1, 4)
    twin.step(sample, twin.timesteps[0], sample)
    twin.set_timesteps(9)
    assert (clock.moment, clock.generation) == (moment, generation)
    assert (len(twin.timesteps), len(pipe.scheduler.timesteps)) == (9, 5)


def test_an_attached_model_and_scheduler_can_be_copied_and_pickled() -> None:
    pipe = wan_pipeline()
    sparse_compile.attach(pipe)
    model = copy.deepcopy(pipe.transformer)
    assert model.cache_context.__self__ is model
    scheduler = pickle.loads(pickle.dumps(pipe.scheduler))
    assert scheduler.step.__self__ is scheduler
    model = pickle.loads(pickle.dumps(pipe.transformer))
    assert model.cache_context.__self__ is model


def test_a_run_that_begins_later_is_at_its_own_step_from_the_first_call() -> None:
    pipe = wan_pipeline()
    clock = sparse_compile.attach(pipe)
    pipe.scheduler.set_timesteps(10)
    pipe.scheduler.set_begin_index(6)
    assert clock.moment == Moment(6, 10)
    sample = torch.zeros(1, 4)
    pipe.scheduler.step(sample, pipe.scheduler.timesteps[6], sample)
    assert clock.moment == Moment(7, 10)
    pipe.scheduler.set_timesteps(10)
    assert clock.moment == Moment(0, 10)


# ---------------------------------------------------------------------- pipelines without named branches


def test_a_scheduler_without_step_index_is_counted() -> None:
    assert not hasattr(CogVideoXDDIMScheduler(), "step_index")
    pipe = cog_pipeline()
    sparse_compile.attach(pipe)
    compile_whole(pipe.transformer)
    first = run_cog(pipe)
    assert phases(pipe.transformer) == [list(FOUR)] * 2
    assert [step for step, _, _ in steps_of(pipe)] == [0, 1, 2, 3]
    assert torch.equal(run_cog(pipe), first)
    assert phases(pipe.transformer) == [list(FOUR) * 2] * 2


def test_a_replaced_scheduler_is_followed_without_named_branches_too() -> None:
    pipe = cog_pipeline()
    sparse_compile.attach(pipe)
    pipe.scheduler = CogVideoXDDIMScheduler()
    compile_whole(pipe.transformer)
    run_cog(pipe)
    pipe.scheduler = CogVideoXDDIMScheduler()
    run_cog(pipe, 5)
    assert phases(pipe.transformer) == [[*FOUR, *FOUR, "sparse"]] * 2


def test_unnamed_calls_of_a_pipeline_are_told_apart_by_their_order() -> None:
    pipe = bare_pipeline()
    sparse_compile.attach(pipe)
    pipe.transformer.compile(backend="sparse_attn", options=OPTIONS)
    first = pipe(4)
    assert steps_of(pipe) == expected(*FOUR, branches=("0", "1"))
    assert torch.equal(pipe(4), first)


def test_two_pipelines_with_one_transformer_share_the_clock() -> None:
    one = wan_pipeline()
    clock = sparse_compile.attach(one)
    compile_whole(one.transformer)
    want = run(one)
    other = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), one.transformer)
    other.set_progress_bar_config(disable=True)
    assert sparse_compile.attach(other) is clock
    for pipe in (other, one, other):
        assert torch.equal(run(pipe), want)
        assert steps_of(pipe) == expected(*FOUR)
    sparse_compile.disable(other)
    for pipe in (one, other):
        assert not set(HOOKED) & set(vars(pipe.scheduler))
        assert "progress_bar" not in vars(pipe)


def test_a_second_pipeline_with_the_transformer_is_found_when_it_runs() -> None:
    one = wan_pipeline()
    sparse_compile.attach(one)
    compile_whole(one.transformer)
    want = run(one)
    other = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), one.transformer)
    other.set_progress_bar_config(disable=True)
    for pipe in (other, one, other):
        assert torch.equal(run(pipe), want)
        assert [phase for _, _, phase in steps_of(pipe)] == [phase for _, _, phase in expected(*FOUR)]


def test_two_pipelines_with_one_scheduler_keep_their_clocks() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipes = [wan_pipeline(scheduler), wan_pipeline(scheduler)]
    clocks = [sparse_compile.attach(pipe) for pipe in pipes]
    assert clocks[0] is not clocks[1]
    for pipe in pipes:
        compile_whole(pipe.transformer)
        run(pipe)
        assert steps_of(pipe) == expected(*FOUR)
    for pipe in pipes:
        sparse_compile.disable(pipe)
    moments = [clock.moment for clock in clocks]
    run(pipes[0], steps=2)
    assert [clock.moment for clock in clocks] == moments


def test_a_new_pipeline_around_an_old_transformer_tells_its_time() -> None:
    pipe = wan_pipeline()
    sparse_compile.attach(pipe)
    compile_whole(pipe.transformer)
    want = run(pipe)
    transformer = pipe.transformer
    del pipe
    gc.collect()
    other = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(run(other), want)
    assert [phase for _, _, phase in steps_of(other)] == [phase for _, _, phase in expected(*FOUR)]


def test_the_death_of_one_pipeline_changes_nothing_for_another_with_its_transformer() -> None:
    one = wan_pipeline()
    sparse_compile.attach(one)
    compile_whole(one.transformer, top_p=0.5)
    other = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), one.transformer)
    other.set_progress_bar_config(disable=True)
    sparse_compile.attach(other)
    want = run(other)
    doomed = [one]
    del one

    def let_go(pipe: WanPipeline, step: int, *_: Any) -> dict[str, Any]:
        if step == 2:
            doomed.clear()
            gc.collect()
        return {}

    assert torch.equal(run(other, callback_on_step_end=let_go), want)
    assert [phase for _, _, phase in steps_of(other)] == [phase for _, _, phase in expected(*FOUR)]
    clock = sparse_compile.attach(other)
    del other
    gc.collect()
    assert clock.over or clock.moment.step == clock.steps


def test_a_pipeline_that_cannot_be_attached_runs_dense_with_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = wan_pipeline()
    want = run(pipe)
    compile_whole(pipe.transformer)
    with sparse_compile.denoising(pipe.transformer, steps=1) as clock, caplog.at_level("WARNING"):
        clock.step()
        torch.testing.assert_close(run(pipe), want, rtol=1e-4, atol=1e-4)
    assert any("driven by one clock" in record.getMessage() for record in caplog.records)


def test_disable_leaves_what_others_have_compiled() -> None:
    pipe = wan_pipeline()
    pipe.transformer.blocks[0].compile(backend="eager")
    mine = pipe.transformer.blocks[0]._compiled_call_impl
    sparse_compile.attach(pipe)
    sparse_compile.disable(pipe)
    assert pipe.transformer.blocks[0]._compiled_call_impl is mine
