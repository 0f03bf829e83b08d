"""Pooled keys in the attention op: the acceptance tests of docs/correction.md, then what the kernels promise beyond."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_oracles import (
    DTYPES,
    IMPLEMENTATIONS,
    OPS,
    assert_same_bits,
    attend,
    cluster,
    exact_attention,
    inputs,
    labels_of,
    make_plan,
    packed,
    random_plan,
    random_tensor,
    token_mask,
)

from sparse_compile.error_budget import nan_filled_empty, planted_attention
from sparse_compile.plan import Plan, PooledKeys

each_kernel = pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
each_tail = pytest.mark.parametrize("coupled", [False, True], ids=["pooled", "coupled"])
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest relative L2 error; pooled arrays are float32 for float64 inputs too."""
SCALE = 0.2


def lse_tolerance(kernel, dtype):
    """Largest error of a log-sum-exp: pooled keys may be rounded to bfloat16, as keys are (docs/cpu.md)."""
    return 1e-3 if kernel == "cpu" and dtype is torch.bfloat16 else 1e-5


def pool(k, v, plan, kernel="cpu", *, coupled=True, video=None):
    video = [0, k.shape[2]] if video is None else video
    *means, coupling = OPS.pooled_keys(k, v, plan.k_order, plan.k_offsets, video, coupled, kernel)
    return PooledKeys(*means, coupling if coupled else None)


def filled(pooled, value):
    """Pooled arrays that hold one number everywhere, also where nothing is."""
    return PooledKeys(*(None if x is None else torch.full_like(x, value) for x in vars(pooled).values()))


def plan_of(q_labels, k_labels, kept):
    """A Plan from the group of each token and a bitmap."""

    def grouped(labels, groups):
        sizes = torch.nn.functional.one_hot(labels, groups).sum(2)
        return labels.sort(stable=True).indices.int(), torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).int()

    return Plan(*grouped(q_labels, kept.shape[2]), *grouped(k_labels, kept.shape[3]), packed(kept))


def with_bitmap(plan, kept):
    return Plan(plan.q_order, plan.q_offsets, plan.k_order, plan.k_offsets, packed(kept))


def valid_queries(plan):
    return labels_of(plan.q_order, plan.q_offsets) < plan.q_offsets.shape[2] - 2


def valid_keys(plan):
    """As a mask over query and key, bool [B, H, Sq, Sk]."""
    valid = labels_of(plan.k_order, plan.k_offsets) < plan.key_groups - 1
    shared = plan.q_order.shape[1] // valid.shape[1]
    return valid.repeat_interleave(shared, 1).unsqueeze(2).expand(-1, -1, plan.q_order.shape[2], -1)


