"""Which heads share a launch: so many that its ordered keys and work lists stay small beside q, k, v and out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from sparse_compile.kernels.work_lists.triton_launch import Tiling, piece_capacity
from sparse_compile.plan import Plan, PooledKeys

WORKSPACE_SHARE = 0.12
"""Most memory of one launch, as a share of q, k, v and out, unless `LEAST_TILES` asks for more."""
LEAST_TILES = 4096
"""Tiles that a launch has at least: with fewer, multiprocessors would wait at its end for a large part of its time."""
INT32 = 4


class HeadSlice(NamedTuple):
    """Some batch items, and some key heads with the query heads that share them."""

    batch: slice
    query_heads: slice
    key_heads: slice

    def of_queries(self, x: Tensor) -> Tensor:
        """The part of x [B, H, …]."""
        return x[self.batch, self.query_heads]

    def of_keys(self, x: Tensor) -> Tensor:
        """The part of x [B, Hkv, …]."""
        return x[self.batch, self.key_heads]

    def of_plan(self, plan: Plan) -> Plan:
        """The part of a Plan."""
        return Plan(
            None if plan.q_order is None else self.of_queries(plan.q_order),
            self.of_queries(plan.q_offsets),
            None if plan.k_order is None else self.of_keys(plan.k_order),
            self.of_keys(plan.k_offsets),
            self.of_queries(plan.keep),
        )

    def of_pooled(self, pooled: PooledKeys | None) -> PooledKeys | None:
        """The part of pooled keys."""
        if pooled is None:
            return None
        coupling = None if pooled.coupling is None else self.of_keys(pooled.coupling)
        mean_k, mean_v, log_size = (self.of_keys(x) for x in (pooled.mean_k, pooled.mean_v, pooled.log_size))
        return PooledKeys(mean_k, mean_v, log_size, coupling)


def head_slices(q: Tensor, k: Tensor, v: Tensor, plan: Plan, tiling: Tiling) -> Iterator[HeadSlice]:
    """Cut a call by heads; one slice of everything where that is small enough.

    Shapes: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv].
    """
    batches, heads, queries, _ = q.shape
    key_heads, keys = k.shape[1:3]
    shared = heads // key_heads
    rows = shared * plan.keep.shape[2]
    ordered = 0 if plan.k_order is None else keys * (k.shape[3] + v.shape[3]) * k.element_size()
    each = ordered + rows * piece_capacity(keys, plan.key_groups, tiling) * INT32
    everything = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()
    tiles = shared * (queries // tiling.block_q) + rows
    at_once = max(int(WORKSPACE_SHARE * everything / max(1, each)), -(-LEAST_TILES // max(1, tiles)), 1)
    if at_once >= batches * key_heads:
        yield HeadSlice(slice(None), slice(None), slice(None))
        return
    parts = -(-key_heads // at_once)
    for batch in range(batches):
        for part in range(parts):
            start, stop = key_heads * part // parts, key_heads * (part + 1) // parts
            yield HeadSlice(slice(batch, batch + 1), slice(start * shared, stop * shared), slice(start, stop))
