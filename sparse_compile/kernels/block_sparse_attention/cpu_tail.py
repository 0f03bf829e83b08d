"""The pooled keys of the groups that a row skips, for CPU tensors: products per head, merged by log-sum-exp.

Attention over two disjoint sets of keys is the mean of both results, weighted by exp of their log-sum-exps
(docs/correction.md). All mass of the pooled part is pooled, so that its coupling term is just scale q C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.kernels.block_sparse_attention.reference import Tail

SCORES_AT_ONCE = 2**18
"""One megabyte of float32 logits: they stay in the second-level cache from one product to the other."""


@dataclass(frozen=True)
class RowTail:
    """The pooled arrays of one head, ready for products, and the queries that need them.

    Shapes: rows int64 [n], the queries that skip anything, ascending; group int64 [n], the query group of each; keys
        [D, Gk]; values [Gk, Dv], finite; coupling [D, Dv] or None; bias [Gq, Gk], ln of the size where a group is
        skipped and -inf elsewhere; hidden bool [Gq, Gk], where it is -inf, or None if all keys are finite; spoiled bool
        [Gq, Dv], where a skipped value is not finite, or None if there is none.
    """

    rows: Tensor
    group: Tensor
    keys: Tensor
    values: Tensor
    coupling: Tensor | None
    bias: Tensor
    hidden: Tensor | None
    spoiled: Tensor | None


def row_tail(tail: Tail, q_group: Tensor) -> RowTail | None:
    """Prepare the tail of one head; None if no query skips anything.

    Shapes: tail.skipped bool [Gq, Gk], by query group; q_group int64 [Sq].
    """
    rows = tail.skipped.any(1).index_select(0, q_group).nonzero().squeeze(1)
    if not len(rows):
        return None
    bias = torch.where(tail.skipped, tail.log_size, -math.inf)
    # A bias of -inf hides a finite logit, but makes NaN of one that is not.
    hidden = None if torch.isfinite(tail.mean_k).all() else ~tail.skipped
    values, spoiled = tail.mean_v, None
    finite = torch.isfinite(values)
    if not finite.all():
        values = torch.where(finite, values, 0)
        spoiled = tail.skipped.to(values.dtype) @ (~finite).to(values.dtype) > 0
    group = q_group.index_select(0, rows)
    return RowTail(rows, group, tail.mean_k.t().contiguous(), values, tail.coupling, bias, hidden, spoiled)


def merge_tail(q: Tensor, exact: Tensor, lse: Tensor, tail: RowTail, scale: float, out: Tensor) -> Tensor:
    """Write the exact result merged with the pooled one into ``out``; return the merged log-sum-exp [Sq].

    Shapes: q [Sq, D], any strides; exact [Sq, Dv] and lse [Sq] of the kept keys, 0 and -inf without any, in the dtype
        of the computation; out [Sq, Dv] in q's dtype.
    """
    if len(tail.rows) < q.shape[0]:
        out.copy_(exact)
    merged = lse.clone()
    at_once = max(64, SCORES_AT_ONCE // max(*tail.keys.shape, exact.shape[1]))
    for rows, group in zip(tail.rows.split(at_once), tail.group.split(at_once), strict=True):
        own_exact, own_lse = exact.index_select(0, rows), lse.index_select(0, rows).unsqueeze(1)
        result, log_sum = _attend_rows(q.index_select(0, rows).to(exact.dtype), tail, group, scale)
        share = torch.sigmoid(log_sum - own_lse)  # exp(log_sum) / (exp(log_sum) + exp(own_lse)): exactly 1 without keys
        none = log_sum == -math.inf
        result = torch.where(none, own_exact, torch.lerp(own_exact, result, share))
        if tail.spoiled is not None:
            result.masked_fill_(tail.spoiled.index_select(0, group), math.nan)
        out.index_copy_(0, rows, result.to(out.dtype))
        merged.index_copy_(0, rows, torch.logaddexp(own_lse, log_sum).squeeze(1))
    return merged


def _attend_rows(q: Tensor, tail: RowTail, group: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to pooled keys alone: q [n, D] and group [n] to result [n, Dv] and log-sum-exp [n, 1].

    A row whose logits are all -inf gives -inf and a result without meaning.
    """
    logits = tail.bias.index_select(0, group).addmm_(q, tail.keys, alpha=scale)
    if tail.hidden is not None:
        logits.masked_fill_(tail.hidden.index_select(0, group), -math.inf)
    peak = logits.amax(1, keepdim=True)
    peak.masked_fill_(peak == -math.inf, 0)
    weights = logits.sub_(peak).exp_()
    total = weights.sum(1, keepdim=True)
    result = (weights @ tail.values).div_(total)
    if tail.coupling is not None:
        result.addmm_(q, tail.coupling, alpha=scale)
    return result, total.log().add_(peak)
