from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generations import (
    BRANCHES,
    QUICK,
    WAYS,
    assert_same,
    generate,
    layers_of,
    phases,
    regional,
    regions_of,
    whole,
)
from torch import Tensor
from toy_models import Stack, tokens

import sparse_compile
from sparse_compile.errors import SparseAttentionError, StrictModeError
from sparse_compile.runtime.clock import Clock
from sparse_compile.runtime.region import Region
from sparse_compile.runtime.registry import REGISTRY

# ---------------------------------------------------------------------- branches


@pytest.mark.parametrize("way", WAYS)
def test_calls_without_names_are_told_apart_by_their_order(way: str) -> None:
    (model, call), (_, call_named) = WAYS[way](), WAYS[way]()
    with sparse_compile.denoising(model, steps=5) as clock:
        unnamed = generate(call, clock, named=False)
        clock.start(5)
        assert_same(generate(call, clock, named=False), unnamed)
    model_named, call_named = WAYS[way]()
    with sparse_compile.denoising(model_named, steps=5) as clock:
        assert_same(generate(call_named, clock), unnamed)
    assert [set(layer.branches) for layer in layers_of(model)] == [{0, 1}] * 2


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("way", WAYS)
def test_a_branch_alone_equals_the_same_branch_beside_another(way: str, named: bool) -> None:
    outputs = []
    for branches in (["cond"], BRANCHES):
        model, call = WAYS[way]()
        with sparse_compile.denoising(model, steps=5) as clock:
            outputs.append({"cond": generate(call, clock, branches, named)["cond"]})
    assert_same(*outputs)


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_steps_that_a_cache_skips_do_no_harm(named: bool) -> None:
    model, call = whole(dense_steps=2)
    with sparse_compile.denoising(model, steps=8) as clock:
        for step in range(8):
            if step not in (1, 2, 5):
                for name in BRANCHES:
                    if named:
                        with clock.branch(name):
                            call(tokens(seed=step))
                    else:
                        call(tokens(seed=step))
            clock.step()
    assert phases(model) == [["dense"] * 2 + ["search"] * 2 + ["sparse"] * 6] * 2
    assert [layer.history[2].step for layer in layers_of(model)] == [3, 3]


def test_a_layer_that_a_cache_skips_searches_when_it_comes_back() -> None:
    model, _ = regional(2, dense_steps=0)
    with sparse_compile.denoising(model, steps=4) as clock, clock.branch("cond"):
        for step in range(4):
            x = model.blocks[0](tokens(seed=step))
            if step not in (0, 2):
                model.blocks[1](x)
            clock.step()
    assert phases(model) == [["search", "sparse", "sparse", "sparse"], ["search", "sparse"]]


# ---------------------------------------------------------------------- no clock


@pytest.mark.parametrize("way", WAYS)
def test_without_a_clock_all_is_dense_with_one_warning(way: str, caplog: pytest.LogCaptureFixture) -> None:
    model, call = WAYS[way](dense_steps=0)
    with caplog.at_level(logging.WARNING, "sparse_compile"):
        for seed in range(3):
            assert torch.equal(call(tokens(seed=seed)), Stack()(tokens(seed=seed)))
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("sparse_compile")]
    assert len(warnings) == 1
    assert "denoising(model, steps=...)" in warnings[0]
    assert "attach(pipe)" in warnings[0]
    report = sparse_compile.explain(model)
    assert report.generations == []
    assert report.compilations == 1
    assert any("no clock told the denoising step" in warning for warning in report.warnings)
    with sparse_compile.denoising(model, steps=1):
        call(tokens())
    assert not any("no clock" in warning for warning in sparse_compile.explain(model).warnings)


def test_a_sparse_graph_that_runs_without_a_clock_attends_to_everything() -> None:
    model, call = whole(dense_steps=0)
    with sparse_compile.denoising(model, steps=4) as clock:
        generate(call, clock)
        search, sparse = regions_of(model)
        clock.start(4)
        own = arguments_of(search, call, tokens(seed=5))
    (out,) = sparse(*own)
    torch.testing.assert_close(out, Stack()(tokens(seed=5)))
    assert not any(state.searched is None for layer in layers_of(model) for state in layer.branches.values())


