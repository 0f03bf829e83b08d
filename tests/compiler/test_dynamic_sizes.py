"""Symbolic sizes: state is shaped per call, splits are written as expressions, results are those of a fresh process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.building import Noise
from families.cogvideox import cogvideox
from families.hunyuan import hunyuan_video
from families.ltx import ltx
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


def decisions(call: Any, model: Any, count: int) -> set[tuple[str, str | None]]:
    """What the report says after a generation of this many tokens."""
    run(call, model, count, mark=True)
    return {(site.decision, site.reason) for site in sparse_compile.explain(model).sites}


SPARSE, SHORT = {("sparse", None)}, {("dense", "too_short")}


@pytest.mark.parametrize("first", ["long", "short"])
@pytest.mark.parametrize(
    ("options", "floor"),
    [
        pytest.param({"min_tokens": 500}, 500, id="min_tokens"),
        pytest.param({"min_tokens": "auto"}, 256, id="floor of the method"),
        pytest.param({"min_tokens": 500, "lowering": "inductor"}, 500, id="inductor", marks=pytest.mark.slow),
    ],
)
def test_the_floor_holds_for_every_length_of_a_dynamic_graph(first: str, options: dict[str, Any], floor: int) -> None:
    model = Stack(2)
    call = torch.compile(model, backend="sparse_attn", options={**EAGER, "dense_steps": 1, **options}, fullgraph=True)
    long, short = range(floor, 3 * floor, floor // 2), (floor - 1, floor // 2)
    for lengths, want in [(long, SPARSE), (short, SHORT)][:: 1 if first == "long" else -1]:
        for count in lengths:
            assert decisions(call, model, count) == want
    compilations = sparse_compile.explain(model).compilations
    assert decisions(call, model, long[1]) == SPARSE
    assert decisions(call, model, short[1]) == SHORT
    assert sparse_compile.explain(model).compilations == compilations == 4


def test_a_first_video_of_one_block_leaves_no_longer_one_dense() -> None:
    model = Stack(1)
    options = {"lowering": "eager", "dense_layers": 0, "min_tokens": 1, "method": "adaspa", "block_size": 100}
    call = torch.compile(model, backend="sparse_attn", options=options, fullgraph=True)
    for count, want in ((100, {("dense", "one_block")}), (101, SPARSE), (60, {("dense", "one_block")}), (300, SPARSE)):
        assert decisions(call, model, count) == want


@pytest.mark.slow
def test_a_real_model_is_compiled_once_for_all_its_resolutions() -> None:
    model, kwargs = ltx()
    options = {**EAGER, "min_tokens": 64, "dense_steps": 1, "density": 1.0}
    call = torch.compile(model, backend="sparse_attn", options=options, dynamic=True)
    noise = Noise(1)
    compilations = []
    for frames, height, width in ((4, 8, 6), (5, 10, 8), (6, 12, 10), (2, 3, 4), (3, 8, 7)):
        sizes = {"num_frames": frames, "height": height, "width": width}
        inputs = {**kwargs, **sizes, "hidden_states": noise(2, frames * height * width, 8)}
        with torch.no_grad(), sparse_compile.denoising(model, steps=3) as clock:
            want = model(**inputs, return_dict=False)[0]
            for _ in range(3):
                got = call(**inputs, return_dict=False)[0]
                assert (got - want).abs().max() <= 2e-4 * want.abs().max()
                clock.step()
        report = sparse_compile.explain(model)
        compilations.append(report.compilations)
        verdict = {(site.decision, site.reason) for site in report.sites if site.role == "self"}
        assert verdict == (SHORT if frames == 2 else SPARSE)
    assert compilations == [3, 3, 3, 4, 4]
