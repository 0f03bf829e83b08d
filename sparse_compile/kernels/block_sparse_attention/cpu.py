"""Attention over the kept key groups for CPU tensors, near the speed of dense attention per attended pair.

One (batch item, head) at a time: keys and values are copied into the grouped order once; each query group
with its kept keys is one small dense attention; groups of like size run as one batch. What stands for the
groups that a row skips is merged in afterwards (`cpu_tail`). Host reads are free here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.kernels.block_sparse_attention.cpu_tail import merge_tail, row_tail
from sparse_compile.kernels.block_sparse_attention.reference import group_of_token, tail_of
from sparse_compile.kernels.precision import compute_dtype
from sparse_compile.plan import Plan, PooledKeys, unpack_bits

BYTES_AT_ONCE = 2**24
"""Most bytes of gathered keys and values in one batch of several groups."""
TOKENS_AT_ONCE = 1024
START_COST = 2**22
"""What starting a batch costs (some 0.2 milliseconds), in multiply-adds of attention."""


@dataclass(frozen=True)
class Work:
    """One query group of a head: where its queries lie in the grouped order, and how many keys it keeps."""

    group: int
    start: int
    queries: int
    keys: int


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, pooled: PooledKeys | None, scale: float, out: Tensor
) -> Tensor:
    """Write softmax(scale q k^T) v over kept keys and pooled keys into ``out``; see `reference.attention`.

    Source: SVG2 (arXiv 2505.18875), SVG-EAR (arXiv 2603.08982) and docs/correction.md; the blocks run through torch's
        FlashAttention for CPU (float32 statistics).
    Shapes: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; out [B, H, Sq, Dv]; any strides; pooled: Hkv heads.
    Returns: natural log-sum-exp over kept and pooled keys, float32 [B, H, Sq]; a row without any gives 0 and -inf.

    Batches never mix heads, so a result depends on nothing but its own head.
    """
    batches, heads, queries, size = q.shape
    shared = heads // k.shape[1]
    width = max(size, v.shape[3])
    # 16-bit inputs too: torch's kernel for them is no faster, and its log-sum-exp is only good to 3e-5.
    compute = compute_dtype(q.dtype)
    pairs = torch.zeros((k.shape[2] + 1, 2 * width), dtype=compute)
    # Fresh pages cost more than the copies into them, so that all heads and batches share the buffers.
    most = max(k.shape[2], BYTES_AT_ONCE // (2 * width * pairs.element_size()))
    scratch = torch.empty((most, 2 * width), dtype=compute)
    exact = torch.empty((0 if pooled is None else queries, v.shape[3]), dtype=compute)
    lse = torch.empty((batches, heads, queries), dtype=torch.float32)
    for batch in range(batches):
        for key_head in range(k.shape[1]):
            k_order = _order_of(plan.k_order, batch, key_head)
            _copy_grouped(k[batch, key_head], k_order, pairs[:-1, :width])
            _copy_grouped(v[batch, key_head], k_order, pairs[:-1, width:])
            k_offsets = plan.k_offsets[batch, key_head]
            for head in range(key_head * shared, (key_head + 1) * shared):
                own_q, own_out = q[batch, head], out[batch, head]
                kept = unpack_bits(plan.keep[batch, head], plan.key_groups)
                tail = None
                if pooled is not None:
                    tail = row_tail(
                        tail_of(pooled, kept, k_offsets, batch, key_head, compute),
                        group_of_token(plan.query_side, batch, head, queries),
                    )
                log_sum = _attend_head(
                    own_q,
                    pairs,
                    scratch,
                    _order_of(plan.q_order, batch, head),
                    plan.q_offsets[batch, head],
                    k_offsets.diff(),
                    kept,
                    scale,
                    own_out if tail is None else exact,
                )
                if tail is not None:
                    log_sum = merge_tail(own_q, exact, log_sum, tail, scale, own_out)
                lse[batch, head] = log_sum
    return lse


def _attend_head(
    q: Tensor,
    pairs: Tensor,
    scratch: Tensor,
    q_order: Tensor | None,
    q_offsets: Tensor,
    k_sizes: Tensor,
    kept: Tensor,
    scale: float,
    out: Tensor,
) -> Tensor:
    """Fill out [Sq, Dv] of one head from q [Sq, D]; return its lse [Sq], in the dtype of pairs.

    pairs [Sk + 1, 2 * width] holds keys and values side by side in the grouped order, padded with zeros to
    width; its last row, all zeros, stands for no key.
    """
    lse = torch.full((q.shape[0],), -math.inf, dtype=pairs.dtype)
    work = list_work(q_offsets, k_sizes, kept)
    if sum(item.queries for item in work) < q.shape[0]:
        out.zero_()
    by_key = torch.repeat_interleave(kept, k_sizes, dim=1)
    for members in make_batches(work, pairs.shape[1], pairs.shape[1] * pairs.element_size()):
        tokens, present = _query_lanes(members, q_order)
        rows = q.index_select(0, tokens.view(-1)).to(pairs.dtype).view(*tokens.shape, -1)
        result, log_sum = _attend_batch(rows, pairs, _key_lanes(members, by_key), scale, scratch)
        result = result[..., : out.shape[1]]
        if present is not None:
            tokens, result, log_sum = tokens[present], result[present], log_sum[present]
        out.index_copy_(0, tokens.view(-1), result.reshape(-1, out.shape[1]).to(out.dtype))
        lse.index_copy_(0, tokens.view(-1), log_sum.reshape(-1).to(lse.dtype))
    return lse


def list_work(q_offsets: Tensor, k_sizes: Tensor, kept: Tensor) -> list[Work]:
    """The groups of a head that have both queries and kept keys.

    Shapes: q_offsets int32 [Gq + 1]; k_sizes int32 [Gk]; kept bool [Gq, Gk].
    """
    bounds = q_offsets.tolist()
    key_counts = kept.to(torch.int64).mv(k_sizes.to(torch.int64)).tolist()
    items = (Work(g, bounds[g], bounds[g + 1] - bounds[g], keys) for g, keys in enumerate(key_counts))
    return [item for item in items if item.queries and item.keys]


def make_batches(work: list[Work], width: int, row_bytes: int) -> Iterator[list[Work]]:
    """Put groups of like size together, as long as padding costs less than starting another batch.

    Every member is padded to the longest of its batch, in queries and in keys.
    """
    batch: list[Work] = []
    queries = keys = 0
    for item in sorted(work, key=lambda item: (-item.queries, -item.keys, item.group)):
        widest, longest = max(queries, item.queries), max(keys, item.keys)
        count = len(batch)
        together = (count + 1) * widest * longest
        apart = count * queries * keys + item.queries * item.keys
        saves = 2 * width * (together - apart) <= START_COST
        if batch and not (saves and (count + 1) * longest * row_bytes <= BYTES_AT_ONCE):
            yield batch
            batch, widest, longest = [], item.queries, item.keys
        batch.append(item)
        queries, keys = widest, longest
    if batch:
        yield batch


def _query_lanes(members: list[Work], order: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens of each member, int64 [T, n], and which lanes are real (None: all); others repeat a token."""
    longest = max(item.queries for item in members)
    start = torch.tensor([item.start for item in members]).unsqueeze(1)
    count = torch.tensor([item.queries for item in members]).unsqueeze(1)
    lane = torch.arange(longest)
    position = start + torch.minimum(lane, count - 1)
    tokens = position if order is None else order.index_select(0, position.view(-1)).view_as(position)
    return tokens, None if all(item.queries == longest for item in members) else lane < count


