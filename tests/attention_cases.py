"""Inputs of attention tests, and the error budget that a block-sparse attention is held to."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from kernel_oracles import attend, exact_attention, random_tensor, token_mask

from sparse_compile.error_budget import assert_within_error_budget, nan_filled_empty

RELATIVE_ERROR = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""Largest relative L2 error of 16-bit outputs (docs/svg2.md, section 15)."""


def random_inputs(queries, keys, size=64, value_size=None, heads=(2, 1), batch=2, dtype=torch.float32):
    return (
        random_tensor(batch, heads[0], queries, size, dtype=dtype),
        random_tensor(batch, heads[1], keys, size, seed=1, dtype=dtype),
        random_tensor(batch, heads[1], keys, value_size or size, seed=2, dtype=dtype),
    )


def assert_matches_exact(q, k, v, plan, scale, kernel, *, ordinary_logits=True):
    """Error budgets of docs/svg2.md, section 15, on every row, with poisoned memory.

    Logits in the thousands are rounded by more than the absolute budgets, in SDPA too: only the relative
    budget is asked of them.
    """
    with nan_filled_empty():
        out, lse = attend(q, k, v, plan, scale, kernel=kernel)
    mask = token_mask(plan)
    exact, exact_lse = exact_attention(q, k, v, mask, scale)
    alive = mask.any(-1)
    assert (out[~alive] == 0).all() and (lse[~alive] == -math.inf).all()
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    if not alive.any():
        return
    lse_error = (lse.double() - exact_lse)[alive].abs() / exact_lse[alive].abs().clamp(min=1)
    assert lse_error.max() <= 1e-5
    exact = torch.where(alive.unsqueeze(-1), exact, 0)
    shared = q.shape[1] // k.shape[1]
    low = F.scaled_dot_product_attention(
        q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), attn_mask=mask, scale=scale
    )
    low = torch.where(alive.unsqueeze(-1), low, 0)
    assert_within_error_budget(out, low, exact, kernel)
    if not ordinary_logits:
        return
    if q.dtype is torch.float32:
        assert (out.double() - exact).abs().max() <= 5e-6 * v.abs().max()
    else:
        norm = exact.norm()
        error, plain = (out.double() - exact).norm() / norm, (low.double() - exact).norm() / norm
        assert error <= RELATIVE_ERROR[q.dtype] and error <= 1.5 * plain + 1e-6
