"""One short generation of a family: the graphs it was compiled from, its report, and how far it is from eager."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dynamo_capture import census
from families.case import Case, Inputs, Row
from families.table import case_of
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import sparse_compile
from sparse_compile.compiler.backend import sparse_attn
from sparse_compile.compiler.torch_internals import graph_inputs
from sparse_compile.testing import Captured

OPTIONS = {"lowering": "eager", "min_tokens": 64, "dense_steps": 0, "dense_layers": 0}
NOTHING_SKIPPED = {"top_p": 1.0}
BRANCHES = {"cond": 1.0, "uncond": 0.8}
"""The branches of guidance, and what scales their video."""
STEPS = 2
TOLERANCE = 2e-4
"""Of the largest value of an output."""

Place = tuple[int, str]
"""Step and branch of a call."""
Errors = dict[Place, float]
Outputs = dict[Place, list[Tensor]]


class Recorder:
    """The backend with these options, and the graphs that it was given so far."""

    def __init__(self, options: Inputs) -> None:
        self.options = options
        self.graphs: list[Captured] = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(Captured(graph_module, example_inputs, graph_inputs(graph_module)))
        return sparse_attn(graph_module, example_inputs, options=self.options)


@dataclass(frozen=True)
class Generation:
    """What there is to say about one generation."""

    report: sparse_compile.Report
    errors: Errors
    graphs: int
    """How many the first call was compiled from."""
    sites: Counter[Row]
    """The sites of these."""


def at(case: Case, kwargs: Inputs, step: int, branch: str) -> Inputs:
    """The inputs of one call: the video moves from step to step, and differs between the branches."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor * BRANCHES[branch] + 0.05 * step

    return {**kwargs, **{name: pytree.tree_map_only(Tensor, moved, kwargs[name]) for name in case.video}}


def outputs_of(run: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """Every tensor that a model returns."""
    return [leaf for leaf in pytree.tree_leaves(run(**inputs)) if isinstance(leaf, Tensor)]


def eager(case: Case, model: nn.Module, kwargs: Inputs) -> Outputs:
    """What the model gives as it is. To be asked before it is compiled."""
    return {
        (step, branch): outputs_of(model, at(case, kwargs, step, branch))
        for step in range(STEPS)
        for branch in BRANCHES
    }


def compiled(case: Case, model: Any, regional: bool, backend: Recorder) -> Callable[..., Any]:
    how: Inputs = {"backend": backend, "fullgraph": case.fullgraph}
    if regional:
        model.compile_repeated_blocks(**how)
        return model  # type: ignore[no-any-return]
    return torch.compile(model, **how)


def largest_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Of the largest value wanted."""
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in want]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


def generation_of(case: Case, regional: bool, **options: Any) -> Generation:
    """Two steps of two branches of a family under these options."""
    torch.compiler.reset()
    recorder, errors = Recorder({**OPTIONS, **options}), Errors()
    with torch.no_grad():
        model, kwargs = case.build()
        wanted = eager(case, model, kwargs)
        run = compiled(case, model, regional, recorder)
        with sparse_compile.denoising(model, steps=STEPS) as clock:
            for step in range(STEPS):
                for branch in BRANCHES:
                    with clock.branch(branch):
                        got = outputs_of(run, at(case, kwargs, step, branch))
                    errors[step, branch] = largest_error(got, wanted[step, branch])
                    if len(errors) == 1:
                        graphs, sites = len(recorder.graphs), census(recorder.graphs)
                clock.step()
            report = sparse_compile.explain(model)
    torch.compiler.reset()
    return Generation(report, errors, graphs, sites)


@functools.cache
def nothing_skipped(name: str, regional: bool) -> Generation:
    """A generation of one case of the table that skips nothing. One serves all tests."""
    return generation_of(case_of(name), regional, **NOTHING_SKIPPED)
