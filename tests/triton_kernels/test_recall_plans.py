"""The Triton kernels that keep a share of the mass, against the reference (docs/svg2.md, 7, and docs/adaspa.md, 13).

Measured sets are those of the reference bit for bit: sums of float32 masses in float64 are exact unless they span more
than 29 binary orders. Estimates are computed in float32 and may differ where the mass before a cluster equals what is
asked to within its rounding; these cases do not come so near to it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from block_axes import axis, random_mass
from kernel_oracles import assert_same_bits, random_tensor
from torch import Tensor

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.block_map.configs import LARGEST_ROW, RowConfig, ScoreConfig
from sparse_compile.kernels.recall_map import reference, triton_launch
from sparse_compile.kernels.recall_map.reference import Bounds
from sparse_compile.plan import unpack_bits

ranks = pytest.mark.parametrize("rank_by", ["mass", "mass_per_key", "random"])
bounds_of_rows = pytest.mark.parametrize(
    ("low", "high"),
    [
        pytest.param(0.0, 1.0, id="free"),
        pytest.param(0.4, 1.0, id="floor"),
        pytest.param(0.02, 0.5, id="ceiling"),
        pytest.param(0.3, 0.3, id="fixed"),
        pytest.param(1.0, 1.0, id="all"),
    ],
)
CONTRAST = torch.tensor([3, 0.3, 1, 2]).view(-1, 1, 1)
"""How unevenly each of four heads spreads its mass, so that bounds hold some of them."""


class Problem(NamedTuple):
    """The tensors of `plan_measured_recall`."""

    mass: Tensor
    q_offsets: Tensor
    q_is_video: Tensor
    k_offsets: Tensor
    k_is_video: Tensor

    def item(self, number):
        own = slice(number, number + 1)
        return self._replace(mass=self.mass[own], q_offsets=self.q_offsets[own], k_offsets=self.k_offsets[own])


class Means(NamedTuple):
    """Clusters of queries and keys, as the k-means op gives them."""

    q_means: Tensor
    k_means: Tensor
    q_offsets: Tensor
    k_offsets: Tensor

    def item(self, number):
        return Means(*(x[number : number + 1] for x in self))


@pytest.fixture
def problem(device):
    """Makes random mass of blocks of the kinds v and t; sizes are one list for each batch item, without padding."""

    def make(q_kinds="vtv", k_kinds="v" * 32 + "tv", *, heads=4, key_heads=2, q_sizes=None, k_sizes=None, seed=0):
        query, key = axis(q_kinds, q_sizes, heads=heads, padding=2), axis(k_kinds, k_sizes, heads=key_heads, padding=3)
        mass = random_mass(query, key, heads=heads, contrast=1.0, seed=seed) ** CONTRAST[:heads]
        alive = query.alive[:, None, :, None] & key.alive[:, None, None, :]
        return Problem(*(x.to(device) for x in (mass * alive, *query, *key)))

    return make


@pytest.fixture
def random_means(device):
    """Makes clusters with random means and sizes, some of them empty; the spread of queries differs by head."""

    def make(queries=4, keys=33, *, size=16, batch=1, heads=2, key_heads=1, seed=0):
        generator = torch.Generator().manual_seed(seed)
        sizes = [(batch, heads, queries + 2), (batch, key_heads, keys + 2)]
        offsets = []
        for shape in sizes:
            own = torch.randint(0, 9, shape, generator=generator)
            own = torch.where(own < 2, 0, own)
            offsets.append(torch.nn.functional.pad(own.cumsum(-1), (1, 0)).int())
        q = random_tensor(batch, heads, queries, size, seed=seed) * CONTRAST[torch.arange(heads) % 4]
        k = random_tensor(batch, key_heads, keys, size, seed=seed + 1)
        return Means(*(x.to(device) for x in (q, k, *offsets)))

    return make


def settings(target=0.8, low=0.0, high=1.0, rank_by="mass", padded=True, seed=0):
    return target, Bounds(low, high), rank_by, padded, seed


def choose(problem, *, row_config=None, **options):
    """keep, recall and at_bounds of measured mass, by the kernels."""
    with nan_filled_empty():
        made = triton_launch.plan_measured_recall(*problem, *settings(**options), row_config)
    assert [x.dtype for x in made] == [torch.int32, torch.float32, torch.float32]
    return made


def assert_as_the_reference(problem, **options):
    """Bitmap and at_bounds bit for bit; recall to the rounding of float32."""
    keep, recall, at_bounds = choose(problem, **options)
    right = reference.plan_measured_recall(*problem, *settings(**options))
    assert_same_bits((keep, at_bounds), (right[0], right[2]))
    assert torch.allclose(recall, right[1], rtol=2e-7, atol=0)
    return keep, recall, at_bounds


def estimate_arguments(means, asked=None, ready=1, scale=0.25, **options):
    target, *rest = settings(**options)
    device = means.q_means.device
    state = torch.full((1,), ready, dtype=torch.int32, device=device)
    wanted = torch.full(means.q_means.shape[:2], target, device=device) if asked is None else asked
    return (*means, state, wanted, scale, *rest)


def estimate(means, *, score_config=None, row_config=None, **options):
    """keep and at_bounds of estimated mass, by the kernels."""
    with nan_filled_empty():
        made = triton_launch.plan_estimated_recall(*estimate_arguments(means, **options), score_config, row_config)
    assert [x.dtype for x in made] == [torch.int32, torch.float32]
    return made


def expected_estimate(means, **options):
    return reference.plan_estimated_recall(*estimate_arguments(means, **options))


def assert_estimate_as_the_reference(means, **options):
    made = estimate(means, **options)
    assert_same_bits(made, expected_estimate(means, **options))
    return made


@ranks
@bounds_of_rows
def test_measured_rows_are_those_of_the_reference(problem, rank_by, low, high):
    _, _, at_bounds = assert_as_the_reference(problem(), rank_by=rank_by, low=low, high=high, target=0.6, seed=9)
    assert at_bounds[..., 1].any() == (high < 1)
    assert not (at_bounds[..., 1] > 0.5).all(), "not all heads are out of reach"


@ranks
@bounds_of_rows
def test_estimated_rows_are_those_of_the_reference(random_means, rank_by, low, high):
    means = random_means(5, 37, heads=4, key_heads=2, seed=1)
    target = 0.3 if rank_by == "random" else 0.7  # a random order finds mass late
    _, at_bounds = assert_estimate_as_the_reference(means, rank_by=rank_by, low=low, high=high, target=target)
    assert at_bounds[..., 1].any() == (high < 1)
    assert not (at_bounds[..., 1] > 0.5).all(), "not all heads are out of reach"


@pytest.mark.parametrize("kinds", ["", "v", "t", "v" * 30, "v" * 31, "v" * 32, "t" * 40, "tt" + "v" * 98])
def test_measured_rows_of_any_length(problem, kinds):
    assert_as_the_reference(problem("vv", kinds, heads=2, key_heads=1), low=0.05, high=0.7)


@pytest.mark.parametrize("keys", [1, 29, 30, 31, 62, 63, 100])
def test_estimated_rows_of_any_length(random_means, keys):
    assert_estimate_as_the_reference(random_means(3, keys, seed=keys), low=0.05, high=0.7)


@pytest.mark.parametrize("target", [1e-9, 0.3, 0.999, 1 - 2**-30])
def test_any_target(problem, random_means, target):
    assert_as_the_reference(problem("vv", "v" * 37, heads=2, key_heads=1), target=target)
    if target < 0.9999:  # float32 has no more to tell
        assert_estimate_as_the_reference(random_means(2, 37), target=target)


@pytest.mark.parametrize("rank_by", ["mass", "mass_per_key"])
def test_ties_go_to_the_lower_block(problem, rank_by):
    made = problem("v", "v" * 20 + "t" + "v" * 20, heads=2, key_heads=1)
    made.mass.copy_(made.mass.clamp(max=3).round())  # four values; 0 as -0, too
    made.mass[..., 1::2] *= torch.where(made.mass[..., 1::2] == 0, -1.0, 1.0)
    for target in (0.1, 0.5, 0.9):
        assert_as_the_reference(made, rank_by=rank_by, target=target, low=0.3)


@pytest.mark.parametrize("target", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_a_target_that_is_met_exactly_is_met(problem, target):
    """Equal masses: the mass before a block can equal what is needed, with and without text that holds a part."""
    for kinds in ("v" * 20, "v" * 12 + "t" * 8):
        made = problem("v", kinds, heads=1, key_heads=1)
        made.mass.fill_(1)
        keep, recall, _ = assert_as_the_reference(made, target=target)
        text = kinds.count("t")
        kept = unpack_bits(keep, 21)[0, 0, 0].sum().item()
        assert kept == max(text + 1, math.ceil(20 * target)) and recall.item() == pytest.approx(kept / 20)


def test_estimated_sets_that_tie_end_at_the_lower_cluster(device):
    q, k = torch.ones(1, 1, 1, 16), torch.ones(1, 1, 70, 16)
    k[:, :, 50] = 2
    sizes = [torch.tensor(own).view(1, 1, -1) for own in ([1, 0, 0], [0, 3] * 35 + [0, 0])]
    offsets = [torch.nn.functional.pad(x.cumsum(-1), (1, 0)).int() for x in sizes]
    equal = Means(*(x.to(device) for x in (q, k, *offsets)))  # 35 clusters of 3 keys
    keep, _ = estimate(equal, scale=0.0, target=0.51)
    kept = unpack_bits(keep, 72)[0, 0, 0]
    assert kept.nonzero().flatten().tolist() == list(range(1, 36, 2)), "18 of 35 clusters hold 0.514"


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("high", [1.0, 0.3])
def test_text_padding_and_empty_blocks(problem, padded, high):
    q_sizes, k_sizes = [[4, 0, 4, 3], [4, 4, 0, 0], [0] * 4], [[4, 0, 4, 4, 0, 4, 3, 4], [4] * 3 + [0] * 5, [0] * 8]
    made = problem("vvvt", "vvvvvtvt", heads=2, key_heads=1, q_sizes=q_sizes, k_sizes=k_sizes)
    made.mass[:, 1] = 1  # out of reach below a ceiling; and mass where nothing is
    keep, recall, at_bounds = assert_as_the_reference(made, padded=padded, high=high)
    kept = unpack_bits(keep, 9)
    assert (at_bounds[:2, 1, 1] == 1).all() == (high < 1)
    assert not kept[..., 8].any() and not kept[2].any() and (recall[2] == 1).all() and not at_bounds[2].any()
    assert kept[0, 0, 4].any() == kept[0, 1, 4].any() == padded
    for number in range(3):
        alone = choose(made.item(number), padded=padded, high=high)
        assert_same_bits(alone, (x[number : number + 1] for x in (keep, recall, at_bounds)))


@pytest.mark.parametrize("ready", [0, 1])
@pytest.mark.parametrize("padded", [True, False])
def test_clusters_text_and_padding_of_a_plan_that_may_not_be_ready(random_means, ready, padded):
    means = random_means(4, 12, batch=3, heads=2, key_heads=2)
    means.q_offsets[2, :, 1:-1] = 0  # all padding
    means.k_offsets[2, :, 1:-1] = 0
    keep, _ = assert_estimate_as_the_reference(means, ready=ready, padded=padded, high=0.4)
    kept = unpack_bits(keep, 14)
    assert not kept[..., 13].any() and not kept[2].any()
    for number in range(3):
        alone = estimate(means.item(number), ready=ready, padded=padded, high=0.4)
        assert torch.equal(alone[0], keep[number : number + 1])


def test_mass_that_is_not_finite_counts_as_0(problem):
    made = problem("vvv", "v" * 20 + "t", heads=2, key_heads=1)
    broken = made.mass.clone()
    broken[:, :, 1] = 0
    broken[:, :, 2, 3:9] = 0
    clean = choose(made._replace(mass=broken), low=0.1)
    broken[:, :, 1] = math.nan
    broken[0, 0, 1, :3] = math.inf
    broken[:, :, 2, 3:9] = -math.inf
    assert_same_bits(assert_as_the_reference(made._replace(mass=broken), low=0.1), clean)
    nothing = choose(made._replace(mass=broken * math.nan))
    assert (nothing[1] == 1).all() and (unpack_bits(nothing[0], 22)[0, :, :3].sum(-1) == 2).all()


def test_a_row_of_means_without_finite_mass_keeps_what_the_ceiling_allows(random_means):
    means = random_means(4, 20, heads=1)
    means.q_offsets.copy_(torch.tensor([0, 3, 6, 9, 12, 14, 15]))
    before, _ = estimate(means, target=0.5)
    means.q_means[0, 0, 1] = math.nan
    after, at_bounds = estimate(means, target=0.5)
    kept = [unpack_bits(x, 22)[0, 0] for x in (before, after)]
    everything = unpack_bits(estimate(means, low=1.0)[0], 22)[0, 0, 1]
    assert kept[1][1].equal(everything) and not kept[0][1].equal(everything) and not at_bounds.isnan().any()
    assert torch.equal(kept[1][[0, 2, 3, 4, 5]], kept[0][[0, 2, 3, 4, 5]])
    limited = estimate(means, target=0.5, high=0.5)
    assert_same_bits(limited, expected_estimate(means, target=0.5, high=0.5))


@pytest.mark.parametrize("value", [-1e18, math.nan])
def test_a_stale_centroid_of_an_empty_cluster_changes_nothing(random_means, value):
    means = random_means(queries=3, keys=9, heads=1)
    before = estimate(means, high=0.6)
    for x, offsets in ((means.q_means, means.q_offsets), (means.k_means, means.k_offsets)):
        empty = (offsets.diff()[..., :-2] == 0).unsqueeze(-1)
        assert empty.any()
        x.copy_(torch.where(empty, value, x))
    assert_same_bits(estimate(means, high=0.6), before)


def test_every_head_is_asked_on_its_own(random_means):
    means = random_means(3, 40, heads=4)
    asked = torch.tensor([[0.2, 0.999, 0.5, 0.8]], device=means.q_means.device)
    assert_estimate_as_the_reference(means, asked=asked)


@pytest.mark.parametrize("seed", [-3, 2**63 - 1])
def test_random_sets_are_those_of_the_counter_hash(problem, random_means, seed):
    assert_as_the_reference(problem("vv", "v" * 40, heads=2), rank_by="random", seed=seed)
    assert_estimate_as_the_reference(random_means(2, 40, batch=2), rank_by="random", seed=seed)


def test_rows_of_a_head_are_added_and_written_in_steps(problem, monkeypatch):
    monkeypatch.setattr(triton_launch, "ROWS_AT_A_TIME", 4)
    monkeypatch.setattr(triton_launch, "ROWS_WRITTEN", 4)
    made = problem("v" * 9, "vvvv", heads=2, key_heads=1, q_sizes=[[*range(1, 10)]])
    made.mass[:, 1] = 1
    for padded in (True, False):
        _, _, at_bounds = assert_as_the_reference(made, high=0.3, padded=padded)
        assert at_bounds[0, 1, 1] == 1


def test_any_strides_and_any_configuration_give_the_same_bits(problem, random_means):
    made, means, options = problem("vv", "v" * 20, heads=2), random_means(17, 33, size=24, heads=2), {"high": 0.6}
    right, estimated = choose(made, **options), estimate(means, **options)
    strided = made.mass.transpose(1, 3).contiguous().transpose(1, 3)
    q, k = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in means[:2])
    assert strided.stride(-1) != 1 and q.stride(-1) != 1
    assert_same_bits(choose(made._replace(mass=strided), row_config=RowConfig(128, 4, 1), **options), right)
    tiles = {"score_config": ScoreConfig(16, 16, 16, 2, 1), "row_config": RowConfig(256, 8, 1)}
    assert_same_bits(estimate(means._replace(q_means=q, k_means=k), **tiles, **options), estimated)


def test_rows_too_long_for_a_program_are_planned_by_the_reference(problem, random_means, monkeypatch):
    made, means = problem("v", "v" * LARGEST_ROW, heads=1, key_heads=1), random_means(2, LARGEST_ROW - 1, size=8)
    monkeypatch.setattr(triton_launch, "launch", None)
    assert_as_the_reference(made)
    assert_estimate_as_the_reference(means)


@pytest.mark.slow
@ranks
def test_long_rows(problem, random_means, rank_by):
    assert_as_the_reference(problem("v", "v" * 7441, heads=2, key_heads=1), rank_by=rank_by, high=0.6)
    made = estimate(random_means(2, LARGEST_ROW - 2, heads=1), rank_by=rank_by)
    assert made[1].isfinite().all()


@pytest.mark.gpu
@ranks
@pytest.mark.parametrize("blocks", [1182, 1860])
def test_real_sizes(problem, rank_by, blocks):
    kinds = "v" * (blocks - 4) + "tttt"
    made = problem(kinds, kinds, heads=4, key_heads=4)
    chosen = assert_as_the_reference(made, rank_by=rank_by, low=0.02, high=0.5)
    assert_same_bits(choose(made, rank_by=rank_by, low=0.02, high=0.5), chosen)


@ranks
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"queries": 3, "keys": 90}, id="small"),
        pytest.param({"queries": 300, "keys": 1000, "size": 128, "heads": 8, "key_heads": 8}, marks=pytest.mark.gpu),
    ],
)
def test_estimates_in_float32_hold_what_float64_asks(random_means, sizes, rank_by):
    """A set may differ from the reference's where float32 cannot tell; its mass, by no more than that."""
    means, options = random_means(**sizes), {"rank_by": rank_by, "target": 0.8, "scale": 0.1}
    keep, at_bounds = estimate(means, **options)
    assert_same_bits((keep, at_bounds), estimate(means, **options))
    groups = means.k_means.shape[2] + 2
    kept, right = (unpack_bits(x, groups) for x in (keep, expected_estimate(means, **options)[0]))
    assert (kept == right).all(-1).double().mean() > 0.99
    shared = means.q_means.shape[1] // means.k_means.shape[1]
    k, k_sizes = (x.repeat_interleave(shared, 1) for x in (means.k_means, means.k_offsets.diff()[..., :-2]))
    logits = 0.1 * means.q_means.double() @ k.double().mT + k_sizes.double().log().unsqueeze(2)
    share = (logits.softmax(-1) * kept[..., :-2, :-2]).sum(-1)
    chose = means.q_offsets.diff()[..., :-2] > 0
    assert share[chose].min() >= 0.8 - 1e-6
