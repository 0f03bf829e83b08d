"""The C++ attention: every instruction set that runs here, threads, reused memory, odd views, plans that are wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_cases import assert_matches_exact, random_inputs
from cpp_levels import levels
from kernel_oracles import DTYPES, OPS, assert_same_bits, attend, labels_of, packed, random_plan, random_tensor
from odd_views import VIEWS

from sparse_compile.kernels.cpp.build import using
from sparse_compile.kernels.cpp.isa import Isa
from sparse_compile.plan import Plan, PooledKeys

SCALE = 0.125


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest) -> Iterator[Isa]:
    with using(request.param):
        yield request.param


def pooled_of(k, v, plan, coupled):
    *means, coupling = OPS.pooled_keys(k, v, plan.k_order, plan.k_offsets, [0, k.shape[2]], coupled, "reference")
    return PooledKeys(*means, coupling if coupled else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys", "size", "value_size"),
    [(1, 1, 8, 8), (65, 63, 40, 24), (300, 1000, 64, 72), (301, 203, 128, 136), (40, 520, 256, 256)],
)
def test_every_instruction_set_is_within_budget(level, dtype, queries, keys, size, value_size):
    q, k, v = random_inputs(queries, keys, size, value_size, heads=(4, 2), dtype=dtype)
    assert_matches_exact(q, k, v, random_plan(2, 4, 2, queries, keys, 4, 40), size**-0.5, "cpu")


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pooled_keys_on_every_instruction_set(level, dtype, coupled):
    q, k, v = random_inputs(301, 403, 40, 72, heads=(4, 2), dtype=dtype)
    plan = random_plan(2, 4, 2, 301, 403, 5, 37, share=0.3)
    pooled = pooled_of(k, v, plan, coupled)
    out, lse = attend(q, k, v, plan, SCALE, pooled=pooled)
    expected, expected_lse = attend(*(x.double() for x in (q, k, v)), plan, SCALE, pooled=pooled, kernel="reference")
    error = (out.double() - expected).norm() / expected.norm()
    assert error <= {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}[dtype]
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert (lse - expected_lse)[finite].abs().max() <= (1e-3 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("factor", [3e3, 3e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_any_size_leave_a_row_its_heaviest_key(level, dtype, factor):
    q, k, v = random_inputs(300, 400, 64, heads=(2, 2), dtype=dtype)
    q, k = q * factor, k * factor
    plan = random_plan(2, 2, 2, 300, 400)
    out, lse = attend(q, k, v, plan, SCALE)
    expected, expected_lse = attend(q.double(), k.double(), v.double(), plan, SCALE, kernel="reference")
    assert torch.equal(lse.isfinite(), expected_lse.isfinite()) and out.isfinite().all()
    finite = expected_lse.isfinite()
    assert ((lse - expected_lse)[finite] / expected_lse[finite]).abs().max() <= 1e-6
    # Two logits that are one rounding apart may change places.
    assert ((out.double() - expected).abs().amax(-1) <= 2e-2).double().mean() > 0.99


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_skipped_never_leaks(level, dtype, value):
    q, k, v = random_inputs(90, 211, 40, heads=(2, 2), dtype=dtype)
    plan = random_plan(2, 2, 2, 90, 211, 3, 30, share=0.5)
    kept = plan.kept()
    kept[:, :, :, 4] = False
    plan = Plan(plan.q_order, plan.q_offsets, plan.k_order, plan.k_offsets, packed(kept))
    expected = attend(q, k, v, plan, SCALE)
    skipped = labels_of(plan.k_order, plan.k_offsets) == 4
    assert skipped.any()
    for x in (k, v):
        x.masked_fill_(skipped.unsqueeze(-1), value)
    assert_same_bits(attend(q, k, v, plan, SCALE), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_repeats_change_no_bit(dtype, two_threads):
    q, k, v = random_inputs(700, 900, 64, heads=(4, 2), dtype=dtype)
    plan = random_plan(2, 4, 2, 700, 900, 6, 50)
    pooled = pooled_of(k, v, plan, True)
    first = attend(q, k, v, plan, SCALE, pooled=pooled)
    assert_same_bits(attend(q, k, v, plan, SCALE, pooled=pooled), first)
    torch.set_num_threads(1)
    assert_same_bits(attend(q, k, v, plan, SCALE, pooled=pooled), first)


def test_memory_kept_from_a_call_of_nan_touches_no_later_one():
    q, k, v = random_inputs(130, 150, 40)
    plan = random_plan(2, 2, 1, 130, 150)
    pooled = pooled_of(k, v, plan, True)
    expected = attend(q, k, v, plan, SCALE, pooled=pooled)
    large = [torch.full_like(x, math.nan) for x in random_inputs(500, 900, 128)]
    attend(*large, random_plan(2, 2, 1, 500, 900, 3, 60), SCALE)
    assert_same_bits(attend(q, k, v, plan, SCALE, pooled=pooled), expected)


def test_calls_of_two_python_threads_do_not_meet():
    cases = [
        (random_inputs(200 + 50 * n, 300, 64, heads=(2, 2)), random_plan(2, 2, 2, 200 + 50 * n, 300)) for n in (0, 1)
    ]
    expected = [attend(*tensors, plan, SCALE) for tensors, plan in cases]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(attend, *cases[n % 2][0], cases[n % 2][1], SCALE) for n in range(40)]
        for n, run in enumerate(runs):
            assert_same_bits(run.result(), expected[n % 2])


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_change_no_bit(dtype, view):
    tensors = random_inputs(130, 150, 40, dtype=dtype)
    plan = random_plan(2, 2, 1, 130, 150)
    viewed = [VIEWS[view](x) for x in tensors]
    assert_same_bits(attend(*viewed, plan, SCALE), attend(*tensors, plan, SCALE))


def test_rows_further_apart_than_32_bits_can_say():
    tensors = random_inputs(40, 40, 16, heads=(1, 1), batch=1, dtype=torch.bfloat16)
    stride = 2**31 // 35
    storage = torch.empty(40 * stride, dtype=torch.bfloat16)  # pages that nobody touches take no memory
    plan = random_plan(1, 1, 1, 40, 40)
    for place, x in enumerate(tensors):
        far = storage.as_strided(x.shape, (0, 0, stride, 1), 64 * place).copy_(x)
        viewed = [far if other is x else other for other in tensors]
        assert_same_bits(attend(*viewed, plan, SCALE), attend(*tensors, plan, SCALE))


def test_a_batch_stride_of_zero():
    q, k, v = random_inputs(130, 150, 40, batch=1)
    plan = random_plan(3, 2, 1, 130, 150)
    expanded = [x.expand(3, -1, -1, -1) for x in (q, k, v)]
    assert_same_bits(attend(*expanded, plan, SCALE), attend(*(x.contiguous() for x in expanded), plan, SCALE))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30, 1e-39, 1e-50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_scale(dtype, scale):
    q, k, v = random_inputs(90, 110, 24, dtype=dtype)
    plan = random_plan(2, 2, 1, 90, 110, share=0.4)
    pooled = pooled_of(k, v, plan, True)
    out, lse = attend(q, k, v, plan, scale, pooled=pooled)
    expected, expected_lse = attend(q, k, v, plan, scale, pooled=pooled, kernel="reference")
    assert torch.allclose(out.float(), expected.float(), atol=1e-6 if dtype is torch.float32 else 2e-2)
    assert torch.allclose(lse, expected_lse, atol=1e-3 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("queries", "keys", "size", "value_size", "batch"),
    [(0, 5, 8, 8, 1), (5, 0, 8, 8, 1), (5, 5, 0, 8, 1), (5, 5, 8, 0, 1), (5, 5, 8, 8, 0)],
)
def test_sizes_of_zero(queries, keys, size, value_size, batch):
    q, k = random_tensor(batch, 2, queries, size), random_tensor(batch, 2, keys, size)
    v = random_tensor(batch, 2, keys, value_size)
    plan = random_plan(batch, 2, 2, queries, keys) if batch else random_plan(1, 2, 2, queries, keys)
    if not batch:
        plan = Plan(*(x[:0] for x in vars(plan).values()))
    out, lse = attend(q, k, v, plan, SCALE)
    expected, expected_lse = attend(q, k, v, plan, SCALE, kernel="reference") if batch else (out, lse)
    assert out.shape == (batch, 2, queries, value_size)
    assert torch.allclose(out, expected) and torch.allclose(lse, expected_lse)


@pytest.mark.parametrize(
    ("field", "place", "value", "rule"),
    [
        ("k_offsets", -1, 151, "must rise from 0 to the 150 tokens"),
        ("q_offsets", 0, 1, "must rise from 0 to the 130 tokens"),
        ("k_offsets", 3, -7, "must rise from 0"),
        ("k_order", 10, 150, "must name tokens from 0 to 149"),
        ("q_order", 10, -1, "must name tokens from 0 to 129"),
        ("q_order", slice(4, 6), 3, "each once"),
    ],
)
def test_a_plan_that_leaves_the_tensors_is_an_error(field, place, value, rule):
    q, k, v = random_inputs(130, 150, 40)
    plan = random_plan(2, 2, 1, 130, 150)
    getattr(plan, field)[1, 0, place] = value
    with pytest.raises(RuntimeError, match=rule):
        attend(q, k, v, plan, SCALE)


def test_a_plan_of_other_heads_or_groups_is_an_error():
    q, k, v = random_inputs(130, 150, 40)
    plan = random_plan(2, 2, 1, 130, 150)
    halved = Plan(*(x[:1] for x in vars(plan).values()))
    with pytest.raises(RuntimeError, match="offsets for 4 heads"):
        attend(q, k, v, halved, SCALE)
    short = Plan(plan.q_order, plan.q_offsets, plan.k_order, plan.k_offsets, plan.keep[:, :, :1].contiguous())
    with pytest.raises(RuntimeError, match="a row for each of 5 query groups"):
        attend(q, k, v, short, SCALE)


def test_tensors_of_two_dtypes_are_an_error():
    q, k, v = random_inputs(130, 150, 40)
    with pytest.raises(RuntimeError, match="must share a dtype"):
        attend(q, k, v.bfloat16(), random_plan(2, 2, 1, 130, 150), SCALE)
