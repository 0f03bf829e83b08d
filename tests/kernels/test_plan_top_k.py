"""The choice of key blocks by mass (docs/adaspa.md, sections 5, 6 and 13.1)."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from block_axes import Axis, axis, random_mass
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import IMPLEMENTATIONS, OPS, assert_same_bits, packed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_compile.kernels.block_map import top_k_reference as reference
from sparse_compile.plan import unpack_bits

few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
kinds_of_blocks = st.text("vvvt", min_size=1, max_size=40)
rules = pytest.mark.parametrize("rule", ["off", "paper", "guarded"])


class Chosen(NamedTuple):
    """What plan_top_k gives, the bitmap as bool [B, H, Gq, Gk]."""

    kept: Tensor
    recall: Tensor
    counts: Tensor


def choose(mass, query, key, *, sparsity=0.8, rule="off", rank_by="mass", padded=True, seed=0):
    keep, recall, counts = reference.plan_top_k(
        mass, query.offsets, query.is_video, key.offsets, key.is_video, sparsity, rule, rank_by, padded, seed
    )
    assert (keep.dtype, recall.dtype, counts.dtype) == (torch.int32, torch.float32, torch.int32)
    return Chosen(unpack_bits(keep, mass.shape[-1]), recall, counts)


def with_recalls(shares, tops):
    """Mass of heads with 100 video blocks, of which the first ``tops`` hold the given share, falling off evenly."""
    mass = torch.zeros(1, len(shares), 2, 101)
    for head, share in enumerate(shares):
        mass[0, head, 0, :tops] = share / tops
        mass[0, head, 0, tops:100] = (1 - share) / (100 - tops)
    return mass


@pytest.mark.parametrize(
    ("sparsity", "blocks", "expected"),
    [
        pytest.param(0.9, 5, 1, id="half-a-block-rounds-up"),
        pytest.param(0.9, 25, 3, id="a-product-rounded-below-the-half"),
        pytest.param(0.7, 5, 2, id="a-product-rounded-above-the-half"),
        pytest.param(0.8, 1861, 372, id="HunyuanVideo"),
        pytest.param(0.99, 20, 1, id="at-least-one"),
        pytest.param(0.0, 7, 7, id="all"),
        pytest.param(1e-12, 7, 7, id="never-more-than-all"),
        pytest.param(0.8, 0, 0, id="none-to-choose-from"),
    ],
)
def test_the_even_count_is_the_rounded_share(sparsity, blocks, expected):
    assert int(reference.even_count(torch.tensor(blocks), sparsity)) == expected


@pytest.mark.parametrize(
    ("count", "blocks", "expected"),
    [
        pytest.param(20, 100, (10, 20, 30), id="half"),
        pytest.param(5, 100, (3, 5, 7), id="half-rounds-down"),
        pytest.param(90, 100, (80, 90, 100), id="limited-by-what-there-is"),
        pytest.param(1, 100, (1, 1, 1), id="nothing-to-give"),
        pytest.param(7, 7, (7, 7, 7), id="nothing-to-receive"),
        pytest.param(0, 0, (0, 0, 0), id="nothing"),
    ],
)
def test_a_head_trades_half_of_its_blocks_or_what_there_is(count, blocks, expected):
    budgets = reference.three_budgets(torch.tensor(count), torch.tensor(blocks))
    assert tuple(int(budget) for budget in budgets) == expected


def counts_of(fewer, even, rule, count=20, blocks=100):
    budgets = torch.stack(reference.three_budgets(torch.tensor(count), torch.tensor(blocks)))
    return budgets[reference.chosen_levels(torch.tensor(fewer), torch.tensor(even), rule)].tolist()


def test_heads_trade_as_in_the_worked_example():
    recalls = [0.99, 0.95, 0.5, 0.9, 0.1, 0.85]
    assert counts_of([0.0] * 6, recalls, "paper") == [10, 10, 30, 10, 30, 30]
    assert counts_of([0.0] * 6, recalls, "guarded") == [20] * 6
    assert counts_of(recalls, recalls, "off") == [20] * 6


def test_guarded_heads_give_by_what_they_would_have_left():
    fewer, even = [0.7, 0.85, 0.4, 0.9, 0.05, 0.81], [0.99, 0.95, 0.5, 0.92, 0.1, 0.85]
    assert counts_of(fewer, even, "guarded") == [20 + 10, 10, 30, 10, 30, 10]
    assert counts_of(fewer[:5], even[:5], "guarded") == [20, 10, 30, 10, 30]


def test_head_ties_go_to_the_lower_head():
    same = [0.9] * 5
    assert counts_of(same, same, "paper") == counts_of(same, same, "guarded") == [10, 10, 30, 30, 20]
    mixed = [0.9, 0.5, 0.5, 0.5]
    assert counts_of(mixed, mixed, "paper") == [10, 30, 20, 20]
    assert counts_of([0.8] * 4, [0.8] * 4, "paper") == [20] * 4, "the threshold itself is not above it"


@rules
@pytest.mark.parametrize("heads", [1, 2, 5, 24])
@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.33, 0.5, 0.8, 0.9, 0.99])
def test_budgets_sum_to_the_even_count_times_the_heads(sparsity, heads, rule):
    sizes = [[4] * 33, [4] * 20 + [0] * 13]  # the second item is shorter
    query, key = axis("v" * 33, sizes, heads=heads), axis("v" * 33, sizes, heads=heads)
    mass = random_mass(query, key, heads=heads) ** torch.linspace(0.2, 3, heads).view(-1, 1, 1)
    chosen = choose(mass, query, key, sparsity=sparsity, rule=rule)
    for item, blocks in enumerate((33, 20)):
        even = int(reference.even_count(torch.tensor(blocks), sparsity))
        counts = chosen.counts[item]
        assert int(counts.sum()) == heads * even
        assert counts.min() >= 1 and counts.max() <= blocks
        if heads == 1 or rule == "off":
            assert (counts == even).all()
        elif heads > 2 and sparsity in (0.5, 0.8):
            assert counts.unique().numel() > 1, "heads trade at all"


def test_guarded_heads_that_gave_keep_more_than_the_threshold():
    query, key = axis("v", heads=6), axis("v" * 100, heads=6)
    even = with_recalls([0.99, 0.97, 0.95, 0.85, 0.3, 0.2], 20)
    assert choose(even, query, key, rule="guarded").counts.tolist() == [[20] * 6], "half of a share is too little"
    paper = choose(even, query, key, rule="paper")
    assert paper.counts.tolist() == [[10, 10, 10, 30, 30, 30]] and paper.recall[0, :3].max() < 0.5
    front = even.clone()
    front[0, :3, 0, :10] *= 1.9  # three heads have nearly all of it in the first half of their blocks
    front[0, :3, 0, 10:20] *= 0.1
    guarded = choose(front, query, key, rule="guarded")
    assert guarded.counts.tolist() == [[10, 10, 10, 30, 30, 30]]
    assert guarded.recall[0, :3].min() > reference.HEAD_THRESHOLD


def exact_choice(row, candidates, number):
    """The blocks with the most mass, one row in Python."""
    ranked = sorted(candidates, key=lambda block: (-row[block], block))
    return set(ranked[:number])


@few
@given(seed=seeds, q_kinds=kinds_of_blocks, k_kinds=kinds_of_blocks, sparsity=st.floats(0, 0.999), padded=st.booleans())
@pytest.mark.parametrize("rank_by", ["mass", "mass_per_key"])
def test_the_choice_is_that_of_exact_arithmetic(rank_by, seed, q_kinds, k_kinds, sparsity, padded):
    generator = torch.Generator().manual_seed(seed)
    q_sizes, k_sizes = (torch.randint(9, (len(kinds),), generator=generator).tolist() for kinds in (q_kinds, k_kinds))
    query, key = axis(q_kinds, q_sizes, heads=2, padding=3), axis(k_kinds, k_sizes, padding=3)
    mass = random_mass(query, key, heads=2, seed=seed)
    chosen = choose(mass, query, key, sparsity=sparsity, rule="guarded", rank_by=rank_by, padded=padded)
    alive = [block for block, size in enumerate(k_sizes) if size]
    video = [block for block in alive if k_kinds[block] == "v"]
    for head in range(2):
        kept_mass = all_mass = 0.0
        for row, size in enumerate([*q_sizes, 3]):
            own = mass[0, head, row].double().tolist()
            rank = [x / max(1, n) for x, n in zip(own, [*k_sizes, 3], strict=True)] if rank_by != "mass" else own
            expected = set(alive) if size and (row < len(q_sizes) or padded) else set()
            if size and row < len(q_sizes) and q_kinds[row] == "v":
                number = int(chosen.counts[0, head])
                expected = (set(alive) - set(video)) | exact_choice(rank, video, number)
                if math.fsum(own):
                    kept_mass += size * math.fsum(own[block] for block in expected) / math.fsum(own)
                    all_mass += size
            assert set(chosen.kept[0, head, row].nonzero().flatten().tolist()) == expected
        recall = kept_mass / all_mass if all_mass else 1.0
        assert float(chosen.recall[0, head]) == pytest.approx(recall, abs=1e-6)


@rules
@pytest.mark.parametrize("rank_by", ["mass", "mass_per_key", "random"])
@pytest.mark.parametrize("kinds", ["v" * 20, "tt" + "v" * 20, "v" * 20 + "ttt", "v" * 9 + "t" + "v" * 11 + "t", "v"])
def test_video_rows_keep_their_budget_and_all_text_and_text_rows_keep_all(rule, rank_by, kinds):
    query, key = axis(kinds, heads=4, padding=2), axis(kinds, heads=2, padding=5)
    mass = random_mass(query, key, heads=4) ** torch.tensor([3, 0.3, 1, 2]).view(-1, 1, 1)
    chosen = choose(mass, query, key, rule=rule, rank_by=rank_by)
    video = query.is_video
    per_row = (chosen.kept & video).sum(-1)[:, :, video]
    assert (per_row == chosen.counts.unsqueeze(-1)).all()
    assert chosen.kept[..., :-1][..., ~video[:-1]].all(), "everyone attends to text"
    assert chosen.kept[:, :, ~video, :-1].all(), "text, and padding as asked, attends to everything"
    assert not chosen.kept[..., -1].any()
    strict = choose(mass, query, key, rule=rule, rank_by=rank_by, padded=False)
    assert torch.equal(strict.kept[:, :, :-1], chosen.kept[:, :, :-1]) and not strict.kept[:, :, -1].any()


def test_ties_go_to_the_lower_block():
    query, key = axis("vv"), axis("tvvvvv")
    mass = torch.tensor([[1.0, 2, 3, 3, 3, 1, 0], [9, 0, 0, 0, 0, 0, 0], [0] * 7]).view(1, 1, 3, 7)
    kept = choose(mass, query, key, sparsity=0.6).kept[0, 0].int()
    assert kept.tolist() == [[1, 0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0], [0] * 7]


@rules
def test_uniform_mass_keeps_as_many_blocks_as_asked(rule):
    query, key = axis("v" * 50, heads=4), axis("v" * 50, heads=4)
    chosen = choose(torch.ones(1, 4, 51, 51), query, key, rule=rule)
    assert (chosen.counts == 10).all() and chosen.kept[:, :, :50, :10].all() and not chosen.kept[..., 10:].any()
    assert torch.equal(chosen.recall, torch.full((1, 4), 0.2))


@few
@given(seed=seeds, exponents=st.lists(st.integers(-20, 20), min_size=5, max_size=5))
@pytest.mark.parametrize("rank_by", ["mass", "mass_per_key"])
def test_a_shift_of_the_log_sum_exp_changes_no_block(rank_by, seed, exponents):  # docs/adaspa.md, section 12, test 3
    query, key = axis("vvvvt", heads=4), axis("v" * 40 + "t", heads=4)
    mass = random_mass(query, key, heads=4, seed=seed) ** torch.tensor([3, 0.3, 1, 2]).view(-1, 1, 1)
    shift = torch.tensor([2.0**exponent for exponent in [*exponents, 0]]).unsqueeze(1)
    for rule in ("off", "paper", "guarded"):
        plain = choose(mass, query, key, rule=rule, rank_by=rank_by)
        assert_same_bits(plain, choose(mass * shift[0], query, key, rule=rule, rank_by=rank_by))
    plain, rows = (choose(x, query, key, rank_by=rank_by) for x in (mass, mass * shift))
    assert torch.equal(plain.kept, rows.kept)


@rules
def test_a_sparsity_of_0_keeps_every_valid_block(rule):
    query, key = axis("vvtvv", [4, 0, 3, 2, 4], heads=2), axis("tvvvvv", [3, 4, 4, 0, 4, 1], heads=2)
    chosen = choose(random_mass(query, key, heads=2), query, key, sparsity=0.0, rule=rule)
    assert torch.equal(chosen.kept[0, 0], query.alive[0].unsqueeze(1) & key.alive[0])
    assert (chosen.recall == 1).all() and (chosen.counts == 4).all()


def test_groups_without_tokens_keep_nothing_and_are_not_kept():
    sizes = [4, 0, 4, 4, 0, 4, 0, 4]
    query, key = axis("vvvvvvtt", sizes), axis("vvvvvvtt", sizes)
    mass = torch.ones(1, 1, 9, 9)  # also where nothing is
    mass[:, :, [1, 4, 8]] = 7 * torch.arange(9.0)
    chosen = choose(mass, query, key, sparsity=0.5)
    assert (chosen.counts == 2).all()
    assert not chosen.kept[0, 0][:, [1, 4, 6, 8]].any() and not chosen.kept[0, 0][[1, 4, 6, 8]].any()
    assert (chosen.kept[0, 0][[0, 2, 3, 5]].sum(-1) == 3).all()
    assert float(chosen.recall) == pytest.approx(3 / 5)


@pytest.mark.parametrize("padded", [True, False])
def test_an_item_that_is_all_padding_keeps_nothing(padded):
    sizes = [[4, 4, 4], [0, 0, 0]]
    query, key = axis("vvt", sizes, padding=12), axis("vvt", sizes, padding=12)
    chosen = choose(torch.zeros(2, 1, 4, 4), query, key, padded=padded)
    assert chosen.counts.flatten().tolist() == [1, 0] and (chosen.recall == 1).all()
    assert not chosen.kept[1].any() and chosen.kept[0, 0, :3].any()


def test_rows_without_finite_mass_leave_the_others_alone():
    query, key = axis("v" * 20, heads=4), axis("v" * 20, heads=4)
    mass = random_mass(query, key, heads=4) ** torch.tensor([3, 0.3, 1, 2]).view(-1, 1, 1)
    broken = mass.clone()
    broken[:, :, 3] = 0
    clean = choose(broken, query, key, rule="paper")
    broken[:, :, 3] = math.nan
    broken[0, 0, 3, :3] = math.inf
    assert_same_bits(choose(broken, query, key, rule="paper"), clean)
    assert clean.recall.isfinite().all() and (clean.kept[0, :, 3].sum(-1) == clean.counts[0]).all()


@rules
@pytest.mark.parametrize("rank_by", ["mass", "mass_per_key", "random"])
def test_a_batch_equals_its_items(rule, rank_by):
    sizes = [[4] * 30 + [3], [4] * 22 + [0] * 8 + [1]]
    query, key = (axis("v" * 30 + "t", sizes, heads=heads) for heads in (4, 2))
    mass = random_mass(query, key, heads=4) ** torch.tensor([3, 0.3, 1, 2]).view(-1, 1, 1)
    both = choose(mass, query, key, rule=rule, rank_by=rank_by, seed=3)
    for item in (0, 1):
        own = slice(item, item + 1)
        parts = [Axis(side.offsets[own], side.is_video) for side in (query, key)]
        alone = choose(mass[own], *parts, rule=rule, rank_by=rank_by, seed=3)
        assert_same_bits(alone, (x[own] for x in both))


def test_shared_key_heads_choose_as_repeated_ones():
    query, one, four = axis("v" * 30, heads=4), axis("v" * 30, heads=1), axis("v" * 30, heads=4)
    mass = random_mass(query, one, heads=4)
    assert_same_bits(choose(mass, query, one, rule="paper"), choose(mass, query, four, rule="paper"))


def test_random_blocks_depend_on_seed_head_and_row_and_not_on_mass():
    query, key = axis("v" * 40, heads=2), axis("v" * 40, heads=2)
    mass = random_mass(query, key, heads=2)
    first = choose(mass, query, key, rank_by="random", seed=1)
    assert torch.equal(first.kept, choose(mass.flip(-1), query, key, rank_by="random", seed=1).kept)
    other = choose(mass, query, key, rank_by="random", seed=2)
    rows = [chosen.kept[0, head, row] for chosen in (first, other) for head in (0, 1) for row in (0, 1)]
    assert len({tuple(row.tolist()) for row in rows}) == 8
    share = first.kept[0, :, :40, :40].float().mean(1)
    assert share.min() > 0 and share.max() < 0.6, "no block is preferred"
    exact = ((mass * first.kept).sum(-1) / mass.sum(-1))[:, :, :40].mean(-1)
    assert torch.allclose(first.recall, exact, atol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("ready", [0, 1])
def test_kept_blocks_gives_what_was_stored_without_the_groups_that_are_empty_now(padded, ready):
    sizes = [[4] * 70, [4] * 50 + [0] * 20]
    query, key = axis("v" * 70, sizes, heads=4, padding=5), axis("v" * 70, sizes, heads=2, padding=5)
    stored = torch.rand(2, 4, 71, 71, generator=torch.Generator().manual_seed(0)) < 0.3
    keep = reference.kept_blocks(packed(stored), torch.tensor([ready], dtype=torch.int32), *query, *key, padded)
    valid = query.alive[:, None, :, None] & key.alive[:, None, None, :]
    expected = valid & stored if ready else valid.expand_as(stored).clone()
    expected[:, :, 70] = key.alive.unsqueeze(1) if padded else False
    assert torch.equal(unpack_bits(keep, 71), expected)


def test_text_that_was_padding_when_the_plan_was_made_is_kept_later():
    then = axis("vvvvtt", [4, 4, 4, 0, 4, 0], padding=8)
    now = axis("vvvvtt", [4, 4, 4, 4, 4, 4])
    keep, _, _ = reference.plan_top_k(torch.rand(1, 1, 7, 7), *then, *then, 0.7, "off", "mass", True, 0)
    later = unpack_bits(reference.kept_blocks(keep, torch.ones(1, dtype=torch.int32), *now, *now, True), 7)[0, 0]
    assert later[:6, 4:6].all(), "everyone attends to text"
    assert later[4:6, :6].all() and later[3, :6].all(), "text, and a row that had no tokens, attend to everything"
    assert (later[:3, :4].sum(-1) == 1).all(), "the plan of the others stays"


@rules
def test_drift_of_whole_rows_moves_neither_recall_nor_budgets(rule):
    """The log-sum-exp of some rows has grown since it was kept: their mass is too large by one factor each."""
    query, key = axis("v" * 40, heads=4), axis("v" * 40, heads=4)
    mass = random_mass(query, key, heads=4) ** torch.tensor([3, 0.3, 1, 2]).view(-1, 1, 1)
    drifted = mass * torch.where(torch.arange(41) < 20, math.exp(4), math.exp(-2)).unsqueeze(-1)
    one, other = (choose(x, query, key, rule=rule, sparsity=0.6) for x in (mass, drifted))
    assert torch.equal(one.counts, other.counts) and torch.equal(one.kept, other.kept)
    assert torch.allclose(one.recall, other.recall, atol=1e-6)


def op_arguments(kernel, rule="guarded", rank_by="mass"):
    query, key = axis("v" * 33 + "t", heads=4, padding=2), axis("v" * 35 + "t", heads=2)
    mass = random_mass(query, key, heads=4)
    keep, ready = torch.zeros(1, 4, 35, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return (mass, *query, *key, keep, ready, 0.8, rule, rank_by, True, 0, kernel)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_the_op_files_the_plan_and_says_that_it_is_there(kernel):
    arguments = op_arguments(kernel)
    recall, counts = OPS.plan_top_k(*arguments)
    mass, q_offsets, q_is_video, k_offsets, k_is_video, keep, ready = arguments[:7]
    direct = reference.plan_top_k(mass, q_offsets, q_is_video, k_offsets, k_is_video, 0.8, "guarded", "mass", True, 0)
    assert_same_bits((keep, recall, counts), direct)
    assert ready.item() == 1
    now = OPS.kept_blocks(keep, ready, q_offsets, q_is_video, k_offsets, k_is_video, True, kernel)
    assert torch.equal(now, keep)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_opcheck(kernel):
    arguments = op_arguments(kernel)
    results = torch.library.opcheck(OPS.plan_top_k.default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results
    stored = (*arguments[5:7], *arguments[1:5], False, kernel)
    results = torch.library.opcheck(OPS.kept_blocks.default, stored)
    assert set(results.values()) == {"SUCCESS"}, results


@rules
@pytest.mark.parametrize("rank_by", ["mass", "mass_per_key", "random"])
def test_no_value_is_read_on_the_host(rule, rank_by):
    arguments = op_arguments("reference", rule, rank_by)
    tensors = [*arguments[:5], *arguments[5:7]]
    with FakeTensorMode() as mode:
        mass, q_offsets, q_is_video, k_offsets, k_is_video, keep, ready = map(mode.from_tensor, tensors)
        made = reference.plan_top_k(
            mass, q_offsets, q_is_video, k_offsets, k_is_video, 0.8, rule, rank_by, True, 0
        )  # any read of a value raises
        assert [x.shape for x in made] == [(1, 4, 35, 2), (1, 4), (1, 4)]
        tensors_of_sides = (q_offsets, q_is_video, k_offsets, k_is_video)
        assert reference.kept_blocks(keep, ready, *tensors_of_sides, False).shape == keep.shape
