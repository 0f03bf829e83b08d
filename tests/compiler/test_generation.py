"""Whole generations: what is compiled, when, and that state goes where it belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families.table import case_of
from families.wan import wan_t2v
from generations import BRANCHES, generate_wan
from torch import Tensor, nn
from toy_models import EAGER, Stack, tokens

import sparse_compile
from sparse_compile.compiler.pipeline import find_sites
from sparse_compile.compiler.torch_internals import graph_inputs
from sparse_compile.testing import planner_of

OPTIONS = {**EAGER, "min_tokens": 64}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def compiled_wan(regional: bool, **options: Any) -> tuple[nn.Module, Callable[..., Any], dict[str, Any]]:
    model, kwargs = wan_t2v()
    how = {"backend": "sparse_attn", "options": {**OPTIONS, **options}, "fullgraph": True}
    if regional:
        model.compile_repeated_blocks(**how)
        return model, model, kwargs
    return model, torch.compile(model, **how), kwargs


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("recursive_tags", [False, True], ids=["plain_tags", "recursive_tags"])
def test_fifty_steps_of_two_branches_compile_once_per_phase(regional: bool, recursive_tags: bool) -> None:
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=recursive_tags):
        model, call, kwargs = compiled_wan(regional)
        with sparse_compile.denoising(model, steps=50) as clock:
            first = generate_wan(call, kwargs, clock)
            assert sparse_compile.explain(model).compilations == 3
            clock.start(50)
            with torch.compiler.set_stance("fail_on_recompile"):
                second = generate_wan(call, kwargs, clock)
    for branch in BRANCHES:
        assert torch.equal(first[branch], second[branch])
    report = sparse_compile.explain(model)
    assert report.compilations == 3
    phases = [[step.phase for step in generation.steps] for generation in report.generations]
    assert phases == [["dense"] * 20 + ["search"] * 2 + ["sparse"] * 78] * 2


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_a_branch_alone_equals_the_same_branch_beside_another(regional: bool) -> None:
    outputs = []
    for branches in (BRANCHES, ("cond",)):
        torch.compiler.reset()
        model, call, kwargs = compiled_wan(regional, top_p=0.5)
        with sparse_compile.denoising(model, steps=6) as clock:
            outputs.append(generate_wan(call, kwargs, clock, branches)["cond"])
    assert torch.equal(*outputs)


def test_dense_steps_equal_the_model_itself() -> None:
    model, call, kwargs = compiled_wan(regional=False, dense_steps=2)
    want = model(**kwargs, return_dict=False)[0]
    with sparse_compile.denoising(model, steps=4) as clock, clock.branch("cond"):
        assert torch.equal(call(**kwargs, return_dict=False)[0], want)


def test_twelve_equal_blocks_share_their_code_and_not_their_state() -> None:
    model = Stack(12)
    for block in model.blocks:
        block.compile(backend="sparse_attn", options={**EAGER, "dense_steps": 1})
    with sparse_compile.denoising(model, steps=4) as clock:
        for _ in range(4):
            model(tokens())
            clock.step()
    report = sparse_compile.explain(model)
    assert report.compilations == 3
    assert len(report.sites) == 12
    assert {site.decision for site in report.sites} == {"sparse"}


def test_the_code_of_one_model_serves_an_equal_one_with_its_own_state() -> None:
    outputs = []
    for models in ([Stack(2), Stack(2)], [Stack(2)]):
        torch.compiler.reset()
        for model in models:
            for block in model.blocks:
                block.compile(backend="sparse_attn", options={**EAGER, "dense_steps": 0, "top_p": 0.5})
        for model in models[:-1]:
            with sparse_compile.denoising(model, steps=3) as clock:
                for seed in range(3):
                    model(tokens(seed=seed + 10))
                    clock.step()
        with sparse_compile.denoising(models[-1], steps=3) as clock:
            for seed in range(3):
                out = models[-1](tokens(seed=seed))
                clock.step()
        outputs.append(out)
        assert sparse_compile.explain(models[-1]).compilations == (0 if len(models) == 2 else 2)
    assert torch.equal(*outputs)


class Broken(Stack):
    """Two blocks with a graph break between them (in a loop Dynamo would give up on the frame)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.blocks[0](hidden_states)
        torch._dynamo.graph_break()
        return self.blocks[1](hidden_states)


def test_graph_pieces_of_a_broken_model_compile_once_per_phase_each() -> None:
    model = Broken(2)
    call = torch.compile(model, backend="sparse_attn", options={**EAGER, "dense_steps": 1})
    with sparse_compile.denoising(model, steps=5) as clock:
        for _ in range(5):
            call(tokens())
            clock.step()
        compilations = sparse_compile.explain(model).compilations
        clock.start(5)
        for _ in range(5):
            call(tokens())
            clock.step()
    report = sparse_compile.explain(model)
    assert report.compilations == compilations == 6
    assert [step.phase for step in report.generations[-1].steps] == [
        "dense",
        "search",
        "sparse",
        "sparse",
        "sparse",
    ]


def test_no_grad_and_inference_mode_share_state() -> None:
    model = Stack(1)
    call = torch.compile(model, backend="sparse_attn", options={**EAGER, "dense_steps": 0})
    with sparse_compile.denoising(model, steps=3) as clock, clock.branch("cond"):
        with torch.inference_mode():
            call(tokens())
        clock.step()
        call(tokens())
    assert [step.phase for step in sparse_compile.explain(model).generations[0].steps] == ["search", "sparse"]


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_inductor_gives_what_the_rewritten_graph_gives_as_it_is(regional: bool) -> None:
    outputs = []
    for lowering in ("eager", "inductor"):
        torch.compiler.reset()
        model, call, kwargs = compiled_wan(regional, lowering=lowering, dense_steps=1, top_p=1.0)
        with sparse_compile.denoising(model, steps=4) as clock:
            outputs.append(generate_wan(call, kwargs, clock)["cond"])
            clock.start(4)
            with torch.compiler.set_stance("fail_on_recompile"):
                assert torch.equal(generate_wan(call, kwargs, clock)["cond"], outputs[-1])
        assert sparse_compile.explain(model).compilations == 3
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan_video", "wan_vace", "ltx"])
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_compilations_are_phases_times_sparse_graphs_plus_the_others(name: str, regional: bool) -> None:
    """Promise 2, against the number of graphs that a backend which only counts receives."""
    graphs = {"sparse": 0, "other": 0}
    model, kwargs = case_of(name).build()

    def counting(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        sites = find_sites(graph_module, inputs, graph_inputs(graph_module), planner_of(min_tokens=64))
        graphs["sparse" if any(site.sparse for site in sites) else "other"] += 1
        forward: Callable[..., Any] = graph_module.forward
        return forward

    def run(backend: Any, steps: int, **how: Any) -> None:
        nonlocal model
        model, _ = case_of(name).build()
        if regional:
            model.compile_repeated_blocks(backend=backend, **how)
            call: Callable[..., Any] = model
        else:
            call = torch.compile(model, backend=backend, **how)
        with sparse_compile.denoising(model, steps=steps) as clock:
            for _ in range(steps):
                for branch in BRANCHES:
                    with clock.branch(branch):
                        call(**kwargs, return_dict=False)
                clock.step()

    run(counting, 1)
    torch.compiler.reset()
    run("sparse_attn", 5, options=OPTIONS)
    assert sparse_compile.explain(model).compilations == 3 * graphs["sparse"] + graphs["other"]