def arguments_of(region: Region, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Any]:
    """Dynamo's own arguments of a call that runs this Region, without the state (4 tensors a layer)."""
    seen: list[Any] = []
    compiled = region._compiled

    def spy(*args: Any) -> Any:
        seen.extend(args)
        return compiled(*args)

    region._compiled = spy
    call(x)
    region._compiled = compiled
    return seen[: -4 * len(region._sparse_owners)]


def test_strict_needs_a_clock() -> None:
    _, call = whole(strict=True)
    with pytest.raises(SparseAttentionError, match=r"needs a clock.*denoising\(model"):
        call(tokens())


# ---------------------------------------------------------------------- strict


def test_a_strict_generation_without_sparse_calls_raises_at_its_end() -> None:
    model, call = whole(strict=True, dense_steps=4)
    with sparse_compile.denoising(model, steps=4) as clock:
        for step in range(4):
            call(tokens(seed=step))
            if step < 3:
                clock.step()
        with pytest.raises(StrictModeError, match=r"4 steps of Stack, all dense.*explain\(model\)"):
            clock.step()


def test_each_strict_generation_is_judged_alone() -> None:
    model, call = whole(strict=True, dense_steps=2)
    with sparse_compile.denoising(model, steps=4) as clock:
        generate(call, clock)
        clock.start(2)
        with pytest.raises(StrictModeError):
            generate(call, clock)


def test_strict_is_judged_again_in_the_next_block_of_too_short_sequences() -> None:
    model, call = whole(strict=True, min_tokens=1000)
    for _ in range(2):
        with sparse_compile.denoising(model, steps=2) as clock, pytest.raises(StrictModeError):
            generate(call, clock)


def test_strict_asks_nothing_of_a_model_that_is_not_compiled() -> None:
    model = Stack()
    with sparse_compile.denoising(model, steps=2) as clock:
        generate(model, clock)


def test_a_strict_generation_may_leave_one_of_two_models_dense() -> None:
    (high, call_high), (low, call_low) = whole(strict=True, dense_steps=2), regional(strict=True, dense_steps=2)
    clock = Clock()
    REGISTRY.claim(high, clock)
    REGISTRY.claim(low, clock)
    clock.start(4)
    for step in range(4):
        (call_high if step < 2 else call_low)(tokens(seed=step))
        clock.step()
    assert phases(high) == [["dense", "dense"]] * 2
    assert phases(low) == [["search", "sparse"]] * 2
    REGISTRY.release(clock)


def test_strict_does_not_ask_method_dense_to_be_sparse() -> None:
    model, call = whole(strict=True, method="dense")
    with sparse_compile.denoising(model, steps=2) as clock:
        generate(call, clock)


# ---------------------------------------------------------------------- guards that somebody drops


def drop_our_guard(entries: list[Any]) -> list[bool]:
    return [entry.guard_type != "SPARSE_ATTN_PHASE" for entry in entries]


def test_a_dropped_guard_gives_right_results_and_a_warning() -> None:
    model = Stack()
    call = torch.compile(
        model, backend="sparse_attn", options={**QUICK, "guard_filter_fn": drop_our_guard}, fullgraph=True
    )
    with sparse_compile.denoising(model, steps=4) as clock, clock.branch("cond"):
        for seed in range(4):
            assert torch.equal(call(tokens(seed=seed)), Stack()(tokens(seed=seed)))
            clock.step()
        report = sparse_compile.explain(model)
    assert report.compilations == 1
    assert ["3 calls ran a graph of another phase" in warning for warning in report.warnings] == [True]


def test_a_sparse_graph_without_its_guard_attends_to_everything_before_a_search() -> None:
    model, call = whole(dense_steps=0)
    with sparse_compile.denoising(model, steps=3) as clock:
        generate(call, clock, ["cond"])
        search, sparse = regions_of(model)
        clock.start(3)
        with clock.branch("cond"):
            own = arguments_of(search, call, tokens(seed=100))
        clock.start(3)
        with clock.branch("cond"):
            (out,) = sparse(*own)
        torch.testing.assert_close(out, Stack()(tokens(seed=100)))
        assert layers_of(model)[0].branches["cond"].searched is None


