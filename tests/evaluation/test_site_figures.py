"""Figures of single attention calls agree with what their definitions say, computed another way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_compile
from sparse_compile.config import Config
from sparse_compile.evaluation.comparison import demo_options
from sparse_compile.evaluation.demo_model import SHOWCASE, VideoSize, generate, load_pipeline
from sparse_compile.evaluation.eager_strategy import EagerAttention
from sparse_compile.evaluation.site_figures import Spread, kept_pairs, site_figures, summary
from sparse_compile.evaluation.tap import TappedAttention, tap
from sparse_compile.phases import Phase
from sparse_compile.plan import Plan, pack_bits
from sparse_compile.strategies.catalogue import load_strategy

SMALL = VideoSize(4, 16, 16)
HEADS, TOKENS, DIM = 2, 96, 16
SCALE = DIM**-0.5
OPTIONS: dict[str, dict[str, object]] = {
    "svg2": {"q_clusters": 6, "k_clusters": 12, "density": 0.3},
    "adaspa": {"block_size": 8, "sparsity": 0.5, "head_adaptive": "off"},
}
METHODS = [pytest.param(method, id=method) for method in OPTIONS]


def tokens(seed: int) -> Tensor:
    """Vectors around eight centres, so that attention has something to find."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(1, HEADS, 8, DIM, generator=generator)
    chosen = torch.randint(0, 8, (TOKENS,), generator=generator)
    return centres[:, :, chosen] + 0.3 * torch.randn(1, HEADS, TOKENS, DIM, generator=generator)


def a_call(step: int = 0, layer: str = "blocks.0.attn1") -> TappedAttention:
    q, k, v = tokens(step), tokens(step), tokens(step + 100)
    return TappedAttention(layer, step, "cond", q, k, v, SCALE)


def attention(method: str, **options: object) -> EagerAttention:
    config = Config.from_options({"method": method, **OPTIONS[method], **options}, environ={})
    return EagerAttention(load_strategy(method), config)


def masked(call: TappedAttention, pairs: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        call.q.double(), call.k.double(), call.v.double(), attn_mask=pairs, scale=call.scale
    )


# ---------------------------------------------------------------------- pairs and calls


def test_kept_pairs_are_in_the_order_of_the_model() -> None:
    kept = torch.tensor([[True, False, False], [False, True, False], [False, False, False]])
    plan = Plan(
        q_order=torch.tensor([[[2, 0, 1]]], dtype=torch.int32),
        q_offsets=torch.tensor([[[0, 1, 3, 3]]], dtype=torch.int32),
        k_order=None,
        k_offsets=torch.tensor([[[0, 2, 4, 4]]], dtype=torch.int32),
        keep=pack_bits(kept)[None, None],
    )
    assert kept_pairs(plan)[0, 0].int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("method", METHODS)
