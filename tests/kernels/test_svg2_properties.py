"""The properties of docs/svg2.md, section 17, that kernels have to keep; the numbers in comments are theirs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import (
    IMPLEMENTATIONS,
    Clustered,
    assert_same_bits,
    attend,
    call,
    cluster,
    exact_attention,
    inertia,
    inputs,
    labels_of,
    make_plan,
    random_plan,
    random_tensor,
    squared_distances,
    token_mask,
)

from sparse_compile.error_budget import planted_attention
from sparse_compile.kernels.block_map import reference as block_map
from sparse_compile.kernels.kmeans import clustering
from sparse_compile.kernels.permutation.reference import sort_labels

SCALE = 0.25
few = settings(max_examples=25, deadline=None, derandomize=True)
fewer = settings(max_examples=10, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
sizes = st.integers(1, 200)
kernels = st.sampled_from(IMPLEMENTATIONS)
each_kernel = pytest.mark.parametrize("kernel", IMPLEMENTATIONS)


@few
@given(seed=seeds, tokens=st.integers(0, 300), groups=st.integers(1, 70))
def test_sorting_gives_a_stable_permutation(seed, tokens, groups):  # 1
    labels = torch.randint(groups, (1, 2, tokens), generator=torch.Generator().manual_seed(seed)).int()
    order, offsets = sort_labels(labels, groups)
    for h in range(2):
        own, permuted = order[0, h].long(), labels[0, h][order[0, h].long()]
        assert own.sort().values.tolist() == list(range(tokens))
        assert offsets[0, h, -1] == tokens
        assert (permuted.diff() >= 0).all()
        assert (own.diff()[permuted.diff() == 0] > 0).all()
        inverse = torch.empty_like(own)
        inverse[own] = torch.arange(tokens)
        assert torch.equal(permuted[inverse], labels[0, h])


@few
@given(seed=seeds, queries=sizes, keys=sizes, pads=st.integers(0, 20), kernel=kernels)
def test_top_p_of_1_is_dense_attention(seed, queries, keys, pads, kernel):  # 2
    q, k, v = inputs(queries, keys + pads, seed)
    valid = torch.randperm(keys + pads, generator=torch.Generator().manual_seed(seed)) < keys
    _, plan, out = call(
        q, k, v, kernel=kernel, plan={"top_p": 1.0}, k_valid=valid.unsqueeze(0), iterations=2, seed=seed
    )
    assert (plan.density() == 1).all()
    mask = valid.expand(1, 2, queries, -1)
    exact, _ = exact_attention(q, k, v, mask, SCALE)
    assert (out - exact).abs().max() <= 5e-6 * v.abs().max()


@few
@given(seed=seeds, lower=st.floats(0.01, 1.0), higher=st.floats(0.01, 1.0), least=st.floats(0, 0.5))
def test_more_mass_keeps_a_superset(seed, lower, higher, least):  # 3
    lower, higher = sorted((lower, higher))
    clusters = cluster(random_tensor(1, 2, 150, 8, seed=seed), random_tensor(1, 2, 170, 8, seed=seed + 1))
    small, large = (make_plan(clusters, 0.5, top_p=p, min_kept=least) for p in (lower, higher))
    assert not (small.kept() & ~large.kept()).any()
    assert (small.density() <= large.density()).all()


@few
@given(
    seed=seeds,
    top_p=st.floats(0.01, 1.0),
    least=st.floats(0, 1.0),
    columns=st.integers(1, 90),
    spread=st.floats(0, 20),
    rank_by=st.sampled_from(["mass", "mass_per_key", "random"]),
)
def test_kept_mass_reaches_top_p_and_no_row_keeps_more_than_it_needs(
    seed, top_p, least, columns, spread, rank_by
):  # 4, 5
    similarity = random_tensor(6, columns, seed=seed).double() * spread
    sizes = torch.randint(0, 9, (columns,), generator=torch.Generator().manual_seed(seed))
    sizes[0] = 1
    minimum = block_map.smallest_count(least, columns)
    mass = block_map.log_mass(similarity, sizes)
    rank = block_map.ranking(rank_by, similarity, mass, seed, 0)
    kept = block_map.select(mass, rank, sizes, top_p, minimum, None)
    shares = torch.where(sizes > 0, mass, -math.inf).softmax(-1)
    occupied = int((sizes > 0).sum())
    assert ((shares * kept).sum(-1) >= top_p - 1e-5).all()
    assert (kept.sum(-1) >= min(minimum, occupied)).all()
    assert not kept[:, sizes == 0].any()
    for i in range(6):
        if int(kept[i].sum()) > max(1, minimum) and top_p < 1:
            crossing = min(kept[i].nonzero().flatten().tolist(), key=lambda j: (float(rank[i, j]), -j))
            assert shares[i][kept[i]].sum() - shares[i, crossing] <= top_p + 1e-9


def relabelled(clusters, seed):
    """The same clusters under other numbers, on both sides."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for order, offsets, means in (
        (clusters.q_order, clusters.q_offsets, clusters.q_means),
        (clusters.k_order, clusters.k_offsets, clusters.k_means),
    ):
        count = means.shape[2]
        number = torch.cat([torch.randperm(count, generator=generator), torch.tensor([count, count + 1])])
        labels = number[labels_of(order, offsets)].int()
        parts += [*sort_labels(labels, count + 2), means[:, :, number[:count].argsort()]]
    return Clustered(*parts, clusters.non_finite, clusters.q_centroids, clusters.k_centroids, clusters.ready)


