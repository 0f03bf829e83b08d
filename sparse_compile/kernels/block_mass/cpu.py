"""Dense attention with its log-sum-exp, and the mass of pairs of groups, for CPU tensors.

Host reads are free here: padding is dropped before anything is multiplied, and a kept log-sum-exp that fits costs one
product of queries and keys, in tiles that stay in the cache.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.block_mass.reference import LARGEST_EXPONENT, LOG2_E, MOST_SPREAD
from sparse_compile.kernels.precision import copied
from sparse_compile.kernels.token_blocks.spans import present
from sparse_compile.plan import Groups

ROWS_AT_ONCE = 128
KEYS_AT_ONCE = 2048
"""With the rows, one megabyte of float32 scores: they stay in the second-level cache."""


class Rows(NamedTuple):
    """Query rows to look at: their tokens and their groups, int64 [n], in the grouped order."""

    token: Tensor
    group: Tensor


class Keys(NamedTuple):
    """The valid keys of a head in the grouped order, [n, D], and the bounds int64 [Gk] of their groups."""

    vectors: Tensor
    bounds: Tensor


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
    """As `reference.attention_with_lse`, by torch's FlashAttention for CPU.

    Computed in float32 for 16-bit inputs too: in these torch's kernel uses a coarser exponential, and its log-sum-exp
    is 2e-5 too low on average (measured with torch 2.13), which is more than block masses may be off.
    """
    if not q.numel():
        return  # torch's kernel divides by the number of queries
    shared = q.shape[1] // k.shape[1]
    width = max(q.shape[3], v.shape[3])
    for batch in range(q.shape[0]):
        usable = None
        if k_valid is not None:
            usable = present(k_valid, batch, k.shape[2], k.device).nonzero().squeeze(1)
        for key_head in range(k.shape[1]):
            heads = slice(key_head * shared, (key_head + 1) * shared)
            key, value = _gathered(k[batch, key_head], usable, width), _gathered(v[batch, key_head], usable, width)
            if not key.shape[0]:
                out[batch, heads] = 0
                lse[batch, heads] = -math.inf
                continue
            result, lse[batch, heads] = _flash(_padded(copied(q[batch, heads]), width), key, value, scale)
            out[batch, heads] = result[..., : v.shape[3]]
        if q_valid is not None and not padded_queries_attend:
            silent = ~present(q_valid, batch, q.shape[2], q.device)
            out[batch].masked_fill_(silent.unsqueeze(1), 0)
            lse[batch].masked_fill_(silent, -math.inf)


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
    """As `reference.block_mass`; a head whose kept log-sum-exp fits, or is fresh, takes one pass over its scores."""
    shared = q.shape[1] // k.shape[1]
    groups = query.offsets.shape[2] - 1, key.offsets.shape[2] - 1
    mass = torch.zeros((*q.shape[:2], *groups), dtype=torch.float32)
    spread = torch.zeros(q.shape[:2], dtype=torch.float32)
    is_ready = bool(ready.item())
    for batch in range(q.shape[0]):
        for key_head in range(k.shape[1]):
            keys = _valid_keys(k[batch, key_head], *_one_head(key, batch, key_head))
            for head in range(key_head * shared, (key_head + 1) * shared):
                order, bounds = _one_head(query, batch, head)
                sizes = bounds.diff()[:-1]
                rows = _rows(order, sizes)
                looked_at = _looked_at(rows, sizes, row_stride)
                own = q[batch, head], lse[batch, head]
                if fresh:
                    sums, _ = _measure(*own, looked_at, keys, len(sizes), scale)
                else:
                    sums, spread[batch, head] = _search(*own, is_ready, rows, looked_at, keys, sizes, scale)
                looks = (sizes + row_stride - 1) // row_stride
                mass[batch, head, :-1, :-1] = sums * (sizes / looks.clamp(min=1)).unsqueeze(1)
    return mass, spread


def _search(
    q: Tensor, lse: Tensor, ready: bool, rows: Rows, looked_at: Rows, keys: Keys, sizes: Tensor, scale: float
) -> tuple[Tensor, float]:
    """Sums [Gq - 1, Gk - 1] over the rows looked at, and the spread; updates lse [Sq] of this head.

    Shapes: q [Sq, D]; rows: all but padding; sizes int64 [Gq - 1].
    """
    spread = math.inf
    if ready:
        sums, ratios = _measure(q, lse, looked_at, keys, len(sizes), scale)
        sound = (ratios > 2**-LARGEST_EXPONENT) & (ratios < 2**LARGEST_EXPONENT)
        doubtful = looked_at.token[~sound]
        # Rows without a key and rows of NaN cannot be measured, now or ever: only their own dense value tells.
        dense = _dense_lse(q, doubtful, keys, scale)
        if not torch.isfinite(dense).any():
            moved, token = ratios[sound].log(), looked_at.token[sound]
            spread = _spread(moved, looked_at.group[sound], sizes)
            if spread <= MOST_SPREAD:
                lse[token] = (lse[token] + moved).to(lse.dtype)
                lse[doubtful] = dense.to(lse.dtype)
                return sums, spread
    lse[rows.token] = _dense_lse(q, rows.token, keys, scale).to(lse.dtype)
    return _measure(q, lse, looked_at, keys, len(sizes), scale)[0], spread


def _measure(q: Tensor, lse: Tensor, rows: Rows, keys: Keys, groups: int, scale: float) -> tuple[Tensor, Tensor]:
    """Sum exp(scale q.k - lse) by groups, float64 [Gq - 1, Gk - 1], and by rows, float64 [n].

    The sum of a row is NaN where one of its scores is; in the sums by groups such terms count as 0.
    """
    sums = torch.zeros((groups, len(keys.bounds) - 1), dtype=torch.float64)
    ratios = torch.zeros(len(rows.token), dtype=torch.float64)
    scratch = keys.vectors.new_empty(ROWS_AT_ONCE * KEYS_AT_ONCE)
    for start in range(0, len(rows.token), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        group = rows.group[part]
        own = torch.arange(int(group[0]), int(group[-1]) + 1)
        member = (own.unsqueeze(1) == group).to(keys.vectors.dtype)
        vectors = copied(q.index_select(0, rows.token[part]))
        shift = lse.index_select(0, rows.token[part]).to(vectors.dtype)
        shift = torch.where(torch.isfinite(shift), -LOG2_E * shift, -math.inf).unsqueeze(1)
        by_key = keys.vectors.new_empty((len(own), len(keys.vectors)))
        _sum_tile(vectors, shift, member, keys.vectors, scale, scratch, by_key, ratios[part], careful=False)
        if not by_key.sum() < 2**LARGEST_EXPONENT:
            # Some term is NaN or beyond the cut-off: rare, so that the check is left out of the tile above.
            ratios[part] = 0
            _sum_tile(vectors, shift, member, keys.vectors, scale, scratch, by_key, ratios[part], careful=True)
        # Differences of a running sum: it never falls, and in float64 loses nothing that a mass of 1e-3 would notice.
        running = torch.nn.functional.pad(by_key.double().cumsum_(1), (1, 0))
        sums[own] += running.index_select(1, keys.bounds).diff(dim=1)
    return sums, ratios


def _sum_tile(
    rows: Tensor,
    shift: Tensor,
    member: Tensor,
    keys: Tensor,
    scale: float,
    scratch: Tensor,
    by_key: Tensor,
    ratios: Tensor,
    *,
    careful: bool,
) -> None:
    """Set by_key [g, Sk] to the sums over the rows of each group, and add those over the keys to ratios [n].

    Shapes: rows [n, D]; shift [n, 1], minus the log-sum-exp in base 2; member [g, n], 1 where a row is in a group.
    """
    for start in range(0, len(keys), KEYS_AT_ONCE):
        part = keys[start : start + KEYS_AT_ONCE]
        terms = scratch[: len(rows) * len(part)].view(len(rows), len(part))
        torch.addmm(shift, rows, part.t(), alpha=scale * LOG2_E, out=terms)
        if careful:
            terms.masked_fill_(terms == math.inf, math.nan).clamp_(max=LARGEST_EXPONENT)
        terms.exp2_()
        ratios += terms.sum(1)
        if careful:
            terms.nan_to_num_(nan=0.0)
        torch.mm(member, terms, out=by_key[:, start : start + KEYS_AT_ONCE])


def _dense_lse(q: Tensor, tokens: Tensor, keys: Keys, scale: float) -> Tensor:
    """Natural log-sum-exp over all valid keys of the rows of q [Sq, D] at tokens [n]: [n]."""
    if not len(tokens) or not len(keys.vectors):
        return keys.vectors.new_full((len(tokens),), -math.inf)
    rows = copied(q.index_select(0, tokens)).unsqueeze(0)
    return _flash(rows, keys.vectors, keys.vectors, scale)[1].squeeze(0)


def _flash(q: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention of heads that share their keys: q [h, Sq, D], key and value [Sk, D]; out and lse [h, Sq]."""
    result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.unsqueeze(0), key.expand(1, len(q), -1, -1), value.expand(1, len(q), -1, -1), 0.0, False, scale=scale
    )
    return result.squeeze(0), lse.squeeze(0)


