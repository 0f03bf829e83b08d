"""The one pass that edits a graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from families.cogvideox import cogvideox
from families.hunyuan import hunyuan_video
from families.wan import wan_t2v
from torch import Tensor
from toy_models import EAGER, Block, Stack, tokens

from sparse_compile.call_log import log_spec
from sparse_compile.compiler import torch_internals
from sparse_compile.passes.insert_sparse_attention import insert_sparse_attention
from sparse_compile.phases import Phase
from sparse_compile.sites import TokenLayout, TokenPart
from sparse_compile.testing import Captured, capture, count_ops, find, planner_of, rewrite

OPTIONS = {**EAGER, "min_tokens": 64}
OPS = ("kmeans", "plan_top_p", "block_sparse_attention")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def attentions(graph_module: torch.fx.GraphModule) -> int:
    return len(graph_module.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention))


def run(captured: Captured, phase: Phase, inputs: list[Tensor], **options: object) -> tuple[Tensor, list[list[Tensor]]]:
    """Run a rewritten graph on zeroed state."""
    rewritten = rewrite(captured, phase, **options)
    states = [[torch.zeros(s.shape, dtype=s.dtype) for s in state.specs] for state in rewritten.states]
    (out,) = rewritten.graph_module(*inputs, *(tensor for state in states for tensor in state))
    return out, states


def test_a_site_becomes_three_ops_and_four_state_inputs() -> None:
    captured = capture(Stack(2), tokens())[0]
    rewritten = rewrite(captured, Phase.SPARSE, **OPTIONS)
    assert [count_ops(rewritten.graph_module, op) for op in OPS] == [2, 2, 2]
    assert attentions(rewritten.graph_module) == 0
    before = len(captured.graph_module.graph.find_nodes(op="placeholder"))
    placeholders = rewritten.graph_module.graph.find_nodes(op="placeholder")
    assert len(placeholders) == before + 8
    assert all("sparse_attn" in node.name for node in placeholders[before:])


@pytest.mark.parametrize("heads", [1, 4])
def test_the_log_has_a_row_for_each_query_head(heads: int) -> None:
    captured = capture(Stack(1, heads=heads), tokens())[0]
    rewritten = rewrite(captured, Phase.SPARSE, **OPTIONS)
    assert rewritten.states[0].specs[-1] == log_spec(torch.device("cpu"), heads)
    assert rewritten.states[0].examples[-1].shape == log_spec(torch.device("cpu"), heads).shape


def test_a_log_for_grouped_heads_has_those_of_the_queries() -> None:
    """Two query heads share the one key head."""

    class Grouped(Block):
        def forward(self, hidden_states: Tensor) -> Tensor:
            q = self.to_q(hidden_states).unflatten(-1, (2, -1)).transpose(1, 2)
            k, v = (p(hidden_states)[..., :16].unsqueeze(1) for p in (self.to_k, self.to_v))
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)

    rewritten = rewrite(capture(Grouped(), tokens())[0], Phase.SPARSE, **OPTIONS)
    assert rewritten.states[0].specs[-1] == log_spec(torch.device("cpu"), 2)


def test_dynamos_own_graph_stays_as_it_was() -> None:
    captured = capture(Stack(1), tokens())[0]
    before = captured.graph_module.code
    rewrite(captured, Phase.SPARSE, **OPTIONS)
    assert captured.graph_module.code == before


def test_dense_sites_are_left_alone_with_a_note() -> None:
    captured = capture(wan_t2v()[0], **wan_t2v()[1])[0]
    rewritten = rewrite(captured, Phase.SEARCH, **OPTIONS)
    assert count_ops(rewritten.graph_module, "block_sparse_attention") == 2
    assert attentions(rewritten.graph_module) == 2


def test_a_second_run_changes_nothing() -> None:
    captured = capture(Stack(1), tokens())[0]
    copied, old_to_new = torch_internals.copy_graph(captured.graph_module)
    sites = [site.moved(old_to_new) for site in find(captured, **OPTIONS)]
    fake_mode = torch_internals.fake_mode_of(captured.graph_module)

    def insert() -> tuple[int, tuple[str, ...]]:
        result = insert_sparse_attention(
            copied, sites, planner_of(**OPTIONS), Phase.SPARSE, "cpu", fake_mode, torch_internals.mark_state_input
        )
        return result.changed, result.notes

    assert insert() == (1, ())
    changed, notes = insert()
    assert changed == 0
    assert "rewritten before" in notes[0]


@pytest.mark.parametrize("phase", [Phase.SEARCH, Phase.SPARSE])
def test_empty_state_attends_to_everything_in_a_sparse_call(phase: Phase) -> None:
    model, x = Stack(2), tokens()
    captured = capture(model, x)[0]
    out, _ = run(captured, phase, list(captured.example_inputs), **{**OPTIONS, "top_p": 1.0})
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
    if phase is Phase.SPARSE:  # whatever top_p: nothing was searched yet
        out, states = run(captured, phase, list(captured.example_inputs), **{**OPTIONS, "top_p": 0.1})
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
        assert [int(ready) for _, _, ready, _ in states] == [0, 0]


def test_a_search_fills_state_and_log() -> None:
    captured = capture(Stack(1), tokens())[0]
    _, [[q_centroids, k_centroids, ready, log]] = run(captured, Phase.SEARCH, list(captured.example_inputs), **OPTIONS)
    assert q_centroids.any()
    assert k_centroids.any()
    assert int(ready) == 1
    assert log[0, 0] == 1
    assert 0 < log[1, 0] <= 1


def test_ops_stand_behind_the_in_place_rotation_of_their_inputs() -> None:
    """Wan fills a buffer by `out[..., 0::2] = …`, which has no data edge to the attention."""

    class Rotated(Block):
        def forward(self, hidden_states: Tensor) -> Tensor:
            projections = (self.to_q, self.to_k, self.to_v)
            q, k, v = (p(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)
            rotated = torch.empty_like(q)
            rotated[..., 0::2] = q[..., 1::2]
            rotated[..., 1::2] = q[..., 0::2]
            return F.scaled_dot_product_attention(rotated, k, v).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model, x = Rotated().eval().requires_grad_(False), tokens()
    captured = capture(model, x)[0]
    out, _ = run(captured, Phase.SEARCH, list(captured.example_inputs), **{**OPTIONS, "top_p": 1.0})
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


def test_new_nodes_say_where_they_come_from() -> None:
    rewritten = rewrite(capture(Stack(1), tokens())[0], Phase.SPARSE, **OPTIONS)
    target = torch.ops.sparse_compile.kmeans.default
    (node,) = rewritten.graph_module.graph.find_nodes(op="call_function", target=target)
    assert "toy_models" in node.meta["stack_trace"]
    assert node.meta["nn_module_stack"]


@pytest.mark.parametrize(
    ("build", "spans"),
    [(wan_t2v, [0, 480]), (hunyuan_video, [0, 320]), (cogvideox, [18, 210])],
)
def test_the_ops_know_where_the_video_lies(build: object, spans: list[int]) -> None:
    model, kwargs = build()  # type: ignore[operator]
    rewritten = rewrite(capture(model, **kwargs)[0], Phase.SPARSE, **OPTIONS)
    target = torch.ops.sparse_compile.kmeans.default
    for node in rewritten.graph_module.graph.find_nodes(op="call_function", target=target):
        assert list(node.args[4]) == list(node.args[5]) == spans


def test_a_key_padding_mask_becomes_the_valid_tokens() -> None:
    model, kwargs = hunyuan_video()
    rewritten = rewrite(capture(model, **kwargs)[0], Phase.SPARSE, **OPTIONS)
    target = torch.ops.sparse_compile.kmeans.default
    for node in rewritten.graph_module.graph.find_nodes(op="call_function", target=target):
        assert node.args[2] is node.args[3] is not None


@pytest.mark.parametrize(
    ("roles", "runs"),
    [
        (["video"], [(0, 1)]),
        (["video", "text"], [(0, 1)]),
        (["text", "video"], [(1, 2)]),
        (["control", "video", "text"], [(0, 2)]),
        (["video", "text", "video"], [(0, 1), (2, 3)]),
        (["learned", "text"], []),
    ],
)
def test_runs_of_visual_parts(roles: list[str], runs: list[tuple[int, int]]) -> None:
    assert TokenLayout(tuple(TokenPart(role, 4, 4) for role in roles)).visual_runs() == runs
