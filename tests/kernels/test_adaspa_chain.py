"""The ops of AdaSpa one after the other: dense attention, search, plan, sparse attention, probe.

The numbers in comments are those of the tests in docs/adaspa.md, section 12.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from kernel_oracles import (
    DTYPES,
    IMPLEMENTATIONS,
    OPS,
    assert_same_bits,
    attend,
    exact_attention,
    fields_of,
    labels_of,
    random_tensor,
    token_mask,
)
from moving_objects import SIZE, MovingObjects
from torch import Tensor

from sparse_compile.kernels.block_map import top_k_reference
from sparse_compile.kernels.block_mass.reference import MOST_SPREAD
from sparse_compile.plan import Plan, unpack_bits

SCALE = SIZE**-0.5
TEXT = 13
RAGGED = (5, 6, 7)
"""210 tokens of video: with 13 of text, no length is a multiple of the block."""
MIDDLE, LARGE = (4, 8, 16), (8, 16, 16)
OUTPUT_BUDGETS = {torch.float32: (2e-5, 1e-4), torch.bfloat16: (5e-3, 3e-2), torch.float16: (1e-3, 4e-3)}
"""Error of an output: its root mean square over that of the output, and the largest one for v from N(0, 1)."""

each_kernel = pytest.mark.parametrize("kernel", IMPLEMENTATIONS)


def on_two_sizes(names, small, cases):
    """Each case on a small grid with each kernel, and the last of them on a large grid."""
    rows = [(small, kernel, *case) for kernel in IMPLEMENTATIONS for case in cases]
    rows.append((LARGE, "cpu", *cases[-1]))
    ids = ["-".join(map(str, (math.prod(grid), kernel, *case))) for grid, kernel, *case in rows]
    return pytest.mark.parametrize(("grid", "kernel", *names), rows, ids=ids)


each_dtype = on_two_sizes(["dtype"], RAGGED, [(dtype,) for dtype in DTYPES])


@functools.cache
def scene(step=0, dtype=torch.float32, **options):
    """q, k and v of one step; shared between tests, which leave them as they are."""
    return tuple(x.to(dtype) for x in MovingObjects(**options).at(step))


class Searched(NamedTuple):
    """What a search gives."""

    plan: Plan
    mass: Tensor
    spread: Tensor
    recall: Tensor
    counts: Tensor


@dataclass
class Site:
    """One attention site of one branch: its settings, and the state that the ops write."""

    video: list[int]
    key_video: list[int] | None = None
    valid: Tensor | None = None
    block: int = 32
    key_block: int | None = None
    sparsity: float = 0.8
    rule: str = "paper"
    kernel: str = "cpu"
    state: dict[str, Tensor] = field(default_factory=dict)

    def dense(self, q, k, v):
        """Dense attention, which leaves its log-sum-exp in the state."""
        self.state.setdefault("lse", torch.full(q.shape[:3], math.nan))
        lse = self.state["lse"]
        return OPS.attention_with_lse(q, k, v, self.valid, self.valid, lse, True, SCALE, True, self.kernel)

    def search(self, q, k, *, fresh):
        """A new plan, by the log-sum-exp in the state; it stays there."""
        query, key = self.blocks(q, k)
        rows, columns = query[2].numel(), key[2].numel()
        keep = self.state.setdefault("keep", torch.zeros(*q.shape[:2], rows, -(-columns // 32), dtype=torch.int32))
        ready = self.state.setdefault("ready", torch.zeros(1, dtype=torch.int32))
        lse, bounds, largest = self.state["lse"], (*query[:2], *key[:2]), max(self.block, self.key_block or 0)
        mass, spread = OPS.block_mass(q, k, lse, ready, *bounds, largest, SCALE, 1, fresh, self.kernel)
        options = (self.sparsity, self.rule, "mass", True, 0, self.kernel)
        recall, counts = OPS.plan_top_k(mass, *query[1:], *key[1:], keep, ready, *options)
        return Searched(self.plan(q, k), mass, spread, recall, counts)

    def plan(self, q, k):
        """The plan in the state."""
        query, key = self.blocks(q, k)
        keep = OPS.kept_blocks(self.state["keep"], self.state["ready"], *query[1:], *key[1:], True, self.kernel)
        return Plan(*query[:2], *key[:2], keep)

    def first_search(self, q, k, v):
        self.dense(q, k, v)
        return self.search(q, k, fresh=True)

    def probe(self, plan, q, k, recall=None, offset=None):
        """The kept mass by 64 probe rows."""
        options = (SCALE, 64, 0, self.kernel)
        measured = OPS.kept_mass(q, k, self.valid, self.video, *fields_of(plan), *options)
        return (
            measured
            if offset is None
            else OPS.paired_kept_mass(measured, recall, offset, torch.zeros_like(offset), self.kernel)
        )

    def blocks(self, q, k):
        spans = (self.video, self.key_video or self.video)
        sizes = (self.block, self.key_block or self.block)
        made = OPS.token_blocks(q, k, self.valid, self.valid, *spans, *sizes, self.kernel)
        in_place = self.valid is None
        return tuple((None if in_place else order, *rest) for order, *rest in (made[:3], made[3:]))


def site(grid=RAGGED, **options):
    return Site([0, math.prod(grid)], **options)


def explicit(plan):
    """The same plan with the order of the tokens written out."""

    def order(offsets):
        return torch.arange(int(offsets[0, 0, -1]), dtype=torch.int32).expand(*offsets.shape[:2], -1)

    if plan.q_order is not None:
        return plan
    return Plan(order(plan.q_offsets), plan.q_offsets, order(plan.k_offsets), plan.k_offsets, plan.keep)


def exact_lse(q, k):
    key = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q.double() @ key.transpose(-1, -2) * SCALE).logsumexp(-1)


def exact_mass(q, k, plan):
    """Block sums of the explicit softmax, float64 [B, H, Gq, Gk]; no padding."""
    plan = explicit(plan)
    key = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    shares = (q.double() @ key.transpose(-1, -2) * SCALE).softmax(-1)
    members = [
        torch.nn.functional.one_hot(labels_of(*side)[0, 0], side.offsets.shape[-1] - 1).double()
        for side in (plan.query_side, plan.key_side)
    ]
    return members[0].t() @ shares @ members[1]


def kept_share(mass, plan, video_blocks):
    """Recall of a plan: share of the mass of the first, visual rows that is kept, [B, H]."""
    rows = mass[:, :, :video_blocks]
    return (rows * plan.kept()[:, :, :video_blocks]).sum((-1, -2)) / rows.sum((-1, -2))


def video_blocks(grid, block=32):
    return -(-math.prod(grid) // block)


def assert_output_within_budget(out, exact):
    most, largest = OUTPUT_BUDGETS[out.dtype]
    error = out.double() - exact
    assert error.square().mean().sqrt() <= most * exact.square().mean().sqrt()
    assert error.abs().max() <= largest


@each_dtype
def test_a_sparsity_of_0_is_dense_attention(grid, kernel, dtype):  # 2
    q, k, v = scene(dtype=dtype, grid=grid, text=TEXT, heads=3)
    own = site(grid, sparsity=0.0, kernel=kernel)
    dense = own.dense(q, k, v)
    found = own.search(q, k, fresh=True)
    assert (found.plan.density() == 1).all() and (found.recall == 1).all()
    exact, lse = exact_attention(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool), SCALE)
    out, sparse_lse = attend(q, k, v, found.plan, SCALE, kernel=kernel)
    for result in (dense, out):
        assert_output_within_budget(result, exact)
    for result in (own.state["lse"], sparse_lse):
        assert ((result - lse).abs() <= 1e-4 * (lse.abs() / 50).clamp(min=1)).all()


@each_dtype
def test_a_sparse_output_is_that_of_its_plan(grid, kernel, dtype):
    q, k, v = scene(dtype=dtype, grid=grid, text=TEXT, heads=3)
    found = site(grid, kernel=kernel).first_search(q, k, v)
    out, lse = attend(q, k, v, found.plan, SCALE, kernel=kernel)
    exact, exact_kept = exact_attention(q, k, v, token_mask(explicit(found.plan)), SCALE)
    assert_output_within_budget(out, exact)
    assert (lse - exact_kept).abs().max() <= 1e-4


@on_two_sizes([], RAGGED, [()])
def test_recall_by_mass_is_recall_by_row(grid, kernel):  # 6
    q, k, v = scene(grid=grid, text=TEXT, gain=1.4)
    own = site(grid, sparsity=0.5, kernel=kernel)
    found = own.first_search(q, k, v)
    _, lse = attend(q, k, v, found.plan, SCALE, kernel=kernel)
    by_row = (lse - own.state["lse"]).exp()[:, :, : math.prod(grid)].double().mean(-1)
    assert (by_row - found.recall).abs().max() <= 1e-4
    assert found.recall.max() < 0.999 and found.counts.unique().numel() > 1, "blocks are left out, and heads trade"


@each_dtype
def test_a_plan_loses_no_recall_to_rounding(grid, kernel, dtype):
    q, k, v = scene(dtype=dtype, grid=grid, text=TEXT)
    own = site(grid, kernel=kernel, rule="off")
    found = own.first_search(q, k, v)
    query, key = own.blocks(q, k)
    exact = exact_mass(q, k, found.plan)
    keep, _, _ = top_k_reference.plan_top_k(exact, *query[1:], *key[1:], own.sparsity, "off", "mass", True, 0)
    best = Plan(*fields_of(found.plan)[:4], keep)
    lost = kept_share(exact, best, video_blocks(grid)) - kept_share(exact, found.plan, video_blocks(grid))
    assert lost.max() <= 1e-4


@each_kernel
@pytest.mark.parametrize("block", [32, 256])
def test_a_planted_permutation_is_found(kernel, block):  # 7
    likes = [3, 6, 0, 7, 1, 4, 2, 5]
    centres = torch.eye(8, SIZE) * math.sqrt(10 * SIZE**0.5)
    group = torch.arange(8).repeat_interleave(block)
    q = centres[torch.tensor(likes)[group]] + 0.1 * random_tensor(1, 2, 8 * block, SIZE)
    k = centres[group] + 0.1 * random_tensor(1, 2, 8 * block, SIZE, seed=1)
    v = random_tensor(1, 2, 8 * block, SIZE, seed=2)
    found = Site([0, 8 * block], block=block, sparsity=7 / 8, kernel=kernel).first_search(q, k, v)
    for head in (0, 1):
        assert found.plan.kept()[0, head, :8].nonzero().tolist() == [[row, liked] for row, liked in enumerate(likes)]
    assert found.recall.min() > 0.97


def run_branch(own, steps):
    """The calls of one branch as a generator: dense and search, then sparse, and a search again at the third step."""
    for number, step in enumerate(steps):
        q, k, v = step
        if number == 0:
            out = own.dense(q, k, v)
            plan = own.search(q, k, fresh=True).plan
        else:
            plan = own.search(q, k, fresh=False).plan if number == 2 else own.plan(q, k)
            out, _ = attend(q, k, v, plan, SCALE, kernel=own.kernel)
        yield out, plan.keep.clone(), own.state["lse"].clone()


@each_kernel
def test_branches_with_states_of_their_own_never_meet(kernel):  # 8
    data = [[scene(step, grid=RAGGED, text=TEXT, seed=seed) for step in (0, 1, 2, 3)] for seed in (0, 1)]
    alone = [list(run_branch(site(kernel=kernel), steps)) for steps in data]
    branches = [run_branch(site(kernel=kernel), steps) for steps in data]
    mixed = [[], []]
    for branch in (0, 1, 1, 0, 1, 0, 0, 1):
        mixed[branch].append(next(branches[branch]))
    for one, other in zip(alone, mixed, strict=True):
        for expected, got in zip(one, other, strict=True):
            assert_same_bits(expected, got)
    together = [tuple(torch.cat(parts) for parts in zip(*steps, strict=True)) for steps in zip(*data, strict=True)]
    for number, (_, keep, _) in enumerate(run_branch(site(kernel=kernel), together)):
        assert torch.equal(keep, torch.cat([alone[branch][number][1] for branch in (0, 1)]))


@each_kernel
def test_shared_key_heads_give_the_plan_of_repeated_ones(kernel):  # 9
    q, k, v = scene(grid=RAGGED, text=TEXT)
    k, v = k[:, ::3], v[:, ::3]
    shared = site(kernel=kernel).first_search(q, k, v)
    wide = [x.repeat_interleave(3, 1) for x in (k, v)]
    repeated = site(kernel=kernel).first_search(q, *wide)
    assert torch.equal(shared.plan.keep, repeated.plan.keep) and torch.equal(shared.counts, repeated.counts)
    out, _ = attend(q, k, v, shared.plan, SCALE, kernel=kernel)
    other, _ = attend(q, *wide, repeated.plan, SCALE, kernel=kernel)
    assert torch.allclose(out, other, atol=1e-6)


@each_kernel
def test_padding_changes_nothing_for_the_valid_tokens(kernel):  # 9
    q, k, v = scene(grid=RAGGED, text=TEXT)
    trimmed = site(kernel=kernel)
    dense = trimmed.dense(q, k, v)
    expected = trimmed.search(q, k, fresh=True)
    sparse, _ = attend(q, k, v, expected.plan, SCALE, kernel=kernel)

    valid = torch.nn.functional.pad(torch.ones(1, 223, dtype=torch.bool), (0, 40))
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 40), value=math.nan) for x in (q, k, v)]
    own = site(valid=valid, kernel=kernel)
    out = own.dense(*padded)
    found = own.search(*padded[:2], fresh=True)
    assert torch.allclose(out[:, :, :223], dense, atol=1e-5)
    blocks = expected.plan.key_groups - 1
    assert torch.equal(found.plan.kept()[:, :, :blocks, :blocks], expected.plan.kept()[:, :, :-1, :-1])
    assert not found.plan.kept()[..., blocks:].any(), "a block of padding alone is in no plan"
    assert torch.allclose(found.recall, expected.recall, atol=1e-6)
    assert torch.equal(found.counts, expected.counts)
    out, _ = attend(*padded, found.plan, SCALE, kernel=kernel)
    assert torch.allclose(out[:, :, :223], sparse, atol=1e-5)
    assert torch.allclose(own.probe(found.plan, *padded[:2]), trimmed.probe(expected.plan, q, k), atol=1e-6)


@each_kernel
def test_queries_and_keys_may_differ_in_number_and_in_blocks(kernel):  # 9
    q, k, v = scene(grid=RAGGED, text=TEXT)
    q = q[:, :, 100:]  # 110 of video
    own = Site([0, 110], key_video=[0, 210], block=48, key_block=16, kernel=kernel)
    found = own.first_search(q, k, v)
    assert found.mass.shape[2:] == (3 + 1 + 1, 14 + 1 + 1) and (found.counts.sum(-1) == 6 * 3).all()
    assert torch.allclose(found.recall.double(), kept_share(exact_mass(q, k, found.plan), found.plan, 3), atol=1e-5)
    mask = token_mask(explicit(found.plan))
    out, _ = attend(q, k, v, found.plan, SCALE, kernel=kernel)
    assert_output_within_budget(out, exact_attention(q, k, v, mask, SCALE)[0])


@on_two_sizes(
    ["drift", "step", "least", "most"],
    MIDDLE,
    [
        ("small", 4, 0.05, 0.2),
        ("gain", 8, 0.05, 0.2),
        ("objects", 2, 0.1, 0.2),
        ("small", 29, 0.2, 0.5),
        ("objects", 8, 0.2, 0.5),
    ],
)
def test_a_plan_by_an_old_log_sum_exp_is_nearly_as_good_as_a_fresh_one(grid, kernel, drift, step, least, most):  # 11
    options = {"grid": grid, "drift": drift}
    before, now = scene(0, **options), scene(step, **options)
    own, other = (site(grid, rule="guarded", kernel=kernel) for _ in range(2))
    own.first_search(*before)
    drifted = own.search(*now[:2], fresh=False)
    assert least < drifted.spread.max() <= most
    fresh = other.first_search(*now)
    assert not torch.equal(drifted.mass, fresh.mass), "the old log-sum-exp was used"
    lost = kept_share(fresh.mass, fresh.plan, fresh.mass.shape[2]) - kept_share(
        fresh.mass, drifted.plan, fresh.mass.shape[2]
    )
    assert lost.max() <= (0.005 if most <= 0.2 else 0.02)
    assert (own.state["lse"] - other.state["lse"]).abs().max() <= 1e-4, "and is up to date now"


@each_kernel
def test_after_a_scene_cut_the_search_starts_from_a_new_log_sum_exp(kernel):
    before, now = (scene(step, grid=MIDDLE, drift="cut", gain=1.4) for step in (0, 15))
    own, other = (site(MIDDLE, kernel=kernel) for _ in range(2))
    own.first_search(*before)
    cut, fresh = own.search(*now[:2], fresh=False), other.first_search(*now)
    assert cut.spread.max() > MOST_SPREAD
    moved = cut.spread > MOST_SPREAD
    assert torch.allclose(cut.mass[moved], fresh.mass[moved], atol=1e-3)
    exact = exact_mass(*now[:2], cut.plan)
    best, got = (kept_share(exact, found.plan, exact.shape[2]) for found in (fresh, cut))
    assert (best - got)[moved].max() <= 1e-4
    assert (own.state["lse"] - exact_lse(*now[:2])).abs().max() <= 1e-4


@on_two_sizes(["drift"], MIDDLE, [("small",), ("gain",), ("cut",), ("objects",)])
def test_paired_probe_rows_follow_the_true_recall(grid, kernel, drift):  # 15
    options = {"grid": grid, "drift": drift, "gain": 1.4}
    own = site(grid, rule="guarded", kernel=kernel)
    q, k, v = scene(0, **options)
    found = own.first_search(q, k, v)
    gave = found.counts < found.counts.sum(-1, keepdim=True) // q.shape[1]
    assert gave.any() and (found.recall[gave] > top_k_reference.HEAD_THRESHOLD).all()
    offset = torch.zeros(1, 6)
    assert torch.allclose(own.probe(found.plan, q, k, found.recall, offset), found.recall, atol=1e-6)
    errors, moves = [], []
    for step in (8, 15, 29) if grid == MIDDLE else (15,):
        q, k, _ = scene(step, **options)
        true = kept_share(exact_mass(q, k, found.plan), found.plan, found.mass.shape[2])
        errors.append((own.probe(found.plan, q, k, None, offset) - true).abs())
        moves.append((true - found.recall).abs())
    assert torch.stack(errors).max() <= 0.05 and torch.stack(errors).mean() <= 0.015
    assert drift != "gain" or torch.stack(moves).max() > 0.06, "what held at first holds no longer"


@each_kernel
@pytest.mark.parametrize("rule", ["paper", "guarded"])
def test_uniform_attention_keeps_as_many_blocks_as_asked(kernel, rule):
    q, k, v = scene(grid=RAGGED, text=TEXT)
    found = site(rule=rule, sparsity=0.5, kernel=kernel).first_search(0 * q, k, v)
    assert (found.counts == 4).all() and (found.plan.kept()[:, :, :7].sum(-1) == 4 + 1).all()
    assert torch.allclose(found.recall, torch.tensor((4 * 32 + TEXT) / 223), atol=1e-5)
    assert unpack_bits(found.plan.keep, 9)[:, :, 7, :8].all(), "text attends to everything"
