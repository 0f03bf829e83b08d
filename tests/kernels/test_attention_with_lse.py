from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_oracles import DTYPES, IMPLEMENTATIONS, OPS, assert_same_bits, exact_attention, random_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_compile.error_budget import assert_within_error_budget, nan_filled_empty
from sparse_compile.kernels.block_mass import cpu, reference
from sparse_compile.kernels.block_sparse_attention import cpu as cpu_attention
from sparse_compile.plan import Groups

each_kernel = pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def random_inputs(queries, keys, size=32, value_size=None, heads=(2, 1), batch=2, dtype=torch.float32):
    return (
        random_tensor(batch, heads[0], queries, size, dtype=dtype),
        random_tensor(batch, heads[1], keys, size, seed=1, dtype=dtype),
        random_tensor(batch, heads[1], keys, value_size or size, seed=2, dtype=dtype),
    )


def dense(q, k, v, *, q_valid=None, k_valid=None, attend=True, scale=0.25, token_major=True, kernel="cpu"):
    """The op, with poisoned memory: out and log-sum-exp."""
    lse = torch.full(q.shape[:3], math.nan)
    with nan_filled_empty():
        out = OPS.attention_with_lse(q, k, v, q_valid, k_valid, lse, attend, scale, token_major, kernel)
    return out, lse


def mask_of(q, k, q_valid=None, k_valid=None, attend=True):
    mask = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool)
    if k_valid is not None:
        mask &= k_valid[:, None, None, :]
    if q_valid is not None and not attend:
        mask &= q_valid[:, None, :, None]
    return mask


def assert_matches_exact(q, k, v, *, scale=0.25, kernel="cpu", **masks):
    """Error budgets from float64 and from torch's own attention in the same dtype."""
    out, lse = dense(q, k, v, scale=scale, kernel=kernel, **masks)
    mask = mask_of(q, k, **masks)
    exact, exact_lse = exact_attention(q, k, v, mask, scale)
    alive = mask.any(-1)
    assert (out[~alive] == 0).all() and (lse[~alive] == -math.inf).all()
    assert out.dtype == q.dtype and out.shape == exact.shape
    error = (lse.double() - exact_lse)[alive].abs() / exact_lse[alive].abs().clamp(min=1)
    assert error.max() <= 1e-5
    low = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    exact, low = (torch.where(alive.unsqueeze(-1), x, 0) for x in (exact, low))
    assert_within_error_budget(out, low, exact, kernel)


@each_kernel
@each_dtype
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 65), (63, 63), (65, 129), (223, 223), (1000, 300)])
def test_rows_match_float64(kernel, dtype, queries, keys):
    assert_matches_exact(*random_inputs(queries, keys, dtype=dtype), kernel=kernel)


@each_kernel
@each_dtype
@pytest.mark.parametrize("attend", [True, False])
def test_masked_rows_match_float64(kernel, dtype, attend):
    q, k, v = random_inputs(130, 200, heads=(4, 2), dtype=dtype)
    q_valid = torch.arange(130).lt(100).unsqueeze(0)
    k_valid = torch.stack([torch.arange(200).lt(170), torch.arange(200) % 3 != 1])
    assert_matches_exact(q, k, v, q_valid=q_valid, k_valid=k_valid, attend=attend, kernel=kernel)


@each_kernel
@pytest.mark.parametrize(("size", "value_size"), [(8, 8), (40, 40), (72, 24), (24, 136), (256, 256)])
def test_head_sizes(kernel, size, value_size):
    q, k, v = random_inputs(65, 130, size, value_size, heads=(4, 2))
    assert_matches_exact(q, k, v, scale=size**-0.5, kernel=kernel)


@each_kernel
@each_dtype
@pytest.mark.parametrize("factor", [1e-4, 30.0, 200.0])
def test_extreme_logits(kernel, dtype, factor):
    q, k, v = random_inputs(65, 150, dtype=dtype)
    assert_matches_exact((q.float() * factor).to(dtype), k, v, kernel=kernel)


