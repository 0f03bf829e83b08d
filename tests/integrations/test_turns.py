"""Several pipelines, loops and threads around one transformer: a clock serves one of them at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_pipelines import FOUR, expected, steps_of
from torch import Tensor
from toy_models import tokens
from toy_pipelines import BarePipeline, bare_pipeline, compiled_stack

import sparse_compile
from sparse_compile.errors import SparseAttentionError

UNNAMED = {"branches": ("0", "1")}


def alone(seed: int = 0) -> Tensor:
    return bare_pipeline(compiled_stack())(4, seed)


@pytest.fixture(params=["attached", pytest.param("found", marks=pytest.mark.slow)])
def pipe(request: pytest.FixtureRequest) -> BarePipeline:
    found = bare_pipeline(compiled_stack())
    if request.param == "attached":
        sparse_compile.attach(found)
    return found


def test_a_pipeline_run_within_a_step_of_another_one_has_a_generation_of_its_own(pipe: BarePipeline) -> None:
    inner = bare_pipeline(pipe.transformer)
    sparse_compile.attach(inner)
    found: list[Tensor] = []

    def run_inner(step: int) -> None:
        if step == 1:
            found.append(inner(4, seed=5))

    pipe(4, after_step=run_inner)
    assert torch.equal(found[0], alone(seed=5))
    generations = [steps_of(pipe, at) for at in range(3)]
    assert generations[0] == expected("dense", "search", **UNNAMED)
    assert generations[1] == expected(*FOUR, **UNNAMED)
    assert generations[2] == expected("search", first=3, **UNNAMED)
    assert pipe(4).equal(alone())


def interleaved(pipes: list[BarePipeline], seeds: tuple[int, int]) -> list[Tensor]:
    """Both pipelines a step at a time."""
    loops: list[Iterator[Tensor]] = [pipe.latents_of(4, seed) for pipe, seed in zip(pipes, seeds, strict=True)]
    with torch.no_grad():
        for latents in zip(*loops, strict=True):
            last = list(latents)
    return last


def test_interleaved_pipelines_never_read_what_the_other_has_kept() -> None:
    outputs = []
    for seed in (5, 50):
        stack = compiled_stack()
        pipes = [bare_pipeline(stack), bare_pipeline(stack)]
        for one in pipes:
            sparse_compile.attach(one)
        outputs.append(interleaved(pipes, (0, seed))[0])
    assert torch.equal(*outputs)


def test_interleaved_pipelines_with_a_transformer_each_run_as_if_alone() -> None:
    pipes = [bare_pipeline(compiled_stack()), bare_pipeline(compiled_stack())]
    for one in pipes:
        sparse_compile.attach(one)
    for seed, latents in zip((0, 5), interleaved(pipes, (0, 5)), strict=True):
        assert torch.equal(latents, alone(seed))


def test_a_call_by_hand_after_a_loop_was_left_attends_to_everything_and_the_report_says_so(pipe: BarePipeline) -> None:
    def fail(step: int) -> None:
        if step == 2:
            raise KeyError

    with pytest.raises(KeyError):
        pipe(6, after_step=fail)
    with torch.no_grad():
        torch.testing.assert_close(pipe.transformer(tokens()), bare_pipeline().transformer(tokens()))
    assert [warning for warning in sparse_compile.explain(pipe).warnings if "outside of the pipeline" in warning]
    assert torch.equal(pipe(4), alone())


def test_timesteps_set_by_hand_do_not_hold_up_another_pipeline(pipe: BarePipeline) -> None:
    pipe(4)
    pipe.scheduler.set_timesteps(10)
    other = bare_pipeline(pipe.transformer)
    assert torch.equal(other(4, seed=5), alone(seed=5))
    assert steps_of(other) == expected(*FOUR, **UNNAMED)


def test_a_loop_of_ones_own_with_the_schedulers_of_an_attached_pipeline_is_timed() -> None:
    pipe = bare_pipeline(compiled_stack())
    sparse_compile.attach(pipe)
    with torch.no_grad():
        pipe.scheduler.set_timesteps(4)
        x = tokens()
        for timestep in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.transformer(x), timestep, x, return_dict=False)[0]
    assert steps_of(pipe) == expected(*FOUR, branches=("0",))


def test_a_model_driven_by_two_threads_raises_in_the_one_that_began_first() -> None:
    pipe = bare_pipeline(compiled_stack())
    sparse_compile.attach(pipe)
    inner = bare_pipeline(pipe.transformer)
    sparse_compile.attach(inner)
    found: dict[str, Any] = {}

    def begin(step: int) -> None:
        if step == 0:
            loop = inner.latents_of(4, 5)

            def take_steps() -> None:
                with torch.no_grad():
                    found["first"] = next(loop)

            other = threading.Thread(target=take_steps)
            other.start()
            other.join()

    with pytest.raises(SparseAttentionError, match="one generation at a time"):
        pipe(4, after_step=begin)
    assert "first" in found
    assert torch.equal(pipe(4), alone())


def in_thread(function: Callable[[], object]) -> None:
    """Run it in another thread, and raise what it raises."""
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        pool.submit(torch.no_grad()(function)).result()


def test_loops_of_ones_own_in_two_threads_raise_in_the_one_that_began_first() -> None:
    pipe = bare_pipeline(compiled_stack())
    sparse_compile.attach(pipe)

    def begin() -> None:
        pipe.scheduler.set_timesteps(4)
        pipe.transformer(tokens())

    with torch.no_grad():
        begin()
        in_thread(begin)
        with pytest.raises(SparseAttentionError, match="one generation at a time"):
            pipe.transformer(tokens())


class WithPreview(BarePipeline):
    def preview(self) -> Tensor:
        found: Tensor = self.transformer(tokens())
        return found


@pytest.mark.parametrize("run", [True, False], ids=["after a run", "before any"])
def test_where_no_loop_runs_a_call_from_another_thread_is_no_error(run: bool) -> None:
    pipe = WithPreview(compiled_stack(), bare_pipeline().scheduler)
    sparse_compile.attach(pipe)
    if run:
        pipe(4)
    in_thread(pipe.preview)
    in_thread(lambda: pipe.transformer(tokens()))
    in_thread(lambda: pipe(4))
    assert torch.equal(pipe(4), alone())
