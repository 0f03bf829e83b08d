"""Ragged block-sparse attention against float64, with and without what stands for the skipped keys."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_oracles import assert_same_bits, exact_attention, random_plan, random_tensor, token_mask
from plan_placement import moved, moved_pooled
from torch import Tensor

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.block_sparse_attention import head_slices as module
from sparse_compile.kernels.block_sparse_attention import reference, triton_launch
from sparse_compile.kernels.block_sparse_attention.configs import AttentionConfig
from sparse_compile.kernels.block_sparse_attention.head_slices import head_slices
from sparse_compile.kernels.pooled_keys.reference import pooled_keys
from sparse_compile.kernels.work_lists.triton_launch import Tiling
from sparse_compile.plan import Plan, PooledKeys

SMALL = AttentionConfig(32, 32, 4, 2)
LARGEST_ERROR = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""For values from N(0, 1)."""
LSE_ERROR = {torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 3e-3}
"""With pooled keys, whose means enter in the dtype of q; without them every dtype has float32's."""
each_dtype = pytest.mark.parametrize("dtype", list(LARGEST_ERROR), ids=["fp32", "fp16", "bf16"])


def attend(
    device: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    pooled: PooledKeys | None = None,
    scale: float = 0.2,
    config: AttentionConfig | None = SMALL,
    short: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp on the CPU; checks the density on the way."""
    out = torch.full((*q.shape[:3], v.shape[3]), math.nan, dtype=q.dtype, device=device)
    placed = (x.to(device) for x in (q, k, v))
    tail = None if pooled is None else moved_pooled(pooled, device)
    with nan_filled_empty():
        lse, density = triton_launch.attention(*placed, moved(plan, device), tail, scale, out, config, short)
    assert torch.equal(density.cpu(), plan.density())
    return out.cpu(), lse.cpu()


def pool(k: Tensor, v: Tensor, plan: Plan, coupled: bool) -> PooledKeys:
    *means, coupling = pooled_keys(k, v, plan.k_order, plan.k_offsets, [0, k.shape[2]], coupled)
    return PooledKeys(*means, coupling if coupled else None)


def in_float64(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, pooled: PooledKeys | None, scale: float
) -> tuple[Tensor, Tensor]:
    exact = torch.empty((*q.shape[:3], v.shape[3]), dtype=torch.float64)
    lse = reference.attention(q.double(), k.double(), v.double(), plan, pooled, scale, exact)
    return exact, lse


def assert_close(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], dtype: torch.dtype, pooled: bool) -> None:
    (out, lse), (exact_out, exact_lse) = found, exact
    assert torch.isfinite(out).all()
    assert (out.double() - exact_out).abs().max() <= LARGEST_ERROR[dtype]
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    seen = exact_lse > -math.inf
    error = (lse[seen].double() - exact_lse[seen]).abs().max() if seen.any() else torch.zeros(())
    assert error <= LSE_ERROR[dtype if pooled else torch.float32]


def in_place(plan: Plan) -> Plan:
    return Plan(None, plan.q_offsets, None, plan.k_offsets, plan.keep)


@each_dtype
@pytest.mark.parametrize(("queries", "keys", "size", "value_size"), [(63, 130, 40, 24), (130, 65, 32, 72)])
def test_rows_match_float64(
    device: str, dtype: torch.dtype, queries: int, keys: int, size: int, value_size: int
) -> None:
    plan = random_plan(1, 2, 1, queries, keys, share=0.4)
    q, k = random_tensor(1, 2, queries, size, dtype=dtype), random_tensor(1, 1, keys, size, seed=1, dtype=dtype)
    v = random_tensor(1, 1, keys, value_size, seed=2, dtype=dtype)
    exact = exact_attention(q, k, v, token_mask(plan), 0.2)
    assert_close(attend(device, q, k, v, plan), exact, dtype, pooled=False)


@each_dtype
@pytest.mark.parametrize("coupled", [False, True], ids=["pooled", "coupled"])
def test_pooled_keys_match_float64(device: str, dtype: torch.dtype, coupled: bool) -> None:
    plan = random_plan(1, 2, 1, 70, 150, 4, 40, share=0.4)
    q, k, v = (
        random_tensor(1, heads, n, 40, seed=heads + n, dtype=dtype) for heads, n in ((2, 70), (1, 150), (1, 150))
    )
    pooled = pool(k, v, plan, coupled)
    exact = in_float64(q, k, v, plan, pooled, 0.2)
    assert_close(attend(device, q, k, v, plan, pooled), exact, dtype, pooled=True)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["nothing", "everything"])
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "tma"])
def test_blocks_in_place(device: str, share: float, descriptors: bool) -> None:
    """Blocks of 32 with a short last one; nothing kept gives 0, and what stands for them gives their attention."""
    q, k, v = (random_tensor(1, 1, 100, 32, seed=seed, dtype=torch.float16) for seed in range(3))
    bounds = torch.tensor([0, 32, 64, 96, 100, 100], dtype=torch.int32).view(1, 1, -1)
    keep = torch.full((1, 1, 5, 1), 15 if share else 0, dtype=torch.int32)
    plan = Plan(None, bounds, None, bounds, keep)
    config = SMALL._replace(descriptors=descriptors)
    out, lse = attend(device, q, k, v, plan, config=config)
    if share:
        assert_close((out, lse), in_float64(q, k, v, plan, None, 0.2), torch.float16, pooled=False)
    else:
        assert (out == 0).all() and (lse == -math.inf).all()
    pooled = pool(k, v, plan, coupled=False)
    found = attend(device, q, k, v, plan, pooled, config=config)
    assert_close(found, in_float64(q, k, v, plan, pooled, 0.2), torch.float16, pooled=True)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "tma"])
def test_skipped_keys_and_padding_never_touch_a_row(device: str, descriptors: bool) -> None:
    """The lanes behind a short piece hold the keys of others: not even their NaN gets through."""
    q, k, v = (random_tensor(1, 1, 100, 32, seed=seed) for seed in range(3))
    bounds = torch.tensor([0, 20, 52, 70, 95, 100], dtype=torch.int32).view(1, 1, -1)
    keep = torch.full((1, 1, 5, 1), 0b0101, dtype=torch.int32)
    plan = Plan(None, bounds, None, bounds, keep)
    config = SMALL._replace(descriptors=descriptors, block_k=16)
    clean = attend(device, q, k, v, plan, config=config)
    k[:, :, 20:52], v[:, :, 20:52], k[:, :, 70:], v[:, :, 70:] = math.nan, math.nan, math.inf, math.inf
    assert torch.isfinite(clean[0]).all()
    assert_same_bits(attend(device, q, k, v, plan, config=config), clean)


@pytest.mark.parametrize("coupled", [False, True], ids=["pooled", "coupled"])
def test_rows_that_keep_all_never_see_the_pooled_arrays(device: str, coupled: bool) -> None:
    plan = random_plan(1, 1, 1, 50, 90, share=1.0)
    q, k, v = (random_tensor(1, 1, n, 32, seed=n) for n in (50, 90, 90))
    pooled = pool(k, v, plan, coupled)
    poisoned = PooledKeys(*(None if x is None else torch.full_like(x, math.nan) for x in vars(pooled).values()))
    found = attend(device, q, k, v, plan, poisoned)
    assert_same_bits(found, attend(device, q, k, v, plan, pooled))
    exact = in_float64(q, k, v, plan, None, 0.2)
    assert_close(found, exact, torch.float32, pooled=False)


def test_a_row_that_is_not_finite_is_nan_and_no_other(device: str) -> None:
    plan = random_plan(1, 1, 1, 40, 60, share=0.6)
    q, k, v = (random_tensor(1, 1, n, 32, seed=n) for n in (40, 60, 60))
    clean = attend(device, q, k, v, plan)
    q[0, 0, 7] = math.nan
    out, lse = attend(device, q, k, v, plan)
    others = torch.arange(40) != 7
    assert_same_bits((out[:, :, others], lse[:, :, others]), (clean[0][:, :, others], clean[1][:, :, others]))
    sees_keys = clean[1][0, 0, 7] > -math.inf
    assert sees_keys and out[0, 0, 7].isnan().all() and lse[0, 0, 7].isnan()


@pytest.mark.parametrize("scale", [-0.2, 0.0, 30.0])
def test_any_scale(device: str, scale: float) -> None:
    plan = random_plan(1, 1, 1, 40, 60, share=0.6)
    q, k, v = (random_tensor(1, 1, n, 32, seed=n) for n in (40, 60, 60))
    pooled = pool(k, v, plan, coupled=True)
    out, lse = attend(device, q, k, v, plan, pooled, scale)
    exact, exact_lse = in_float64(q, k, v, plan, pooled, scale)
    assert (out - exact).abs().max() <= 1e-4 * max(1.0, float(exact.abs().max()))
    seen = exact_lse > -math.inf
    assert torch.allclose(lse[seen].double(), exact_lse[seen].double(), rtol=1e-5, atol=1e-4)


def test_strides_batches_repeats_and_launch_sizes_change_no_bit(device: str) -> None:
    plan = random_plan(2, 4, 2, 50, 70, share=0.5)
    q, k, v = (random_tensor(2, heads, n, 32, seed=n, dtype=torch.float16) for heads, n in ((4, 50), (2, 70), (2, 70)))
    pooled = pool(k, v, plan, coupled=True)
    found = attend(device, q, k, v, plan, pooled)
    strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert_same_bits(attend(device, *strided, plan, pooled), found)
    assert_same_bits(attend(device, q, k, v, plan, pooled, config=SMALL._replace(persistent=1)), found)
    second = Plan(*(x[1:] for x in vars(plan).values()))
    tail = PooledKeys(*(x[1:] for x in vars(pooled).values()))
    assert_same_bits(attend(device, q[1:], k[1:], v[1:], second, tail), [x[1:] for x in found])


@pytest.mark.parametrize("coupled", [None, True], ids=["without-tail", "coupled"])
def test_what_is_left_of_a_row_goes_in_short_tiles(device: str, coupled: bool | None) -> None:
    """Rows of 0 to 33 queries: in whole tiles, in short ones, and in both."""
    sizes = torch.tensor([0, 5, 16, 17, 31, 32, 33, 0])
    bounds = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int().view(1, 1, -1)
    plan = random_plan(1, 1, 1, int(sizes.sum()), 90, 8, 6, share=0.5)
    plan = Plan(plan.q_order, bounds, plan.k_order, plan.k_offsets, plan.keep)
    q, k, v = (random_tensor(1, 1, n, 32, seed=n, dtype=torch.float16) for n in (plan.q_order.shape[2], 90, 90))
    pooled = None if coupled is None else pool(k, v, plan, coupled)
    found = attend(device, q, k, v, plan, pooled, short=SMALL._replace(block_q=16))
    assert_close(found, in_float64(q, k, v, plan, pooled, 0.2), torch.float16, pooled=pooled is not None)
    without = attend(device, q, k, v, plan, pooled)
    assert torch.allclose(found[0], without[0], atol=2e-3) and torch.allclose(found[1], without[1], atol=1e-5)


def test_ragged_rows_get_a_configuration_for_what_is_left(device: str) -> None:
    plan, blocks = random_plan(1, 1, 1, 2000, 900, 9, 12), random_plan(1, 1, 1, 2000, 900, 33, 12)
    q, k = torch.empty(1, 1, 2000, 64, dtype=torch.float16), torch.empty(1, 1, 900, 64, dtype=torch.float16)
    found = triton_launch.configured(q.to(device), k.to(device), k.to(device), plan)
    assert found.short is not None and found.short.block_q * 2 == found.config.block_q
    assert (found.tiling.short_q, found.short.block_k) == (found.short.block_q, found.config.block_k)
    for other in (in_place(plan), blocks):
        assert triton_launch.configured(q.to(device), k.to(device), k.to(device), other).short is None


def test_heads_may_go_in_several_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = random_plan(2, 6, 3, 50, 70, share=0.5)
    q, k, v = (random_tensor(2, heads, n, 32, seed=n) for heads, n in ((6, 50), (3, 70), (3, 70)))
    pooled = pool(k, v, plan, coupled=True)
    whole = attend(device, q, k, v, plan, pooled)
    tiling = Tiling(32, 32, 16)
    assert len(list(head_slices(q, k, v, plan, tiling))) == 1
    monkeypatch.setattr(module, "LEAST_TILES", 1)
    monkeypatch.setattr(module, "WORKSPACE_SHARE", 0.0)
    parts = list(head_slices(q, k, v, plan, tiling))
    assert [(part.batch.start, part.key_heads, part.query_heads) for part in parts] == [
        (batch, slice(head, head + 1), slice(2 * head, 2 * head + 2)) for batch in range(2) for head in range(3)
    ]
    assert_same_bits(attend(device, q, k, v, plan, pooled), whole)


@each_dtype
@pytest.mark.parametrize("attends", [False, True], ids=["padding-silent", "padding-attends"])
def test_dense_attention_keeps_its_log_sum_exp(device: str, dtype: torch.dtype, attends: bool) -> None:
    q, k, v = (random_tensor(1, heads, n, 24, seed=n, dtype=dtype) for heads, n in ((2, 40), (1, 70), (1, 70)))
    q_valid, k_valid = torch.arange(40)[None] % 7 != 3, torch.arange(70)[None] % 5 != 1
    k, v = (torch.where(k_valid[:, None, :, None], x, math.nan) for x in (k, v))
    mask = k_valid[:, None, None, :] & (q_valid[:, None, :, None] | attends)
    clean = (torch.where(k_valid[:, None, :, None], x, 0) for x in (k, v))
    exact = exact_attention(q, *clean, mask.expand(1, 2, 40, 70), 0.2)
    exact = (exact[0].nan_to_num(0), exact[1])
    out, lse = torch.empty(1, 2, 40, 24, dtype=dtype, device=device), torch.empty(1, 2, 40, device=device)
    placed = (x.to(device) for x in (q, k, v, q_valid, k_valid))
    triton_launch.attention_with_lse(*placed, attends, 0.2, out, lse)
    assert_close((out.cpu(), lse.cpu()), exact, dtype, pooled=False)


@pytest.mark.parametrize("ordered", [True, False], ids=["ragged", "in-place"])
def test_offsets_pass_2_to_the_31(device: str, ordered: bool) -> None:
    """Tokens so far apart that the last ones lie behind 2^31 elements; only the pages in use take memory on a CPU."""
    plan = random_plan(1, 1, 1, 40, 40, share=0.6)
    plan = plan if ordered else in_place(plan)
    near = [random_tensor(1, 1, 40, 16, seed=seed, dtype=torch.float16) for seed in range(3)]
    apart = 2**26
    far = [
        torch.empty(39 * apart + 16, dtype=torch.float16, device=device).as_strided(x.shape, (1, 1, apart, 1))
        for x in near
    ]
    for x, wide in zip(near, far, strict=True):
        wide.copy_(x)
    out = torch.empty(1, 1, 40, 16, dtype=torch.float16, device=device)
    lse, _ = triton_launch.attention(*far, moved(plan, device), None, 0.2, out, SMALL)
    assert_same_bits((out.cpu(), lse.cpu()), attend(device, *near, plan))


def test_without_queries_nothing_is_computed(device: str) -> None:
    plan = random_plan(1, 1, 1, 0, 5, 2, 2)
    q, k = torch.empty(1, 1, 0, 32), random_tensor(1, 1, 5, 32)
    assert attend(device, q, k, k, plan)[0].shape == (1, 1, 0, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "blocks"])
def test_real_sizes_match_float64(dtype: torch.dtype, ragged: bool) -> None:
    """Wan 1.3B at 480p: 32,760 tokens, 12 heads of 128; the rows of some query groups."""
    tokens, heads, size = 32_760, 12, 128
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, size, generator=generator, device="cuda").to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    plan = large_plan(tokens, heads, ragged, generator)
    out = torch.full_like(q, math.nan)
    *means, coupling = pooled_keys(k, v, plan.k_order, plan.k_offsets, [0, tokens], True)
    pooled = PooledKeys(*means, coupling)
    lse, _ = triton_launch.attention(q, k, v, plan, pooled, size**-0.5, out)
    assert torch.isfinite(out).all()
    for head in (0, heads - 1):
        one = Plan(*(None if x is None else x[:, head : head + 1] for x in vars(plan).values()))
        tail = PooledKeys(*(x[:, head : head + 1] for x in vars(pooled).values()))
        exact = torch.empty((1, 1, tokens, size), dtype=torch.float64, device="cuda")
        parts = (x[:, head : head + 1].double() for x in (q, k, v))
        exact_lse = reference.attention(*parts, one, tail, size**-0.5, exact)
        assert_close((out[:, head : head + 1], lse[:, head : head + 1]), (exact, exact_lse), dtype, pooled=True)


def large_plan(tokens: int, heads: int, ragged: bool, generator: torch.Generator) -> Plan:
    """Blocks of 64, or random clusters, of which a quarter is kept."""
    from sparse_compile.kernels.permutation.reference import sort_labels
    from sparse_compile.plan import pack_bits

    if ragged:
        rows, columns = 130, 432
        q_labels, k_labels = (
            torch.randint(n - 1, (1, heads, tokens), generator=generator, device="cuda", dtype=torch.int32)
            for n in (rows, columns)
        )
        q_order, q_offsets = sort_labels(q_labels, rows)
        k_order, k_offsets = sort_labels(k_labels, columns)
    else:
        rows = columns = -(-tokens // 64) + 1
        q_order = k_order = None
        bounds = (torch.arange(rows + 1, device="cuda", dtype=torch.int32) * 64).clamp(max=tokens)
        q_offsets = k_offsets = bounds.expand(1, heads, rows + 1).contiguous()
    kept = torch.rand(1, heads, rows, columns, generator=generator, device="cuda") < 0.25
    kept[..., -1] = False
    return Plan(q_order, q_offsets, k_order, k_offsets, pack_bits(kept))
