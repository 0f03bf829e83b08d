"""The Triton kernels of kept mass against the reference and float64 (docs/adaspa.md, section 13)."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_oracles import DTYPES, fields_of, inputs, labels_of, packed, random_plan, random_tensor
from plan_placement import moved

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.kept_mass import reference, triton_kernels, triton_launch
from sparse_compile.kernels.kept_mass.configs import Config, candidates
from sparse_compile.kernels.launching import INTERPRETER, launch
from sparse_compile.plan import Plan

SCALE = 0.25
TINY = Config(16, 32, 1, 1)
"""Several tiles of rows and splits of keys even where there are few of each."""


def in_place(plan):
    return Plan(None, plan.q_offsets, None, plan.k_offsets, plan.keep)


@pytest.fixture
def case(device):
    """Makes q, k and a random plan; the last group of either side is padding."""

    def make(queries=100, keys=120, *, batch=1, heads=2, key_heads=1, size=16, dtype=torch.float32, **plan):
        q, k, _ = inputs(queries, keys, 0, batch=batch, heads=heads, key_heads=key_heads, size=size, dtype=dtype)
        return q.to(device), k.to(device), moved(random_plan(batch, heads, key_heads, queries, keys, **plan), device)

    return make


def measure(q, k, plan, *, rows=16, seed=0, valid=None, video=None, config=None):
    video = [0, q.shape[2]] if video is None else video
    with nan_filled_empty():
        return triton_launch.kept_mass(q, k, valid, video, plan, SCALE, rows, seed, config=config)


def assert_right(q, k, plan, *, rows=16, seed=0, valid=None, video=None, config=None, tolerance=5e-6):
    """As the reference measures it in float64, on the same rows, and no farther from it than rounding."""
    got = measure(q, k, plan, rows=rows, seed=seed, valid=valid, video=video, config=config)
    video = [0, q.shape[2]] if video is None else video
    exact = reference.kept_mass(q.double(), k.double(), valid, video, plan, SCALE, rows, seed)
    assert got.dtype is torch.float32 and got.shape == exact.shape
    assert torch.equal(got.isnan(), exact.isnan())
    assert (got - exact).nan_to_num().abs().max() <= tolerance
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (65, 63), (203, 130)])
def test_the_share_matches_float64(case, dtype, queries, keys):
    got = assert_right(*case(queries, keys, dtype=dtype))
    if queries > 1:
        assert ((got > 0.05) & (got < 0.95)).all()


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("placed", [False, True])
def test_shared_key_heads_batches_and_tokens_in_place(case, heads, key_heads, placed):
    q, k, plan = case(90, 70, batch=2, heads=heads, key_heads=key_heads)
    assert_right(q, k, in_place(plan) if placed else plan)


@pytest.mark.parametrize("sides", ["queries", "keys"])
def test_one_side_may_be_in_place_alone(case, sides):
    q, k, plan = case()
    q_order = None if sides == "queries" else plan.q_order
    k_order = None if sides == "keys" else plan.k_order
    assert_right(q, k, Plan(q_order, plan.q_offsets, k_order, plan.k_offsets, plan.keep))


@pytest.mark.parametrize("size", [8, 40, 72])
def test_sizes_that_are_no_power_of_two(case, size):
    assert_right(*case(size=size))


@pytest.mark.parametrize("rows", [1, 17, 64, 150])
def test_any_number_of_rows_also_more_than_there_are_queries(case, rows):
    assert_right(*case(100, 70, heads=1), rows=rows, config=TINY)


def test_many_and_empty_groups_read_the_right_bits(case, device):
    q, k, plan = case(100, 90, q_groups=40, k_groups=75)
    assert (plan.k_offsets.diff() == 0).any() and (plan.q_offsets.diff() == 0).any() and plan.keep.shape[3] == 3
    assert_right(q, k, plan, config=TINY)
    assert_right(q, k, in_place(plan), config=TINY)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("which", range(3))
def test_each_configuration_that_a_tuner_may_take_is_right(case, dtype, size, which):
    chosen = candidates(INTERPRETER, dtype, size)
    assert_right(*case(150, 300, size=size, dtype=dtype), rows=64, config=chosen[which % len(chosen)], tolerance=1e-5)


def test_only_valid_visual_rows_count(case, device):
    q, k, plan = case(200, 70, batch=2, heads=2)
    valid = (torch.rand(2, 200, generator=torch.Generator().manual_seed(0)) < 0.7).to(device)
    video = [30, 100, 130, 200]
    got = assert_right(q, k, plan, valid=valid, video=video)
    assert not torch.allclose(got, measure(q, k, plan), atol=1e-3)
    shared_mask = assert_right(q, k, plan, valid=valid[:1], video=video)
    assert torch.equal(shared_mask[0], got[0]) and not torch.equal(shared_mask[1], got[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_plan_keeps_everything_and_an_empty_one_nothing(case, device, dtype):
    q, k, plan = case(123, 123, dtype=dtype)
    kept = torch.ones(1, 2, 5, 7, dtype=torch.bool)
    kept[..., -1] = False
    for bits, share in ((kept, 1.0), (torch.zeros_like(kept), 0.0)):
        made = Plan(plan.q_order, plan.q_offsets, plan.k_order, plan.k_offsets, packed(bits).to(device))
        assert (measure(q, k, made, config=TINY) == share).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_padding_keys_touch_nothing(case, device, value):
    q, k, plan = case(123, 123)
    before = measure(q, k, plan)
    padding = (labels_of(plan.k_order.cpu(), plan.k_offsets.cpu())[0, 0] == plan.key_groups - 1).to(device)
    assert padding.any()
    k[:, :, padding] = value
    assert torch.equal(measure(q, k, plan), before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_without_a_finite_score_do_not_count(case, value):
    q, k, plan = case(40)
    q[:, :, :7] = value
    assert assert_right(q, k, plan, rows=30, config=TINY).isfinite().all()
    token = int(plan.k_order[0, 0, 0])
    k[:, :, token] = value
    assert assert_right(q, k, plan).isnan().all(), "a key that is not finite spoils all rows"


def test_an_infinite_score_below_all_others_is_a_key_without_mass(case):
    q, k, plan = case()
    q[..., 0] = q[..., 0].abs()
    token = int(plan.k_order[0, 0, 0])
    k[:, :, token, 0] = -math.inf
    assert assert_right(q, k, plan).isfinite().all()


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_large_scores_neither_overflow_nor_vanish(case, shift):
    q, k, plan = case()
    q[..., 0], k[..., 0] = 16.0, shift / 4
    assert assert_right(q, k, plan, config=TINY, tolerance=2e-4).isfinite().all()  # scores of 300 round by 1e-5


def test_many_splits_are_merged_as_one_softmax(device):
    rows, splits = 21, 40
    peaks = 8 * random_tensor(1, 2, splits, rows)
    peaks[:, :, ::3] = -math.inf  # splits without a valid key
    total = random_tensor(1, 2, splits, rows, seed=1).abs().masked_fill(peaks == -math.inf, 0)
    kept = total * torch.rand(total.shape, generator=torch.Generator().manual_seed(2))
    occupied = torch.ones(1, 2, rows, dtype=torch.uint8)
    occupied[..., 3] = 0
    weights = peaks.double().exp2()
    shares = (kept * weights).sum(2) / (total * weights).sum(2)
    expected = shares[occupied.bool()].view(1, 2, -1).mean(-1)
    partials = torch.stack([peaks, total, kept], 3).to(device)
    measured = torch.full((1, 2), math.nan, device=device)
    blocks = {"BLOCK_ROWS": 16, "BLOCK_SPLITS": 16, "warps": 4, "stages": 1}
    launch(triton_kernels.mean_of_shares, (2,), partials, occupied.to(device), measured, rows, splits, **blocks)
    assert (measured.cpu() - expected).abs().max() <= 1e-6


def test_where_there_is_no_row_the_answer_is_nan(case, device):
    q, k, plan = case(100, 60, batch=2)
    assert assert_right(q, k, plan, video=[]).isnan().all()
    valid = torch.ones(2, 100, dtype=torch.bool, device=device)
    valid[1] = False
    got = assert_right(q, k, plan, valid=valid)
    assert got[0].isfinite().all() and got[1].isnan().all()
    assert measure(q[:, :, :0], k, plan, video=[]).isnan().all()
    assert measure(q, k[:, :, :0], plan).isnan().all()
    only_padding = plan.k_offsets.clone()
    only_padding[..., :-1] = 0
    assert measure(q, k, Plan(plan.q_order, plan.q_offsets, plan.k_order, only_padding, plan.keep)).isnan().all()


def test_equal_seeds_take_equal_rows_and_others_do_not(case):
    q, k, plan = case(400, 50, q_groups=20, k_groups=12)
    first = assert_right(q, k, plan, seed=5)
    assert torch.equal(measure(q, k, plan, seed=5), first)
    assert (assert_right(q, k, plan, seed=6) != first).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_equals_its_items_whatever_the_strides(case, dtype):
    q, k, plan = case(90, 130, batch=2, heads=2, dtype=dtype)
    both = measure(q, k, plan)
    for item in (0, 1):
        own = slice(item, item + 1)
        assert torch.equal(measure(q[own], k[own], Plan(*(x[own] for x in fields_of(plan)))), both[own])

    def strided(x):
        return x.repeat(1, 1, 1, 2).transpose(1, 2).contiguous()[..., : x.shape[3]].transpose(1, 2)

    def last_dimension_first(x):
        return x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)

    for layout in (strided, last_dimension_first):
        assert torch.equal(measure(layout(q), layout(k), plan), both)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("placed", [False, True])
def test_a_real_size(dtype, placed):
    tokens, heads, size = 32_760, 12, 128
    plan = moved(random_plan(2, heads, heads, tokens, tokens, 301, 501), "cuda")
    plan = in_place(plan) if placed else plan
    q, k = (random_tensor(2, heads, tokens, size, seed=seed, dtype=dtype).cuda() for seed in (1, 2))
    video = [0, tokens - 226]
    got = assert_right(q, k, plan, rows=64, video=video, tolerance=1e-5)
    assert torch.equal(measure(q, k, plan, rows=64, video=video), got)
