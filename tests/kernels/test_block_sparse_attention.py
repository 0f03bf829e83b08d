from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import assert_matches_exact, random_inputs
from kernel_oracles import (
    DTYPES,
    IMPLEMENTATIONS,
    OPS,
    assert_same_bits,
    attend,
    cluster,
    exact_attention,
    labels_of,
    make_plan,
    random_plan,
    random_tensor,
    token_mask,
)

from sparse_compile.kernels.block_sparse_attention import reference
from sparse_compile.plan import Plan, PooledKeys, pack_bits


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 1), (1, 63), (63, 63), (65, 65), (127, 129), (1000, 1000), (300, 1000), (1000, 65)],
)
def test_rows_match_float64(kernel, dtype, queries, keys):
    q, k, v = random_inputs(queries, keys, dtype=dtype)
    assert_matches_exact(q, k, v, random_plan(2, 2, 1, queries, keys), 0.125, kernel)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "value_size"), [(8, 8), (40, 40), (72, 24), (24, 136), (256, 256)])
def test_head_sizes(kernel, dtype, size, value_size):
    q, k, v = random_inputs(130, 200, size, value_size, dtype=dtype)
    assert_matches_exact(q, k, v, random_plan(2, 2, 1, 130, 200), size**-0.5, kernel)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.1])
@pytest.mark.parametrize("groups", [(2, 2), (40, 70), (3, 64)])
def test_empty_sparse_and_full_plans(kernel, share, groups):
    q, k, v = random_inputs(150, 180, 32, heads=(4, 2))
    plan = random_plan(2, 4, 2, 150, 180, *groups, share=share)
    assert_matches_exact(q, k, v, plan, 0.2, kernel)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1e-4, 30.0, 200.0])
def test_extreme_logits(kernel, dtype, factor):
    q, k, v = random_inputs(65, 150, 32, dtype=dtype)
    q = (q.float() * factor).to(dtype)
    plan = random_plan(2, 2, 1, 65, 150)
    assert_matches_exact(q, k, v, plan, 0.2, kernel, ordinary_logits=factor < 100)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_float64_is_computed_in_float64(kernel):
    q, k, v = (x.double() for x in random_inputs(65, 150, 32))
    plan = random_plan(2, 2, 1, 65, 150)
    out, _ = attend(q, k, v, plan, 0.2, kernel=kernel)
    mask = token_mask(plan)
    exact, _ = exact_attention(q, k, v, mask, 0.2)
    alive = mask.any(-1)
    assert torch.allclose(out[alive], exact[alive], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_a_plan_without_orders_means_tokens_in_place(kernel):
    q, k, v = random_inputs(100, 120, 32)
    identity = [torch.arange(n, dtype=torch.int32).expand(2, h, n) for n, h in ((100, 2), (120, 1))]
    q_offsets = torch.tensor([0, 10, 64, 64, 100], dtype=torch.int32).expand(2, 2, 5)
    k_offsets = torch.tensor([0, 1, 60, 110, 120], dtype=torch.int32).expand(2, 1, 5)
    kept = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    kept[..., 3] = False
    with_orders = Plan(identity[0], q_offsets, identity[1], k_offsets, pack_bits(kept))
    without = Plan(None, q_offsets, None, k_offsets, pack_bits(kept))
    one, other = (attend(q, k, v, plan, 0.2, kernel=kernel) for plan in (with_orders, without))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert_matches_exact(q, k, v, with_orders, 0.2, kernel)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_key_that_is_not_finite_spoils_exactly_the_rows_that_keep_it(kernel, dtype, which, value):
    q, k, v = random_inputs(90, 120, 32, dtype=dtype)
    plan = random_plan(2, 2, 1, 90, 120)
    clean, clean_lse = attend(q, k, v, plan, 0.2, kernel=kernel)
    (k if which == "key" else v)[0, 0, 17] = value
    out, lse = attend(q, k, v, plan, 0.2, kernel=kernel)
    keeps = token_mask(plan)[..., 17].clone()
    keeps[1] = False
    assert keeps.any() and not keeps.all()
    assert torch.equal(out[~keeps], clean[~keeps]) and torch.equal(lse[~keeps], clean_lse[~keeps])
    if math.isnan(value) or which == "value":
        assert not torch.isfinite(out[keeps]).any()


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_one_channel_of_a_value_stays_in_that_channel(kernel, dtype):
    q, k, v = random_inputs(90, 120, 32, dtype=dtype)
    plan = random_plan(2, 2, 1, 90, 120)
    v[0, 0, 17, 5] = math.nan
    out, _ = attend(q, k, v, plan, 0.2, kernel=kernel)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, ..., 5] = token_mask(plan)[0, ..., 17]
    assert torch.equal(torch.isnan(out), expected)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_query_gives_a_nan_row_and_no_other(kernel, dtype):
    q, k, v = random_inputs(90, 120, 32, dtype=dtype)
    plan = random_plan(2, 2, 1, 90, 120, share=0.9)
    clean, _ = attend(q, k, v, plan, 0.2, kernel=kernel)
    rows = torch.zeros(2, 2, 90, dtype=torch.bool)
    rows[0, 0, 5] = rows[1, 1, 88] = True
    rows &= token_mask(plan).any(-1)
    assert rows.any()
    q[rows] = math.nan
    out, _ = attend(q, k, v, plan, 0.2, kernel=kernel)
    assert torch.isnan(out[rows]).all()
    assert torch.equal(out[~rows], clean[~rows])


