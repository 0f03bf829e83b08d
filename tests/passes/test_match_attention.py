"""Which nodes are attention, how they were called, and which Parameter names their layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dynamo_capture import capture_model
from torch import Tensor, fx, nn

from sparse_compile.passes.match_attention import match_attention
from sparse_compile.sites import GraphInput, Reason, Site
from sparse_compile.testing import capture

Q, K = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 10, 8)
MASK = torch.ones(2, 1, 1, 10, dtype=torch.bool)


def sites_of(function: Any, *args: Any, **kwargs: Any) -> list[Site]:
    captured = capture(function, *args, **kwargs)[0]
    return match_attention(captured.graph_module, captured.inputs)


def owner_names(module: nn.Module, *args: Tensor, **kwargs: Any) -> list[tuple[str, int]]:
    captured = capture(module, *args, **kwargs)[0]
    sites = match_attention(captured.graph_module, captured.inputs)
    return [("" if s.owner is None else captured.inputs[s.owner].name, s.ordinal) for s in sites]


class Attention(nn.Module):
    """Projections as in diffusers; the text projection, if any, is met first on the way up."""

    def __init__(self, *, text: bool = False, text_first: bool = True) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm_q = nn.LayerNorm(8)
        self.add_q_proj = nn.Linear(8, 8) if text else None
        self.text_first = text_first

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (self.norm_q(self.to_q(x)), self.to_k(x), self.to_v(x))
        if self.add_q_proj is not None:
            pair = [self.add_q_proj(text), q]
            q = torch.cat(pair if self.text_first else pair[::-1], dim=1)
        return F.scaled_dot_product_attention(*(t.unflatten(2, (2, 4)).transpose(1, 2) for t in (q, k, v)))


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn1": Attention(**options)}) for _ in range(2)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return sum(block["attn1"](x, text).sum() for block in self.blocks)


X, TEXT = torch.randn(2, 12, 8), torch.randn(2, 5, 8)


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, m: F.scaled_dot_product_attention(q, k, k, m, 0.25, False, scale=0.5, enable_gqa=True),
        lambda q, k, m: F.scaled_dot_product_attention(
            query=q, key=k, value=k, attn_mask=m, dropout_p=0.25, is_causal=False, scale=0.5, enable_gqa=True
        ),
        lambda q, k, m: F.scaled_dot_product_attention(
            q, k, value=k, attn_mask=m, dropout_p=0.25, scale=0.5, enable_gqa=True
        ),
        lambda q, k, m: torch._C._nn.scaled_dot_product_attention(
            q, k, k, m, dropout_p=0.25, scale=0.5, enable_gqa=True
        ),
    ],
    ids=["positional", "keyword", "mixed", "the function's other name"],
)
def test_every_way_of_passing_arguments_is_read_alike(call: Any) -> None:
    (site,) = sites_of(call, Q, K, MASK)
    assert site.query_sizes == (2, 4, 12, 8)
    assert site.key_sizes == site.value_sizes == (2, 2, 10, 8)
    assert site.mask is not None
    assert (site.dropout_p, site.is_causal, site.scale, site.enable_gqa) == (0.25, False, 0.5, True)


def test_absent_arguments_have_their_defaults() -> None:
    (site,) = sites_of(lambda q: F.scaled_dot_product_attention(q, q, q), Q)
    assert (site.mask, site.dropout_p, site.is_causal, site.scale, site.enable_gqa) == (
        None,
        0.0,
        False,
        None,
        False,
    )
    assert not site.nested
    assert site.decision is None


def test_causal_attention_is_read_as_such() -> None:
    (site,) = sites_of(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), Q)
    assert site.is_causal is True


def test_the_layout_of_the_result_in_memory_is_kept() -> None:
    (site,) = sites_of(lambda q: F.scaled_dot_product_attention(q, q, q) * 2, Q)
    assert math.prod(site.query_sizes) // 2 == max(site.output_strides)


def test_a_setting_that_the_graph_computes_leaves_the_site_dense() -> None:
    graph = fx.Graph()
    q = graph.placeholder("q")
    q.meta["example_value"] = Q
    scale = graph.call_method("item", (q,))
    out = graph.call_function(F.scaled_dot_product_attention, (q, q, q), {"scale": scale})
    out.meta["example_value"] = Q
    scale.meta["example_value"] = _data_dependent_number()
    graph.output(out)
    (site,) = match_attention(fx.GraphModule(nn.Module(), graph), {q: GraphInput("q")})
    assert site.decision is not None
    assert site.decision.reason is Reason.ANALYSIS_FAILED
    assert "scale" in site.decision.note


def _data_dependent_number() -> Any:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return ShapeEnv().create_unbacked_symfloat()


def test_a_symbolic_setting_that_tracing_fixed_is_a_number() -> None:
    (captured,) = capture_model("flux", dynamic=True)
    sites = match_attention(captured.graph_module, captured.inputs)
    assert [site.dropout_p for site in sites] == [0.0] * 3
    assert all(site.decision is None for site in sites)


# ---------------------------------------------------------------------- near misses


def softmax_by_hand(q: Tensor) -> Tensor:
    return torch.softmax(q @ q.mT / 8**0.5, dim=-1) @ q


def overload(q: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention.default(q, q, q)


@pytest.mark.parametrize("function", [softmax_by_hand, overload, lambda q: q.softmax(-1)])
def test_other_spellings_of_attention_are_left_alone(function: Any) -> None:
    assert sites_of(function, Q) == []


@pytest.mark.parametrize("op", ["call_method", "call_module"])
def test_a_method_or_module_of_the_same_name_is_left_alone(op: str) -> None:
    graph = fx.Graph()
    q = graph.placeholder("q")
    q.meta["example_value"] = Q
    graph.output(getattr(graph, op)("scaled_dot_product_attention", (q, q, q)))
    root = nn.Module()
    root.add_module("scaled_dot_product_attention", nn.Identity())
    assert match_attention(fx.GraphModule(root, graph), {q: GraphInput("q")}) == []


def test_flex_attention_is_left_alone() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    square = torch.randn(1, 2, 128, 16)
    assert sites_of(lambda q: flex_attention(q, q, q), square) == []


# ---------------------------------------------------------------------- sub-graphs


def test_attention_under_gradient_checkpointing_is_found_and_marked_as_nested() -> None:
    from torch.utils.checkpoint import checkpoint

    def forward(q: Tensor) -> Tensor:
        inner = checkpoint(lambda t: F.scaled_dot_product_attention(t, t, t), q, use_reentrant=False)
        return F.scaled_dot_product_attention(q, q, q) + inner

    outer, inner = sites_of(forward, Q.clone().requires_grad_())
    assert (outer.nested, inner.nested) == (False, True)
    assert inner.owner is None
    assert inner.query_sizes == tuple(Q.shape)


# ---------------------------------------------------------------------- the owner


def test_the_owner_is_the_weight_of_the_query_projection() -> None:
    names = owner_names(Model(), X, TEXT)
    assert [name.split("blocks.")[-1] for name, _ in names] == ["0.attn1.to_q.weight", "1.attn1.to_q.weight"]


@pytest.mark.parametrize("text_first", [True, False])
def test_of_joined_queries_the_longest_gives_the_owner(text_first: bool) -> None:
    names = owner_names(Model(text=True, text_first=text_first), X, TEXT)
    assert [name.rpartition("attn1.")[2] for name, _ in names] == ["to_q.weight"] * 2


def test_the_name_is_the_path_of_the_attention_module() -> None:
    captured = capture(Model(), X, TEXT)[0]
    site = match_attention(captured.graph_module, captured.inputs)[0]
    assert site.name.endswith("blocks.0.attn1")
    assert site.modules[-1] == ("blocks.0.attn1", "Attention")


def test_sites_that_share_an_owner_are_numbered() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.to_q(x)[:, None]
            return F.scaled_dot_product_attention(q, q, q) + F.scaled_dot_product_attention(q, x[:, None], q)

    assert [ordinal for _, ordinal in owner_names(Shared(), X)] == [0, 1]


def test_a_weight_that_is_cast_on_the_way_is_still_the_owner() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8).half())

        def forward(self, x: Tensor) -> Tensor:
            q = F.linear(x, self.weight.float())[:, None]
            return F.scaled_dot_product_attention(q, q, q)

    assert owner_names(Cast(), X) == [("weight", 0)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("vector", "matrix"), "matrix"), (("vector",), "vector"), ((), "")],
    ids=["a matrix before a vector", "a vector at last", "none"],
)
def test_without_a_projection_the_nearest_parameter_is_the_owner(names: tuple[str, ...], expected: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in names:
                size = (8,) if name == "vector" else (12, 8)
                self.register_parameter(name, nn.Parameter(torch.randn(size)))

        def forward(self, x: Tensor) -> Tensor:
            for name in reversed(names):
                x = x * getattr(self, name)
            q = x[:, None]
            return F.scaled_dot_product_attention(q, q, q)

    (found,) = owner_names(Scaled(), X)
    assert found == (expected, 0)


def test_a_buffer_or_an_argument_is_no_owner() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(8, 8))

        def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
            q = F.linear(F.linear(x, self.weight), matrix)[:, None]
            return F.scaled_dot_product_attention(q, q, q)

    assert owner_names(Buffered(), X, torch.randn(8, 8)) == [("", 0)]


def test_without_an_owner_the_innermost_module_gives_the_name() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Bare()

        def forward(self, q: Tensor) -> Tensor:
            return self.inner(q)

    (site,) = sites_of(Outer(), Q)
    assert (site.owner, site.name) == (None, "inner")


class Bare(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q)


def test_matching_twice_finds_the_same_and_leaves_the_graph_as_it_was() -> None:
    captured = capture(Model(), X, TEXT)[0]
    before = str(captured.graph_module.graph)
    first, second = (match_attention(captured.graph_module, captured.inputs) for _ in range(2))
    assert [s.node for s in first] == [s.node for s in second]
    assert str(captured.graph_module.graph) == before
