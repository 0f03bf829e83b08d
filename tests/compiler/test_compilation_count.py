"""Nothing is compiled beyond the graphs that Inductor alone has; those with a sparse site once for each phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families.table import case_of
from torch import nn
from toy_models import Stack, tokens

import sparse_compile
from sparse_compile.compiler import backend
from sparse_compile.compiler.in_place import CompiledInPlace
from sparse_compile.compiler.torch_internals import graph_inputs
from sparse_compile.integrations.repeated_blocks import parts_to_compile
from sparse_compile.testing import Captured, find

OPTIONS = {"min_tokens": 64, "dense_steps": 1, "dense_layers": 0, "lowering": "eager", "kernel": "reference"}
PHASES = ("dense", "search", "sparse")
STEPS, GENERATIONS, BRANCHES = 4, 2, ("cond", "uncond")


def plain_graphs(model: nn.Module, call: dict[str, Any], parts: Sequence[nn.Module]) -> tuple[int, int]:
    """How many graphs a backend gets that leaves them as they are: with a sparse site, and without."""
    sparse: list[bool] = []

    def count(graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = Captured(graph_module, inputs, graph_inputs(graph_module))
        sparse.append(any(site.sparse for site in find(captured, min_tokens=64)))
        return graph_module.forward

    torch.compiler.reset()
    compiled = CompiledInPlace(parts, backend=count)
    with torch.no_grad():
        for _ in range(2):
            model(**call)
    compiled.undo()
    return sum(sparse), len(sparse) - sum(sparse)


def compilations(
    model: nn.Module, call: dict[str, Any], parts: Sequence[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, set[str]]:
    """How many graphs this backend compiled in some generations, and the phases that its layers met."""
    seen: list[object] = []
    compile_graph = backend.compile_graph

    def counted(*args: Any) -> Callable[..., Any]:
        seen.append(args[0])
        return compile_graph(*args)

    monkeypatch.setattr(backend, "compile_graph", counted)
    torch.compiler.reset()
    compiled = CompiledInPlace(parts, backend="sparse_attn", options=OPTIONS)
    phases: set[str] = set()
    with torch.no_grad():
        for _ in range(GENERATIONS):
            with sparse_compile.denoising(model, steps=STEPS) as clock:
                for _ in range(STEPS):
                    for name in BRANCHES:
                        with clock.branch(name):
                            model(**call)
                    clock.step()
                steps = sparse_compile.explain(model).generations[-1].steps
                phases |= {step.phase for step in steps}
    compiled.undo()
    return len(seen), phases


def counted_and_needed(
    model: nn.Module, call: dict[str, Any], parts: Sequence[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """How many graphs were compiled, and how many there are at most: every phase of each graph with a sparse site."""
    with_sparse, others = plain_graphs(model, call, parts)
    count, phases = compilations(model, call, parts, monkeypatch)
    assert with_sparse > 0 and phases == set(PHASES)
    return count, len(PHASES) * with_sparse + others


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "blocks"])
def test_a_small_model_is_compiled_once_a_phase(regional, monkeypatch):
    model = Stack(3)
    parts = list(model.blocks) if regional else [model]
    count, needed = counted_and_needed(model, {"hidden_states": tokens()}, parts, monkeypatch)
    assert count == needed == len(PHASES)


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("name", ["hunyuan_video", "ltx", "flux"])
def test_a_family_is_compiled_no_more_than_once_a_phase(name, regional, monkeypatch):
    model, call = case_of(name).build()
    count, needed = counted_and_needed(model, call, parts_to_compile(model, regional).modules, monkeypatch)
    # Fewer where a graph that was compiled for other strides in one phase serves both in the next.
    assert len(PHASES) <= count <= needed
