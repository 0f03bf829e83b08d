from __future__ import annotations

import math

import pytest
import torch
from kernel_oracles import cluster, exact_top_p, make_plan, packed, random_tensor

from sparse_compile.kernels.block_map import reference
from sparse_compile.plan import unpack_bits

READY = torch.ones(1, dtype=torch.int32)


def offsets_of(sizes):
    return torch.tensor([[[0, *torch.tensor(sizes).cumsum(0).tolist()]]], dtype=torch.int32)


def plan_map(q_means, k_means, q_sizes, k_sizes, *, ready=READY, top_p=0.9, min_kept=0.0, density=None,
             rank_by="mass", padded=True, scale=0.25, seed=0):  # fmt: skip
    """The bool map [Cq + 2, Ck + 2] of one head."""
    keep = reference.plan_top_p(
        q_means[None, None], k_means[None, None], offsets_of(q_sizes), offsets_of(k_sizes),
        ready, scale, top_p, min_kept, density, rank_by, padded, seed,
    )  # fmt: skip
    return unpack_bits(keep, len(k_sizes))[0, 0]


def log_shares(*values):
    return torch.tensor([values], dtype=torch.float64).log()


def kept_ranks(shares, top_p, minimum=0, density=None, sizes=None):
    mass = log_shares(*shares)
    sizes = torch.ones(len(shares), dtype=torch.int32) if sizes is None else torch.tensor(sizes)
    return reference.select(mass, mass, sizes, top_p, minimum, density)[0].tolist()


@pytest.mark.parametrize(
    ("shares", "top_p", "minimum", "expected"),
    [
        pytest.param((0.5, 0.25, 0.125, 0.125), 0.6, 0, [1, 1, 0, 0], id="crossing-cluster-is-kept"),
        pytest.param((0.5, 0.25, 0.125, 0.125), 0.5, 0, [1, 1, 0, 0], id="equal-prefix-keeps-one-more"),
        pytest.param((0.5, 0.25, 0.125, 0.125), 0.499, 0, [1, 0, 0, 0], id="first-cluster-is-enough"),
        pytest.param((0.5, 0.25, 0.125, 0.125), 1e-9, 0, [1, 0, 0, 0], id="tiny-p-keeps-exactly-one"),
        pytest.param((0.5, 0.25, 0.125, 0.125), 1e-9, 3, [1, 1, 1, 0], id="minimum-ties-to-the-lowest"),
        pytest.param((0.125, 0.125, 0.25, 0.5), 0.7, 0, [0, 0, 1, 1], id="order-is-by-mass"),
        pytest.param((0.5, 0.5, 0.0, 0.0), 1.0, 0, [1, 1, 1, 1], id="p-of-1-ignores-rounding"),
    ],
)
def test_top_p_rule(shares, top_p, minimum, expected):
    assert kept_ranks(shares, top_p, minimum) == [bool(bit) for bit in expected]


@pytest.mark.parametrize(
    ("density", "expected"),
    [
        pytest.param(0.01, [1, 0, 0, 0], id="the-first-is-always-kept"),
        pytest.param(0.5, [1, 0, 0, 0], id="half-of-the-next-would-reach-the-target"),
        pytest.param(0.51, [1, 1, 0, 0], id="half-of-the-next-stays-below"),
        pytest.param(0.99, [1, 1, 1, 1], id="nearly-all"),
        pytest.param(1.0, [1, 1, 1, 1], id="all"),
    ],
)
def test_density_rule(density, expected):
    # Sizes 40, 20, 20, 20: the second is kept if 40 + 10 < density * 100.
    got = kept_ranks((0.4, 0.3, 0.2, 0.1), 0.9, 4, density, sizes=[40, 20, 20, 20])
    assert got == [bool(bit) for bit in expected]


@pytest.mark.parametrize("rank_by", ["mass", "mass_per_key", "random"])
@pytest.mark.parametrize("density", [None, 0.3, 1.0])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_empty_clusters_are_never_kept(rank_by, density, top_p):
    k_sizes = [0, 5, 9, 0, 2, 0, 4, 1]  # six clusters, text, padding
    kept = plan_map(
        random_tensor(3, 16), random_tensor(6, 16, seed=1), [4, 4, 4, 1, 1], k_sizes,
        top_p=top_p, min_kept=0.9, density=density, rank_by=rank_by,
    )  # fmt: skip
    assert not kept[:, [0, 3, 5]].any()
    assert kept[:3, [1, 2, 4]].any(1).all()


def test_text_and_padding_rows_and_columns():
    means = random_tensor(4, 16)
    options = {"top_p": 1e-6, "q_sizes": [5, 5, 5, 5, 3, 2], "k_sizes": [5, 5, 5, 5, 3, 2]}
    sdpa = plan_map(means, means, **options)
    assert sdpa[:, 4].all(), "everyone attends to text"
    assert not sdpa[:, 5].any(), "nobody attends to padding"
    assert sdpa[4:, :5].all(), "text and padding attend to all that is valid"
    assert (sdpa[:4, :4].sum(1) == 1).all()
    strict = plan_map(means, means, **options, padded=False)
    assert torch.equal(strict[:5], sdpa[:5]) and not strict[5].any()


