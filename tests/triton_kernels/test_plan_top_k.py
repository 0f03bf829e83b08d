"""The Triton kernels that choose key blocks by mass, against the reference (docs/adaspa.md, sections 5 and 6)."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from kernel_oracles import assert_same_bits
from torch import Tensor

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.block_map import top_k_reference as reference
from sparse_compile.kernels.block_map import triton_launch
from sparse_compile.kernels.block_map.configs import LARGEST_ROW, RowConfig
from sparse_compile.plan import unpack_bits

ranks = pytest.mark.parametrize("rank_by", ["mass", "mass_per_key", "random"])
CONTRAST = torch.tensor([3, 0.3, 1, 2]).view(-1, 1, 1)
"""How unevenly each of four heads spreads its mass, so that they trade."""


class Problem(NamedTuple):
    """The tensors of `plan_top_k`."""

    mass: Tensor
    q_offsets: Tensor
    q_is_video: Tensor
    k_offsets: Tensor
    k_is_video: Tensor

    def item(self, number):
        own = slice(number, number + 1)
        return self._replace(mass=self.mass[own], q_offsets=self.q_offsets[own], k_offsets=self.k_offsets[own])

    @property
    def alive(self):
        """Which blocks have tokens and are not padding: bool [B, Gq] and [B, Gk]."""
        return [torch.nn.functional.pad(x[:, 0].diff()[:, :-1] > 0, (0, 1)) for x in (self.q_offsets, self.k_offsets)]


def axis(kinds, sizes, heads):
    """Bounds int32 [B, heads, G + 1] and is_video [G] of blocks of the kinds v and t, and of padding."""
    bounds = torch.nn.functional.pad(torch.tensor(sizes).cumsum(-1), (1, 0)).int()
    return bounds.unsqueeze(1).repeat(1, heads, 1), torch.tensor([kind == "v" for kind in kinds] + [False])


@pytest.fixture
def problem(device):
    """Makes random mass of blocks of the kinds v and t; sizes are one list for each batch item, padding last."""

    def make(q_kinds="vtv", k_kinds="v" * 32 + "tv", *, heads=4, key_heads=2, q_sizes=None, k_sizes=None, seed=0):
        q_sizes = q_sizes or [[4] * len(q_kinds) + [2]]
        k_sizes = k_sizes or [[4] * len(k_kinds) + [3]]
        query, key = axis(q_kinds, q_sizes, heads), axis(k_kinds, k_sizes, key_heads)
        shape = (len(q_sizes), heads, len(q_kinds) + 1, len(k_kinds) + 1)
        mass = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).exp() ** CONTRAST[:heads]
        made = Problem(mass, *query, *key)
        rows, columns = made.alive
        mass *= rows[:, None, :, None] * columns[:, None, None, :]
        return Problem(*(x.to(device) for x in made))

    return make


def arguments(sparsity=0.8, rule="off", rank_by="mass", padded=True, seed=0):
    return (sparsity, rule, rank_by, padded, seed)


def choose(problem, *, row_config=None, **options):
    with nan_filled_empty():
        keep, recall, counts = triton_launch.plan_top_k(*problem, *arguments(**options), row_config)
    assert (keep.dtype, recall.dtype, counts.dtype) == (torch.int32, torch.float32, torch.int32)
    return keep, recall, counts


def assert_as_the_reference(problem, **options):
    """Bitmap and counts bit for bit; recall to the rounding of float32."""
    keep, recall, counts = choose(problem, **options)
    right = reference.plan_top_k(*problem, *arguments(**options))
    assert torch.equal(counts, right[2])
    assert torch.equal(keep, right[0])
    assert torch.allclose(recall, right[1], rtol=2e-7, atol=0)
    return keep, recall, counts


@ranks
@pytest.mark.parametrize("rule", ["off", "paper", "guarded"])
def test_blocks_recall_and_budgets_are_those_of_the_reference(problem, rank_by, rule):
    _, _, counts = assert_as_the_reference(problem(), rank_by=rank_by, rule=rule, sparsity=0.5, seed=9)
    assert (rule == "off") == (counts.unique().numel() == 1) or rank_by == "random", "heads trade at all"


@pytest.mark.parametrize("kinds", ["", "v", "t", "v" * 30, "v" * 31, "v" * 32, "t" * 40, "tt" + "v" * 98])
def test_rows_of_any_length(problem, kinds):
    assert_as_the_reference(problem("vv", kinds, heads=1, key_heads=1), rule="guarded")


@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.999])
def test_any_budget(problem, sparsity):
    _, recall, _ = assert_as_the_reference(
        problem("vv", "v" * 37, heads=2, key_heads=1), sparsity=sparsity, rule="paper"
    )
    assert (recall == 1).all() == (sparsity == 0)


@pytest.mark.parametrize("rank_by", ["mass", "mass_per_key"])
def test_ties_go_to_the_lower_block(problem, rank_by):
    made = problem("v", "v" * 20 + "t" + "v" * 20, heads=2, key_heads=1)
    made.mass.copy_(made.mass.clamp(max=3).round())  # four values; 0 as -0, too
    made.mass[..., 1::2] *= torch.where(made.mass[..., 1::2] == 0, -1.0, 1.0)
    for sparsity in (0.1, 0.5, 0.9):
        assert_as_the_reference(made, rank_by=rank_by, sparsity=sparsity, rule="guarded")


def test_the_choice_is_that_of_a_sort(problem):
    made = problem("vv", "v" * 45, heads=1, key_heads=1, seed=4)
    kept = unpack_bits(choose(made, sparsity=0.7)[0], 46)[0, 0]
    for row in (0, 1):
        values = made.mass[0, 0, row, :45].tolist()
        best = sorted(range(45), key=lambda block: (-values[block], block))[:14]  # 13.5 blocks, rounded
        assert sorted(best) == kept[row].nonzero().flatten().tolist()


def test_mass_per_key_tells_quotients_apart_that_float32_cannot(problem):
    sizes = [[3, 5, 3, 5, 7, 0]]
    made = problem("v", "vvvvv", heads=1, key_heads=1, q_sizes=[[4, 0]], k_sizes=sizes)
    row = [16777215.0, 27962026.0, 16777215.0, 27962024.0, 0.0, 0.0]  # over 3 or 5: 5592405 and a fifth more or less
    made.mass[0, 0, 0] = torch.tensor(row)
    assert len({x / n for x, n in zip(row[:4], sizes[0], strict=False)}) == 3
    quotients = made.mass[0, 0, 0, :4].cpu() / torch.tensor(sizes[0][:4])
    assert quotients.unique().numel() == 1, "in float32 all four tie"
    for sparsity, expected in ((0.8, [1]), (0.6, [0, 1]), (0.4, [0, 1, 2])):
        keep, _, _ = assert_as_the_reference(made, sparsity=sparsity, rank_by="mass_per_key")
        assert unpack_bits(keep, 6)[0, 0, 0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    "rank_by", ["mass", *(pytest.param(other, marks=pytest.mark.slow) for other in ("mass_per_key", "random"))]
)
def test_text_padding_and_empty_blocks(problem, rank_by, padded):
    q_sizes = [[4, 0, 4, 3, 2], [4, 4, 0, 0, 5], [0, 0, 0, 0, 13]]  # the last item is all padding
    k_sizes = [[4, 0, 4, 4, 0, 4, 3, 4, 0], [4, 4, 4, 0, 0, 0, 0, 4, 7], [0] * 8 + [23]]
    made = problem("vvvt", "vvvvvtvt", heads=2, key_heads=1, q_sizes=q_sizes, k_sizes=k_sizes)
    options = {"rank_by": rank_by, "padded": padded, "rule": "paper", "sparsity": 0.5}
    keep, recall, counts = assert_as_the_reference(made, **options)
    kept = unpack_bits(keep, 9)
    assert not kept[..., 8].any() and not kept[2].any() and (recall[2] == 1).all() and (counts[2] == 0).all()
    assert kept[0, 0, 4].any() == padded
    for number in range(3) if padded else ():
        alone = choose(made.item(number), **options)
        assert_same_bits(alone, (x[number : number + 1] for x in (keep, recall, counts)))


def test_mass_where_nothing_is_does_not_count(problem):
    made = problem("vvt", "vvvvtv", heads=2, key_heads=1, q_sizes=[[4, 0, 4, 2]], k_sizes=[[4, 0, 4, 4, 4, 4, 3]])
    clean = choose(made, sparsity=0.5, rule="paper")
    rows, columns = (x[0] for x in made.alive)
    for value in (1e30, math.nan):
        made.mass.copy_(torch.where(rows.unsqueeze(1) & columns, made.mass, value))
        assert_same_bits(assert_as_the_reference(made, sparsity=0.5, rule="paper"), clean)


def test_mass_that_is_not_finite_counts_as_0(problem):
    made = problem("vvv", "v" * 20, heads=2, key_heads=1)
    broken = made.mass.clone()
    broken[:, :, 1] = 0
    broken[:, :, 2, 3:9] = 0
    clean = choose(made._replace(mass=broken), rule="paper")
    broken[:, :, 1] = math.nan
    broken[0, 0, 1, :3] = math.inf
    broken[:, :, 2, 3:9] = -math.inf
    assert_same_bits(choose(made._replace(mass=broken), rule="paper"), clean)
    assert clean[1].isfinite().all()
    nothing = choose(made._replace(mass=broken * math.nan), rule="paper")
    assert (nothing[1] == 1).all() and (unpack_bits(nothing[0], 21)[0, :, :3].sum(-1) == nothing[2][0, :, None]).all()


def test_every_row_counts_by_its_tokens_whatever_its_sum(problem):
    made = problem("vvv", "v" * 20, heads=2, q_sizes=[[1, 40, 7, 0]])
    drift = torch.tensor([2.0**20, 2.0**-20, 1, 1], device=made.mass.device).view(-1, 1)
    one, other = (
        assert_as_the_reference(made._replace(mass=x), rule="guarded") for x in (made.mass, made.mass * drift)
    )
    assert_same_bits(one, other)


def test_recall_adds_all_rows_of_a_head(problem, monkeypatch):
    """More rows than are added up at a time."""
    monkeypatch.setattr(triton_launch, "ROWS_AT_A_TIME", 4)
    assert_as_the_reference(problem("v" * 9, "vvv", heads=1, key_heads=1, q_sizes=[[*range(1, 10), 5]]))


def test_any_strides_and_any_configuration_give_the_same_bits(problem):
    made = problem("vv", "v" * 20, heads=2)
    right = choose(made, sparsity=0.6, rule="guarded")
    strided = made.mass.transpose(1, 3).contiguous().transpose(1, 3)
    assert strided.stride(-1) != 1
    assert_same_bits(choose(made._replace(mass=strided), sparsity=0.6, rule="guarded"), right)
    assert_same_bits(choose(made, sparsity=0.6, rule="guarded", row_config=RowConfig(128, 4, 1)), right)


@pytest.mark.parametrize("seed", [-3, 2**63 - 1])
def test_random_blocks_are_those_of_the_counter_hash(problem, seed):
    assert_as_the_reference(problem("vv", "v" * 40, heads=2), rank_by="random", seed=seed)


def test_rows_too_long_for_a_program_are_planned_by_the_reference(problem, monkeypatch):
    made = problem("v", "v" * LARGEST_ROW, heads=1, key_heads=1)
    monkeypatch.setattr(triton_launch, "launch", None)
    assert_as_the_reference(made)


@pytest.mark.slow
@ranks
def test_long_rows(problem, rank_by):
    made = problem("v", "v" * 7441, heads=2, key_heads=1)
    assert_as_the_reference(made, rank_by=rank_by, rule="guarded")


@pytest.mark.gpu
@ranks
@pytest.mark.parametrize("blocks", [1182, 1860])
def test_real_sizes(problem, blocks, rank_by):
    kinds = "v" * (blocks - 4) + "tttt"
    made = problem(kinds, kinds, heads=4, key_heads=4)
    many = made._replace(
        mass=made.mass.repeat(1, 10, 1, 1), q_offsets=made.q_offsets.repeat(1, 10, 1), k_offsets=made.k_offsets[:, :1]
    )
    chosen = choose(many, rank_by=rank_by, rule="guarded")
    assert_same_bits(choose(many, rank_by=rank_by, rule="guarded"), chosen)
    assert_as_the_reference(made, rank_by=rank_by, rule="guarded")
