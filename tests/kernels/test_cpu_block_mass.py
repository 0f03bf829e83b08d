"""Block mass in C++: every level of instructions, groups and tiles of any size, threads, memory used before."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpp_levels import each_level
from kernel_oracles import DTYPES, assert_same_bits, random_plan, random_tensor

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.block_mass import cpu, reference
from sparse_compile.kernels.cpp.build import using
from sparse_compile.plan import Groups

SCALE = 0.25
READY = torch.ones(1, dtype=torch.int32)
NOT_READY = torch.zeros(1, dtype=torch.int32)
MODES = {"fresh": (READY, True), "kept": (READY, False), "anew": (NOT_READY, False)}

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_mode = pytest.mark.parametrize("mode", MODES)


def make_inputs(queries, keys, *, size=16, heads=(2, 2), batch=1, dtype=torch.float32):
    q = 2 * random_tensor(batch, heads[0], queries, size, seed=0)
    return q.to(dtype), random_tensor(batch, heads[1], keys, size, seed=1, dtype=dtype)


def side_of(*sizes, heads=2):
    """Groups of tokens in place; the last is padding."""
    bounds = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    return Groups(None, bounds.expand(1, heads, -1).contiguous())


def dense_lse(q, k, key, scale=SCALE):
    """The natural log-sum-exp over the keys that are no padding, computed in float64: float32 [B, H, Sq]."""
    shared = q.shape[1] // k.shape[1]
    in_place = torch.arange(k.shape[2]).expand(*k.shape[:2], -1)
    order = in_place if key.order is None else key.order.to(torch.int64)
    usable = torch.empty(k.shape[:3], dtype=torch.bool).scatter_(2, order, in_place < key.offsets[..., -2:-1])
    scores = q.double() @ k.double().repeat_interleave(shared, 1).mT * scale
    return scores.masked_fill(~usable.repeat_interleave(shared, 1).unsqueeze(2), -math.inf).logsumexp(-1).float()


def search(module, q, k, lse, sides, mode, *, scale=SCALE, row_stride=1):
    """Mass, spread and the new log-sum-exp, made in poisoned memory."""
    ready, fresh = MODES[mode]
    lse = lse.clone()
    with nan_filled_empty():
        found = module.block_mass(q, k, lse, ready, *sides, scale, row_stride, fresh)
    return *found, lse


def assert_as_reference(q, k, lse, sides, mode, **options):
    mass, spread, new = search(cpu, q, k, lse, sides, mode, **options)
    expected_mass, expected_spread, expected_new = search(reference, q, k, lse, sides, mode, **options)
    assert mass.dtype is torch.float32 and spread.dtype is torch.float32
    assert ((mass - expected_mass).abs() / expected_mass.clamp(min=1e-3)).max() <= 1e-4
    assert torch.allclose(spread, expected_spread, rtol=1e-3, atol=1e-5)
    finite = torch.isfinite(expected_new)
    assert torch.equal(torch.isfinite(new), finite), "what has no log-sum-exp is told apart in either"
    assert torch.allclose(new[finite], expected_new[finite], rtol=2e-6, atol=1e-4)


@each_level
@each_dtype
@each_mode
@pytest.mark.parametrize("size", [1, 7, 40, 130, 256])
def test_every_level_agrees_with_the_reference(level, dtype, mode, size):
    q, k = make_inputs(150, 603, size=size, heads=(4, 2), batch=2, dtype=dtype)
    plan = random_plan(2, 4, 2, 150, 603, 6, 9)
    scale = size**-0.5
    kept = dense_lse(q, k, plan.key_side, scale)
    kept += 0.3 * random_tensor(*kept.shape, seed=2)
    kept[0, 1] = 1e4  # does not fit
    q[0, 0, plan.q_order[0, 0, 0]] = math.nan
    k[1, 0, plan.k_order[1, 0, 0], 0] = math.inf  # in some rows the score is -inf
    with using(level):
        assert_as_reference(q, k, kept, (plan.query_side, plan.key_side), mode, scale=scale, row_stride=2)


CUTS = {
    "a-row-a-group": [1] * 300,
    "one-group": [300],
    "around-a-tile": [143, 1, 145, 11],
    "empty-ones": [0, 5, 0, 0, 200, 95, 0],
    "small-ones": [5, 3, 17, 40, 2, 65, 96, 72],
}


@each_mode
@each_dtype
@pytest.mark.parametrize("query_cuts", CUTS)
@pytest.mark.parametrize("key_cuts", CUTS)
def test_groups_of_any_size(dtype, mode, query_cuts, key_cuts):
    q, k = make_inputs(310, 313, dtype=dtype)
    sides = side_of(*CUTS[query_cuts], 10), side_of(*CUTS[key_cuts], 13)
    lse = dense_lse(q, k, sides[1])
    q[:, :, 300:], k[:, :, 300:] = math.nan, math.nan
    for row_stride in (1, 3, 1000):
        assert_as_reference(q, k, lse, sides, mode, row_stride=row_stride)


@each_level
@pytest.mark.parametrize("shift", [40.0, -40.0])
def test_far_from_the_cut_off_a_shift_scales_the_mass(level, shift):
    q, k = make_inputs(300, 700)
    sides = side_of(100, 200, 0), side_of(256, 256, 188, 0)
    lse = dense_lse(q, k, sides[1])
    plain, _, _ = search(cpu, q, k, lse, sides, "kept")
    with using(level):
        mass, spread, new = search(cpu, q, k, lse + shift, sides, "kept")
    assert torch.allclose(mass * math.exp(shift), plain, rtol=1e-4)
    assert (spread < 1e-3).all() and torch.allclose(new, lse, atol=1e-4)


@each_level
def test_no_term_is_larger_than_the_cut_off_and_infinity_is_none(level):
    q, k = make_inputs(300, 700)
    sides = side_of(100, 200, 0), side_of(256, 256, 188, 0)
    lse = dense_lse(q, k, sides[1]) - torch.linspace(0, 200, 300)
    k[0, 1, 9, 3] = math.inf
    with using(level):
        mass, _, _ = search(cpu, q, k, lse, sides, "fresh")
    expected, _, _ = search(reference, q, k, lse, sides, "fresh")
    assert torch.allclose(mass, expected, rtol=1e-4) and expected.max() > 2.0**reference.LARGEST_EXPONENT


@each_dtype
@pytest.mark.parametrize("rising", [True, False])
def test_log_sum_exp_anew_where_later_keys_score_higher_or_lower(dtype, rising):
    q, k = make_inputs(30, 2000, dtype=dtype)
    ramp = torch.linspace(-60, 60, 2000) if rising else torch.linspace(60, -60, 2000)
    q[..., 0], k[..., 0] = 4.0, ramp.to(dtype)
    sides = side_of(30, 0), side_of(*[100] * 20, 0)
    mass, _, new = search(cpu, q, k, torch.zeros(1, 2, 30), sides, "anew")
    assert torch.allclose(new, dense_lse(q, k, sides[1]), atol=1e-4)
    assert torch.allclose(mass.sum(-1), torch.tensor([30.0, 0]), atol=1e-3)


@each_mode
@pytest.mark.parametrize("scale", [0.0, -0.25])
def test_any_scale(mode, scale):
    q, k = make_inputs(50, 300)
    sides = side_of(20, 30, 0), side_of(100, 150, 50)
    assert_as_reference(q, k, dense_lse(q, k, sides[1], scale), sides, mode, scale=scale)


@each_mode
@each_dtype
def test_the_number_of_threads_changes_no_bit(mode, dtype):
    q, k = make_inputs(500, 700, heads=(4, 2), dtype=dtype)
    plan = random_plan(1, 4, 2, 500, 700, 12, 9)
    sides = plan.query_side, plan.key_side
    lse = dense_lse(q, k, sides[1]) + 0.3 * random_tensor(1, 4, 500, seed=2)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(search(cpu, q, k, lse, sides, mode))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(other, found[0])


@each_dtype
def test_what_a_larger_call_left_in_memory_is_not_seen(dtype):
    q, k = make_inputs(40, 50, dtype=dtype)
    sides = side_of(15, 20, 5), side_of(21, 9, 20)
    lse = dense_lse(q, k, sides[1])
    before = [search(cpu, q, k, lse, sides, mode) for mode in MODES]
    for mode in MODES:
        many, more = torch.full((1, 2, 700, 64), math.nan, dtype=dtype), side_of(300, 400, 0)
        search(cpu, many, many, torch.zeros(1, 2, 700), (more, more), mode)
    for mode, one in zip(MODES, before, strict=True):
        assert_same_bits(search(cpu, q, k, lse, sides, mode), one)


@each_dtype
@each_mode
def test_where_tensors_lie_changes_no_bit(dtype, mode):
    q, k = make_inputs(90, 77, size=24, batch=3, dtype=dtype)
    k = k[:1].expand(3, -1, -1, -1)
    plan = random_plan(3, 2, 2, 90, 77, 5, 4)
    sides = plan.query_side, plan.key_side
    lse = dense_lse(q, k, sides[1])
    expected = search(cpu, q, k.contiguous(), lse, sides, mode)

    def at_an_odd_address(x):
        return torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x)

    def wider(x):
        return torch.cat((x, torch.full_like(x, math.nan)), -1)[..., : x.shape[-1]]

    strided = [Groups(*(x.mT.contiguous().mT for x in side)) for side in sides]
    for place in (lambda x: x, at_an_odd_address, wider, lambda x: x.mT.contiguous().mT):
        assert_same_bits(search(cpu, place(q), place(k), lse, strided, mode), expected)


@each_mode
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys"), [(0, 2, 5, 6), (1, 0, 5, 6), (1, 2, 0, 6), (1, 2, 5, 0), (1, 2, 0, 0)]
)
def test_nothing_to_look_at_has_no_mass(mode, batch, heads, queries, keys):
    q, k = make_inputs(queries, keys, heads=(heads, heads), batch=batch)
    sides = [Groups(None, side_of(n, 0, heads=heads).offsets.expand(batch, -1, -1)) for n in (queries, keys)]
    mass, spread, lse = search(cpu, q, k, torch.zeros(q.shape[:3]), sides, mode)
    assert mass.shape == (batch, heads, 2, 2) and (mass == 0).all()
    assert spread.shape == (batch, heads) and not spread.isnan().any()
    assert mode == "fresh" or not keys or lse.isfinite().all()


def test_calls_from_two_threads_at_once_do_not_meet():
    calls = []
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        q, k = make_inputs(400 + 50 * seed, 300 - 50 * seed, dtype=dtype)
        sides = side_of(*[50] * (8 + seed), 0), side_of(*[50] * (6 - seed), 0)
        calls += [(cpu, q, k, dense_lse(q, k, sides[1]), sides, mode) for mode in MODES]
    expected = [search_without_poison(*call) for call in calls]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda call: search_without_poison(*call), calls * 10))
    for number, one in enumerate(found):
        assert_same_bits(one, expected[number % len(calls)])


def search_without_poison(module, q, k, lse, sides, mode):
    """As `search`, whose patch of torch is not for several threads."""
    ready, fresh = MODES[mode]
    lse = lse.clone()
    return *module.block_mass(q, k, lse, ready, *sides, SCALE, 1, fresh), lse


def test_a_row_stride_below_one_is_refused():
    q, k = make_inputs(5, 6)
    with pytest.raises(RuntimeError, match="row_stride must be at least 1, not 0"):
        search(cpu, q, k, torch.zeros(1, 2, 5), (side_of(5, 0), side_of(6, 0)), "fresh", row_stride=0)