def test_groups_without_tokens_keep_nothing_and_are_not_kept():
    means = random_tensor(3, 16)
    kept = plan_map(means, means, [5, 0, 5, 0, 0], [5, 5, 5, 0, 0], top_p=1.0)
    assert not kept[[1, 3, 4]].any() and not kept[:, 3:].any()
    assert kept[[0, 2], :3].all()


@pytest.mark.parametrize("padded", [True, False])
def test_state_that_is_not_ready_keeps_every_valid_key(padded):
    means = random_tensor(40, 16)
    sizes = [3] * 39 + [0] + [2, 2]
    kept = plan_map(means, means, sizes, sizes, top_p=0.1, ready=torch.zeros(1, dtype=torch.int32), padded=padded)
    rows = [*range(39), 40] + ([41] if padded else [])
    assert kept[rows][:, [*range(39), 40]].all()
    assert not kept[:, [39, 41]].any() and not kept[39].any()
    assert kept[41].any() == padded


@pytest.mark.parametrize("shape", [(3, 5), (32, 64), (33, 70), (5, 200)])
@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_the_map_matches_the_rule_in_exact_arithmetic(shape, top_p):
    q, k = random_tensor(shape[0], 32), random_tensor(shape[1], 32, seed=1)
    sizes = torch.randint(0, 30, (shape[1],), generator=torch.Generator().manual_seed(2))
    scale = 32**-0.5
    exact_scores = q.double() @ k.double().t() * scale
    similarity = reference.scores(q, k, scale)
    bound = max(1.0, float(scale * q.norm(dim=1).max() * k.norm(dim=1).max()))
    assert ((similarity - exact_scores).abs() <= 2e-6 * bound).all()
    mass = torch.where(sizes > 0, exact_scores + sizes.double().clamp(min=1).log(), -math.inf)
    minimum = reference.smallest_count(0.1, shape[1])
    expected = exact_top_p(mass, sizes, top_p, minimum)
    got = reference.select(reference.log_mass(similarity, sizes), mass, sizes, top_p, minimum, None)
    assert torch.equal(got, expected)


def test_extreme_scores_are_ordered_although_their_shares_underflow():
    mass = torch.tensor([[0.0, -1000.0, -3000.0, -2000.0]], dtype=torch.float64)
    kept = reference.select(mass, mass, torch.ones(4), 0.5, 3, None)[0].tolist()
    assert kept == [True, True, False, True]


@pytest.mark.parametrize("value", [1e4, 1e18, -1e18])
def test_a_stale_centroid_of_an_empty_cluster_changes_nothing(value):
    q, k = random_tensor(4, 16), random_tensor(6, 16, seed=1)
    q_sizes, k_sizes = [3, 0, 3, 3, 1, 0], [4, 4, 0, 4, 4, 4, 2, 1]
    before = plan_map(q, k, q_sizes, k_sizes)
    q[1], k[2] = value, value
    assert torch.equal(plan_map(q, k, q_sizes, k_sizes), before)


def test_mass_per_key_prefers_the_nearer_and_mass_the_larger_cluster():
    q, k = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.9, 0.0]])
    sizes = [1, 1000, 0, 0]
    options = {"scale": 1.0, "top_p": 1e-6}
    assert plan_map(q, k, [1, 0, 0], sizes, **options)[0].tolist() == [False, True, False, False]
    per_key = plan_map(q, k, [1, 0, 0], sizes, rank_by="mass_per_key", **options)
    assert per_key[0].tolist() == [True, False, False, False]


def test_random_ranking_depends_on_the_seed_and_the_head_alone():
    means, sizes = random_tensor(6, 8), [5] * 6 + [0, 0]
    maps = [
        plan_map(means * factor, means, sizes, sizes, density=0.4, rank_by="random", seed=seed)
        for factor, seed in ((1, 0), (3, 0), (1, 1))
    ]
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])
    two_heads = make_plan(
        cluster(random_tensor(2, 2, 90, 8), random_tensor(2, 2, 90, 8, seed=1)),
        0.3, rank_by="random", density=0.3,
    ).kept()  # fmt: skip
    assert not torch.equal(two_heads[0, 0], two_heads[0, 1])


def test_smallest_count_is_not_fooled_by_rounding():
    assert reference.smallest_count(0.29, 100) == 29
    assert reference.smallest_count(0.1, 1000) == 100
    assert reference.smallest_count(0.1, 64) == 6
    assert reference.smallest_count(0.0, 64) == 0


def test_query_heads_share_key_heads_in_order():
    q, k = random_tensor(1, 4, 60, 16), random_tensor(1, 2, 80, 16, seed=1)
    clusters = cluster(q, k)
    kept = make_plan(clusters, 0.25).keep
    clusters.k_means = clusters.k_means.repeat_interleave(2, dim=1)
    clusters.k_offsets = clusters.k_offsets.repeat_interleave(2, dim=1)
    assert torch.equal(make_plan(clusters, 0.25).keep, kept)


@pytest.mark.parametrize("groups", [1, 31, 32, 33, 64, 100])
def test_bitmap_words_hold_the_lowest_group_in_the_lowest_bit(groups):
    kept = torch.rand(3, groups, generator=torch.Generator().manual_seed(groups)) < 0.5
    words = packed(kept)
    assert torch.equal(reference.pack_bits(kept), words)
    assert torch.equal(unpack_bits(words, groups), kept)
