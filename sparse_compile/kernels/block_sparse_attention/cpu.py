"""Attention over the kept key groups for CPU tensors, at about the speed of dense attention per attended pair.

One (batch item, head) at a time: keys and values are copied into the grouped order once; each query group with its
kept keys is one small dense attention; groups of like size run as one batch. Host reads are free here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.plan import Plan, unpack_bits

BYTES_AT_ONCE = 2**24
"""Gathered keys and values of one batch."""
PAIRS_PER_BATCH = 2**20
"""What starting a batch costs (about 50 microseconds), as query-key-channel products of attention."""


@dataclass(frozen=True)
class Work:
    """One query group of a head: its number, its number of queries, and its number of kept keys."""

    group: int
    queries: int
    keys: int


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, out: Tensor) -> Tensor:
    """Write softmax(scale q k^T) v over the kept keys into ``out``; see `reference.attention`.

    Source: SVG2 (arXiv 2505.18875); the blocks run through torch's FlashAttention for CPU (float32 statistics).
    Shapes: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; out [B, H, Sq, Dv]; any strides.
    Returns: natural log-sum-exp over the kept keys, float32 [B, H, Sq]; a row without a key gives 0 and -inf.

    Batches never mix heads, so a result depends on nothing but its own head.
    """
    batches, heads, queries, _ = q.shape
    shared = heads // k.shape[1]
    lse = torch.empty((batches, heads, queries), dtype=torch.float32)
    for batch in range(batches):
        for key_head in range(k.shape[1]):
            key = _grouped(k[batch, key_head], _order(plan.k_order, batch, key_head))
            value = _grouped(v[batch, key_head], _order(plan.k_order, batch, key_head))
            for head in range(key_head * shared, (key_head + 1) * shared):
                _attend_head(q, key, value, plan, (batch, head, key_head), scale, out, lse)
    return lse


def _attend_head(
    q: Tensor, key: Tensor, value: Tensor, plan: Plan, at: tuple[int, int, int], scale: float, out: Tensor, lse: Tensor
) -> None:
    """Fill out[batch, head] and lse[batch, head] of ``at`` = (batch, head, key_head)."""
    batch, head, key_head = at
    own, own_out, own_lse = q[batch, head], out[batch, head], lse[batch, head]
    q_offsets = plan.q_offsets[batch, head].tolist()
    kept = unpack_bits(plan.keep[batch, head], plan.key_groups)
    key_counts = plan.k_offsets[batch, key_head].diff().to(torch.int64)
    kept_keys = kept.to(torch.int64).mv(key_counts).tolist()
    order = _order(plan.q_order, batch, head)
    by_key = torch.repeat_interleave(kept, key_counts, dim=1)
    work = []
    for group, keys in enumerate(kept_keys):
        first, last = q_offsets[group], q_offsets[group + 1]
        if last > first and keys > 0:
            work.append(Work(group, last - first, keys))
    if sum(item.queries for item in work) < own.shape[0]:
        own_out.zero_()
        own_lse.fill_(-math.inf)
    row_bytes = (key.shape[1] + value.shape[1]) * key.element_size()
    for members in make_batches(work, own.shape[1], row_bytes):
        tokens, lanes = _query_lanes(members, q_offsets, order)
        rows = _key_lanes(members, by_key)
        block_out, block_lse = _attend_block(own[tokens], key, value, rows, scale)
        own_out[tokens[lanes]] = block_out[lanes]
        own_lse[tokens[lanes]] = block_lse[lanes]
