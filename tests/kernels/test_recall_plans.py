"""Plans that keep a share of the mass of each row (docs/svg2.md, section 7, and docs/adaspa.md, section 13.1)."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from block_axes import Axis, axis, random_mass
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import IMPLEMENTATIONS, OPS, assert_same_bits, random_tensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_compile.kernels.recall_map import reference
from sparse_compile.plan import unpack_bits

few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
targets = st.floats(0.05, 0.99)
kinds_of_blocks = st.text("vvvt", min_size=1, max_size=30)
ranks = pytest.mark.parametrize("rank_by", ["mass", "mass_per_key", "random"])
each_kernel = pytest.mark.parametrize("kernel", IMPLEMENTATIONS)


class Chosen(NamedTuple):
    """What a planner gives, the bitmap as bool [B, H, Gq, Gk]; ``recall`` where it is measured."""

    kept: Tensor
    at_bounds: Tensor
    recall: Tensor | None = None


def choose(mass, query, key, *, target=0.9, low=0.0, high=1.0, rank_by="mass", padded=True, seed=0, kernel="cpu"):
    """AdaSpa's plan of measured mass."""
    keep = torch.full((*mass.shape[:3], -(-mass.shape[3] // 32)), -1, dtype=torch.int32)
    ready, at_bounds = torch.zeros(1, dtype=torch.int32), torch.full((*mass.shape[:2], 2), math.nan)
    recall = OPS.plan_measured_recall(
        mass, *query, *key, keep, ready, at_bounds, target, low, high, rank_by, padded, seed, kernel
    )
    assert ready.item() == 1 and recall.dtype == at_bounds.dtype == torch.float32
    return Chosen(unpack_bits(keep, mass.shape[3]), at_bounds, recall)


class Means(NamedTuple):
    """Clusters of queries and keys, as the k-means op gives them."""

    q_means: Tensor
    k_means: Tensor
    q_offsets: Tensor
    k_offsets: Tensor

    def item(self, number):
        return Means(*(x[number : number + 1] for x in self))


def clusters(q_sizes, k_sizes, *, heads=2, size=8, seed=0):
    """Random means; sizes [B, H, C + 2] and [B, Hkv, C + 2] as lists or tensors."""
    q_sizes, k_sizes = torch.as_tensor(q_sizes), torch.as_tensor(k_sizes)
    q_sizes, k_sizes = (x.expand(1, n, -1) if x.dim() == 1 else x for x, n in ((q_sizes, heads), (k_sizes, 1)))
    sides = [torch.nn.functional.pad(x.cumsum(-1), (1, 0)).int() for x in (q_sizes, k_sizes)]
    means = [random_tensor(*x.shape[:2], x.shape[2] - 2, size, seed=seed + i) for i, x in enumerate((q_sizes, k_sizes))]
    return Means(*means, *sides)


def estimate(means, *, asked=None, ready=1, target=0.9, low=0.0, high=1.0, rank_by="mass", padded=True, seed=0,
             scale=0.5, kernel="cpu"):  # fmt: skip
    """SVG2's plan of estimated mass."""
    state = torch.tensor([ready], dtype=torch.int32)
    keep, at_bounds = OPS.plan_estimated_recall(
        *means, state, asked, scale, target, low, high, rank_by, padded, seed, kernel
    )
    assert keep.dtype == torch.int32 and at_bounds.dtype == torch.float32
    return Chosen(unpack_bits(keep, means.k_means.shape[2] + 2), at_bounds)


def exact_row(own, sizes, video, text, target, low, high, rank):
    """One row in Python: the video blocks it keeps, and whether floor and ceiling hold it."""
    order = sorted(video, key=lambda block: (-rank[block], block))
    needed, every = target * math.fsum(own[block] for block in [*video, *text]), sum(sizes[block] for block in video)
    sure = [own[block] for block in text]
    wanted, least, most = set(), set(order[:1]), set(order[:1])
    for place, block in enumerate(order):
        before = order[:place]
        middle = sum(sizes[other] for other in before) + sizes[block] / 2
        wanted |= {block} if math.fsum([*sure, *(own[other] for other in before)]) < needed else set()
        least |= {block} if middle < low * every else set()
        most |= {block} if middle < high * every else set()
    return (wanted | least) & most, bool(least - wanted), bool(wanted - most)


def assert_rows(chosen, head, rows, alive, text):
    """Compare the rows of one head: ``rows`` holds (number, tokens, exact_row's result)."""
    tokens = sum(size for _, size, _ in rows)
    up, down = (sum(size for _, size, row in rows if row[side]) / max(1, tokens) for side in (1, 2))
    assert chosen.at_bounds[0, head].tolist() == pytest.approx([up, down], abs=1e-7)
    for number, size, row in rows:
        everything = set(alive) if down > reference.UNREACHED else row[0] | set(text)
        assert set(chosen.kept[0, head, number].nonzero().flatten().tolist()) == (everything if size else set())


@few
@given(
    seed=seeds,
    q_kinds=kinds_of_blocks,
    k_kinds=kinds_of_blocks,
    target=targets,
    bounds=st.sampled_from([(0.0, 1.0), (0.02, 0.5), (0.3, 0.3), (0.4, 0.7), (1.0, 1.0)]),
)
@pytest.mark.parametrize("rank_by", ["mass", "mass_per_key"])
def test_measured_rows_are_those_of_exact_arithmetic(rank_by, seed, q_kinds, k_kinds, target, bounds):
    generator = torch.Generator().manual_seed(seed)
    q_sizes, k_sizes = (torch.randint(9, (len(kinds),), generator=generator).tolist() for kinds in (q_kinds, k_kinds))
    query, key = axis(q_kinds, q_sizes, heads=2, padding=3), axis(k_kinds, k_sizes, padding=3)
    mass = random_mass(query, key, heads=2, seed=seed)
    chosen = choose(mass, query, key, target=target, low=bounds[0], high=bounds[1], rank_by=rank_by)
    alive = [block for block, size in enumerate(k_sizes) if size]
    video, text = ([block for block in alive if k_kinds[block] == kind] for kind in "vt")
    for head in range(2):
        rows = []
        for row in (row for row in range(len(q_sizes)) if q_kinds[row] == "v"):
            own = mass[0, head, row].double().tolist()
            rank = [x / max(1, n) for x, n in zip(own, [*k_sizes, 3], strict=True)] if rank_by != "mass" else own
            rows.append((row, q_sizes[row], exact_row(own, k_sizes, video, text, target, *bounds, rank)))
        assert_rows(chosen, head, rows, alive, text)
        shares = (mass * chosen.kept)[0, head].double().sum(-1) / mass[0, head].double().sum(-1)
        weights = [size if math.isfinite(shares[row]) else 0 for row, size, _ in rows]
        kept = sum(w * float(shares[row]) for w, (row, _, _) in zip(weights, rows, strict=True) if w)
        assert float(chosen.recall[0, head]) == pytest.approx(kept / sum(weights) if sum(weights) else 1, abs=1e-6)


@few
@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    target=targets,
    bounds=st.sampled_from([(0.0, 1.0), (0.02, 0.5), (0.3, 0.3), (0.4, 0.7)]),
)
@pytest.mark.parametrize("rank_by", ["mass", "mass_per_key"])
def test_estimated_rows_are_those_of_exact_arithmetic(rank_by, seed, shape, target, bounds):
    generator = torch.Generator().manual_seed(seed)
    q_sizes, k_sizes = (torch.randint(9, (1, 2, n + 2), generator=generator) for n in shape)
    means = clusters(q_sizes, k_sizes[:, :1], seed=seed)
    chosen = estimate(means, target=target, low=bounds[0], high=bounds[1], rank_by=rank_by)
    sizes, keys = k_sizes[0, 0].tolist(), shape[1]
    alive, text = [block for block, size in enumerate(sizes[:-1]) if size], [keys] if sizes[keys] else []
    video = [block for block in alive if block < keys]
    for head in range(2):
        scores = (means.q_means[0, head].double() @ means.k_means[0, 0].double().t() * 0.5).tolist()
        rows = []
        for row, own in enumerate(scores):
            weights = [n * math.exp(x) for n, x in zip(sizes, own, strict=False)] + [0.0, 0.0]
            rank = weights if rank_by == "mass" else own
            result = exact_row(weights, sizes, video, [], float(torch.tensor(target)), *bounds, rank)
            rows.append((row, int(q_sizes[0, head, row]), result))
        assert_rows(chosen, head, rows, alive, text)


@ranks
@few
@given(seed=seeds, target=targets, less=st.floats(0.1, 1))
def test_the_target_is_reached_and_missed_without_the_weakest_kept_block(rank_by, seed, target, less):
    query, key = axis("v" * 6, heads=2), axis("v" * 30 + "t", [1 + n % 5 for n in range(30)] + [3])
    mass = random_mass(query, key, heads=2, seed=seed)
    chosen = choose(mass, query, key, target=target, rank_by=rank_by)
    exact = mass.double()[:, :, :6]
    kept = chosen.kept[:, :, :6]
    share = (exact * kept).sum(-1) / exact.sum(-1)
    assert (share >= target - 1e-12).all() and chosen.recall.min() >= target - 1e-6
    if rank_by != "random":  # the weakest is the last of the order
        rank = exact / key.offsets[0, 0].diff().clamp(min=1) if rank_by == "mass_per_key" else exact
        last = torch.where(kept & key.is_video, rank, math.inf).argmin(-1, keepdim=True)
        missing = share - exact.gather(-1, last).squeeze(-1) / exact.sum(-1)
        only = (kept & key.is_video).sum(-1) == 1
        assert ((missing < target + 1e-12) | only).all()
    fewer = choose(mass, query, key, target=target * less, rank_by=rank_by)
    assert not (fewer.kept & ~chosen.kept).any(), "a lower target keeps a part of the same blocks"
    assert (fewer.recall <= chosen.recall).all()


BOUNDED = [
    pytest.param(0.6, 0.0, 1.0, 2, [0, 0], id="mass-alone"),
    pytest.param(0.5, 0.0, 1.0, 1, [0, 0], id="reached-exactly"),
    pytest.param(0.6, 0.49, 1.0, 2, [0, 0], id="a-floor-below-it"),
    pytest.param(0.6, 0.75, 1.0, 4, [1, 0], id="a-floor"),
    pytest.param(0.6, 1.0, 1.0, 5, [1, 0], id="a-floor-of-all"),
    pytest.param(0.95, 0.0, 0.6, 5, [0, 1], id="a-ceiling-holds-all-rows-so-the-head-keeps-all"),
    pytest.param(0.6, 0.5, 0.5, 2, [0, 0], id="a-fixed-density-that-is-enough"),
    pytest.param(1e-6, 0.0, 1.0, 1, [0, 0], id="one-at-least"),
]


@pytest.mark.parametrize(("target", "low", "high", "number", "held"), BOUNDED)
def test_floor_and_ceiling_count_keys_by_half_of_the_block_that_crosses(target, low, high, number, held):
    # The middles of the blocks lie at 5, 15, 22, 26 and 34 of 40 keys, and 0.75 of them are 30.
    sizes = [10, 10, 4, 4, 12]
    query, key = axis("v"), axis("vvvvv", sizes)
    mass = torch.tensor([16.0, 8, 4, 3, 1, 0]).expand(1, 1, 2, 6)
    chosen = choose(mass, query, key, target=target, low=low, high=high)
    assert chosen.kept[0, 0, 0].tolist() == [block < number for block in range(6)]
    assert chosen.at_bounds[0, 0].tolist() == held


@each_kernel
def test_a_head_out_of_reach_attends_to_everything_and_says_so(kernel):
    query, key = axis("vvv", [2, 1, 1], heads=2), axis("vvvv")
    flat, sharp = torch.ones(5), torch.tensor([97.0, 1, 1, 1, 0])
    few_tokens = torch.stack([sharp, flat, flat, flat])  # as many tokens are held down as not
    many_tokens = torch.stack([flat, sharp, flat, flat])
    chosen = choose(torch.stack([few_tokens, many_tokens])[None], query, key, high=0.5, kernel=kernel)
    assert chosen.at_bounds[0, :, 1].tolist() == [0.5, 0.75]
    assert chosen.kept[0, 0, :3].sum(-1).tolist() == [1, 2, 2]
    assert chosen.kept[0, 1, :3, :4].all() and chosen.recall[0].tolist() == [pytest.approx((2 * 0.97 + 1) / 4), 1]


@each_kernel
def test_an_estimate_out_of_reach_keeps_everything_in_its_head_alone(kernel):
    means = clusters([3, 3, 3, 0, 2], [4] * 10 + [2, 3], heads=2)
    means.q_means[0, 0] = 0  # every key cluster has the same mass
    means.q_means[0, 1] = 8 * means.k_means[0, 0, :3]
    chosen = estimate(means, low=0.05, high=0.5, kernel=kernel)
    assert chosen.at_bounds[0].tolist() == [[0, 1], [0, 0]]
    assert chosen.kept[0, 0, :3, :11].all() and not chosen.kept[..., 11].any()
    assert (chosen.kept[0, 1, :3, :10].sum(-1) <= 5).all()


@ranks
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("high", [1.0, 0.3])
def test_text_is_always_kept_and_padding_never(rank_by, padded, high):
    kinds = "v" * 9 + "t" + "v" * 11 + "t"
    query, key = axis(kinds, heads=4, padding=2), axis(kinds, heads=2, padding=5)
    mass = random_mass(query, key, heads=4, contrast=0.5)
    chosen = choose(mass, query, key, high=high, rank_by=rank_by, padded=padded)
    text = (~key.is_video).nonzero().flatten()[:-1]
    assert chosen.kept[:, :, :-1, text].all() and chosen.kept[:, :, text, :-1].all()
    assert not chosen.kept[..., -1].any() and chosen.kept[:, :, -1, :-1].all() == padded
    means = clusters([3, 0, 3, 2, 2], [4] * 12 + [2, 3], heads=2)
    estimated = estimate(means, high=high, rank_by=rank_by, padded=padded)
    assert estimated.kept[:, :, [0, 2, 3], 12].all() and estimated.kept[:, :, 3, :12].all()
    assert not estimated.kept[..., 13].any() and not estimated.kept[:, :, 1].any()
    assert estimated.kept[:, :, 4, :13].all() == padded


def test_text_that_holds_the_target_leaves_the_floor_to_the_video():
    query, key = axis("v"), axis("vvvvt", [4, 4, 4, 4, 1])
    mass = torch.tensor([1.0, 2, 1, 1, 95, 0]).expand(1, 1, 2, 6)
    for low, number in ((0.0, 1), (0.5, 2)):
        chosen = choose(mass, query, key, low=low)
        assert chosen.kept[0, 0, 0].sum() == number + 1 and chosen.kept[0, 0, 0, [1, 4]].all()
        assert chosen.at_bounds[0, 0].tolist() == [1, 0]


ROWS = [
    pytest.param([2.0] * 10, 0.35, 4, id="equal-masses-end-at-the-lower-blocks"),
    pytest.param([0.0] * 7 + [5.0] + [0.0] * 2, 0.99, 1, id="all-mass-in-one"),
    pytest.param([0.0] * 10, 0.9, 1, id="no-mass"),
    pytest.param([math.nan] * 10, 0.9, 1, id="NaN-counts-as-0"),
    pytest.param([math.inf] + [1.0] * 9, 0.5, 5, id="so-does-infinity"),
]


@pytest.mark.parametrize(("row", "target", "number"), ROWS)
def test_rows_that_are_not_like_others(row, target, number):
    query, key = axis("vv"), axis("v" * 10)
    mass = torch.tensor([[*row, 0.0], [*range(10, 0, -1), 0.0], [0.0] * 11])[None, None]
    chosen = choose(mass, query, key, target=target)
    kept = chosen.kept[0, 0, 0].nonzero().flatten().tolist()
    first = [block for block, x in enumerate(row) if math.isfinite(x) and x == max(filter(math.isfinite, row))]
    assert kept == (first or list(range(10)))[:number]
    assert chosen.recall.isfinite().all() and chosen.recall.min() >= target


@pytest.mark.parametrize("kinds", ["v", "t", "tv", ""])
def test_one_block_or_none(kinds):
    query, key = axis("v"), axis(kinds)
    chosen = choose(random_mass(query, key), query, key, low=0.5, high=0.5)
    assert chosen.kept[0, 0, 0].tolist() == [True] * len(kinds) + [False]
    assert chosen.recall.tolist() == [[1.0]]
    assert estimate(clusters([2, 0, 0], [5, 0, 0])).kept[0, :, 0].tolist() == [[True, False, False]] * 2
    assert not estimate(clusters([2, 0, 0], [0, 0, 5])).kept[0, :, 0].any()


def test_a_row_of_means_that_cannot_be_scored_keeps_what_the_ceiling_allows():
    means = clusters([2, 2, 2, 0, 0], [4] * 8 + [0, 0], heads=1)
    before = estimate(means, target=0.4)
    means.q_means[0, 0, 1] = math.nan
    after = estimate(means, target=0.4)
    assert after.kept[0, 0, 1, :8].all() and not before.kept[0, 0, 1, :8].all()
    assert torch.equal(after.kept[0, 0, [0, 2]], before.kept[0, 0, [0, 2]])
    held = estimate(means, target=0.4, high=0.5)
    assert held.kept[0, 0, 1].sum() == 4 and held.at_bounds[0, 0].tolist() == pytest.approx([0, 1 / 3])


@pytest.mark.parametrize("padded", [True, False])
def test_state_that_is_not_ready_keeps_every_valid_key(padded):
    means = clusters([3, 0, 3, 2, 2], [4, 0, 4, 2, 3], heads=2)
    kept = estimate(means, ready=0, target=0.1, padded=padded).kept
    assert kept[:, :, [0, 2, 3]][..., [0, 2, 3]].all() and not kept[..., [1, 4]].any() and not kept[:, :, 1].any()
    assert kept[:, :, 4].any() == padded


def test_each_head_is_asked_on_its_own_and_0_or_nothing_stands_for_the_target():
    means = clusters([3, 3, 3, 0, 0], [4] * 20 + [0, 0], heads=3)
    plain = estimate(means)
    for none in (torch.zeros(1, 3), torch.full((1, 3), 0.9)):
        assert_same_bits(plain[:2], estimate(means, asked=none)[:2])
    mixed = estimate(means, asked=torch.tensor([[0.3, 0.0, 0.999]])).kept[0]
    assert torch.equal(mixed[1], plain.kept[0, 1])
    assert torch.equal(mixed[0], estimate(means, target=0.3).kept[0, 0])
    assert torch.equal(mixed[2], estimate(means, target=0.999).kept[0, 2])


@ranks
def test_a_batch_equals_its_items_and_shared_key_heads_choose_as_repeated_ones(rank_by):
    options = {"rank_by": rank_by, "seed": 3, "low": 0.1, "high": 0.6}
    sizes = [[4] * 30 + [3], [4] * 22 + [0] * 8 + [1]]
    query, key = (axis("v" * 30 + "t", sizes, heads=heads) for heads in (4, 2))
    mass = random_mass(query, key, heads=4)
    both = choose(mass, query, key, **options)
    assert_same_bits(both, choose(mass, query, Axis(key.offsets.repeat_interleave(2, 1), key.is_video), **options))
    means = clusters(torch.arange(48).view(2, 4, 6) % 5, torch.arange(88).view(2, 2, 22) % 7)
    planned = estimate(means, **options)
    repeated = (x.repeat_interleave(2, 1) for x in (means.k_means, means.k_offsets))
    q_means, _, q_offsets, _ = means
    k_means, k_offsets = repeated
    assert_same_bits(planned[:2], estimate(Means(q_means, k_means, q_offsets, k_offsets), **options)[:2])
    for item in (0, 1):
        own = slice(item, item + 1)
        assert_same_bits(choose(mass[own], query.item(item), key.item(item), **options), (x[own] for x in both))
        assert_same_bits(estimate(means.item(item), **options)[:2], (x[own] for x in planned[:2]))


def arguments_of(op, kernel, rank_by="mass"):
    """Arguments of each op, on odd sizes."""
    query, key = axis("v" * 33 + "t", heads=4, padding=2), axis("v" * 35 + "t", heads=2)
    ready, keep = torch.ones(1, dtype=torch.int32), torch.zeros(1, 4, 35, 2, dtype=torch.int32)
    figures, at_bounds = torch.full((1, 4), 0.5), torch.zeros(1, 4, 2)
    mass, rest = random_mass(query, key, heads=4), (0.9, 0.02, 0.5, rank_by, True, 0, kernel)
    means = clusters(torch.arange(24).view(1, 4, 6) % 5, torch.arange(44).view(1, 2, 22) % 7)
    return {
        "plan_estimated_recall": (*means, ready, figures, 0.25, *rest),
        "plan_measured_recall": (mass, *query, *key, keep, ready, at_bounds, *rest),
        "calibrate_recall": (
            torch.tensor([[0.5, 0.9, math.nan, 1]]),
            torch.zeros(1, 4, 2),
            0.9,
            torch.zeros(1, 4),
            kernel,
        ),
        "keep_weak_heads_whole": (figures, query.offsets, key.offsets, keep, 0.5, True, kernel),
    }[op]


OPS_OF_RECALL = ("plan_estimated_recall", "plan_measured_recall", "calibrate_recall", "keep_weak_heads_whole")


@each_kernel
@pytest.mark.parametrize("op", OPS_OF_RECALL)
def test_opcheck(op, kernel):
    results = torch.library.opcheck(getattr(OPS, op).default, arguments_of(op, kernel))
    assert set(results.values()) == {"SUCCESS"}, results


@ranks
@pytest.mark.parametrize("op", OPS_OF_RECALL)
def test_no_value_is_read_on_the_host(op, rank_by):
    from sparse_compile.ops import recall

    with FakeTensorMode() as mode:  # any read of a value raises
        arguments = arguments_of(op, "reference", rank_by)
        getattr(recall, f"_{op}")(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