def seen_pooled(plan, pooled):
    """Which query sees which pooled key: bool [B, H, Sq, Gk]."""
    labels = labels_of(plan.q_order, plan.q_offsets)
    rows = plan.kept().gather(2, labels.unsqueeze(-1).expand(-1, -1, -1, plan.key_groups))
    there = pooled.log_size.repeat_interleave(labels.shape[1] // pooled.log_size.shape[1], 1) > -math.inf
    return ~rows & there.unsqueeze(2) & valid_queries(plan).unsqueeze(-1)


def per_head(pooled, heads):
    """The pooled arrays in float64 for every query head."""
    shared = heads // pooled.mean_k.shape[1]
    return [None if x is None else x.double().repeat_interleave(shared, 1) for x in vars(pooled).values()]


def exact_pooled_attention(q, k, v, plan, pooled, scale):
    """The formula in float64: one softmax over kept keys and pooled keys; output and natural log-sum-exp."""
    mean_k, mean_v, log_size, coupling = per_head(pooled, q.shape[1])
    shared = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(shared, 1), v.double().repeat_interleave(shared, 1)
    mask, seen = token_mask(plan), seen_pooled(plan, pooled)
    logits = (q @ k.mT * scale).masked_fill(~mask, -math.inf)
    tail = (q @ mean_k.mT * scale + log_size.unsqueeze(2)).masked_fill(~seen, -math.inf)
    joint = torch.cat([logits, tail], -1)
    lse = joint.logsumexp(-1)
    weights = (joint - lse.unsqueeze(-1)).exp().masked_fill(~torch.cat([mask, seen], -1), 0)
    pooled_weights = weights[..., k.shape[2] :]
    v = v.masked_fill(~mask.any((1, 2)).view(-1, 1, k.shape[2], 1), 0)  # a key that nobody keeps
    out = weights[..., : k.shape[2]] @ v + pooled_weights @ mean_v
    if coupling is not None:
        out += pooled_weights.sum(-1, keepdim=True) * scale * (q @ coupling)
    return out, lse


def relative_error(actual, exact):
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def assert_matches(q, k, v, plan, pooled, kernel, scale=SCALE):
    with nan_filled_empty():
        out, lse = attend(q, k, v, plan, scale, pooled=pooled, kernel=kernel)
    exact, exact_lse = exact_pooled_attention(q, k, v, plan, pooled, scale)
    assert out.dtype is q.dtype and lse.dtype is torch.float32
    alive = exact_lse > -math.inf
    assert (out[~alive] == 0).all() and torch.equal(lse > -math.inf, alive)
    assert relative_error(out, exact) <= TOLERANCE[q.dtype]
    assert (
        (lse - exact_lse)[alive].abs() <= lse_tolerance(kernel, q.dtype) * exact_lse[alive].abs().clamp(min=1)
    ).all()
    return out, lse


@each_kernel
@each_tail
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "key_heads", "size", "value_size"),
    [(65, 63, 1, 1, 16, 16), (301, 203, 4, 2, 24, 40), (150, 400, 2, 2, 40, 8), (1, 7, 2, 1, 8, 8)],
    ids=["plain", "shared heads, wide values", "narrow values", "one query"],
)
def test_the_whole_formula_matches_float64(kernel, coupled, dtype, queries, keys, heads, key_heads, size, value_size):
    q = random_tensor(2, heads, queries, size, dtype=dtype)
    k = random_tensor(2, key_heads, keys, size, seed=1, dtype=dtype)
    v = random_tensor(2, key_heads, keys, value_size, seed=2, dtype=dtype)
    plan = random_plan(2, heads, key_heads, queries, keys)
    pooled = pool(k, v, plan, kernel, coupled=coupled, video=[0, keys // 3, keys // 2, keys])
    assert_matches(q, k, v, plan, pooled, kernel)


@each_kernel
@each_tail
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plan_that_keeps_all_is_dense_attention_and_never_looks_at_the_pooled_arrays(kernel, coupled, dtype):
    q, k, v = inputs(130, 150, 0, batch=2, heads=4, key_heads=2, dtype=dtype)
    plan = random_plan(2, 4, 2, 130, 150, k_groups=90)
    occupied = plan.k_offsets.diff().repeat_interleave(2, 1).unsqueeze(2) > 0
    assert not occupied.all()
    kept = occupied.expand(-1, -1, 5, -1).clone()  # an empty group is not kept, and must not be seen pooled
    kept[..., -1] = False
    plan = with_bitmap(plan, kept)
    pooled = pool(k, v, plan, coupled=coupled)
    plain = attend(q, k, v, plan, SCALE, kernel=kernel)
    exact, _ = exact_attention(q, k, v, valid_keys(plan), SCALE)
    if dtype is torch.float32:
        assert (plain[0] - exact).abs().max() <= 2e-6 * exact.abs().max()
    for arrays in (pooled, filled(pooled, math.nan), filled(pooled, 7.0)):
        assert_same_bits(attend(q, k, v, plan, SCALE, pooled=arrays, kernel=kernel), plain)


@each_kernel
@each_tail
def test_rows_that_keep_all_and_padding_queries_are_as_without_a_tail_beside_others(kernel, coupled):
    q, k, v = inputs(130, 150, 0, batch=2, heads=4, key_heads=2)
    plan = random_plan(2, 4, 2, 130, 150)
    kept = plan.kept().clone()
    kept[:, :, 1, :-1] = True
    plan = with_bitmap(plan, kept)
    pooled = pool(k, v, plan, coupled=coupled)
    labels = labels_of(plan.q_order, plan.q_offsets)
    untouched = (labels == 1) | (labels == plan.q_offsets.shape[2] - 2)
    plain = attend(q, k, v, plan, SCALE, kernel=kernel)
    for arrays in (pooled, filled(pooled, math.nan)):
        out, lse = attend(q, k, v, plan, SCALE, pooled=arrays, kernel=kernel)
        assert torch.equal(out[untouched], plain[0][untouched]) and torch.equal(lse[untouched], plain[1][untouched])
    out, lse = attend(q, k, v, plan, SCALE, pooled=pooled, kernel=kernel)
    assert (lse[~untouched] > plain[1][~untouched]).float().mean() > 0.9


@each_kernel
@each_tail
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_groups_of_one_key_give_dense_attention(kernel, coupled, share):
    q, k, v = inputs(61, 45, 0, heads=2, key_heads=1)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(1, 2, 3, 46, generator=generator) < share
    kept[..., -1] = False
    labels = torch.stack([torch.randperm(45, generator=generator)]).unsqueeze(0)
    plan = plan_of(torch.randint(2, (1, 2, 61), generator=generator), labels, kept)
    out, lse = attend(q, k, v, plan, SCALE, pooled=pool(k, v, plan, kernel, coupled=coupled), kernel=kernel)
    exact, exact_lse = exact_attention(q, k, v, valid_keys(plan), SCALE)
    assert (out - exact).abs().max() <= 1e-5 and (lse - exact_lse).abs().max() <= 1e-5


@each_kernel
@each_tail
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_groups_of_equal_keys_give_dense_attention_for_any_values(kernel, coupled, share):
    q, k, v = inputs(130, 150, 0, batch=2, heads=4, key_heads=2)
    plan = random_plan(2, 4, 2, 130, 150, share=share)
    labels = labels_of(plan.k_order, plan.k_offsets)
    k = k.gather(2, labels.unsqueeze(-1).expand_as(k))
    pooled = pool(k, v, plan, kernel, coupled=coupled)
    assert not coupled or (pooled.coupling == 0).all()
    out, lse = attend(q, k, v, plan, SCALE, pooled=pooled, kernel=kernel)
    exact, exact_lse = exact_attention(q, k, v, valid_keys(plan), SCALE)
    valid = valid_queries(plan)
    assert (out - exact)[valid].abs().max() <= 1e-5 and (lse - exact_lse)[valid].abs().max() <= 1e-5


@each_kernel
@each_tail
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plan_that_keeps_nothing_is_attention_to_the_pooled_keys(kernel, coupled, dtype):
    q, k, v = inputs(130, 150, 0, dtype=dtype)
    plan = random_plan(1, 2, 1, 130, 150, share=0.0)
    pooled = pool(k, v, plan, kernel, coupled=coupled)
    with nan_filled_empty():
        out, lse = attend(q, k, v, plan, SCALE, pooled=pooled, kernel=kernel)
    mean_k, mean_v, log_size, coupling = per_head(pooled, 2)
    logits = q.double() @ mean_k.mT * SCALE + log_size.unsqueeze(2)
    expected = logits.softmax(-1) @ mean_v + (SCALE * q.double() @ coupling if coupled else 0)
    valid = valid_queries(plan)
    assert relative_error(out[valid], expected[valid]) <= TOLERANCE[dtype]
    assert (lse - logits.logsumexp(-1))[valid].abs().max() <= lse_tolerance(kernel, dtype)
    assert (out[~valid] == 0).all() and (lse[~valid] == -math.inf).all()


def online_attention(q, k, v, plan, pooled, scale, pooled_first):
    """The form of a flash kernel: base 2, a running maximum, pooled keys before or after the loop over keys."""
    shared = q.shape[1] // k.shape[1]
    mean_k, mean_v, log_size, coupling = (
        None if x is None else x.float().repeat_interleave(shared, 1) for x in vars(pooled).values()
    )
    q, k, v = q.float(), k.float().repeat_interleave(shared, 1), v.float().repeat_interleave(shared, 1)
    m = torch.full((*q.shape[:3], 1), -math.inf)
    total, pooled_total, acc = torch.zeros_like(m), torch.zeros_like(m), torch.zeros(*q.shape[:3], v.shape[3])
    keys = (k, v, k.new_zeros(k.shape[:3]), token_mask(plan), False)
    tail = (mean_k, mean_v, log_size / math.log(2), seen_pooled(plan, pooled), True)
    for keys_, values, bias, mask, is_tail in (tail, keys) if pooled_first else (keys, tail):
        for start in range(0, keys_.shape[2], 16):
            part = slice(start, start + 16)
            x = scale * math.log2(math.e) * (q @ keys_[:, :, part].mT) + bias[:, :, None, part]
            x = torch.where(mask[..., part], x, -math.inf)
            above = torch.maximum(m, x.amax(-1, keepdim=True))
            base = torch.where(above == -math.inf, 0, above)
            p, rescale = torch.exp2(x - base), torch.exp2(m - base)
            total = total * rescale + p.sum(-1, keepdim=True)
            pooled_total = pooled_total * rescale + (p.sum(-1, keepdim=True) if is_tail else 0)
            acc, m = acc * rescale + p @ values[:, :, part], above
        if is_tail and coupling is not None:
            acc += pooled_total * (scale * q @ coupling)
    lse = (torch.where(total > 0, m, 0) + total.log2()) * math.log(2)
    return acc / torch.where(total > 0, total, 1), lse.squeeze(-1)


@each_tail
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_softmax_the_merge_and_both_online_forms_agree(coupled, dtype):
    q, k, v = inputs(301, 203, 0, batch=2, heads=4, key_heads=2, size=24, dtype=dtype)
    plan = random_plan(2, 4, 2, 301, 203, share=0.3)
    pooled = pool(k, v, plan, coupled=coupled)
    forms = [attend(q, k, v, plan, SCALE, pooled=pooled, kernel=kernel) for kernel in IMPLEMENTATIONS]
    forms += [online_attention(q, k, v, plan, pooled, SCALE, first) for first in (True, False)]
    out, lse = forms[0]
    for other, other_lse in forms[1:]:
        assert relative_error(other, out) <= (1e-5 if dtype is torch.float32 else 1e-2)
        assert torch.allclose(other_lse, lse, rtol=1e-5, atol=lse_tolerance("cpu", dtype))


@each_kernel
@pytest.mark.parametrize("bounds", [[0, 0, 1, 1, 77, 77, 90], [0, 77, 77, 77, 77, 77, 90], [0, 1, 2, 3, 4, 90, 90]])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_empty_single_and_whole_groups_and_poisoned_padding(kernel, bounds, poison):
    q, k, v = inputs(61, 90, 0)
    offsets = torch.tensor(bounds, dtype=torch.int32).expand(1, 1, 7)
    kept = torch.rand(1, 2, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    kept[..., -1] = False
    q_side = random_plan(1, 2, 1, 61, 90)
    identity = torch.arange(90, dtype=torch.int32).view(1, 1, 90)
    plan = Plan(q_side.q_order, q_side.q_offsets, identity, offsets, packed(kept))
    clean = assert_matches(q, k, v, plan, pool(k, v, plan, kernel), kernel)
    k[:, :, bounds[-2] :], v[:, :, bounds[-2] :] = poison, poison
    assert_same_bits(attend(q, k, v, plan, SCALE, pooled=pool(k, v, plan, kernel), kernel=kernel), clean)


@each_kernel
@each_tail
@pytest.mark.parametrize(
    ("dtype", "magnitude", "scale"),
    [(torch.float32, 4.47, 1.0), (torch.float32, 30.0, 0.02), (torch.bfloat16, 30.0, 0.1)],
)
def test_large_logits_stay_finite_and_right(kernel, coupled, dtype, magnitude, scale):
    """With signs of magnitude 4.47, 4 dimensions and scale 1, logits reach 80 and -80."""
    q, k, v = inputs(130, 150, 0, size=4, batch=2)
    q, k = (q.sign() * magnitude).to(dtype), (k.sign() * magnitude).to(dtype)
    v = (v * (30 if dtype is torch.bfloat16 else 1)).to(dtype)
    if magnitude < 5:
        assert 75 < (q[0, 0] @ k[0, 0].t()).max() < 85
    plan = random_plan(2, 2, 1, 130, 150, k_groups=40)
    out, lse = attend(q, k, v, plan, scale, pooled=pool(k, v, plan, kernel, coupled=coupled), kernel=kernel)
    assert torch.isfinite(out).all()
    exact, exact_lse = exact_pooled_attention(q, k, v, plan, pool(k, v, plan, kernel, coupled=coupled), scale)
    alive = exact_lse > -math.inf
    assert relative_error(out, exact) <= (2e-5 if dtype is torch.float32 else 1e-2)
    assert (
        (lse - exact_lse)[alive].abs() <= lse_tolerance(kernel, q.dtype) * exact_lse[alive].abs().clamp(min=1)
    ).all()


@each_kernel
@pytest.mark.parametrize("share", [0.0, 0.5, 1.1])
@pytest.mark.parametrize("factor", [0.1, 1.0, 5.0])
def test_pooled_mass_is_never_more_than_the_true_mass(kernel, share, factor):
    q, k, v = inputs(130, 150, 0, batch=2, heads=4, key_heads=2)
    plan = random_plan(2, 4, 2, 130, 150, share=share)
    _, lse = attend(q * factor, k, v, plan, SCALE, pooled=pool(k, v, plan, kernel), kernel=kernel)
    _, dense = exact_attention(q * factor, k, v, valid_keys(plan), SCALE)
    assert (lse <= dense + 1e-4).all()


@each_kernel
@each_tail
def test_the_order_of_the_keys_does_not_matter(kernel, coupled):
    q, k, v = inputs(130, 151, 0, heads=2, key_heads=2)
    plan = random_plan(1, 2, 2, 130, 151)
    out, lse = attend(q, k, v, plan, SCALE, pooled=pool(k, v, plan, kernel, coupled=coupled), kernel=kernel)
    shuffle = torch.randperm(151, generator=torch.Generator().manual_seed(1))
    k_labels = labels_of(plan.k_order, plan.k_offsets)[:, :, shuffle]
    moved = plan_of(labels_of(plan.q_order, plan.q_offsets), k_labels, plan.kept())
    k, v = k[:, :, shuffle], v[:, :, shuffle]
    again = attend(q, k, v, moved, SCALE, pooled=pool(k, v, moved, kernel, coupled=coupled), kernel=kernel)
    assert (again[0] - out).abs().max() <= 1e-5
    assert torch.allclose(again[1], lse, atol=1e-5)


@each_kernel
def test_two_branches_give_the_same_bits_in_either_order(kernel):
    branches = {
        seed: (*inputs(130, 150, seed, heads=4, key_heads=2), random_plan(1, 4, 2, 130, 150, seed=seed))
        for seed in (1, 2)
    }

    def run(seed):
        q, k, v, plan = branches[seed]
        return attend(q, k, v, plan, SCALE, pooled=pool(k, v, plan, kernel), kernel=kernel)

    first = {seed: run(seed) for seed in (1, 2)}
    second = {seed: run(seed) for seed in (2, 1)}
    for seed in branches:
        assert_same_bits(first[seed], second[seed])
    assert not torch.equal(first[1][0], first[2][0])


def error_against_dense(q, k, v, plan, pooled, kernel):
    out, _ = attend(q, k, v, plan, SCALE, pooled=pooled, kernel=kernel)
    return relative_error(out, exact_attention(q, k, v, torch.ones_like(token_mask(plan)), SCALE)[0])


@each_kernel
@each_tail
def test_the_error_shrinks_with_the_radius_of_the_groups(kernel, coupled):
    q, spread, v = inputs(130, 180, 0, heads=2, key_heads=2)
    labels = torch.randint(12, (1, 2, 180), generator=torch.Generator().manual_seed(0))
    centres = random_tensor(1, 2, 12, 16, seed=5)
    kept = torch.rand(1, 2, 4, 13, generator=torch.Generator().manual_seed(1)) < 0.3
    kept[..., -1] = False
    plan = plan_of(torch.randint(3, (1, 2, 130), generator=torch.Generator().manual_seed(2)), labels, kept)
    errors = []
    for radius in (1.0, 0.5, 0.25, 0.125, 0.0):
        k = centres.gather(2, labels.unsqueeze(-1).expand_as(spread)) + radius * spread
        errors.append(error_against_dense(q, k, v, plan, pool(k, v, plan, kernel, coupled=coupled), kernel))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 and errors[3] < 0.2 * errors[0] and errors[4] < 1e-5


@each_kernel
@pytest.mark.parametrize("follow", [False, True], ids=["random values", "values that follow their keys"])
def test_on_planted_clusters_pooling_cuts_the_error_and_coupling_cuts_it_further(kernel, follow):
    q, k, v = planted_attention(tokens=512, size=16, centres=20, noise=0.6, sharpness=0.3)
    if follow:
        v = 0.5 * v + k @ random_tensor(16, 16, seed=3)
    plan = make_plan(cluster(q, k, 8, 24), SCALE, density=0.25, rank_by="mass_per_key")
    none = error_against_dense(q, k, v, plan, None, kernel)
    pooled, coupled = (
        error_against_dense(q, k, v, plan, pool(k, v, plan, kernel, coupled=way), kernel) for way in (False, True)
    )
    assert pooled < 0.2 * none and coupled < 0.75 * pooled