@each_kernel
def test_float64_is_computed_in_float64(kernel):
    q, k, v = (x.double() for x in random_inputs(65, 150, value_size=24))
    out, _ = dense(q, k, v, kernel=kernel)
    exact, _ = exact_attention(q, k, v, mask_of(q, k), 0.25)
    assert torch.allclose(out, exact, rtol=1e-12, atol=1e-14)


@each_kernel
@each_dtype
def test_the_log_sum_exp_of_16_bit_inputs_is_not_biased(kernel, dtype):
    q, k, v = random_inputs(223, 223, 64, dtype=dtype)
    _, exact = exact_attention(4 * q, k, v, mask_of(q, k), 0.125)
    _, lse = dense(4 * q, k, v, scale=0.125, kernel=kernel)
    assert (lse - exact).mean().abs() < 2e-6


@each_kernel
@each_dtype
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_padding_keys_equal_trimmed_keys_whatever_they_hold(kernel, dtype, garbage):
    q, k, v = random_inputs(90, 120, heads=(4, 2), dtype=dtype)
    trimmed = dense(q, k[:, :, :77], v[:, :, :77], kernel=kernel)
    k[:, :, 77:], v[:, :, 77:] = garbage, garbage
    padded = dense(q, k, v, k_valid=torch.arange(120).lt(77).unsqueeze(0), kernel=kernel)
    for one, other in zip(padded, trimmed, strict=True):
        assert torch.allclose(one, other, rtol=torch.finfo(dtype).eps, atol=1e-6)


@each_kernel
def test_a_row_without_a_key_gives_0_and_no_mass(kernel):
    q, k, v = random_inputs(40, 50)
    k_valid = torch.zeros(2, 50, dtype=torch.bool)
    k_valid[1, 3] = True
    out, lse = dense(q, k, v, k_valid=k_valid, kernel=kernel)
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all()
    assert torch.allclose(out[1], v[1, :, 3:4].expand_as(out[1]))
    assert torch.allclose(lse[1], (q[1] @ k[1, 0, 3]) * 0.25, atol=1e-5)


@each_kernel
@each_dtype
def test_padding_queries_attend_or_not_and_leave_the_others_alone(kernel, dtype):
    q, k, v = random_inputs(90, 70, dtype=dtype)
    plain = dense(q, k, v, kernel=kernel)
    q_valid = torch.arange(90).lt(80).unsqueeze(0)
    assert_same_bits(dense(q, k, v, q_valid=q_valid, kernel=kernel), plain)
    q[:, :, 80:] = math.nan
    out, lse = dense(q, k, v, q_valid=q_valid, attend=False, kernel=kernel)
    assert_same_bits((out[:, :, :80], lse[:, :, :80]), (plain[0][:, :, :80], plain[1][:, :, :80]))
    assert (out[:, :, 80:] == 0).all() and (lse[:, :, 80:] == -math.inf).all()


@each_kernel
@each_dtype
def test_a_nan_query_gives_a_nan_row_and_no_other(kernel, dtype):
    q, k, v = random_inputs(90, 120, dtype=dtype)
    clean, clean_lse = dense(q, k, v, kernel=kernel)
    rows = torch.zeros(2, 2, 90, dtype=torch.bool)
    rows[0, 0, 5] = rows[1, 1, 88] = True
    q[rows] = math.nan
    out, lse = dense(q, k, v, kernel=kernel)
    assert out[rows].isnan().all() and lse[rows].isnan().all()
    assert torch.equal(out[~rows], clean[~rows]) and torch.equal(lse[~rows], clean_lse[~rows])


@each_kernel
def test_a_nan_key_spoils_every_row_of_its_heads_and_no_other(kernel):
    q, k, v = random_inputs(90, 120, heads=(4, 2))
    clean, _ = dense(q, k, v, kernel=kernel)
    k[0, 1, 17, 3] = math.nan
    out, lse = dense(q, k, v, kernel=kernel)
    assert out[0, 2:].isnan().all() and lse[0, 2:].isnan().all()
    assert torch.equal(out[0, :2], clean[0, :2]) and torch.equal(out[1], clean[1])


