"""Looking for the pipeline that called changes nothing in the frames on the way, and keeps nothing alive."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from toy_pipelines import BarePipeline, bare_pipeline

from sparse_compile.integrations.pipeline_frames import local_variable, nearest_pipeline


class Module:
    """Methods such as lie between a pipeline and its attention."""

    def rebinding(self, look: Callable[[], Any]) -> bool:
        x = torch.zeros(4)
        first = weakref.ref(x)
        look()
        x = torch.ones(4)
        return first() is None and bool(x.all())

    def with_cells(self, look: Callable[[], Any]) -> tuple[int, int, Module]:
        count, plain = 1, 2

        def inner() -> tuple[int, Module]:
            nonlocal count
            look()
            count += 1
            return count, self

        counted, owner = inner()
        return counted, plain, owner

    def with_locals(self, look: Callable[[], Any]) -> dict[str, Any]:
        mine = locals()
        look()
        return mine


def test_a_tensor_that_a_method_rebinds_dies_though_somebody_has_looked() -> None:
    assert Module().rebinding(nearest_pipeline)


def test_variables_of_cells_and_plain_ones_stay_bound() -> None:
    module = Module()
    assert module.with_cells(nearest_pipeline) == (2, 2, module)


def test_the_locals_that_a_method_has_taken_stay_as_they_were() -> None:
    module = Module()
    mine = module.with_locals(nearest_pipeline)
    assert mine["self"] is module
    assert mine["look"] is nearest_pipeline


def test_variables_stay_bound_under_a_tracing_debugger() -> None:
    def trace(frame: Any, event: str, _: object) -> Any:
        if event == "line":
            local_variable(frame, "self")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = Module().with_cells(nearest_pipeline)
    finally:
        sys.settrace(before)
    assert found[:2] == (2, 2)


def test_the_names_of_a_module_stay() -> None:
    names: dict[str, Any] = {"local_variable": local_variable, "sys": sys, "self": 1}
    exec("found = local_variable(sys._getframe(), 'self')", names)
    assert names["found"] == names["self"] == 1


@pytest.mark.parametrize("name", ["self", "there is none"])
def test_the_pipeline_is_found_with_the_frame_of_its_call(name: str) -> None:
    class Looking(BarePipeline):
        def look(self) -> Any:
            return (lambda: nearest_pipeline())()

    pipe = Looking(bare_pipeline().transformer, bare_pipeline().scheduler)
    owner, frame = pipe.look()
    assert owner is pipe
    assert local_variable(frame, name) is (pipe if name == "self" else None)
