"""Attention over the kept key groups in plain torch: the definition of correct (docs/svg2.md, section 9).

The plan is expanded to a mask over tokens, a bounded number of queries at a time. Nothing is read on the
host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compile.plan import Plan, unpack_bits

SCORES_AT_ONCE = 2**24


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, out: Tensor) -> Tensor:
    """Write softmax(scale q k^T) v over the kept keys into ``out``.

    Source: SVG2 (arXiv 2505.18875): exact softmax, renormalised over the kept keys.
    Shapes: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; out [B, H, Sq, Dv]; any strides.
    Dtypes: q, k, v, out alike; computed in float32, or in float64 for float64 inputs.
    Returns: natural log of the sum of exp(scale q.k) over the kept keys, float32 [B, H, Sq]. A row without a
        key gives 0 and -inf.

    Keys that a row does not keep never touch it, not even as NaN. A non-finite kept value gives NaN in its
    channel.
    """
    batches, heads, queries, _ = q.shape
    shared = heads // k.shape[1]
    lse = torch.empty((batches, heads, queries), dtype=torch.float32, device=q.device)
    for batch in range(batches):
        for head in range(heads):
            key_head = head // shared
            q_group = group_of_token(plan.q_order, plan.q_offsets, batch, head, queries)
            k_group = group_of_token(plan.k_order, plan.k_offsets, batch, key_head, k.shape[2])
            key, value = _copied(k[batch, key_head]), _copied(v[batch, key_head])
            by_key = unpack_bits(plan.keep[batch, head], plan.key_groups).index_select(1, k_group)
            rows = max(1, SCORES_AT_ONCE // max(1, k.shape[2]))
            for start in range(0, queries, rows):
                part = slice(start, start + rows)
                mask = by_key.index_select(0, q_group[part])
                result, log_sum = attend(_copied(q[batch, head, part]), key, value, mask, scale)
                out[batch, head, part] = result.to(out.dtype)
                lse[batch, head, part] = log_sum
    return lse


def group_of_token(order: Tensor | None, offsets: Tensor, batch: int, head: int, tokens: int) -> Tensor:
    """The group that each token of one (batch item, head) belongs to: int64 [S]."""
    position = torch.arange(tokens, device=offsets.device, dtype=offsets.dtype)
    group = torch.searchsorted(offsets[batch, head, 1:].contiguous(), position, right=True)
    if order is None:
        return group
    return torch.empty_like(group).scatter_(0, order[batch, head].to(torch.int64), group)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked attention of one head: rows [Sq, Dv] and their log-sum-exp [Sq], in the dtype of the inputs.

    Shapes: q [Sq, D]; k [Sk, D]; v [Sk, Dv]; mask bool [Sq, Sk], True where a query attends to a key.
    """
    logits = torch.where(mask, (q @ k.t()) * scale, -math.inf)
    peak = logits.amax(-1, keepdim=True) if k.shape[0] else logits.new_full((q.shape[0], 1), -math.inf)
    peak = torch.where(peak == -math.inf, 0, peak)
    weights = (logits - peak).exp()
    total = weights.sum(-1, keepdim=True)
    finite = torch.isfinite(v)
    result = (weights @ torch.where(finite, v, 0)) / torch.where(total == 0, 1, total)
    # A weight of 0 times NaN is NaN, so values that are not finite take a way of their own to the rows that
    # keep them.
    spoiled = mask.to(v.dtype) @ (~finite).to(v.dtype) > 0
    return torch.where(spoiled, math.nan, result), (total.log() + peak).squeeze(-1)


def _copied(x: Tensor) -> Tensor:
    """A new contiguous copy in the dtype of the computation: results depend on no stride and no alignment."""
    compute = torch.float64 if x.dtype is torch.float64 else torch.float32
    return x.to(compute, copy=True, memory_format=torch.contiguous_format)