def pooled_keys(k, v, plan, *, kernel="cpu", coupled=True):
    *means, coupling = OPS.pooled_keys(k, v, plan.k_order, plan.k_offsets, [0, k.shape[2]], coupled, kernel)
    return PooledKeys(*means, coupling if coupled else None)


def each_field(fields, change):
    return type(fields)(*(None if x is None else change(x) for x in vars(fields).values()))


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", [False, True], ids=["kept keys alone", "with a tail"])
def test_strides_batches_shared_heads_and_repeats_change_no_bit(kernel, dtype, tail):
    q, k, v = random_inputs(301, 203, 40, heads=(4, 2), dtype=dtype)
    plan = random_plan(2, 4, 2, 301, 203)
    pooled = pooled_keys(k, v, plan) if tail else None

    def strided(x):
        wide = x.transpose(1, 2).contiguous().repeat(1, 1, *[2 if d == 3 else 1 for d in range(2, x.ndim)])
        return wide[..., : x.shape[-1]].transpose(1, 2) if x.ndim == 4 else wide.transpose(1, 2)

    def call(q, k, v, plan, change):
        own = each_field(pooled, change) if tail else None
        return attend(q, k, v, plan, 0.2, pooled=own, kernel=kernel)

    result = call(q, k, v, plan, lambda x: x)
    assert_same_bits(call(q, k, v, plan, lambda x: x), result)
    assert_same_bits(call(strided(q), strided(k), strided(v), plan, strided), result)
    for b in range(2):
        item = slice(b, b + 1)
        single = call(q[item], k[item], v[item], each_field(plan, lambda x, item=item: x[item]), lambda x, i=item: x[i])
        assert_same_bits(single, [x[item] for x in result])
    repeated = Plan(
        plan.q_order,
        plan.q_offsets,
        plan.k_order.repeat_interleave(2, 1),
        plan.k_offsets.repeat_interleave(2, 1),
        plan.keep,
    )
    own = call(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), repeated, lambda x: x.repeat_interleave(2, 1))
    assert_same_bits(own, result)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_the_pooled_arrays_of_a_kept_group_touch_no_row_that_keeps_it(kernel):
    q, k, v = random_inputs(150, 180, 32, batch=1)
    plan = random_plan(1, 2, 1, 150, 180)
    pooled = pooled_keys(k, v, plan, coupled=False)
    clean = attend(q, k, v, plan, 0.2, pooled=pooled, kernel=kernel)
    pooled.mean_k[:, :, 2], pooled.mean_v[:, :, 2] = math.nan, math.nan
    out, lse = attend(q, k, v, plan, 0.2, pooled=pooled, kernel=kernel)
    labels = labels_of(plan.q_order, plan.q_offsets)
    keeps = plan.kept()[..., 2].gather(2, labels) | (labels == plan.q_offsets.shape[2] - 2)
    assert keeps.any() and not keeps.all()
    assert torch.isnan(out[~keeps]).all() and torch.isnan(lse[~keeps]).all()
    assert (out - clean[0])[keeps].abs().max() <= 1e-6 and (lse - clean[1])[keeps].abs().max() <= 1e-6


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_reaches_every_valid_row_in_its_channel(kernel, dtype, value):
    q, k, v = random_inputs(150, 180, 32, batch=1, dtype=dtype)
    plan = random_plan(1, 2, 1, 150, 180)
    group = int((~plan.kept()[0, 0, -1]).nonzero()[0])  # one that the padding queries of a head do not keep
    token = int(plan.k_order[0, 0, plan.k_offsets[0, 0, group]])
    v[0, 0, token, 5] = value
    out, lse = attend(q, k, v, plan, 0.2, pooled=pooled_keys(k, v, plan, kernel=kernel, coupled=False), kernel=kernel)
    reached = labels_of(plan.q_order, plan.q_offsets) < plan.q_offsets.shape[2] - 2
    reached |= token_mask(plan)[..., token]
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[..., 5] = reached
    assert not reached.all()
    assert torch.equal(~torch.isfinite(out), expected)
    assert torch.isfinite(lse[reached]).all()


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("coupled", [False, True])
def test_a_key_that_is_nan_reaches_every_valid_row(kernel, coupled):
    q, k, v = random_inputs(150, 180, 32, batch=1)
    plan = random_plan(1, 2, 1, 150, 180)
    k[0, 0, int(plan.k_order[0, 0, 0]), 3] = math.nan
    pooled = pooled_keys(k, v, plan, kernel=kernel, coupled=coupled)
    out, _ = attend(q, k, v, plan, 0.2, pooled=pooled, kernel=kernel)
    valid = labels_of(plan.q_order, plan.q_offsets) < plan.q_offsets.shape[2] - 2
    assert torch.isnan(out[valid]).all()


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_pooled_keys_without_mass_leave_the_kept_keys_alone(kernel):
    q, k, v = random_inputs(150, 180, 32, batch=1)
    plan = random_plan(1, 2, 1, 150, 180)
    pooled = pooled_keys(k, v, plan, coupled=False)
    pooled.mean_k[..., 0] = -math.inf
    q[..., 0] = 1.0
    plain = attend(q, k, v, plan, 0.2, kernel=kernel)
    assert_same_bits(attend(q, k, v, plan, 0.2, pooled=pooled, kernel=kernel), plain)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_a_nan_query_gives_a_nan_row_and_no_other_also_with_a_tail(kernel):
    q, k, v = random_inputs(150, 180, 32)
    plan = random_plan(2, 2, 1, 150, 180)
    pooled = pooled_keys(k, v, plan)
    clean, _ = attend(q, k, v, plan, 0.2, pooled=pooled, kernel=kernel)
    token = int(plan.q_order[0, 1, 0])  # of group 0
    q[0, 1, token] = math.nan
    out, lse = attend(q, k, v, plan, 0.2, pooled=pooled, kernel=kernel)
    assert torch.isnan(out[0, 1, token]).all() and torch.isnan(lse[0, 1, token])
    out[0, 1, token] = clean[0, 1, token]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_one_cluster_of_all_tokens_equals_dense_attention(kernel):
    x = torch.full((1, 2, 500, 32), 0.3)
    v = random_tensor(1, 2, 500, 32)
    plan = make_plan(cluster(x, x, kernel=kernel), 0.2, kernel=kernel)
    assert plan.density().tolist() == [[1.0, 1.0]]
    assert plan.kept().sum() == 2
    out, _ = attend(x, x, v, plan, 0.2, kernel=kernel)
    assert torch.allclose(out, F.scaled_dot_product_attention(x, x, v, scale=0.2), atol=2e-6)


def test_the_reference_in_small_pieces_equals_the_reference_in_one(monkeypatch):
    q, k, v = random_inputs(301, 203, 40)
    plan = random_plan(2, 2, 1, 301, 203)
    for pooled in (None, pooled_keys(k, v, plan)):
        with monkeypatch.context() as patched:
            whole, lse = attend(q, k, v, plan, 0.2, pooled=pooled, kernel="reference")
            patched.setattr(reference, "SCORES_AT_ONCE", 203 * 64)
            pieces, lse_of_pieces = attend(q, k, v, plan, 0.2, pooled=pooled, kernel="reference")
        assert torch.allclose(pieces, whole, atol=1e-6) and torch.allclose(lse_of_pieces, lse, atol=1e-5)
