"""What is hooked once stays hooked once, and comes off again; what cannot be hooked is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import HOOKED
from toy_pipeline import toy_pipeline
from toy_pipelines import bare_pipeline

import sparse_compile
from sparse_compile.errors import SparseAttentionError
from sparse_compile.integrations.method_hook import MethodHook
from sparse_compile.runtime.registry import REGISTRY


class Sampler:
    def step(self) -> str:
        return "stepped"


def depth(owner: Any, name: str) -> int:
    hook, hooks = vars(owner).get(name), 0
    while isinstance(hook, MethodHook):
        hook, hooks = hook._before, hooks + 1
    return hooks


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_hooks_come_off_in_any_order(order: tuple[int, ...]) -> None:
    sampler, heard = Sampler(), []
    hooks = [MethodHook(sampler, "step", after=lambda _, result, at=at: heard.append(at)) for at in range(3)]
    for gone, at in enumerate(order):
        hooks[at].remove()
        assert depth(sampler, "step") == 2 - gone
        heard.clear()
        assert sampler.step() == "stepped"
        assert heard == sorted(order[gone + 1 :])
    assert "step" not in vars(sampler)


def test_a_hook_beneath_somebody_elses_wrapper_passes_calls_on() -> None:
    sampler, heard = Sampler(), []
    hook = MethodHook(sampler, "step", after=lambda *_: heard.append(1))
    sampler.step = wrapper = lambda: hook() + " by another"  # type: ignore[method-assign]
    hook.remove()
    assert (vars(sampler)["step"], sampler.step(), heard) == (wrapper, "stepped by another", [])


def test_pipelines_of_one_scheduler_that_come_and_go_in_turn_leave_nothing_on_it() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    old, new = bare_pipeline(scheduler=scheduler), bare_pipeline(scheduler=scheduler)
    sparse_compile.attach(old)
    for _ in range(4):
        sparse_compile.attach(new)
        sparse_compile.disable(old)
        assert [depth(scheduler, name) for name in HOOKED] == [1, 1, 1]
        old, new = new, old
    sparse_compile.disable(old)
    assert not set(HOOKED) & set(vars(scheduler))


def test_attaching_again_after_a_swap_hooks_only_the_new_scheduler() -> None:
    pipe = toy_pipeline()
    clock = sparse_compile.attach(pipe)
    for _ in range(3):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        assert sparse_compile.attach(pipe) is clock
        assert [depth(pipe.scheduler, name) for name in HOOKED] == [1, 1, 1]
        assert depth(pipe, "progress_bar") == 1
    sparse_compile.disable(pipe)
    assert "progress_bar" not in vars(pipe)
    assert not set(HOOKED) & set(vars(pipe.scheduler))


class Bar:
    """Has its methods on itself, not in its class."""

    def __init__(self, total: int) -> None:
        self.iterable, self.total, self.updates = None, total, 0
        self.update = self.count
        self.close = lambda: None

    def count(self, by: int = 1) -> None:
        self.updates += by

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BarWithoutClose:
    iterable, total = None, 4

    def update(self, by: int = 1) -> None:
        pass

    def __enter__(self) -> BarWithoutClose:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("bar", [Bar(4), BarWithoutClose()], ids=["on the bar", "without close"])
def test_a_run_under_a_bar_that_cannot_be_hooked_is_timed_by_its_scheduler(
    bar: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = toy_pipeline()
    want = pipe(4)
    monkeypatch.setattr(type(pipe), "progress_bar", lambda self, total: bar)
    clock = sparse_compile.attach(pipe)
    assert torch.equal(pipe(4), want)
    assert (clock.moment.step, clock.steps) == (4, 4)


def test_a_scheduler_whose_methods_lie_on_itself_is_refused_by_name() -> None:
    scheduler = Sampler()
    scheduler.set_timesteps = len  # type: ignore[attr-defined]
    pipe = bare_pipeline(scheduler=scheduler)
    with pytest.raises(SparseAttentionError, match=r"with a scheduler and a transformer.*Sampler"):
        sparse_compile.attach(pipe)
    assert REGISTRY.clocks() == []
