"""Symbolic sizes: state is shaped per call, splits are written as expressions, results are those of a fresh process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.cogvideox import cogvideox
from families.hunyuan import hunyuan_video
from families.wan import wan_t2v
from toy_models import EAGER, Stack, tokens

import sparse_compile
from sparse_compile.phases import Phase
from sparse_compile.testing import capture, count_ops, rewrite

OPTIONS = {**EAGER, "dense_steps": 1, "top_p": 0.6}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


def run(call: Any, model: Any, count: int, mark: bool) -> torch.Tensor:
    x = tokens(count, seed=count)
    if mark:
        torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad(), sparse_compile.denoising(model, steps=5) as clock:
        for _ in range(5):
            out = call(x)
            clock.step()
    return out


@pytest.mark.parametrize(("mark", "compilations"), [(False, 6), (True, 3)], ids=["automatic", "mark_dynamic"])
def test_three_lengths_equal_fresh_compilations(mark: bool, compilations: int) -> None:
    model = Stack(2)
    call = torch.compile(model, backend="sparse_attn", options=OPTIONS, fullgraph=True)
    lengths = (6000, 9000, 12_000)  # three numbers of key clusters
    got = {count: run(call, model, count, mark) for count in lengths}
    assert sparse_compile.explain(model).compilations == compilations
    for count in lengths:
        torch.compiler.reset()
        fresh = torch.compile(model, backend="sparse_attn", options=OPTIONS, fullgraph=True, dynamic=False)
        assert torch.equal(run(fresh, model, count, mark=False), got[count])


@pytest.mark.parametrize("build", [wan_t2v, hunyuan_video, cogvideox])
def test_a_dynamic_graph_is_rewritten_and_equals_dense_when_everything_is_kept(build: Any) -> None:
    model, kwargs = build()
    options = {**EAGER, "min_tokens": 64, "dense_steps": 0, "top_p": 1.0}
    with torch.no_grad():
        want = model(**kwargs, return_dict=False)[0]
        call = torch.compile(model, backend="sparse_attn", options=options, dynamic=True)
        with sparse_compile.denoising(model, steps=2) as clock:
            for _ in range(2):
                got = call(**kwargs, return_dict=False)[0]
                assert (got - want).abs().max() <= 2e-4 * want.abs().max()
                clock.step()
    assert "sparse" in {site.decision for site in sparse_compile.explain(model).sites}


def test_rewriting_a_dynamic_graph_bakes_no_length_in() -> None:
    x = tokens(200)
    torch._dynamo.mark_dynamic(x, 1)
    captured = capture(Stack(1), x)[0]
    rewritten = rewrite(captured, Phase.SEARCH, **EAGER)
    assert count_ops(rewritten.graph_module, "kmeans") == 1
    assert "200" not in str(rewritten.graph_module.graph)
