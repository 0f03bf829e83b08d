"""Helpers to unit-test a rewrite or a strategy: what our own tests use.

graph = capture(lambda q, k, v: scaled_dot_product_attention(q, k, v), q, k, v)[0]
sites = find(graph, min_tokens=64)
assert sites[0].sparse
assert count_ops(rewrite(graph, Phase.SPARSE, min_tokens=64).graph_module, "block_sparse_attention") == 1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparse_compile.compiler import pipeline, torch_internals
from sparse_compile.compiler.kernel_choice import choose_kernel
from sparse_compile.config import Config
from sparse_compile.error_budget import assert_within_error_budget, nan_filled_empty, planted_attention
from sparse_compile.passes.insert_sparse_attention import StateInput
from sparse_compile.phases import Phase
from sparse_compile.sites import GraphInput, Site
from sparse_compile.strategies.base import Planner, Strategy
from sparse_compile.strategies.catalogue import load_strategy

__all__ = [
    "Captured",
    "Rewritten",
    "assert_within_error_budget",
    "capture",
    "count_ops",
    "find",
    "nan_filled_empty",
    "planner_of",
    "planted_attention",
    "rewrite",
]


@dataclass(frozen=True)
class Captured:
    """One graph as Dynamo gave it to the backend."""

    graph_module: fx.GraphModule
    example_inputs: Sequence[Any]
    inputs: dict[fx.Node, GraphInput]


@dataclass(frozen=True)
class Rewritten:
    """A rewritten copy of a graph, and the state inputs behind its own."""

    graph_module: fx.GraphModule
    states: tuple[StateInput, ...]


def capture(
    function: Callable[..., Any],
    *args: Any,
    fullgraph: bool = True,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> list[Captured]:
    """The graphs that Dynamo makes of one call, under ``torch.no_grad()``, in order.

    Args:
        function: a function or module.
        args: its arguments.
        fullgraph: whether a graph break is an error.
        dynamic: whether sizes are symbolic.
        kwargs: its keyword arguments.
    """
    seen: list[Captured] = []

    def record(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(Captured(graph_module, example_inputs, torch_internals.graph_inputs(graph_module)))
        forward: Callable[..., Any] = graph_module.forward
        return forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=record, fullgraph=fullgraph, dynamic=dynamic)(*args, **kwargs)
    return seen


def planner_of(strategy: Strategy | None = None, **options: object) -> Planner:
    """A Planner of these options, for a strategy that need not be installed."""
    config = Config.from_options(options, environ={})
    return Planner(load_strategy(config.method) if strategy is None else strategy, config)


def find(captured: Captured, strategy: Strategy | None = None, **options: object) -> list[Site]:
    """The classified sites of a graph under these options."""
    planner = planner_of(strategy, **options)
    with torch.no_grad():
        return pipeline.find_sites(captured.graph_module, captured.example_inputs, captured.inputs, planner)


def rewrite(captured: Captured, phase: Phase, strategy: Strategy | None = None, **options: object) -> Rewritten:
    """A copy of the graph with the strategy's ops of ``phase`` at each sparse site."""
    planner = planner_of(strategy, **options)
    with torch.no_grad():
        sites = pipeline.find_sites(captured.graph_module, captured.example_inputs, captured.inputs, planner)
        kernel = choose_kernel(planner.config, captured.example_inputs).name
        graph_module, states = pipeline.rewrite(captured.graph_module, sites, planner, phase, kernel)
    return Rewritten(graph_module, states)


def count_ops(graph_module: fx.GraphModule, op: str) -> int:
    """How many nodes call ``torch.ops.sparse_compile.<op>``."""
    target = getattr(torch.ops.sparse_compile, op).default
    return len(graph_module.graph.find_nodes(op="call_function", target=target))
