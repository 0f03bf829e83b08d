"""The graphs that a GPU gets, on a machine without one: rewritten for the Triton kernels, run on fake CUDA tensors.

What a graph calls, and of what shapes and strides, is checked with it; values are not there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.cogvideox import cogvideox
from families.hunyuan import hunyuan_video
from families.wan import wan_t2v
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_models import Stack, tokens

from sparse_compile.compiler import pipeline
from sparse_compile.phases import Phase
from sparse_compile.testing import Captured, capture, planner_of

Model = tuple[nn.Module, dict[str, Any]]
MODELS: dict[str, Callable[[], Model]] = {
    "separate projections": lambda: (Stack(2), {"hidden_states": tokens()}),
    "cross-attention": wan_t2v,
    "joint": cogvideox,
    "joint with a mask": hunyuan_video,
}
PHASES = {"svg2": (Phase.SEARCH, Phase.SPARSE), "adaspa": (Phase.SEARCH, Phase.SPARSE, Phase.REFINE)}
OPTIONS = {"svg2": {"q_clusters": 4, "k_clusters": 12}, "adaspa": {"block_size": 16}}
PHASES_OF_METHODS = [(method, phase) for method, phases in PHASES.items() for phase in phases]


class OnCuda(fx.Interpreter):
    """Runs a graph that was captured on the CPU as one of a GPU; keeps what the package's ops return.

    What Python itself does with a CUDA tensor (indexing, `to`, `contiguous`) needs a torch built for CUDA, so it is
    spelt by operators here.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.returned: list[tuple[str, Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if getattr(n.target, "namespace", "") == "sparse_compile":
            results = (made,) if isinstance(made, Tensor) else made
            self.returned += [(n.target.name(), result) for result in results]
        return made

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is operator.getitem and isinstance(args[0], Tensor):
            return indexed(*args)
        if target is operator.setitem:
            place = indexed(*args[:2])
            return (torch.ops.aten.copy_ if isinstance(args[2], Tensor) else torch.ops.aten.fill_)(place, args[2])
        return super().call_function(target, _on_cuda(args), _on_cuda(kwargs))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == "to" and args[1:] == (torch.device("cpu"),):
            return args[0]
        if target == "contiguous":
            return torch.ops.aten.contiguous(*args)
        return super().call_method(target, _on_cuda(args), _on_cuda(kwargs))


def _on_cuda(values: Any) -> Any:
    return fx.node.map_aggregate(values, lambda x: torch.device("cuda") if isinstance(x, torch.device) else x)


def indexed(x: Tensor, index: Any) -> Tensor:
    """x[index], of ints, slices, None and an ellipsis."""
    index = index if isinstance(index, tuple) else (index,)
    if ... in index:
        place = index.index(...)
        missing = x.dim() - sum(part is not None and part is not ... for part in index)
        index = (*index[:place], *(slice(None),) * missing, *index[place + 1 :])
    dim = 0
    for part in index:
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, slice):
            x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
        else:
            x = x.select(dim, part)
            dim -= 1
        dim += 1
    return x


@pytest.fixture(scope="module")
def captured() -> Callable[[str], Captured]:
    """The graph of a model, captured once."""
    graphs: dict[str, Captured] = {}

    def of(name: str) -> Captured:
        if name not in graphs:
            model, inputs = MODELS[name]()
            graphs[name] = capture(model, **inputs)[0]
        return graphs[name]

    return of


def shapes_of(outputs: Any) -> list[tuple[torch.Size, tuple[int, ...], torch.dtype]]:
    return [(x.shape, x.stride(), x.dtype) for x in outputs]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("method", "phase"), PHASES_OF_METHODS)
def test_a_rewritten_graph_stays_on_the_gpu_and_returns_what_the_dense_one_does(
    captured: Callable[[str], Captured], name: str, method: str, phase: Phase
) -> None:
    graph = captured(name)
    planner = planner_of(min_tokens=1, dense_layers=0, method=method, **OPTIONS[method])
    with torch.no_grad():
        sites = pipeline.find_sites(graph.graph_module, graph.example_inputs, graph.inputs, planner)
        rewritten, states = pipeline.rewrite(graph.graph_module, sites, planner, phase, "triton")
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            inputs = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if isinstance(x, Tensor) else x
                for x in graph.example_inputs
            ]
            state = [torch.empty(spec.shape, dtype=spec.dtype) for each in states for spec in each.specs]
            dense = OnCuda(graph.graph_module).run(*inputs)
            interpreter = OnCuda(rewritten)
            outputs = interpreter.run(*inputs, *state)
    assert states and shapes_of(outputs) == shapes_of(dense)
    assert all(x.device.type == "cuda" for x in outputs)
    assert "sparse_compile::kept_mass" in {op for op, _ in interpreter.returned}
    assert all(x.device.type == "cuda" for _, x in interpreter.returned), interpreter.returned
