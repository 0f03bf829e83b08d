from __future__ import annotations

import gc
import logging
import weakref
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
    state_tensors,
    whole,
)
from torch import nn
from toy_models import Stack, tokens

import sparse_compile
from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.runtime.clock import Clock
from sparse_compile.runtime.registry import REGISTRY, Registry
from sparse_compile.strategies.svg2 import Svg2


def generate_and_let_die(way: str) -> list[weakref.ref[Any]]:
    """Weak references to all that a generation of a model made."""
    model, call = WAYS[way]()
    with sparse_compile.denoising(model, steps=4) as clock:
        generate(call, clock)
        kept: list[Any] = [model, clock, *model.parameters(), *layers_of(model), *state_tensors(model)]
    return [*map(weakref.ref, kept)]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_a_dropped_model_stays_alive(way: str) -> None:
    references = generate_and_let_die(way)
    gc.collect()
    alive = [type(thing).__name__ for reference in references if (thing := reference()) is not None]
    assert alive == []
    assert len(references) > 20
    assert (len(REGISTRY._layers), len(REGISTRY._claims), len(REGISTRY._records)) == (0, 0, 0)


def test_regions_die_when_dynamo_forgets_their_code() -> None:
    model, call = whole()
    with sparse_compile.denoising(model, steps=4) as clock:
        generate(call, clock)
    references = [*map(weakref.ref, regions_of(model))]
    assert len(references) == 3
    del model, call, clock
    torch.compiler.reset()
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_two_equal_models_share_code_and_no_state() -> None:
    (one, call_one), (two, call_two) = regional(), regional()
    with sparse_compile.denoising(one, steps=4) as first, sparse_compile.denoising(two, steps=4) as second:
        want = generate(call_one, first)
        assert sparse_compile.explain(one).compilations == 3
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same(generate(call_two, second), want)
        addresses = [tensor.data_ptr() for model in (one, two) for tensor in state_tensors(model)]
    assert regions_of(one) == regions_of(two)
    assert len(set(addresses)) == len(addresses) == 2 * 2 * len(BRANCHES) * 4


def test_two_equal_models_may_be_at_different_steps() -> None:
    (one, call_one), (two, call_two) = regional(), regional()
    with sparse_compile.denoising(one, steps=4) as clock:
        want = generate(call_one, clock, ["cond"])["cond"]
    with sparse_compile.denoising(one, steps=4) as first, sparse_compile.denoising(two, steps=4) as second:
        outputs: dict[int, list[torch.Tensor]] = {1: [], 2: []}
        for turn in range(6):
            for number, call, clock, late in ((1, call_one, first, 0), (2, call_two, second, 2)):
                if late <= turn < late + 4:
                    with clock.branch("cond"):
                        outputs[number].append(call(tokens(seed=100 + turn - late)))
                    clock.step()
    for seen in outputs.values():
        assert_same({"cond": seen}, {"cond": want})


def test_twelve_equal_blocks_compile_once_per_phase_and_have_twelve_states() -> None:
    model, call = regional(12)
    with sparse_compile.denoising(model, steps=4) as clock:
        generate(call, clock, ["cond"])
        addresses = [tensor.data_ptr() for tensor in state_tensors(model)]
    assert sparse_compile.explain(model).compilations == 3
    assert len(regions_of(model)) == 3
    assert len(set(addresses)) == len(addresses) == 12 * 4
    assert phases(model) == [["dense", "search", "sparse", "sparse"]] * 12


def test_two_sets_of_options_on_one_model_keep_separate_layers_and_states() -> None:
    alone: dict[float, Any] = {}
    for top_p in (0.3, 0.7):
        model, call = whole(top_p=top_p)
        with sparse_compile.denoising(model, steps=4) as clock:
            alone[top_p] = generate(call, clock, ["cond"])["cond"]
    model = Stack()
    calls = {p: torch.compile(model, backend="sparse_attn", options={**QUICK, "top_p": p}) for p in alone}
    together: dict[float, Any] = {p: [] for p in alone}
    with sparse_compile.denoising(model, steps=4) as clock, clock.branch("cond"):
        for step in range(4):
            for top_p, call in calls.items():
                together[top_p].append(call(tokens(seed=100 + step)))
            clock.step()
    assert_same(together, alone)  # type: ignore[arg-type]
    assert not torch.equal(together[0.3][3], together[0.7][3])
    assert len(layers_of(model)) == 4
    assert len({id(layer.planner) for layer in layers_of(model)}) == 2
    assert [layer.index for layer in layers_of(model)] == [0, 0, 1, 1]


def test_reset_forgets_what_was_compiled_and_its_state() -> None:
    model, call = whole()
    with sparse_compile.denoising(model, steps=4) as clock:
        generate(call, clock)
        references = [*map(weakref.ref, [*layers_of(model), *state_tensors(model)])]
        torch.compiler.reset()
        gc.collect()
        assert [reference() for reference in references] == [None] * len(references)
        assert layers_of(model) == []
        assert sparse_compile.explain(model).to_dict()["compilations"] == 0
        assert "no attention was compiled yet" in str(sparse_compile.explain(model))


