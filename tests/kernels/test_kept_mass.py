"""The attention mass that a Plan keeps, measured on probe rows (docs/adaspa.md, section 13.2)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import IMPLEMENTATIONS, OPS, fields_of, inputs, labels_of, packed, random_plan, token_mask
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.kept_mass import reference
from sparse_compile.kernels.kmeans.stratified import one_of_each_stratum
from sparse_compile.plan import Plan

SCALE = 0.25
few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def row_recalls(q, k, plan):
    """Share of the softmax mass of each row over the valid keys that is kept, float64 [B, H, Sq]."""
    shared = q.shape[1] // k.shape[1]
    valid = (labels_of(plan.k_order, plan.k_offsets) < plan.key_groups - 1).repeat_interleave(shared, 1)
    logits = q.double() @ k.double().repeat_interleave(shared, 1).transpose(-1, -2) * SCALE
    weights = logits.masked_fill(~valid.unsqueeze(2), -math.inf).softmax(-1)
    return weights.masked_fill(~token_mask(plan), 0).sum(-1)


def without_padding(plan):
    """The same plan with the padding group merged into the group before it."""
    q_offsets, k_offsets = plan.q_offsets.clone(), plan.k_offsets.clone()
    q_offsets[..., -2], k_offsets[..., -2] = q_offsets[..., -1], k_offsets[..., -1]
    return Plan(plan.q_order, q_offsets, plan.k_order, k_offsets, plan.keep)


def measure(q, k, plan, *, rows=64, seed=0, q_valid=None, video=None):
    return reference.kept_mass(q, k, q_valid, [0, q.shape[2]] if video is None else video, plan, SCALE, rows, seed)


@few
@given(seed=seeds, queries=st.integers(1, 150), keys=st.integers(1, 150), more=st.integers(0, 100))
def test_as_many_rows_as_queries_measure_exactly(seed, queries, keys, more):
    q, k, _ = inputs(queries, keys, seed, batch=2, heads=4, key_heads=2)
    plan = without_padding(random_plan(2, 4, 2, queries, keys, seed=seed))
    expected = row_recalls(q, k, plan).mean(-1)
    got = measure(q, k, plan, rows=queries + more, seed=seed)
    assert got.dtype is torch.float32
    assert torch.allclose(got.double(), expected, atol=1e-5)


@pytest.mark.parametrize("text", [0, 30])
def test_only_valid_visual_rows_count(text):
    q, k, _ = inputs(200, 170, 0, batch=2, heads=4, key_heads=2)
    plan = without_padding(random_plan(2, 4, 2, 200, 170))
    valid = torch.rand(2, 200, generator=torch.Generator().manual_seed(0)) < 0.7
    counted = valid.clone()
    counted[:, :text] = False
    counted[:, 100 : 100 + text] = False
    video = [text, 100, 100 + text, 200]
    recalls = row_recalls(q, k, plan)
    expected = (recalls * counted.unsqueeze(1)).sum(-1) / counted.sum(-1).unsqueeze(1)
    got = measure(q, k, plan, rows=200, q_valid=valid, video=video)
    assert torch.allclose(got.double(), expected, atol=1e-5)
    assert not torch.allclose(got.double(), recalls.mean(-1), atol=1e-3)
    shared_mask = measure(q, k, plan, rows=200, q_valid=valid[:1], video=video)
    assert torch.equal(shared_mask[0], got[0]) and not torch.equal(shared_mask[1], got[1])


def test_64_rows_come_near_the_exact_share():
    q, k, _ = inputs(2100, 300, 0, heads=8, key_heads=2)
    plan = without_padding(random_plan(1, 8, 2, 2100, 300, 30, 20))
    recalls = row_recalls(q, k, plan)
    errors = torch.stack([measure(q, k, plan, seed=seed) - recalls.mean(-1) for seed in range(20)])
    deviation = recalls.std(-1).max() / 8  # of a mean of 64
    assert errors.abs().max() <= 4 * deviation
    assert errors.mean(0).abs().max() <= 4 * deviation / math.sqrt(20), "no row is preferred"
    assert errors.abs().max() > 1e-4, "a sample it is"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_full_plan_keeps_everything_and_an_empty_one_nothing(dtype):
    q, k, _ = inputs(223, 223, 0, dtype=dtype)
    plan = random_plan(1, 2, 1, 223, 223)
    kept = torch.ones(1, 2, 5, 7, dtype=torch.bool)
    kept[..., -1] = False
    for bits, share in ((kept, 1.0), (torch.zeros_like(kept), 0.0)):
        made = Plan(plan.q_order, plan.q_offsets, plan.k_order, plan.k_offsets, packed(bits))
        assert (measure(q, k, made) == share).all()


def test_padding_keys_touch_nothing():
    q, k, _ = inputs(223, 223, 0)
    plan = random_plan(1, 2, 1, 223, 223)
    before = measure(q, k, plan)
    padding = labels_of(plan.k_order, plan.k_offsets)[0, 0] == plan.key_groups - 1
    assert padding.any()
    for value in (math.nan, math.inf, -math.inf, 3e38):
        k[:, :, padding] = value
        assert torch.equal(measure(q, k, plan), before)
    kept = labels_of(plan.q_order, plan.q_offsets) < 4
    expected = row_recalls(q, k.nan_to_num(posinf=0), plan)
    got = measure(q, k, plan, rows=223, q_valid=kept[:, 0])[:, 0]
    assert torch.allclose(got.double(), expected[:, 0][kept[:, 0]].mean(), atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_without_a_finite_score_do_not_count(value):
    q, k, _ = inputs(100, 120, 0)
    plan = without_padding(random_plan(1, 2, 1, 100, 120))
    expected = row_recalls(q, k, plan)[:, :, 7:].mean(-1)
    q[:, :, :7] = value
    assert torch.allclose(measure(q, k, plan, rows=100).double(), expected, atol=1e-5)
    k[:, :, 3] = value
    assert measure(q, k, plan, rows=100).isnan().all(), "a key that is not finite spoils all rows"


def test_where_there_is_no_row_the_answer_is_nan():
    q, k, _ = inputs(100, 120, 0, batch=2)
    plan = random_plan(2, 2, 1, 100, 120)
    assert measure(q, k, plan, video=[]).isnan().all()
    valid = torch.ones(2, 100, dtype=torch.bool)
    valid[1] = False
    got = measure(q, k, plan, q_valid=valid)
    assert got[0].isfinite().all() and got[1].isnan().all()
    assert measure(q[:, :, :0], k, plan, video=[]).isnan().all()
    only_padding = plan.k_offsets.clone()
    only_padding[..., :-1] = 0
    assert measure(q, k, Plan(plan.q_order, plan.q_offsets, plan.k_order, only_padding, plan.keep)).isnan().all()


def test_equal_seeds_take_equal_rows_and_others_do_not():
    q, k, _ = inputs(2000, 100, 0, batch=2, heads=4, key_heads=2)
    plan = random_plan(2, 4, 2, 2000, 100)
    first = measure(q, k, plan, seed=5)
    assert torch.equal(measure(q, k, plan, seed=5), first)
    assert (measure(q, k, plan, seed=6) != first).all()
    with nan_filled_empty():
        assert torch.equal(measure(q, k, plan, seed=5), first)


def test_each_row_lies_in_its_stratum_and_roles_and_heads_take_different_ones():
    included = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 0.7
    where = included.nonzero().flatten()
    bounds = torch.arange(65) * len(where) // 64
    choices = []
    for role, head in ((0, 0), (1, 0), (2, 0), (2, 1)):
        token, occupied = one_of_each_stratum(included, 64, 3, role, head)
        place = torch.searchsorted(where, token)
        assert torch.equal(where[place], token) and occupied.all()
        assert (place >= bounds[:-1]).all() and (place < bounds[1:]).all()
        choices.append(tuple(token.tolist()))
    assert len(set(choices)) == 4


def test_a_batch_equals_its_items_and_shared_key_heads_repeated_ones():
    q, k, _ = inputs(300, 223, 0, batch=2, heads=4, key_heads=2)
    plan = random_plan(2, 4, 2, 300, 223)
    both = measure(q, k, plan)
    for item in (0, 1):
        own = slice(item, item + 1)
        assert torch.equal(measure(q[own], k[own], Plan(*(x[own] for x in fields_of(plan)))), both[own])
    wide = Plan(
        plan.q_order,
        plan.q_offsets,
        plan.k_order.repeat_interleave(2, 1),
        plan.k_offsets.repeat_interleave(2, 1),
        plan.keep,
    )
    assert torch.equal(measure(q, k.repeat_interleave(2, 1), wide), both)

    def strided(x):
        return x.repeat(1, 1, 1, 2).transpose(1, 2).contiguous()[..., : x.shape[3]].transpose(1, 2)

    assert torch.equal(measure(strided(q), strided(k), plan), both)


def test_a_bounded_number_of_rows_at_once_changes_nothing_that_matters(monkeypatch):
    q, k, _ = inputs(300, 223, 0)
    plan = random_plan(1, 2, 1, 300, 223)
    whole = measure(q, k, plan)
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 223 * 5)
    assert torch.allclose(measure(q, k, plan), whole, atol=1e-6)


def call(q, k, plan, recall, offset, *, rows=16, seed=0, kernel="cpu"):
    spans = [0, q.shape[2]]
    measured = OPS.kept_mass(q, k, None, spans, *fields_of(plan), SCALE, rows, seed, kernel)
    if offset is None:
        return measured
    planned = torch.full_like(offset, -1.0)
    paired = OPS.paired_kept_mass(measured, recall, offset, planned, kernel)
    assert torch.equal(planned, torch.full_like(offset, -1.0) if recall is None else recall)
    return paired


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_later_calls_say_how_far_the_true_share_has_moved(kernel):
    q, k, _ = inputs(500, 223, 0, heads=4)
    plan = without_padding(random_plan(1, 4, 1, 500, 223))
    truth = row_recalls(q, k, plan).mean(-1).float()
    offset = torch.full((1, 4), math.nan)
    assert torch.allclose(call(q, k, plan, truth, offset, kernel=kernel), truth, atol=1e-6)
    assert torch.allclose(offset, truth - call(q, k, plan, None, None, kernel=kernel), atol=1e-6)
    moved = q + 0.1 * torch.randn(q.shape, generator=torch.Generator().manual_seed(9))
    now = row_recalls(moved, k, plan).mean(-1)
    kept = offset.clone()
    paired = call(moved, k, plan, None, offset, kernel=kernel)
    assert torch.equal(offset, kept), "only a call with a true share sets the offset"
    unpaired = call(moved, k, plan, None, None, kernel=kernel)
    assert (paired - now).abs().mean() < 0.5 * (unpaired - now).abs().mean()


def test_an_estimate_stays_a_share_and_a_first_call_without_rows_adds_nothing():
    q, k, _ = inputs(200, 223, 0)
    plan = random_plan(1, 2, 1, 200, 223)
    assert (call(q, k, plan, None, torch.tensor([[2.0, -2.0]])) == torch.tensor([[1.0, 0.0]])).all()
    offset = torch.ones(1, 2)
    assert call(q * math.nan, k, plan, torch.full((1, 2), 0.5), offset).isnan().all()
    assert (offset == 0).all()


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("paired", [True, False])
def test_opcheck(kernel, paired):
    q, k, _ = inputs(50, 60, 0, batch=2, heads=4, key_heads=2, dtype=torch.bfloat16)
    valid = (torch.arange(50) < 45).expand(2, -1)
    arguments = (q, k, valid, [0, 40], *fields_of(random_plan(2, 4, 2, 50, 60)), SCALE, 8, 0, kernel)
    op = OPS.kept_mass
    if paired:
        op, arguments = (
            OPS.paired_kept_mass,
            (op(*arguments), torch.full((2, 4), 0.5), torch.zeros(2, 4), torch.zeros(2, 4), kernel),
        )
    results = torch.library.opcheck(op.default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


def test_no_value_is_read_on_the_host():
    q, k, _ = inputs(50, 60, 0, batch=2, heads=4, key_heads=2)
    plan = random_plan(2, 4, 2, 50, 60)
    with FakeTensorMode() as mode:
        fake = Plan(*(mode.from_tensor(x) for x in fields_of(plan)))
        valid = mode.from_tensor(torch.ones(1, 50, dtype=torch.bool))
        q, k = mode.from_tensor(q), mode.from_tensor(k)
        for order in (fake, Plan(None, fake.q_offsets, None, fake.k_offsets, fake.keep)):
            got = reference.kept_mass(q, k, valid, [0, 40], order, SCALE, 8, 0)  # any read of a value raises
            assert got.shape == (2, 4) and got.dtype is torch.float32
