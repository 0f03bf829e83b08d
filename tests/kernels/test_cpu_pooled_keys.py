"""Pooled keys in C++: every level of instructions, heads in several parts, threads, memory used before, odd views."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpp_levels import each_level
from kernel_oracles import DTYPES, assert_same_bits, random_plan, random_tensor
from odd_views import VIEWS

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.cpp.build import using
from sparse_compile.kernels.permutation.reference import sort_labels
from sparse_compile.kernels.pooled_keys import cpu, reference

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def random_keys(tokens, size=24, value_size=40, *, groups=7, batch=2, heads=2, dtype=torch.float32):
    """Keys, values, and the order and bounds of random groups, of which the last holds padding."""
    plan = random_plan(batch, heads, heads, 1, tokens, k_groups=groups)
    k = random_tensor(batch, heads, tokens, size, seed=1, dtype=dtype)
    return k, random_tensor(batch, heads, tokens, value_size, seed=2, dtype=dtype), plan.k_order, plan.k_offsets


def pool(k, v, order, offsets, video=None, coupled=True):
    with nan_filled_empty():
        return cpu.pooled_keys(k, v, order, offsets, [0, k.shape[2]] if video is None else video, coupled)


@each_level
@each_dtype
@pytest.mark.parametrize(
    ("tokens", "size", "value_size", "groups"),
    [
        pytest.param(1, 8, 8, 2, id="one-token"),
        pytest.param(301, 7, 13, 9, id="odd-sizes"),
        pytest.param(1100, 64, 64, 40, id="two-parts"),
        pytest.param(2500, 128, 136, 20, id="three-parts"),
        pytest.param(300, 256, 256, 3, id="widest"),
        pytest.param(20_000, 4, 4, 50, id="parts-of-more-than-one-sum"),
    ],
)
def test_every_level_is_within_budget(level, dtype, tokens, size, value_size, groups):
    k, v, order, offsets = random_keys(tokens, size, value_size, groups=groups, batch=1, dtype=dtype)
    video = [0, tokens // 3, tokens // 2, tokens]
    with using(level):
        pooled = pool(k, v, order, offsets, video)
    exact = reference.pooled_keys(k.double(), v.double(), order, offsets, video, True)
    for actual, expected in zip(pooled, exact, strict=True):
        finite = expected.isfinite()
        assert torch.equal(actual.isfinite(), finite)
        assert ((actual - expected)[finite].abs() <= 1e-6).all()


@each_level
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_padding_touches_nothing_and_text_no_coupling(level, poison):
    k, v, _, _ = random_keys(3000)
    labels = torch.randint(4, (2, 2, 3000), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    labels[..., 100:1500] = 4  # text
    labels[..., ::7] = 5  # padding
    order, offsets = sort_labels(labels, 6)
    video = [0, 100, 1500, 3000]
    with using(level):
        clean = pool(k, v, order, offsets, video)
        for x in (k, v):
            x.masked_fill_((labels == 5).unsqueeze(-1), poison)
        assert_same_bits(pool(k, v, order, offsets, video), clean)
        for x in (k, v):
            x.masked_fill_((labels == 4).unsqueeze(-1), poison)
        poisoned = pool(k, v, order, offsets, video)
    assert torch.equal(poisoned[3], clean[3])
    for mean, before in zip(poisoned[:2], clean[:2], strict=True):
        assert not mean[:, :, 4].isfinite().any()
        assert torch.equal(mean[:, :, :4], before[:, :, :4])


@each_dtype
def test_threads_repeats_and_batches_change_no_bit(dtype, two_threads):
    args = random_keys(2300, 40, 24, groups=30, dtype=dtype)
    first = pool(*args)
    assert_same_bits(pool(*args), first)
    torch.set_num_threads(1)
    assert_same_bits(pool(*args), first)
    for b in range(2):
        assert_same_bits(pool(*(x[b : b + 1] for x in args)), [x[b : b + 1] for x in first])


def test_more_heads_than_are_summed_at_once():
    k, v, order, offsets = random_keys(1100, 256, 256, groups=3, batch=1, heads=66, dtype=torch.bfloat16)
    pooled = pool(k, v, order, offsets)
    for h in (0, 63, 64, 65):
        assert_same_bits(pool(*(x[:, h : h + 1] for x in (k, v, order, offsets))), [x[:, h : h + 1] for x in pooled])


def test_memory_kept_from_a_call_of_nan_touches_no_later_one():
    args = random_keys(150)
    expected = pool(*args)
    k, v, order, offsets = random_keys(2000, 128, 128)
    pool(torch.full_like(k, math.nan), torch.full_like(v, math.nan), order, offsets)
    assert_same_bits(pool(*args), expected)


def test_calls_of_two_python_threads_do_not_meet():
    cases = [random_keys(1200 + 300 * n) for n in (0, 1)]
    expected = [pool(*args) for args in cases]
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(cpu.pooled_keys, *args, [0, args[0].shape[2]], True) for args in cases * 20]
        for n, run in enumerate(runs):
            assert_same_bits(run.result(), expected[n % 2])


@pytest.mark.parametrize("view", VIEWS)
@each_dtype
def test_views_change_no_bit(dtype, view):
    k, v, order, offsets = random_keys(301, dtype=dtype)
    strided = (torch.stack([x, x], -1)[..., 0] for x in (order, offsets))
    assert_same_bits(pool(VIEWS[view](k), VIEWS[view](v), *strided), pool(k, v, order, offsets))


def test_a_batch_stride_of_zero():
    args = random_keys(301, batch=1)
    pooled = pool(*(x.expand(3, *x.shape[1:]) for x in args))
    assert_same_bits(pooled, [x.expand(3, *x.shape[1:]) for x in pool(*args)])


def test_no_tokens_have_no_means_and_no_coupling():
    k, v, _, _ = random_keys(1)
    mean_k, mean_v, log_size, coupling = pool(k[:, :, :0], v[:, :, :0], None, torch.zeros(2, 2, 4, dtype=torch.int32))
    assert (mean_k == 0).all() and (mean_v == 0).all() and (coupling == 0).all()
    assert (log_size == -math.inf).all()


def test_groups_that_leave_the_tokens_are_refused():
    k, v, order, offsets = random_keys(50)
    with pytest.raises(RuntimeError, match="must rise from 0 to the 50 tokens"):
        pool(k, v, order, offsets + 1)
    with pytest.raises(RuntimeError, match="must name tokens from 0 to 49"):
        pool(k, v, order + 1, offsets)
