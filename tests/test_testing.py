"""The helpers that `sparse_compile.testing` gives to users."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from toy_models import EAGER, Block, Stack, tokens

from sparse_compile import testing
from sparse_compile.phases import Phase
from sparse_compile.sites import Reason


def test_capture_gives_every_graph_of_a_call_and_what_its_inputs_are() -> None:
    (captured,) = testing.capture(Stack(1), tokens())
    names = {known.name for known in captured.inputs.values() if known.is_parameter}
    assert {"blocks.0.to_q.weight", "blocks.0.to_k.bias"} <= names
    pieces = testing.capture(broken, tokens(), fullgraph=False)
    assert len(pieces) == 2


def broken(x: torch.Tensor) -> torch.Tensor:
    x = x + 1
    torch._dynamo.graph_break()
    return x * 2


def test_find_and_rewrite_need_no_clock() -> None:
    (captured,) = testing.capture(Stack(1), tokens())
    assert [site.decision.reason for site in testing.find(captured)] == [Reason.TOO_SHORT]
    assert [site.sparse for site in testing.find(captured, min_tokens=64)] == [True]
    for phase in (Phase.SEARCH, Phase.SPARSE):
        rewritten = testing.rewrite(captured, phase, **EAGER)
        assert testing.count_ops(rewritten.graph_module, "kmeans") == 1
        assert [spec.shape for spec in rewritten.states[0].specs] == [(1, 2, 32, 16), (1, 2, 64, 16), (1,), (515, 6)]


def test_a_strategy_that_is_not_installed_can_be_tried() -> None:
    class Nothing:
        name, phases = "nothing", (Phase.DENSE,)

        def unsupported_reason(self, site: object, config: object) -> Reason:
            return Reason.DENSE_LAYER

    (captured,) = testing.capture(Block(), tokens())
    sites = testing.find(captured, strategy=Nothing(), min_tokens=1)  # type: ignore[arg-type]
    assert [site.decision.reason for site in sites] == [Reason.DENSE_LAYER]


def test_planted_attention_has_its_mass_where_it_was_planted() -> None:
    planted = testing.planted_attention(tokens=400, heads=1, size=16, centres=8)
    q, k = planted[0], planted[1]
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    top = weights.sort(-1, descending=True).values[..., : 400 // 4].sum(-1)
    assert top.mean() > 0.8
    assert F.scaled_dot_product_attention(q, k, k).shape == q.shape
