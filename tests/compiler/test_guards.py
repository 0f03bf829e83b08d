"""The phase guard's function: pure, silent, and without memory of frames."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from sparse_compile.compiler import guards
from sparse_compile.phases import Phase
from sparse_compile.runtime.clock import Clock
from sparse_compile.runtime.registry import Registry
from sparse_compile.testing import planner_of


class FakeOwner:
    """A placeholder as far as `source_name` looks at it."""

    def __init__(self, source: str) -> None:
        self.name = "owner"
        self.meta = {"grapharg": type("GraphArg", (), {"source": type("Source", (), {"name": source})})}


def checked(registry: Registry, planner: Any, phase: Phase, *sources: str) -> Any:
    owners: list[Any] = [FakeOwner(source) for source in sources]
    return guards.phase_check(owners, phase, (False,) * len(owners), planner, registry)


def test_it_follows_the_layers_phase_and_changes_nothing() -> None:
    registry, planner, clock = Registry(), planner_of(dense_steps=1, dense_layers=0), Clock()
    model = nn.Linear(2, 2)
    registry.claim(model, clock)
    clock.start(4)
    dense, search = (checked(registry, planner, phase, "L['self'].weight") for phase in (Phase.DENSE, Phase.SEARCH))
    for _ in range(3):
        assert (dense({"self": model}, {}), search({"self": model}, {})) == (True, False)
    assert not registry.layers_of(model.weight), "a guard makes no layer"
    clock.step()
    assert (dense({"self": model}, {}), search({"self": model}, {})) == (False, True)


def test_the_first_layer_that_is_not_kept_dense_speaks() -> None:
    registry, planner, clock = Registry(), planner_of(dense_steps=0, dense_layers=1), Clock()
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    registry.claim(model, clock)
    clock.start(4)
    sources = ("L['self'][0].weight", "L['self'][1].weight")
    owners: list[Any] = [FakeOwner(source) for source in sources]
    search = guards.phase_check(owners, Phase.SEARCH, (True, False), planner, registry)
    assert search({"self": model}, {})
    other_layers = guards.phase_check(owners, Phase.SEARCH, (False, False), planner, registry)
    assert not other_layers({"self": model}, {})
    first_only = checked(registry, planner, Phase.DENSE, "L['self'][0].weight")
    assert first_only({"self": model}, {})


def test_it_never_raises_and_reports_once(caplog: pytest.LogCaptureFixture) -> None:
    check = checked(Registry(), planner_of(), Phase.DENSE, "L['self'].weight")
    with caplog.at_level(logging.ERROR):
        assert check({}, {}) is False
        assert check({}, {}) is False
    assert len(caplog.records) == 1


def test_it_keeps_no_frame() -> None:
    registry, planner = Registry(), planner_of()
    check = checked(registry, planner, Phase.DENSE, "L['self'].weight")
    model = nn.Linear(2, 2)
    dead = weakref.ref(model)
    check({"self": model, "x": torch.zeros(1)}, {})
    del model
    gc.collect()
    assert dead() is None