def test_detaching_a_clock_undoes_what_its_source_did() -> None:
    model = Stack()
    clock = Clock()
    undone: list[str] = []
    source = Source(undone)
    REGISTRY.claim(model, clock)
    REGISTRY.attach(clock, source)
    assert REGISTRY.clocks() == [clock]
    assert REGISTRY.sources(clock) == [source]
    REGISTRY.detach(clock)
    assert undone == ["undone"]
    assert REGISTRY.clocks() == []
    assert REGISTRY.claim_of(next(model.parameters())) is None


class Source:
    """Counts how often it is detached."""

    def __init__(self, undone: list[str]) -> None:
        self.undone = undone

    def detach(self) -> None:
        self.undone.append("undone")


def test_a_clock_may_be_reset_in_the_middle_of_a_generation() -> None:
    model, call = whole(dense_layers=1, dense_steps=0)
    with sparse_compile.denoising(model, steps=4) as clock:
        want = generate(call, clock, ["cond"])
        clock.start(4)
        for _ in range(2):
            with clock.branch("cond"):
                call(tokens())
            clock.step()
        torch.compiler.reset()
        with clock.branch("cond"):
            call(tokens())
        assert phases(model) == [["dense"], ["search"]]
        clock.start(4)
        assert_same(generate(call, clock, ["cond"]), want)


def test_a_model_is_claimed_once() -> None:
    model, _ = whole()
    with sparse_compile.denoising(model, steps=4):
        with (
            pytest.raises(SparseAttentionError, match=r"one clock at a time.*Leave the other"),
            sparse_compile.denoising(model, steps=4),
        ):
            pass
        assert REGISTRY.claim_of(next(model.parameters())) is not None


def test_a_part_of_a_claimed_model_is_claimed_too() -> None:
    model = Stack()
    with (
        sparse_compile.denoising(model.blocks[1], steps=4),
        pytest.raises(SparseAttentionError, match="one clock"),
    ):
        REGISTRY.claim(model, Clock())


def test_a_failed_claim_takes_nothing() -> None:
    model = Stack()
    clock = Clock()
    with sparse_compile.denoising(model.blocks[1], steps=4), pytest.raises(SparseAttentionError):
        REGISTRY.claim(model, clock)
    assert REGISTRY.claim_of(model.blocks[0].to_q.weight) is None


def test_denoising_lets_go_after_an_exception() -> None:
    model, call = whole(dense_steps=0)
    with pytest.raises(KeyError), sparse_compile.denoising(model, steps=4) as clock:
        call(tokens())
        clock.step()
        raise KeyError
    assert [layer.claim for layer in layers_of(model)] == [None, None]
    x = tokens(seed=3)
    torch.testing.assert_close(call(x), Stack()(x))
    with sparse_compile.denoising(model, steps=4):
        assert REGISTRY.phase_of(model.parameters(), layers_of(model)[0].planner) == "search"


@pytest.mark.parametrize("thing", [None, "model", torch.nn.functional.relu, torch.zeros(1)])
def test_denoising_needs_a_module(thing: Any) -> None:
    with (
        pytest.raises(SparseAttentionError, match="needs a module"),
        sparse_compile.denoising(thing, steps=4),
    ):
        pass


def test_a_clock_needs_a_model_with_parameters() -> None:
    with (
        pytest.raises(SparseAttentionError, match="with Parameters"),
        sparse_compile.denoising(nn.Identity(), steps=4),
    ):
        pass


def test_a_claimed_model_without_layers_has_the_phase_of_its_clock() -> None:
    registry = Registry()
    model = Stack(3)
    planner = registry.planner(Config.from_options({"dense_steps": 1, "dense_layers": 1}, environ={}), Svg2())
    owners = [block.to_q.weight for block in model.blocks]
    assert registry.phase_of(owners, planner) == "dense"
    clock = Clock()
    registry.claim(model, clock)
    assert registry.phase_of(owners, planner) == "dense"
    clock.start(3)
    assert registry.phase_of(owners, planner) == "dense"
    clock.step()
    assert registry.phase_of(owners, planner) == "search"
    assert registry.phase_of(owners[:1], planner) == "dense"
    assert [registry.layers_of(owner) for owner in owners] == [[], [], []]


def test_equal_options_have_one_planner() -> None:
    registry = Registry()
    one = registry.planner(Config.from_options({"top_p": 0.5}, environ={}), Svg2())
    assert registry.planner(Config.from_options({"top_p": 0.5}, environ={}), Svg2()) is one
    assert registry.planner(Config.from_options({"top_p": 0.6}, environ={}), Svg2()) is not one


def test_layers_that_ran_before_the_claim_are_numbered_by_their_calls() -> None:
    model = Stack(3)
    calls = [torch.compile(block, backend="sparse_attn", options=QUICK) for block in model.blocks]
    for at in (2, 0, 1):
        calls[at](tokens())
    with sparse_compile.denoising(model, steps=4):
        assert [layer.index for layer in layers_of(model)] == [1, 2, 0]


def test_the_finder_is_asked_only_once_its_library_is_there(caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry()
    registry.add_finder("a_library_that_is_not_there", "a_module_that_is_not_there")
    assert not registry.find_clock()
    with caplog.at_level(logging.WARNING, "sparse_compile"):
        registry.warn_no_clock()
        registry.warn_no_clock()
    assert len([r for r in caplog.records if "no clock" in r.message]) == 1