def _key_lanes(members: list[Work], by_key: Tensor) -> Tensor:
    """Positions of the kept keys of each member in the grouped order, int64 [T, L]; Sk where there is none.

    Shapes: by_key bool [Gq, Sk].
    """
    groups = torch.tensor([item.group for item in members])
    counts = torch.tensor([item.keys for item in members])
    member, position = by_key.index_select(0, groups).nonzero(as_tuple=True)
    first = counts.cumsum(0) - counts
    lane = torch.arange(position.shape[0]) - first.index_select(0, member)
    lanes = torch.full((len(members), int(counts.max())), by_key.shape[1])
    lanes[member, lane] = position
    return lanes


def _attend_batch(rows: Tensor, pairs: Tensor, lanes: Tensor, scale: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention of rows [T, n, D] to the pairs at lanes [T, L]; gives [T, n, width] and lse [T, n]."""
    count, width = lanes.numel(), pairs.shape[1] // 2
    gathered = torch.index_select(pairs, 0, lanes.view(-1), out=scratch[:count])
    gathered = gathered.view(lanes.shape[0], 1, lanes.shape[1], 2 * width)
    mask = None
    if len(lanes) > 1:
        missing = lanes == pairs.shape[0] - 1
        mask = rows.new_zeros(lanes.shape).masked_fill_(missing, -math.inf)[:, None, None, :]
    queries = torch.nn.functional.pad(rows, (0, width - rows.shape[2])).unsqueeze(1)
    result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, gathered[..., :width], gathered[..., width:], 0.0, False, attn_mask=mask, scale=scale
    )
    return result.squeeze(1), lse.squeeze(1)


def _order_of(order: Tensor | None, batch: int, head: int) -> Tensor | None:
    return None if order is None else order[batch, head].to(torch.int64)


def _copy_grouped(x: Tensor, order: Tensor | None, grouped: Tensor) -> None:
    """Copy [S, D] into the first D columns of ``grouped``, in the grouped order."""
    target = grouped[:, : x.shape[1]]
    if order is None:
        target.copy_(x)
        return
    for start in range(0, x.shape[0], TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        target[part] = x.index_select(0, order[part])