def test_a_phase_that_changes_between_guard_and_call_for_a_new_clock_is_no_mismatch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, call = whole(dense_steps=0)
    call(tokens())
    clock = Clock()

    def find() -> bool:
        REGISTRY.claim(model, clock)
        clock.start(3)
        return True

    monkeypatch.setattr(REGISTRY, "find_clock", find)
    call(tokens())
    assert phases(model) == [["dense"]] * 2
    assert sparse_compile.explain(model).warnings == []
    call(tokens())
    assert phases(model) == [["dense", "search"]] * 2
    REGISTRY.release(clock)


# ---------------------------------------------------------------------- exceptions and threads


@pytest.mark.parametrize("way", WAYS)
def test_after_an_abandoned_generation_a_new_one_equals_a_fresh_run(way: str) -> None:
    model, call = WAYS[way]()
    with sparse_compile.denoising(model, steps=5) as clock:
        want = generate(call, clock)
    model, call = WAYS[way]()
    for left_at in (1, 2, 3):
        with pytest.raises(KeyError), sparse_compile.denoising(model, steps=5) as clock:
            for step in range(5):
                with clock.branch("cond"):
                    call(tokens(seed=step))
                    if step == left_at:
                        raise KeyError
                clock.step()
    with sparse_compile.denoising(model, steps=5) as clock:
        assert_same(generate(call, clock), want)


def run_together(*functions: Callable[[], Any]) -> list[BaseException]:
    """Run functions in threads of their own to their ends; what they raised."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], Any]) -> None:
        try:
            with torch.no_grad():
                function()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("way", WAYS)
def test_two_models_in_two_threads_equal_one_after_the_other(way: str) -> None:
    model, call = WAYS[way]()
    with sparse_compile.denoising(model, steps=5) as clock:
        want = generate(call, clock)
    together = threading.Barrier(2)
    outputs: list[Any] = []

    def run(other: tuple[Stack, Callable[[Tensor], Tensor]]) -> None:
        model, call = other
        with sparse_compile.denoising(model, steps=5) as clock:
            together.wait()
            outputs.append(generate(call, clock))

    pairs = [WAYS[way](), WAYS[way]()]
    assert run_together(*(lambda pair=pair: run(pair) for pair in pairs)) == []
    for seen in outputs:
        assert_same(seen, want)


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_two_calls_of_one_model_at_once_are_an_error(named: bool) -> None:
    model, call = whole()
    entered, leave = threading.Event(), threading.Event()
    with sparse_compile.denoising(model, steps=4) as clock:
        call(tokens())
        (region,) = regions_of(model)
        compiled = region._compiled

        def slow(*args: Any) -> Any:
            entered.set()
            assert leave.wait(60)
            return compiled(*args)

        def first() -> None:
            call(tokens())

        def second() -> None:
            assert entered.wait(60)
            region._compiled = compiled
            try:
                if named:
                    with clock.branch("cond"):
                        call(tokens())
                else:
                    call(tokens())
            finally:
                leave.set()

        region._compiled = slow
        (error,) = run_together(first, second)
        assert isinstance(error, SparseAttentionError)
        assert "one generation at a time" in str(error)
        torch.testing.assert_close(call(tokens()), Stack()(tokens()))
    assert [len(seen) for seen in phases(model)] == [3, 3]


def test_a_model_called_after_the_last_step_runs_dense() -> None:
    model, call = whole(dense_steps=0, top_p=0.3)
    with sparse_compile.denoising(model, steps=2) as clock:
        generate(call, clock)
        torch.testing.assert_close(call(tokens()), model(tokens()))


def test_calls_without_a_moving_clock_do_not_pile_up_state(caplog: pytest.LogCaptureFixture) -> None:
    model, call = whole(dense_steps=0)
    with sparse_compile.denoising(model, steps=4), caplog.at_level("WARNING"):
        for _ in range(40):
            call(tokens())
    (layer, *_) = (layer for p in model.parameters() for layer in REGISTRY.layers_of(p))
    assert len(layer.branches) == 16
    assert sum("clock.step() missing" in record.getMessage() for record in caplog.records) == 1