@each_kernel
@each_dtype
def test_strides_batches_shared_heads_and_repeats_change_no_bit(kernel, dtype):
    q, k, v = random_inputs(101, 203, 40, 24, heads=(4, 2), dtype=dtype)
    plain = dense(q, k, v, kernel=kernel)

    def strided(x):
        wide = x.transpose(1, 2).contiguous().repeat(1, 1, 1, 2)
        return wide[..., 1 : 1 + x.shape[-1]].transpose(1, 2).copy_(x)

    assert_same_bits(dense(q, k, v, kernel=kernel), plain)
    assert_same_bits(dense(strided(q), strided(k), strided(v), kernel=kernel), plain)
    own = dense(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), kernel=kernel)
    assert_same_bits(own, plain)
    for b in range(2):
        single = dense(q[b : b + 1], k[b : b + 1], v[b : b + 1], kernel=kernel)
        assert_same_bits(single, (x[b : b + 1] for x in plain))


@each_kernel
def test_the_layout_of_the_output_changes_its_strides_alone(kernel):
    q, k, v = random_inputs(40, 50)
    token_major, head_major = (dense(q, k, v, token_major=major, kernel=kernel)[0] for major in (True, False))
    assert token_major.transpose(1, 2).is_contiguous() and head_major.is_contiguous()
    assert torch.equal(token_major, head_major)


def test_the_reference_in_pieces_equals_the_reference_in_one(monkeypatch):
    q, k, v = random_inputs(301, 203)
    whole = dense(q, k, v, kernel="reference")
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(reference, "FEWEST_ROWS", 64)
    for one, other in zip(dense(q, k, v, kernel="reference"), whole, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an op returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize(("attention", "mass"), [(cpu_attention, cpu), (reference, reference)])
def test_no_tensor_of_a_whole_search_is_as_large_as_all_scores(attention, mass):
    q = random_tensor(1, 1, 2048, 8)
    side = Groups(None, torch.tensor([*range(0, 2049, 64), 2048], dtype=torch.int32).view(1, 1, -1))
    lse, ready = torch.zeros(1, 1, 2048), torch.zeros(1, dtype=torch.int32)
    with LargestTensor() as largest:
        attention.attention_with_lse(q, q, q, None, None, True, 0.25, torch.empty_like(q), lse)
        mass.block_mass(q, q, lse, ready, side, side, 0.25, 1, False)
    assert q.numel() <= largest.elements <= 2048 * 2048 // 4


def op_args(kernel, masks, token_major=True):
    q, k, v = random_inputs(40, 50, 16, 24, heads=(4, 2))
    q_valid = torch.arange(40).lt(35).unsqueeze(0) if masks else None
    k_valid = torch.arange(50).lt(45).expand(2, -1) if masks else None
    return (q, k, v, q_valid, k_valid, torch.zeros(2, 4, 40), False, 0.25, token_major, kernel)


@each_kernel
@pytest.mark.parametrize("masks", [False, True])
def test_opcheck(kernel, masks):
    results = torch.library.opcheck(OPS.attention_with_lse.default, op_args(kernel, masks))
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("token_major", [False, True])
def test_the_reference_reads_no_value_on_the_host(masks, token_major):
    from sparse_compile.ops import attention

    args = op_args("reference", masks, token_major)
    with FakeTensorMode() as mode:
        fakes = tuple(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args)
        body, fake = attention._attention_with_lse(*fakes), OPS.attention_with_lse(*fakes)
    real = OPS.attention_with_lse(*args)
    for result in (body, fake):
        assert result.shape == real.shape and result.stride() == real.stride() and result.dtype == real.dtype


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_without_queries_nothing_is_computed(kernel):
    q, k = torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 5, 16)
    out = OPS.attention_with_lse(q, k, k, None, None, torch.zeros(1, 2, 0), True, 0.25, True, kernel)
    assert out.shape == (1, 2, 0, 16)
