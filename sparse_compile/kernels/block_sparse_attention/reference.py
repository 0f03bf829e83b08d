"""Attention over the kept key groups in plain torch: the definition of correct (docs/svg2.md, section 9).

What stands for the groups that are not kept enters the same softmax (docs/correction.md).

The plan is expanded to a mask over tokens, a bounded number of queries at a time. Nothing is read on the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.precision import copied
from sparse_compile.plan import Groups, Plan, PooledKeys, unpack_bits

SCORES_AT_ONCE = 2**24


class Tail(NamedTuple):
    """What stands for the key groups that the queries of one head skip.

    Shapes: mean_k [Gk, D]; mean_v [Gk, Dv]; log_size [Gk]; coupling [D, Dv] or None; skipped bool [n, Gk], True where
        a pooled key takes part, for n query groups or queries.
    """

    mean_k: Tensor
    mean_v: Tensor
    log_size: Tensor
    coupling: Tensor | None
    skipped: Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, pooled: PooledKeys | None, scale: float, out: Tensor
) -> Tensor:
    """Write softmax(scale q k^T) v over the kept keys, and the pooled keys of all other groups, into ``out``.

    Source: SVG2 (arXiv 2505.18875): exact softmax, renormalised over the kept keys. SVG-EAR (arXiv 2603.08982): a group
        that is not kept is one key more, mean_k with mean_v, and ln of its size added to the logit. With coupling,
        the pooled share of the softmax times scale q C is added to the output (docs/correction.md).
    Shapes: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; out [B, H, Sq, Dv]; any strides; pooled: Hkv heads.
    Dtypes: q, k, v, out alike; computed in float32, or in float64 for float64 inputs.
    Returns: natural log of the sum of exp(logit) over kept and pooled keys, float32 [B, H, Sq]. A row without any
        gives 0 and -inf.

    Keys that a row neither keeps nor sees pooled never touch it, not even as NaN; nor do the pooled arrays touch a row
    that skips nothing, bit for bit. Padding queries (the last group) see no pooled key. A non-finite kept value gives
    NaN in its channel.
    """
    batches, heads, queries, _ = q.shape
    shared = heads // k.shape[1]
    lse = torch.empty((batches, heads, queries), dtype=torch.float32, device=q.device)
    for batch in range(batches):
        for head in range(heads):
            key_head = head // shared
            q_group = group_of_token(plan.query_side, batch, head, queries)
            k_group = group_of_token(plan.key_side, batch, key_head, k.shape[2])
            key, value = copied(k[batch, key_head]), copied(v[batch, key_head])
            kept = unpack_bits(plan.keep[batch, head], plan.key_groups)
            by_key = kept.index_select(1, k_group)
            tail = None
            if pooled is not None:
                tail = tail_of(pooled, kept, plan.k_offsets[batch, key_head], batch, key_head, key.dtype)
            rows = max(1, SCORES_AT_ONCE // max(1, k.shape[2]))
            for start in range(0, queries, rows):
                part = slice(start, start + rows)
                own_tail = None if tail is None else tail._replace(skipped=tail.skipped.index_select(0, q_group[part]))
                mask = by_key.index_select(0, q_group[part])
                result, log_sum = attend(copied(q[batch, head, part]), key, value, mask, scale, own_tail)
                out[batch, head, part] = result.to(out.dtype)
                lse[batch, head, part] = log_sum
    return lse


def tail_of(pooled: PooledKeys, kept: Tensor, k_offsets: Tensor, batch: int, key_head: int, dtype: torch.dtype) -> Tail:
    """What one head sees of the groups it does not keep, in ``dtype``; ``skipped`` is by query group, bool [Gq, Gk].

    Shapes: kept bool [Gq, Gk]; k_offsets int32 [Gk + 1].

    Empty groups and padding, of queries or of keys, are left out by the plan and not by a size of 0 in ``pooled``: a
    row that keeps all there is must not see the pooled arrays, whatever they hold.
    """
    fields = (pooled.mean_k, pooled.mean_v, pooled.log_size)
    mean_k, mean_v, log_size = (copied(x[batch, key_head], dtype) for x in fields)
    coupling = None if pooled.coupling is None else copied(pooled.coupling[batch, key_head], dtype)
    skipped = ~kept & (k_offsets.diff() > 0) & (log_size > -math.inf)
    skipped[-1] = False
    skipped[:, -1] = False
    return Tail(mean_k, mean_v, log_size, coupling, skipped)


def group_of_token(side: Groups, batch: int, head: int, tokens: int) -> Tensor:
    """The group that each token of one (batch item, head) belongs to: int64 [S]."""
    position = torch.arange(tokens, device=side.offsets.device, dtype=side.offsets.dtype)
    group = torch.searchsorted(side.offsets[batch, head, 1:].contiguous(), position, right=True)
    if side.order is None:
        return group
    return torch.empty_like(group).scatter_(0, side.order[batch, head].to(torch.int64), group)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, tail: Tail | None = None
) -> tuple[Tensor, Tensor]:
    """Masked attention of one head: rows [Sq, Dv] and their log-sum-exp [Sq], in the dtype of the inputs.

    Shapes: q [Sq, D]; k [Sk, D]; v [Sk, Dv]; mask bool [Sq, Sk], True where a query attends to a key; tail.skipped
        bool [Sq, Gk].

    Keys and pooled keys are summed apart, so that a row without pooled keys has the bits it has without a tail.
    """
    logits = torch.where(mask, (q @ k.t()) * scale, -math.inf)
    peak = logits.amax(-1, keepdim=True) if k.shape[0] else logits.new_full((q.shape[0], 1), -math.inf)
    if tail is None:
        weights = (logits - _finite_or_zero(peak)).exp()
        total, result = weights.sum(-1, keepdim=True), _weighted_sum(weights, v, mask)
    else:
        pooled_logits = torch.where(tail.skipped, (q @ tail.mean_k.t()) * scale + tail.log_size, -math.inf)
        peak = torch.maximum(peak, pooled_logits.amax(-1, keepdim=True))
        weights, pooled = (logits - _finite_or_zero(peak)).exp(), (pooled_logits - _finite_or_zero(peak)).exp()
        share = pooled.sum(-1, keepdim=True)
        total = weights.sum(-1, keepdim=True) + share
        result = _weighted_sum(weights, v, mask) + _weighted_sum(pooled, tail.mean_v, tail.skipped)
        if tail.coupling is not None:
            change = share * (scale * (q @ tail.coupling))
            result = result + torch.where(tail.skipped.any(-1, keepdim=True), change, 0)
    return result / torch.where(total == 0, 1, total), (total.log() + _finite_or_zero(peak)).squeeze(-1)


def _finite_or_zero(peak: Tensor) -> Tensor:
    """The largest logit of each row; 0 for a row without keys, where -inf minus -inf would be NaN."""
    return torch.where(peak == -math.inf, 0, peak)


def _weighted_sum(weights: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Product of weights [n, S] and values [S, Dv], where values outside of the mask [n, S] never enter.

    A weight of 0 times NaN is NaN, so values that are not finite take a way of their own to the rows that see them.
    """
    finite = torch.isfinite(values)
    spoiled = mask.to(values.dtype) @ (~finite).to(values.dtype) > 0
    return torch.where(spoiled, math.nan, weights @ torch.where(finite, values, 0))
