"""The Triton kernels that choose key clusters by mass, against the reference and float64 (docs/svg2.md, section 7)."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from kernel_oracles import assert_same_bits, random_tensor
from torch import Tensor

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.block_map import reference, triton_launch
from sparse_compile.kernels.block_map.configs import LARGEST_ROW, RowConfig, ScoreConfig, row_candidates
from sparse_compile.kernels.launching import INTERPRETER
from sparse_compile.plan import unpack_bits

TOLERANCE = 1e-6
"""Of cumulative mass, and of ranks as a share of the largest: what float32 cannot tell."""
ranks = pytest.mark.parametrize("rank_by", ["mass", "mass_per_key", "random"])


class Means(NamedTuple):
    """Clusters of queries and keys, as the k-means op gives them."""

    q_means: Tensor
    k_means: Tensor
    q_offsets: Tensor
    k_offsets: Tensor

    def item(self, number):
        return Means(*(x[number : number + 1] for x in self))


def settings(**options):
    """The arguments of `plan_top_p` behind its tensors, in order."""
    defaults = {"scale": 0.25, "top_p": 0.9, "min_kept": 0.0, "density": None, "rank_by": "mass", "padded": True}
    assert options.keys() <= {*defaults, "seed"}
    return (*(defaults | options | {"seed": options.get("seed", 0)}).values(),)


def offsets_of(sizes):
    """int32 [B, H, G + 1] from sizes [B, H, G]."""
    return torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).int()


def random_sizes(*shape, most=9, seed=0):
    """Sizes of clusters, some of them 0, then of text and padding."""
    sizes = torch.randint(0, most, shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(sizes < most // 4, 0, sizes)


@pytest.fixture
def random_means(device):
    """Makes clusters with random means and sizes; ``whole`` means have exact scores, and many that are the same."""

    def make(queries=4, keys=33, *, size=16, batch=1, heads=2, key_heads=1, whole=False, seed=0):
        q = random_tensor(batch, heads, queries, size, seed=seed)
        k = random_tensor(batch, key_heads, keys, size, seed=seed + 1)
        if whole:
            q, k = q.clamp(-1.4, 1.4).round(), k.clamp(-1.4, 1.4).round()
            k[:, :, keys // 2 :] = k[:, :, : keys - keys // 2].clone()
        q_sizes = random_sizes(batch, heads, queries + 2, seed=seed + 2)
        k_sizes = random_sizes(batch, key_heads, keys + 2, seed=seed + 3)
        if whole:
            k_sizes = torch.where(k_sizes > 4, 4, k_sizes)
        return Means(*(x.to(device) for x in (q, k, offsets_of(q_sizes), offsets_of(k_sizes))))

    return make


def plan(means, *, ready=1, score_config=None, row_config=None, **options):
    state = torch.full((1,), ready, dtype=torch.int32, device=means.q_means.device)
    with nan_filled_empty():
        return triton_launch.plan_top_p(*means, state, *settings(**options), score_config, row_config)


def expected_plan(means, *, ready=1, **options):
    state = torch.full((1,), ready, dtype=torch.int32, device=means.q_means.device)
    return reference.plan_top_p(*means, state, *settings(**options))


def assert_as_the_reference(means, **options):
    assert torch.equal(plan(means, **options), expected_plan(means, **options))


def assert_decided_rows_as_the_reference(means, **options):
    """Rows are those of the reference, but where float64 itself decides by less than float32 can tell.

    And every row of clusters is the smallest prefix of its order that holds the mass, to within that.
    """
    keep = plan(means, **options)
    groups = means.k_means.shape[2] + 2
    kept, right = (unpack_bits(x, groups).cpu() for x in (keep, expected_plan(means, **options)))
    same = (kept == right).all(-1)
    own = dict(zip(("scale", "top_p", "min_kept", "density", "rank_by"), settings(**options), strict=False))
    q_sizes, k_sizes = means.q_offsets.diff().cpu(), means.k_offsets.diff().cpu()
    shared = q_sizes.shape[1] // k_sizes.shape[1]
    looked_at = 0
    for b, h, row in (q_sizes[..., :-2] > 0).nonzero().tolist():
        q, k = means.q_means[b, h, row : row + 1].cpu(), means.k_means[b, h // shared].cpu()
        sizes = k_sizes[b, h // shared, :-2]
        score = reference.scores(q, k, own["scale"])
        mass = reference.log_mass(score, sizes)
        rank = reference.ranking(own["rank_by"], score, mass, options.get("seed", 0), h)
        if own["rank_by"] == "random":
            continue  # the hash has a row; such rows are compared exactly elsewhere
        minimum = reference.smallest_count(own["min_kept"], sizes.numel())
        undecided = assert_smallest_prefix(
            kept[b, h, row, :-2], reference.shares(mass)[0], rank[0], sizes > 0, own["top_p"], minimum
        )
        assert same[b, h, row] or undecided, (b, h, row)
        looked_at += 1
    assert looked_at and same[..., -2:].all()
    assert same[q_sizes == 0].all(), "groups without tokens"
    return keep


def assert_smallest_prefix(kept, share, rank, occupied, top_p, minimum):
    """Check one row in float64; whether its end lies where float32 cannot tell. All [Ck]."""
    left = occupied & ~kept
    assert not (kept & ~occupied).any()
    if not occupied.any():
        return False
    assert kept.any(), "a row keeps at least one cluster"
    least = rank[kept].min()
    rounding = TOLERANCE * rank[occupied].abs().max()
    before = float(share[kept].sum() - share[kept & (rank == least)].min())
    assert before <= top_p + TOLERANCE or kept.sum() <= minimum, "without its last cluster it holds too little"
    if not left.any():
        return abs(before - top_p) <= TOLERANCE
    assert least >= rank[left].max() - rounding, "what is kept comes first in the order"
    assert share[kept].sum() > top_p - TOLERANCE and kept.sum() >= minimum, "it holds enough"
    near = min(abs(before - top_p), abs(float(share[kept].sum()) - top_p)) <= TOLERANCE
    return near or bool(0 < (least - rank[left].max()).abs() <= rounding)


@pytest.mark.parametrize("keys", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("rank_by", ["mass", "mass_per_key"])
def test_rows_are_the_smallest_prefix_that_holds_the_mass(random_means, keys, rank_by):
    means = random_means(keys=keys, seed=keys)
    assert_decided_rows_as_the_reference(means, rank_by=rank_by, top_p=0.7, min_kept=0.1 if keys == 100 else 0)


@pytest.mark.parametrize("size", [8, 40, 72])
def test_means_of_any_size_are_scored(random_means, size):
    means = random_means(3, size=size)
    assert_decided_rows_as_the_reference(means, scale=size**-0.5, top_p=0.5)


def test_a_thousand_clusters(random_means):
    means = random_means(queries=2, keys=1000, heads=1)
    assert_decided_rows_as_the_reference(means, min_kept=0.1)


@ranks
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"top_p": 0.3}, id="some"),
        pytest.param({"top_p": 0.95, "min_kept": 0.4}, id="most"),
        pytest.param({"top_p": 1e-6}, id="one"),
        pytest.param({"top_p": 1e-6, "min_kept": 0.5}, id="the-minimum"),
        pytest.param({"top_p": 1.0}, id="all"),
        pytest.param({"min_kept": 1.0}, id="the-minimum-is-all"),
        pytest.param({"density": 0.3, "min_kept": 0.9}, id="keys"),
        pytest.param({"density": 0.001}, id="the-first"),
        pytest.param({"density": 1.0}, id="all-keys"),
    ],
)
def test_clusters_of_exact_scores_are_those_of_the_reference(random_means, rank_by, options):
    means = random_means(queries=3, keys=35, heads=1, whole=True)  # half of the clusters tie with the other half
    assert_as_the_reference(means, rank_by=rank_by, seed=5, **options)


def test_ties_go_to_the_lower_cluster(device):
    q, k = torch.ones(1, 1, 1, 16), torch.ones(1, 1, 70, 16)
    k[:, :, 50] = 2
    sizes = [torch.tensor(own).view(1, 1, -1) for own in ([1, 0, 0], [0, 3] * 35 + [0, 0])]
    equal = Means(*(x.to(device) for x in (q, k, *map(offsets_of, sizes))))  # 35 clusters of 3 keys
    kept = unpack_bits(plan(equal, scale=0.0, top_p=0.5), 72)[0, 0, 0]
    assert kept.nonzero().flatten().tolist() == list(range(1, 36, 2)), "18 clusters hold more than half"
    kept = unpack_bits(plan(equal, scale=0.0, density=0.2), 72)[0, 0, 0]
    assert kept.nonzero().flatten().tolist() == list(range(1, 14, 2))


@pytest.mark.parametrize(
    ("density", "number"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.7, 2), (0.71, 3), (0.89, 3), (0.91, 4)]
)
def test_density_counts_half_of_the_cluster_that_crosses(device, density, number):
    q, k = torch.ones(1, 1, 1, 16), torch.arange(4, 0, -1).view(1, 1, 4, 1).expand(1, 1, 4, 16)
    sizes = [torch.tensor(own).view(1, 1, -1) for own in ([1, 0, 0], [40, 20, 20, 20, 0, 0])]
    means = Means(*(x.to(device) for x in (q, k.float(), *map(offsets_of, sizes))))
    assert unpack_bits(plan(means, density=density), 6)[0, 0, 0].tolist() == [j < number for j in range(6)]
    assert_as_the_reference(means, density=density)


@pytest.mark.parametrize("seed", [0, 1, -7, 2**31, 2**63 - 1])
def test_random_ranks_are_the_counter_hash(random_means, seed):
    means = random_means(2, 40, batch=2)
    assert_as_the_reference(means, rank_by="random", density=0.3, seed=seed)


@pytest.mark.parametrize("ready", [0, 1])
@pytest.mark.parametrize("padded", [True, False])
def test_text_padding_and_empty_groups_are_as_in_the_reference(device, ready, padded):
    means = random_tensor(3, 1, 5, 16).to(device)
    sizes = torch.tensor([[5, 5, 0, 5, 5, 3, 2], [0, 5, 5, 5, 0, 0, 4], [0, 0, 0, 0, 0, 0, 9]])  # the last: all padding
    offsets = offsets_of(sizes).unsqueeze(1).to(device)
    clusters = Means(means, means, offsets, offsets)
    for top_p in (1e-6, 1.0):
        keep = plan(clusters, top_p=top_p, ready=ready, padded=padded)
        assert torch.equal(keep, expected_plan(clusters, top_p=top_p, ready=ready, padded=padded))
        kept = unpack_bits(keep, 7)
        assert kept[0, :, [0, 1, 3, 4, 5], 5].all() and not kept[..., 6].any() and not kept[2].any()
        assert kept[0, 0, 6].any() == padded


def test_extreme_scores_are_ordered_although_their_mass_underflows(device):
    q, k = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 5, 16)
    k[0, 0, :, 0] = torch.tensor([0.0, -1e3, -3e3, -2e3, 1e4])
    sizes = [torch.tensor(own).view(1, 1, -1) for own in ([1, 0, 0], [2, 2, 2, 2, 0, 0, 0])]  # the best is empty
    means = Means(*(x.to(device) for x in (q, k, *map(offsets_of, sizes))))
    kept = unpack_bits(plan(means, scale=1.0, top_p=0.5, min_kept=0.6), 7)[0, 0, 0]
    assert kept[:5].tolist() == [True, True, False, True, False]
    for top_p in (0.5, 0.999):
        only = unpack_bits(plan(means, scale=1.0, top_p=top_p), 7)[0, 0, 0]
        assert only[:5].tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("value", [-1e18, math.nan])
def test_a_stale_centroid_of_an_empty_cluster_changes_nothing(random_means, value):
    means = random_means(queries=3, keys=9, heads=1)
    before = plan(means)
    for x, offsets in ((means.q_means, means.q_offsets), (means.k_means, means.k_offsets)):
        empty = (offsets.diff()[..., :-2] == 0).unsqueeze(-1)
        assert empty.any()
        x.copy_(torch.where(empty, value, x))
    assert torch.equal(plan(means), before)


def test_a_row_without_finite_mass_keeps_everything_and_leaves_the_others_alone(random_means):
    means = random_means(3, 20, heads=1)
    before = unpack_bits(plan(means, top_p=0.5), 22)
    means.q_means[0, 0, 1] = math.nan
    after = unpack_bits(plan(means, top_p=0.5), 22)
    everything = unpack_bits(plan(means, top_p=1.0), 22)[0, 0, 1]
    assert after[0, 0, 1].equal(everything) and not before[0, 0, 1].equal(everything)
    assert torch.equal(after[0, 0, [0, 2, 3, 4]], before[0, 0, [0, 2, 3, 4]])


def test_a_batch_equals_its_items_and_shared_key_heads_equal_repeated_ones(random_means):
    means = random_means(2, 34, batch=2, heads=4, key_heads=2)
    keep = assert_decided_rows_as_the_reference(means, top_p=0.6, rank_by="mass_per_key")
    for number in (0, 1):
        assert_same_bits(plan(means.item(number), top_p=0.6, rank_by="mass_per_key"), keep[number : number + 1])
    q, k, q_offsets, k_offsets = means
    repeated = Means(q, k.repeat_interleave(2, dim=1), q_offsets, k_offsets.repeat_interleave(2, dim=1))
    assert torch.equal(plan(repeated, top_p=0.6, rank_by="mass_per_key"), keep)


def test_any_strides_and_any_tiles_give_the_same_bits(random_means):
    means = random_means(queries=17, keys=33, size=24, heads=2, key_heads=2)
    keep = plan(means, top_p=0.6)
    q, k = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in means[:2])
    assert q.stride(-1) != 1
    tiles = {"score_config": ScoreConfig(16, 16, 16, 2, 1), "row_config": RowConfig(256, 8, 1)}
    assert torch.equal(plan(means._replace(q_means=q, k_means=k), top_p=0.6, **tiles), keep)


def test_rows_too_long_for_a_program_are_planned_by_the_reference(random_means, monkeypatch):
    means = random_means(queries=2, keys=LARGEST_ROW - 1, size=8, heads=1)
    monkeypatch.setattr(triton_launch, "launch", None)
    assert_as_the_reference(means, top_p=0.5)


@pytest.mark.parametrize("groups", [1, 32, 33, 1002, LARGEST_ROW])
def test_every_row_that_fits_has_a_configuration(groups):
    for config in row_candidates(INTERPRETER, torch.float32, groups):
        assert config.lanes >= max(32, groups) and config.lanes & (config.lanes - 1) == 0
        assert 1 <= config.warps <= 16 and config.warps * 32 <= config.lanes


@pytest.mark.slow
def test_the_longest_row_of_a_program(random_means):
    means = random_means(queries=2, keys=LARGEST_ROW - 2, size=16, heads=1)
    assert_decided_rows_as_the_reference(means, min_kept=0.1)
    assert_as_the_reference(means, density=0.4, rank_by="random")


@pytest.mark.gpu
@pytest.mark.parametrize("rank_by", ["mass", "mass_per_key"])
def test_real_sizes(random_means, rank_by):
    means = random_means(queries=300, keys=1000, size=128, heads=8, key_heads=8)
    assert_decided_rows_as_the_reference(means, scale=128**-0.5, rank_by=rank_by, min_kept=0.1)
    assert_same_bits((plan(means, rank_by=rank_by),), (plan(means, rank_by=rank_by),))


@pytest.mark.gpu
@ranks
def test_real_sizes_of_exact_scores(random_means, rank_by):
    means = random_means(queries=300, keys=1000, size=128, heads=40, key_heads=40, whole=True)
    assert_as_the_reference(means, density=0.25, rank_by=rank_by)