def test_without_correction_the_output_is_attention_over_the_kept_pairs(method: str) -> None:
    call = a_call()
    made = attention(method, correction="none").searched(call.q, call.k, call.v, call.scale)
    pairs = kept_pairs(made.plan)
    assert 0.1 < pairs.double().mean() < 0.7
    assert torch.allclose(pairs.double().mean((2, 3)), made.plan.density().double())
    torch.testing.assert_close(made.output.double(), masked(call, pairs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_options_reach_the_method(method: str) -> None:
    call = a_call()
    sparser = {"density": 0.1} if method == "svg2" else {"sparsity": 0.9}
    usual, less = (
        attention(method, **options).searched(call.q, call.k, call.v, call.scale).plan.density().mean()
        for options in ({}, sparser)
    )
    assert less < usual


def test_a_kept_plan_serves_later_calls() -> None:
    first, later = a_call(0), a_call(1)
    layer = attention("adaspa")
    made = layer.searched(first.q, first.k, first.v, first.scale)
    again = layer.call(Phase.SPARSE, later.q, later.k, later.v, later.scale)
    assert again is not None
    assert torch.equal(again.plan.keep, made.plan.keep)


def test_a_method_without_a_plan_has_no_figures() -> None:
    class Dense(type(load_strategy("svg2"))):  # type: ignore[misc]
        def write(self, build, site, phase):  # type: ignore[no-untyped-def]
            return build.attention()

    call = a_call()
    layer = EagerAttention(Dense(), Config())
    with pytest.raises(sparse_compile.SparseAttentionError, match="block_sparse_attention"):
        layer.searched(call.q, call.k, call.v, call.scale)


# ---------------------------------------------------------------------- figures


@pytest.mark.parametrize("method", METHODS)
def test_figures_follow_their_definitions(method: str) -> None:
    call = a_call()
    options = {"method": method, **OPTIONS[method], "correction": "none"}
    rows = site_figures([call], options, reuse_after=1)
    pairs = kept_pairs(attention(method, correction="none").searched(call.q, call.k, call.v, call.scale).plan)
    dense, sparse = masked(call, torch.ones_like(pairs)), masked(call, pairs)
    mass = torch.softmax(SCALE * call.q.double() @ call.k.double().mT, -1)
    assert [row.head for row in rows] == [0, 1]
    for row in rows:
        assert (row.layer, row.step, row.branch, row.reuse_recall) == ("blocks.0.attn1", 0, "cond", None)
        kept = pairs[0, row.head]
        error = sparse[0, row.head] - dense[0, row.head]
        assert row.density == pytest.approx(kept.double().mean().item())
        assert row.recall == pytest.approx(mass[0, row.head][kept].sum().item() / TOKENS)
        assert row.recall > row.density
        expected = error.abs().sum() / dense[0, row.head].abs().sum()
        assert row.rel_l1 == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
        expected = error.norm() / dense[0, row.head].norm()
        assert row.rel_l2 == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_is_judged_again_on_the_later_step_of_its_own_layer(method: str) -> None:
    options = {"method": method, **OPTIONS[method]}
    first, later, other = a_call(0), a_call(3), a_call(3, "blocks.1.attn1")
    rows = site_figures([first, later, other], options, reuse_after=3)
    told = {(row.layer, row.step): row.reuse_recall for row in rows if row.head == 0}
    pairs = kept_pairs(attention(method).searched(first.q, first.k, first.v, first.scale).plan)
    mass = torch.softmax(SCALE * later.q.double() @ later.k.double().mT, -1)
    assert told[("blocks.0.attn1", 0)] == pytest.approx(mass[0, 0][pairs[0, 0]].sum().item() / TOKENS)
    assert told[("blocks.0.attn1", 3)] is None
    assert told[("blocks.1.attn1", 3)] is None


def test_same_q_and_k_later_recall_the_same() -> None:
    call = a_call()
    again = TappedAttention(call.layer, 5, call.branch, call.q, call.k, call.v, call.scale)
    rows = site_figures([call, again], {"method": "svg2", **OPTIONS["svg2"]}, reuse_after=5)
    assert all(row.reuse_recall == pytest.approx(row.recall) for row in rows if row.step == 0)


def test_a_plan_that_keeps_everything_is_exact() -> None:
    options = {"method": "svg2", **OPTIONS["svg2"], "density": 1.0}
    for row in site_figures([a_call()], options, reuse_after=1):
        assert (row.density, row.recall) == (1.0, pytest.approx(1.0))
        assert row.rel_l1 < 1e-5


def test_the_spread_shows_what_a_mean_hides() -> None:
    spread = Spread.of([float(value) for value in range(101)])
    assert spread == Spread(mean=50.0, p5=5.0, minimum=0.0, p95=95.0, maximum=100.0)


def test_a_summary_leaves_out_what_was_not_measured() -> None:
    options = {"method": "svg2", **OPTIONS["svg2"]}
    found = summary(site_figures([a_call()], options, reuse_after=1))
    assert list(found) == ["density", "recall", "rel_l1", "rel_l2"]
    assert found["recall"].minimum <= found["recall"].mean <= found["recall"].maximum


# ---------------------------------------------------------------------- the tap


def test_the_tap_sees_each_self_attention_of_the_chosen_steps() -> None:
    pipeline = load_pipeline()
    steps = []
    tapped = tap(pipeline, SHOWCASE[0], SMALL, steps=4, seed=0, at=(1, 2), on_step=steps.append)
    layers = [f"blocks.{number}.attn1" for number in range(6)]
    assert [(call.step, call.branch, call.layer) for call in tapped] == [
        (step, branch, layer) for step in (1, 2) for branch in ("cond", "uncond") for layer in layers
    ]
    assert steps == [0, 1, 2]  # nothing behind the last one that was asked for
    assert all(call.q.shape == call.k.shape == call.v.shape == (1, 4, SMALL.tokens, 32) for call in tapped)
    assert not torch.equal(tapped[1].q, tapped[7].q)  # the prompt enters behind the first self-attention


def test_the_tap_changes_nothing_and_leaves_nothing_behind() -> None:
    pipeline, plain = load_pipeline(), load_pipeline()
    tap(pipeline, SHOWCASE[0], SMALL, steps=3, seed=0, at=(0,))
    hooks = [module._forward_pre_hooks or module._forward_hooks for module in pipeline.transformer.modules()]
    assert not any(hooks)
    after, expected = (generate(each, [SHOWCASE[0]], SMALL, steps=3, seed=0) for each in (pipeline, plain))
    assert torch.equal(after, expected)
    assert F.scaled_dot_product_attention.__module__ != tap.__module__


def test_demo_options_give_figures_of_the_demo_model() -> None:
    tapped = tap(load_pipeline(), SHOWCASE[0], SMALL, steps=4, seed=0, at=(1, 2))
    few = [call for call in tapped if call.layer == "blocks.2.attn1" and call.branch == "cond"]
    for method in OPTIONS:
        options = demo_options({"method": method, **({"q_clusters": 8, "k_clusters": 16} if method == "svg2" else {})})
        found = summary(site_figures(few, options, reuse_after=1))
        assert found["recall"].mean > found["density"].mean
        assert found["reuse_recall"].mean > found["density"].mean