def _one_head(side: Groups, batch: int, head: int) -> tuple[Tensor | None, Tensor]:
    """Order int64 [S] and bounds int64 [G + 1] of one head."""
    order = None if side.order is None else side.order[batch, head].to(torch.int64)
    return order, side.offsets[batch, head].to(torch.int64)


def _valid_keys(k: Tensor, order: Tensor | None, bounds: Tensor) -> Keys:
    """All keys of k [Sk, D] but padding, copied into the grouped order."""
    count = int(bounds[-2])
    return Keys(copied(k[:count] if order is None else k.index_select(0, order[:count])), bounds[:-1])


def _rows(order: Tensor | None, sizes: Tensor) -> Rows:
    """All rows but padding, from the sizes int64 [Gq - 1] of the groups."""
    group = torch.repeat_interleave(sizes)
    return Rows(torch.arange(len(group)) if order is None else order[: len(group)], group)


def _looked_at(rows: Rows, sizes: Tensor, row_stride: int) -> Rows:
    """Every so manyth row of each group, from its first."""
    first = (sizes.cumsum(0) - sizes).index_select(0, rows.group)
    chosen = (torch.arange(len(first)) - first) % row_stride == 0
    return Rows(rows.token[chosen], rows.group[chosen])


def _spread(moved: Tensor, group: Tensor, sizes: Tensor) -> float:
    """Mean over the groups with tokens of the standard deviation of moved [n] within each."""
    count = torch.bincount(group, minlength=len(sizes)).clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return values.new_zeros(len(sizes)).index_add_(0, group, values) / count

    deviation = mean((moved - mean(moved)[group]).square()).sqrt()
    return float(deviation.sum() / (sizes > 0).sum().clamp(min=1))


def _gathered(x: Tensor, tokens: Tensor | None, width: int) -> Tensor:
    """The rows of x [S, n] at tokens (None: all) in the dtype of the computation, with zeros up to ``width``."""
    return _padded(copied(x if tokens is None else x.index_select(0, tokens)), width)


def _padded(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))
