"""Dense attention with its log-sum-exp, and the mass of pairs of groups, in plain torch: the definition of correct.

The method is in docs/adaspa.md, section 4; the check of a kept log-sum-exp in section 8. One (batch item, head) at a
time and a bounded number of queries at a time. Nothing is read on the host, so the mass is made both from the kept
log-sum-exp and from that of these q and k, and the device chooses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_compile.kernels.precision import copied
from sparse_compile.kernels.token_blocks.spans import present
from sparse_compile.plan import Groups

MOST_SPREAD = 0.5
"""Most nats that the log-sum-exp may have moved unevenly within a query group for an earlier one to rank its blocks.

AdaSpa (arXiv 2502.21079) reuses the log-sum-exp of an earlier step. A shift of a whole group changes no ranking; one
within a group does. Up to this spread the plan loses about 0.01 of recall (docs/adaspa.md, section 8).
"""
LARGEST_EXPONENT = 64.0
"""Where base-2 exponents are cut off, so that no sum overflows. A row whose sum gets there, or as far below 1, where
float32 runs out of digits, is not to be trusted."""
LOG2_E = 1 / math.log(2)

SCORES_AT_ONCE = 2**20
FEWEST_ROWS = 128
"""Rows at once however many keys there are: fewer would starve the matrix product."""


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_valid: Tensor | None,
    k_valid: Tensor | None,
    padded_queries_attend: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Write softmax(scale q k^T) v over the valid keys into ``out``, and the log of its denominator into ``lse``.

    Source: the first search of AdaSpa (arXiv 2502.21079).
    Shapes: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; q_valid bool [B or 1, Sq] and k_valid bool
        [B or 1, Sk], None: all valid; out [B, H, Sq, Dv]; lse float32 [B, H, Sq], natural log; any strides.
    Dtypes: q, k, v, out alike; computed in float32, or in float64 for float64 inputs.

    Invalid keys never touch a row, not even as NaN. A row without a valid key, and a padding query unless
    ``padded_queries_attend``, gives 0 and -inf. Valid tokens that are not finite act as in dense attention.
    """
    batches, heads, queries, _ = q.shape
    shared = heads // k.shape[1]
    for batch in range(batches):
        usable = present(k_valid, batch, k.shape[2], k.device)
        attends = present(None if padded_queries_attend else q_valid, batch, queries, q.device)
        for head in range(heads):
            key, value = copied(k[batch, head // shared]), copied(v[batch, head // shared])
            value = torch.where(usable.unsqueeze(1), value, 0)  # a weight of 0 times NaN is NaN
            for part in _pieces(queries, key.shape[0]):
                logits = torch.where(usable, (copied(q[batch, head, part]) @ key.t()) * scale, -math.inf)
                log_sum = torch.where(attends[part], logits.logsumexp(-1), -math.inf)
                result = torch.where((log_sum == -math.inf).unsqueeze(1), 0, logits.softmax(-1) @ value)
                out[batch, head, part] = result.to(out.dtype)
                lse[batch, head, part] = log_sum.to(lse.dtype)


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    ready: Tensor,
    query: Groups,
    key: Groups,
    scale: float,
    row_stride: int,
    fresh: bool,
) -> tuple[Tensor, Tensor]:
    """Sum exp(scale q.k - lse) over every pair of groups; bring ``lse`` up to date unless it is ``fresh``.

    Source: AdaSpa (arXiv 2502.21079), searches with a fresh and with a kept log-sum-exp; the refresh and the check are
        ours (docs/adaspa.md, sections 4 and 8).
    Shapes: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; lse float32 [B, H, Sq], natural log; ready int32 [1]; query and key as
        in `Plan`; any strides.
    Dtypes: q and k alike; scores in float32, or in float64 for float64 inputs; sums in float64.
    Returns: mass float32 [B, H, Gq, Gk], 0 for padding and for whatever is not finite; spread float32 [B, H] in nats,
        inf where ``lse`` was not ready or does not fit q and k at all.

    Only every ``row_stride``-th row of a query group is looked at, and the mass scaled up to all of them. The kept
    ``lse`` of a head is used, and refreshed in these rows, if its spread is at most `MOST_SPREAD`. Otherwise it is
    computed anew in all rows but padding, and the mass is made from that.
    """
    batches, heads, queries, _ = q.shape
    shared = heads // k.shape[1]
    groups = query.offsets.shape[2] - 1, key.offsets.shape[2] - 1
    mass = torch.empty((batches, heads, *groups), dtype=torch.float32, device=q.device)
    spread = torch.empty((batches, heads), dtype=torch.float32, device=q.device)
    in_place = torch.arange(max(queries, k.shape[2]), device=q.device)
    for batch in range(batches):
        for head in range(heads):
            mass[batch, head], spread[batch, head] = _mass_of_head(
                q[batch, head],
                copied(k[batch, head // shared]),
                lse[batch, head],
                ready[0] != 0,
                _one_head(query, batch, head, in_place[:queries]),
                _one_head(key, batch, head // shared, in_place[: k.shape[2]]),
                scale,
                row_stride,
                fresh,
            )
    return mass, spread


def _mass_of_head(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    ready: Tensor,
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    scale: float,
    row_stride: int,
    fresh: bool,
) -> tuple[Tensor, Tensor]:
    """Mass [Gq, Gk] and spread of one head: q [Sq, D], k [Sk, D], lse [Sq]; a side is (order [S], bounds [G + 1])."""
    (q_order, q_bounds), (k_order, k_bounds) = query, key
    place = torch.arange(q.shape[0], device=q.device)
    group = torch.searchsorted(q_bounds[1:].contiguous(), place, right=True)
    padding = place >= q_bounds[-2]
    looked_at = ((place - q_bounds.index_select(0, group)) % row_stride == 0) & ~padding
    usable = torch.empty_like(k_order, dtype=torch.bool)
    usable.scatter_(0, k_order, torch.arange(k.shape[0], device=k.device) < k_bounds[-2])
    kept = lse.index_select(0, q_order)

    sums = k.new_zeros((len(q_bounds) - 1, len(k_bounds) - 1), dtype=torch.float64)
    dense_sums = torch.zeros_like(sums)
    ratio, dense = [], []
    for part in _pieces(q.shape[0], k.shape[0]):
        scores = (k @ copied(q.index_select(0, q_order[part])).t()) * scale  # [Sk, rows]
        scores = torch.where(usable.unsqueeze(1), scores, -math.inf)
        bounds = q_bounds.clamp(part.start, part.stop) - part.start
        by_key = _group_sums(_terms(scores, kept[part]), key)  # [Gk, rows]
        sums += _sums_of_rows(by_key, looked_at[part], bounds)
        if fresh:
            continue
        ratio.append(by_key.sum(0))
        dense.append(scores.logsumexp(0).to(lse.dtype))
        dense_sums += _sums_of_rows(_group_sums(_terms(scores, dense[-1]), key), looked_at[part], bounds)

    sizes = q_bounds.diff()
    looks = (sizes + row_stride - 1) // row_stride
    per_look = (sizes / looks.clamp(min=1)).unsqueeze(1)
    mass = sums * per_look
    if fresh:
        return mass.float(), mass.new_zeros(())
    ratios, dense_lse = torch.cat(ratio), torch.cat(dense)
    sound = (ratios > 2**-LARGEST_EXPONENT) & (ratios < 2**LARGEST_EXPONENT)
    moved = torch.where(sound, ratios, 1).log()
    counted = looked_at & sound & torch.isfinite(dense_lse)
    spread = _spread(moved, counted, q_bounds, group)
    # A row whose dense log-sum-exp is not finite (no key, or NaN) cannot be measured, now or ever: it says nothing.
    fits = ready & ~(looked_at & ~sound & torch.isfinite(dense_lse)).any()
    valid = fits & (spread <= MOST_SPREAD)
    refreshed = torch.where(counted, kept.double() + moved, dense_lse.double())
    new = torch.where(valid, torch.where(looked_at, refreshed, kept), dense_lse)
    lse.index_copy_(0, q_order, torch.where(padding, kept, new).to(lse.dtype))
    return torch.where(valid, mass, dense_sums * per_look).float(), torch.where(fits, spread, math.inf)


def _terms(scores: Tensor, lse: Tensor) -> Tensor:
    """The exponential of scores - lse, 0 where that is not finite: float64 [Sk, rows] from [Sk, rows] and [rows]."""
    exponent = (scores - lse) * LOG2_E
    usable = (exponent < math.inf) & torch.isfinite(lse)  # an infinite score is not a large one: it counts as nothing
    return torch.where(usable, exponent.clamp(max=LARGEST_EXPONENT).exp2(), 0).double()


def _sums_of_rows(by_key: Tensor, looked_at: Tensor, bounds: Tensor) -> Tensor:
    """Sum [Gk, rows] over the rows of each query group that are looked at: [Gq, Gk]."""
    rows = torch.where(looked_at, by_key, 0).t().contiguous()
    return _group_sums(rows, (torch.arange(rows.shape[0], device=rows.device), bounds))


def _group_sums(values: Tensor, side: tuple[Tensor, Tensor]) -> Tensor:
    """Sum rows of values [S, n] by group, in the order of the tokens: [G, n]. No atomics, so that runs repeat."""
    order, bounds = side
    return torch.nn.functional.embedding_bag(
        order, values, bounds.to(order.dtype), mode="sum", include_last_offset=True
    )


def _spread(moved: Tensor, counted: Tensor, bounds: Tensor, group: Tensor) -> Tensor:
    """Mean over the query groups with tokens of the standard deviation of ``moved`` over their counted rows."""
    side = torch.arange(moved.shape[0], device=moved.device), bounds

    def mean(values: Tensor) -> Tensor:
        stacked = torch.stack((torch.where(counted, values, 0), counted.to(values.dtype)), dim=1)
        total, count = _group_sums(stacked, side).unbind(1)
        return total / count.clamp(min=1)

    deviation = mean((moved - mean(moved).index_select(0, group)).square()).sqrt()[:-1]
    return deviation.sum() / (bounds.diff()[:-1] > 0).sum().clamp(min=1)


def _one_head(side: Groups, batch: int, head: int, in_place: Tensor) -> tuple[Tensor, Tensor]:
    """Order int64 [S] and bounds int64 [G + 1] of one head."""
    order = in_place if side.order is None else side.order[batch, head].to(torch.int64)
    return order, side.offsets[batch, head].to(torch.int64)


def _pieces(rows: int, keys: int) -> Iterator[slice]:
    """Cut the rows so that their scores against all keys stay few."""
    step = max(FEWEST_ROWS, SCORES_AT_ONCE // max(1, keys))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