@fewer
@given(seed=seeds, kernel=kernels, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_numbers_of_clusters_do_not_matter(seed, kernel, dtype):  # 6
    q, k, v = inputs(130, 150, seed, dtype=dtype)
    clusters, plan, out = call(q, k, v, kernel=kernel, seed=seed)
    other = make_plan(relabelled(clusters, seed), SCALE, kernel=kernel)
    assert torch.equal(token_mask(other), token_mask(plan))
    assert torch.allclose(other.density(), plan.density())
    again, _ = attend(q, k, v, other, SCALE, kernel=kernel)
    assert torch.allclose(again, out, atol=5e-6 if dtype is torch.float32 else 1e-2)


@fewer
@given(seed=seeds, kernel=kernels)
def test_the_order_of_tokens_does_not_matter(seed, kernel):  # 7
    q, k, v = inputs(130, 150, seed)
    state, _, _ = call(q, k, v, kernel=kernel, seed=seed)
    options = {"kernel": kernel, "state": state, "iterations": 2}
    _, _, out = call(q, k, v, **options)
    generator = torch.Generator().manual_seed(seed)
    keys, queries = torch.randperm(150, generator=generator), torch.randperm(130, generator=generator)
    _, _, other_keys = call(q, k[:, :, keys], v[:, :, keys], **options)
    assert torch.allclose(other_keys, out, atol=1e-5)
    _, _, other_queries = call(q[:, :, queries], k, v, **options)
    assert torch.allclose(other_queries, out[:, :, queries], atol=1e-5)


@fewer
@given(seed=seeds, kernel=kernels, length=st.floats(0.1, 4))
def test_adding_one_vector_to_all_keys_changes_nothing(seed, kernel, length):  # 8
    q, k, v = inputs(130, 150, seed)
    k = (k * 8).round() / 8  # so that the sum below is exact, and no tie is decided by rounding
    state, _, _ = call(q, k, v, kernel=kernel, seed=seed)
    shift = (random_tensor(16, seed=seed + 5) * length * 8).round() / 8
    moved = Clustered(**vars(state) | {"k_centroids": state.k_centroids + shift})
    before, _, out = call(q, k, v, kernel=kernel, state=state, iterations=1)
    after, _, other = call(q, k + shift, v, kernel=kernel, state=moved, iterations=1)
    assert torch.equal(before.k_order, after.k_order)
    # The shift adds one number to a query's logits; only their rounding may show.
    assert torch.allclose(other, out, atol=3e-5)


@fewer
@given(seed=seeds, kernel=kernels, tokens=st.integers(20, 300), clusters=st.integers(1, 20))
def test_inertia_never_grows(seed, kernel, tokens, clusters):  # 9
    x = random_tensor(tokens, 8, seed=seed)
    included = torch.ones(tokens, dtype=torch.bool)
    steps = clustering.IMPLEMENTATIONS[kernel]
    means = steps.stratified_sample(x, included, clusters, seed, "key", 0)
    previous = math.inf
    for _ in range(12):
        labels = steps.assign(x, means, included)
        means = steps.update(x, labels, included, means)
        now = inertia(x, labels, means)
        assert now <= previous * (1 + 1e-6)
        previous = now


def true_kept_mass(q, k, plan, scale):
    """Share of softmax mass on kept keys, [B, H, Sq], in float32 one head at a time."""
    mask = token_mask(plan)
    return (q @ k.transpose(-1, -2) * scale).softmax(-1).mul_(mask).sum(-1)


@pytest.mark.parametrize("noise", [0.15, 0.4])
@pytest.mark.parametrize(("top_p", "mean", "quantile"), [(0.9, 0.94, 0.85), (0.95, 0.965, 0.91)])
def test_planted_mass_is_kept(noise, top_p, mean, quantile):  # 10
    q, k, _ = planted_attention(1, 1, 4000, 64, centres=60, noise=noise)
    clusters = cluster(q, k, 60, 120, iterations=50)
    plan = make_plan(clusters, 0.125, top_p=top_p)
    kept = true_kept_mass(q, k, plan, 0.125)[0, 0]
    assert kept.mean() >= max(top_p, mean)
    assert kept.quantile(0.05) >= quantile
    assert plan.density().max() < 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_two_warm_iterations_follow_a_drift(seed):  # 11
    _, before, _ = planted_attention(1, 1, 3000, 32, centres=40, noise=0.3, seed=seed)
    drift = random_tensor(32, seed=seed + 9)
    after = before + 0.1 * math.sqrt(32) * drift / drift.norm() + 0.02 * random_tensor(1, 1, 3000, 32, seed=3)
    state = cluster(before, before, 40, 80, iterations=50)
    warm = cluster(after, after, 40, 80, state=state, iterations=2)
    cold = cluster(after, after, 40, 80, iterations=50)

    def key_inertia(got):
        return inertia(after[0, 0], labels_of(got.k_order, got.k_offsets)[0, 0], got.k_means[0, 0])

    assert key_inertia(warm) <= 1.02 * key_inertia(cold)


@each_kernel
@pytest.mark.parametrize("rank_by", ["mass", "random"])
def test_a_call_leaves_its_inputs_and_the_global_generator_alone(kernel, rank_by):  # 13
    q, k, v = inputs(130, 150, 0)
    copies = [x.clone() for x in (q, k, v)]
    state = torch.get_rng_state()
    call(q, k, v, kernel=kernel, plan={"rank_by": rank_by})
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_bits((q, k, v), copies)


@fewer
@given(
    seed=seeds,
    kernel=kernels,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    queries=st.integers(1, 300),
    keys=st.integers(1, 300),
    size=st.sampled_from([8, 40, 64]),
)
def test_batches_shared_heads_and_strides_change_no_bit(seed, kernel, dtype, queries, keys, size):  # 14
    q, k, v = inputs(queries, keys, seed, batch=2, heads=4, key_heads=2, size=size, dtype=dtype)
    valid = torch.ones(2, keys, dtype=torch.bool)
    valid[1, keys - keys // 5 :] = False  # the items have prompts of different lengths
    options = {"kernel": kernel, "iterations": 3, "seed": seed}
    clusters, plan, out = call(q, k, v, k_valid=valid, k_video=[0, keys - keys // 4], **options)
    options["k_video"] = [0, keys - keys // 4]

    def strided(x):
        return x.repeat(1, 1, 1, 2).transpose(1, 2).contiguous()[..., :size].transpose(1, 2)

    again = call(strided(q), strided(k), strided(v), k_valid=valid, **options)
    assert_same_bits((*again[0].outputs, again[1].keep, again[2]), (*clusters.outputs, plan.keep, out))
    for b in range(2):
        item = slice(b, b + 1)
        own, own_plan, own_out = call(q[item], k[item], v[item], k_valid=valid[item], **options)
        assert_same_bits((own_plan.keep[0], own_out[0]), (plan.keep[b], out[b]))
        assert torch.equal(own.k_order[0], clusters.k_order[b])

    state = cluster(q, k, k_valid=valid, **options)
    repeated = Clustered(**vars(state) | {"k_centroids": state.k_centroids.repeat_interleave(2, 1)})
    _, _, shared_out = call(q, k, v, k_valid=valid, state=state, **options)
    wide = (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    _, _, repeated_out = call(*wide, k_valid=valid, state=repeated, **options)
    assert torch.equal(shared_out, repeated_out)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits_also_when_other_calls_run_between(kernel, dtype):  # 15, 17
    q, k, v = inputs(300, 350, 0, batch=2, heads=4, key_heads=2, size=64, dtype=dtype)
    first = call(q, k, v, kernel=kernel)
    call(*inputs(77, 33, 5), kernel=kernel)
    second = call(q, k, v, kernel=kernel)
    assert_same_bits((*first[0].outputs, first[1].keep, first[2]), (*second[0].outputs, second[1].keep, second[2]))


@fewer
@given(seed=seeds, kernel=kernels, text=st.integers(1, 20), pads=st.integers(1, 20))
def test_text_is_always_kept_and_padding_never(seed, kernel, text, pads):  # 16
    tokens = 100 + text + pads
    q, k, v = inputs(tokens, tokens, seed, key_heads=2)
    valid = (torch.arange(tokens) < 100 + text).unsqueeze(0)
    options = {
        "kernel": kernel,
        "q_valid": valid,
        "k_valid": valid,
        "q_video": [0, 100],
        "k_video": [0, 100],
        "plan": {"top_p": 0.3},
    }
    _, plan, out = call(q, k, v, **options)
    mask = token_mask(plan)
    assert mask[..., 100 : 100 + text].all() and not mask[..., 100 + text :].any()
    assert mask[:, :, 100:, : 100 + text].all()
    k[:, :, 100 + text :] = math.nan
    v[:, :, 100 + text :] = math.nan
    _, _, other = call(q, k, v, **options)
    assert torch.equal(out, other)
    options["plan"] = {"top_p": 0.3, "padded_queries_attend": False}
    _, plan, parity = call(q, k, v, **options)
    assert torch.equal(parity[:, :, : 100 + text], out[:, :, : 100 + text])
    assert (parity[:, :, 100 + text :] == 0).all()


@few
@given(seed=seeds, queries=sizes, keys=sizes, share=st.floats(0, 1))
def test_density_is_the_share_of_valid_pairs(seed, queries, keys, share):  # 18
    plan = random_plan(2, 4, 2, queries, keys, 6, 40, share=share, seed=seed)
    mask = token_mask(plan)
    valid_q = labels_of(plan.q_order, plan.q_offsets) < 5
    valid_k = (labels_of(plan.k_order, plan.k_offsets) < 39).repeat_interleave(2, 1)
    pairs = (mask & valid_q.unsqueeze(-1)).sum((-1, -2)).double()
    valid = valid_q.sum(-1) * valid_k.sum(-1)
    expected = torch.where(valid > 0, pairs / valid.clamp(min=1), 1.0)
    assert torch.allclose(plan.density().double(), expected, atol=1e-6)


@each_kernel
@pytest.mark.parametrize("offset", [6.0, 16.0])
def test_a_shared_offset_costs_no_inertia(kernel, offset):  # 20
    points, _, _ = planted_attention(1, 1, 2000, 64, centres=40)
    x = (points[0, 0] + offset * torch.ones(64)).bfloat16()
    centroids = x[::50].float() + 0.01
    steps = clustering.IMPLEMENTATIONS[kernel]
    labels = steps.assign(x, centroids, torch.ones(2000, dtype=torch.bool))
    rounded = centroids.bfloat16()
    exact = squared_distances(x, rounded).argmin(1)
    assert inertia(x, labels, rounded) <= 1.001 * inertia(x, exact, rounded)


@each_kernel
@pytest.mark.parametrize("value", [1e3, 1e19, 3e38])
def test_a_stale_centroid_of_an_empty_cluster_changes_nothing(kernel, value):  # 21
    q, k, v = inputs(150, 170, 0)
    state = cluster(q, k, kernel=kernel)
    state.q_centroids[:, :, 3] = state.q_centroids[:, :, 2]  # a duplicate starts empty
    state.k_centroids[:, :, 5] = state.k_centroids[:, :, 4]
    first = call(q, k, v, kernel=kernel, state=state, iterations=1)
    assert (first[0].q_offsets.diff()[..., 3] == 0).all() and (first[0].k_offsets.diff()[..., 5] == 0).all()
    state.q_centroids[:, :, 3] = value
    state.k_centroids[:, :, 5] = -value
    second = call(q, k, v, kernel=kernel, state=state, iterations=1)
    assert_same_bits((first[1].keep, first[2]), (second[1].keep, second[2]))
    assert torch.equal(first[1].density(), second[1].density())
