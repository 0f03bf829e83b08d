"""Memory stays flat over generations and resolutions, and all of it is given back with the pipeline."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from generations import QUICK, layers_of, state_tensors
from torch import nn
from toy_models import Block, Stack
from toy_pipeline import ToyPipeline, ToyTransformer, toy_pipeline

import sparse_compile
from sparse_compile.runtime.registry import REGISTRY

GENERATIONS = 50
SIZES = (64, 72, 80, 88, 96, 104, 112, 120)


def enabled(pipe: ToyPipeline, regional: bool) -> None:
    sparse_compile.enable(pipe, regional=regional, **QUICK)


def attached(pipe: ToyPipeline, regional: bool) -> None:
    sparse_compile.attach(pipe)
    compiled: list[nn.Module] = [*pipe.transformer.blocks] if regional else [pipe.transformer]
    for module in compiled:
        module.compile(backend="sparse_attn", options=QUICK)


WAYS: dict[str, Callable[[ToyPipeline, bool], None]] = {"enabled": enabled, "attached": attached}
by_way = pytest.mark.parametrize("way", WAYS)
by_region = pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])


class Held(NamedTuple):
    """What the process holds."""

    tensors: int
    bytes: int
    layers: int
    graphs: int
    cache_entries: int


def held(model: nn.Module) -> Held:
    gc.collect()
    # by `type`, since isinstance would ask weak proxies for the class of an object that is gone
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    codes = [function.__code__ for function in (Stack.forward, Block.forward)]
    entries = [entry for code in codes for entry in torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)]
    return Held(
        len(tensors),
        sum(tensor.untyped_storage().nbytes() for tensor in tensors),
        len(layers_of(model)),
        sparse_compile.explain(model).compilations,
        len(entries),
    )


@pytest.mark.slow
@by_region
@by_way
def test_fifty_generations_hold_no_more_than_two(way: str, regional: bool) -> None:
    pipe = toy_pipeline()
    WAYS[way](pipe, regional)
    pipe(steps=3, size=64)
    pipe(steps=3, size=64)
    before = held(pipe.transformer)
    for seed in range(2, GENERATIONS):
        pipe(steps=3, seed=seed, size=64)
    assert held(pipe.transformer) == before
    assert before.layers == 2
    assert before.cache_entries >= 3


@pytest.mark.slow
@by_region
@by_way
def test_eight_resolutions_in_turn_hold_no_more_the_second_time(way: str, regional: bool) -> None:
    pipe = toy_pipeline()
    WAYS[way](pipe, regional)
    rounds = []
    for _ in range(3):
        for size in SIZES:
            pipe(steps=3, size=size)
        rounds.append(held(pipe.transformer))
    assert rounds[1] == rounds[2]
    assert rounds[0].graphs == rounds[1].graphs


@by_region
@by_way
def test_nothing_of_a_deleted_pipeline_stays(way: str, regional: bool) -> None:
    pipe = toy_pipeline(second=ToyTransformer())
    WAYS[way](pipe, regional)
    for size in SIZES[:2]:
        pipe(size=size)
    clock = REGISTRY.attached_clock(pipe.transformer)
    assert clock is not None
    kept: list[Any] = [pipe, pipe.scheduler, clock, *REGISTRY.sources(clock)]
    for model in (pipe.transformer, pipe.transformer_2):
        kept += [*model.modules(), *model.parameters(), *layers_of(model), *state_tensors(model)]
    assert any(type(thing) is torch.Tensor for thing in kept)
    references = [*map(weakref.ref, kept)]
    del kept, clock, pipe, model
    gc.collect()
    assert [type(thing).__name__ for reference in references if (thing := reference()) is not None] == []
    assert not REGISTRY.clocks()
    assert not REGISTRY.enabled


@by_region
def test_disabling_gives_state_back_while_the_pipeline_lives(regional: bool) -> None:
    pipe = toy_pipeline()
    sparse_compile.enable(pipe, regional=regional, **QUICK)
    pipe()
    states = [
        weakref.ref(tensor)
        for layer in layers_of(pipe.transformer)
        for state in layer.branches.values()
        for tensors in state.tensors.values()
        for tensor in tensors
    ]
    assert states
    sparse_compile.disable(pipe)
    gc.collect()
    assert [state() for state in states] == [None] * len(states)
