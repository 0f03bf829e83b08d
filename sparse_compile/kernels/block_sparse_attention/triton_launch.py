"""Block-sparse attention on a GPU: orders keys and values, expands the plan, launches (docs/kernels.md)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.block_sparse_attention.configs import AttentionConfig, candidates, short_of
from sparse_compile.kernels.block_sparse_attention.descriptors import descriptor, fits_descriptor
from sparse_compile.kernels.block_sparse_attention.head_slices import head_slices
from sparse_compile.kernels.block_sparse_attention.triton_kernels import attend_tiles
from sparse_compile.kernels.launching import device_of, lanes, launch
from sparse_compile.kernels.permutation.triton_launch import gather_rows
from sparse_compile.kernels.token_blocks.valid_first import dense_plan
from sparse_compile.kernels.tuning import chosen
from sparse_compile.kernels.work_lists.triton_launch import Tiling, density, work_lists
from sparse_compile.plan import Plan, PooledKeys

SMALLEST_SCALE = 1e-30
"""Stands for a scale of 0, which times -inf would be NaN."""
POOLED_AT_ONCE = 32
"""Pooled keys of a chunk: few, so that their loop needs no more registers than the one over keys."""
WIDEST_ROW = 512
"""Bytes of a pooled key up to which a chunk has so many; half as many wider ones fit the 99 KiB of sm_86, 89, 120."""
WHOLE_BLOCK, LARGE_GROUP = 0.75, 8
"""Mean keys of a group, in chunks, from which a chunk is one piece rather than several short ones: blocks in place, all
of one size; and groups of any size, of which the last chunk is half empty."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    pooled: PooledKeys | None,
    scale: float,
    out: Tensor,
    config: AttentionConfig | None = None,
    short: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Write attention over the kept keys, and the pooled keys of all other groups, into ``out``.

    Source: SVG2 (arXiv 2505.18875), SVG-EAR (arXiv 2603.08982). Gives the result of `reference.attention` to within
        rounding: weights and pooled keys enter their products in the dtype of q, and sums are float32.
    Shapes: q [B, H, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; out [B, H, Sq, Dv]; any strides. D and Dv are at
        most 256, Sk is below `work_lists.LONGEST_SEQUENCE`.
    Dtypes: float16, bfloat16 or float32, all alike.
    Returns: natural log-sum-exp float32 [B, H, Sq], -inf for a row without keys; density float32 [B, H].
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    kept_keys = torch.empty(plan.keep.shape[:3], dtype=torch.int32, device=q.device)
    if pooled is not None:
        pooled = pooled_for_products(pooled, q.dtype)
    chosen = configured(q, k, v, plan, config, short)
    for part in head_slices(q, k, v, plan, chosen.tiling):
        _attend(
            part.of_queries(q),
            part.of_keys(k),
            part.of_keys(v),
            part.of_plan(plan),
            part.of_pooled(pooled),
            scale,
            part.of_queries(out),
            part.of_queries(lse),
            part.of_queries(kept_keys),
            chosen,
        )
    return lse, density(plan, kept_keys)


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
    """Dense attention that keeps its log-sum-exp, by a plan of one group and the padding behind it.

    Source: the first search of AdaSpa (arXiv 2502.21079). Gives the result of
        `block_mass.reference.attention_with_lse` to within rounding.
    Shapes: q_valid bool [B or 1, Sq] and k_valid bool [B or 1, Sk], or None; lse float32 [B, H, Sq], written; the
        others as `attention`.
    """
    plan = dense_plan(q, k, q_valid, k_valid, padded_queries_attend)
    lse.copy_(attention(q, k, v, plan, None, scale, out)[0])


class Configured(NamedTuple):
    """The configuration of a call, that of its short tiles (None: it has none), and how the plan is cut for both."""

    config: AttentionConfig
    short: AttentionConfig | None
    tiling: Tiling


def configured(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    config: AttentionConfig | None = None,
    short: AttentionConfig | None = None,
) -> Configured:
    """Choose from shapes alone.

    Args:
        q: [B, H, Sq, D].
        k: [B, Hkv, Sk, D].
        v: [B, Hkv, Sk, Dv].
        plan: only its shapes are read.
        config: use this one, without TMA where that cannot be.
        short: with ``config``, the one for short tiles.
    """
    ordered = plan.k_order is not None
    if config is None:
        mean_row = q.shape[2] / max(1, plan.keep.shape[2] - 1)
        size = max(q.shape[3], v.shape[3])
        rows = candidates(device_of(q), q.dtype, size, ragged=ordered, mean_row=mean_row)
        named = problem(q.dtype, size, ragged=ordered, most_queries=rows[0].block_q)
        config = chosen("block_sparse_attention", named, rows, q)
        if plan.q_order is not None and mean_row < LARGE_GROUP * config.block_q:
            short = short_of(config, rows)
    mean_group = k.shape[2] / max(1, plan.key_groups - 1)
    ragged = mean_group < config.block_k * (LARGE_GROUP if ordered else WHOLE_BLOCK)
    if ragged or ordered or not fits_descriptor(k) or not fits_descriptor(v):
        config = config._replace(descriptors=False)
        short = None if short is None else short._replace(descriptors=False)
    return Configured(config, short, config.tiling(ragged=ragged, short=short))


def problem(dtype: torch.dtype, size: int, *, ragged: bool, most_queries: int) -> str:
    """What a measurement of the configurations holds for."""
    return f"{dtype}, {size}, {'ragged' if ragged else 'blocks'}, tiles up to {most_queries}"


def pooled_for_products(pooled: PooledKeys, dtype: torch.dtype) -> PooledKeys:
    """Means in the dtype of the products that they enter; all contiguous."""
    coupling = None if pooled.coupling is None else pooled.coupling.contiguous()
    mean_k, mean_v = (x.to(dtype).contiguous() for x in (pooled.mean_k, pooled.mean_v))
    return PooledKeys(mean_k, mean_v, pooled.log_size.contiguous(), coupling)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    pooled: PooledKeys | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    kept_keys: Tensor,
    chosen: Configured,
) -> None:
    """Attend some heads, which all tensors are of; ``lse`` and ``kept_keys`` are contiguous and written."""
    queries, size, keys, value_size = *q.shape[2:], *v.shape[2:]
    tiling = chosen.tiling
    lists = work_lists(plan, queries, keys, tiling)
    kept_keys.copy_(lists.kept_keys)
    if plan.k_order is not None:
        k, v = gather_rows(k, v, plan.k_order)
    size_padded, value_padded = (lanes(x) for x in (size, value_size))
    widest = max(size_padded, value_padded) * q.element_size()
    absent = lists.pieces  # stands for what a constant switches off
    coupling = None if pooled is None else pooled.coupling
    for config, tiles in ((chosen.config, lists.tiles), (chosen.short, lists.short_tiles)):
        if config is None or tiles is None:
            continue
        most = tiles.ranges.shape[0]
        launch(
            attend_tiles,
            (min(most, config.persistent * device_of(q).multiprocessors or most),),
            q,
            descriptor(k, config.block_k, size_padded) if config.descriptors else k,
            descriptor(v, config.block_k, value_padded) if config.descriptors else v,
            out,
            lse,
            absent if plan.q_order is None else plan.q_order.contiguous(),
            tiles.ranges,
            tiles.number,
            lists.pieces,
            lists.counts,
            lists.skipped,
            *((absent, absent, absent) if pooled is None else (pooled.mean_k, pooled.mean_v, pooled.log_size)),
            absent if coupling is None else coupling,
            queries,
            q.shape[1],
            q.shape[1] // k.shape[1],
            plan.keep.shape[2],
            plan.key_groups,
            plan.keep.shape[3],
            lists.pieces.shape[1],
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            scale,
            max(abs(scale), SMALLEST_SCALE) / math.log(2),
            BLOCK_Q=config.block_q,
            BLOCK_K=config.block_k,
            PIECE=tiling.piece,
            BLOCK_P=POOLED_AT_ONCE if widest <= WIDEST_ROW else POOLED_AT_ONCE // 2,
            D=size,
            D_PAD=size_padded,
            DV=value_size,
            DV_PAD=value_padded,
            ORDERED=plan.q_order is not None,
            POOLED=pooled is not None,
            COUPLED=coupling is not None,
            FLIP=scale < 0,
            TMA=config.descriptors,
            WIDE=keys * max(k.stride(2), v.stride(2)) >= 2**31,
            PRECISION="tf32x3" if q.dtype is torch.float32 else "ieee",
            warps=config.warps,
            stages=config.stages,
        )
