"""The attention mass that a Plan keeps, measured on probe rows, for CUDA tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compile.kernels.kept_mass import triton_kernels
from sparse_compile.kernels.kept_mass.configs import ORDER_BLOCK, PROGRAMS_PER_MULTIPROCESSOR, Config, candidates
from sparse_compile.kernels.kept_mass.reference import ROLE
from sparse_compile.kernels.kmeans.stratified import one_of_each_stratum_of_heads
from sparse_compile.kernels.launching import Device, device_of, lanes, launch
from sparse_compile.kernels.permutation.group_of_position import group_at_position, groups_of
from sparse_compile.kernels.token_blocks.spans import inside
from sparse_compile.plan import Groups, Plan

SMALLEST_BLOCK = 16
"""The least that ``tl.dot`` takes along a dimension."""
LOG2_E = 1 / math.log(2)


def kept_mass(
    q: Tensor,
    k: Tensor,
    q_valid: Tensor | None,
    q_video: list[int],
    plan: Plan,
    scale: float,
    rows: int,
    seed: int,
    *,
    config: Config | None = None,
) -> Tensor:
    """Mean over probe rows of the share of their softmax mass that the plan keeps; see `reference.kept_mass`.

    Source: docs/adaspa.md, section 13 (not in arXiv 2502.21079).
    Shapes: q [B, H, Sq, D] and k [B, Hkv, Sk, D], any strides; q_valid bool [B or 1, Sq] or None; q_video
        [start, stop, …].
    Dtypes: q and k float16, bfloat16 or float32.
    Returns: float32 [B, H] in [0, 1]; NaN where no row counts. The rows are those of the reference.

    Nothing is read on the host. Equal inputs give equal bits, and a batch those of its items.
    """
    batches, heads, queries, size = q.shape
    key_heads, keys = k.shape[1:3]
    if queries == 0 or keys == 0:
        return torch.full((batches, heads), math.nan, dtype=torch.float32, device=q.device)
    device = device_of(q)
    chosen = candidates(device, q.dtype, size)[0] if config is None else config
    included = inside(q_video, queries, q.device).expand(batches, 1, queries)
    if q_valid is not None:
        included = included & q_valid.unsqueeze(1)
    token, occupied = one_of_each_stratum_of_heads(included, rows, seed, ROLE, heads)
    token, occupied = token.contiguous(), occupied.contiguous()
    q_group = _groups_of_tokens(plan.query_side, token)
    k_order = None if plan.k_order is None else plan.k_order.contiguous()
    k_offsets, keep = plan.k_offsets.contiguous(), plan.keep.contiguous()
    block_rows = min(chosen.block_rows, lanes(rows))
    tiles = -(-rows // block_rows)
    splits, split_tokens = _splits(keys, heads * tiles, device, chosen.block_keys)
    partials = torch.empty((batches, heads, splits, 3, rows), dtype=torch.float32, device=q.device)
    measured = torch.empty((batches, heads), dtype=torch.float32, device=q.device)
    launch(
        triton_kernels.partial_masses,
        (batches * heads * splits * tiles,),
        q,
        k,
        token,
        q_group,
        k_offsets if k_order is None else k_order,
        group_at_position(k_offsets, keys),
        keep,
        partials,
        scale * LOG2_E,
        keys,
        rows,
        heads,
        key_heads,
        keep.shape[2],
        plan.key_groups,
        keep.shape[3],
        splits,
        split_tokens,
        *q.stride(),
        *k.stride(),
        0 if k_order is None else keys,
        HAS_ORDER=k_order is not None,
        D=size,
        D_PAD=lanes(size),
        BLOCK_ROWS=block_rows,
        BLOCK_KEYS=chosen.block_keys,
        PRECISION="tf32x3" if q.dtype is torch.float32 else "ieee",
        warps=chosen.warps,
        stages=chosen.stages,
    )
    launch(
        triton_kernels.mean_of_shares,
        (batches * heads,),
        partials,
        occupied.view(torch.uint8),
        measured,
        rows,
        splits,
        BLOCK_ROWS=block_rows,
        BLOCK_SPLITS=16,
        warps=4,
        stages=1,
    )
    return measured


def _groups_of_tokens(side: Groups, token: Tensor) -> Tensor:
    """The group of each chosen token: int32 [B, H, n] from tokens int64 [B, H, n]. The order is read, not inverted."""
    if side.order is None:
        return groups_of(side.offsets, token.to(torch.int32))
    order, position = side.order.contiguous(), torch.empty_like(token, dtype=torch.int32)
    batches, heads, tokens = order.shape
    launch(
        triton_kernels.positions_of_tokens,
        (batches * heads * -(-tokens // ORDER_BLOCK),),
        order,
        token,
        position,
        tokens,
        token.shape[2],
        tokens,
        BLOCK=ORDER_BLOCK,
        BLOCK_ROWS=SMALLEST_BLOCK,
        warps=4,
        stages=1,
    )
    return groups_of(side.offsets, position)


def _splits(tokens: int, programs: int, device: Device, block_keys: int) -> tuple[int, int]:
    """Into how many splits a head's keys are cut, and how long they are: enough for the whole GPU.

    ``programs``: how many there are a split in one batch item. The number of items is left out, so that a batch is
    measured as its items are.
    """
    wanted = -(-PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors // programs)
    wanted = max(1, min(wanted, -(-tokens // block_keys)))
    split_tokens = -(-tokens // (wanted * block_keys)) * block_keys
    return -(-tokens // split_tokens), split_tokens
