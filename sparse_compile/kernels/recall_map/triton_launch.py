"""Launches of the Triton kernels for recall targets: no sort, no loop over heads, nothing read on the host.

Rows of more than `LARGEST_ROW` key groups do not fit into a program: the reference plans them, in plain torch and head
by head, wherever the tensors live.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.block_map.completion import occupied
from sparse_compile.kernels.block_map.configs import LARGEST_ROW, RowConfig, ScoreConfig, row_candidates
from sparse_compile.kernels.block_map.triton_kernels import head_recall
from sparse_compile.kernels.block_map.triton_launch import mean_scores, seed_words
from sparse_compile.kernels.launching import device_of, launch
from sparse_compile.kernels.recall_map import reference
from sparse_compile.kernels.recall_map.reference import UNREACHED, Bounds, unreached
from sparse_compile.kernels.recall_map.triton_kernels import keep_estimated_recall, keep_measured_recall, settle_heads
from sparse_compile.plan import BITS_PER_WORD

ROWS_AT_A_TIME = 512
"""Rows of a head that are added up in one step."""
ROWS_WRITTEN = 16
"""Rows of a head that are written in one step where it attends to everything."""


def plan_estimated_recall(
    q_means: Tensor,
    k_means: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    ready: Tensor,
    asked: Tensor,
    scale: float,
    bounds: Bounds,
    rank_by: str,
    padded_queries_attend: bool,
    seed: int,
    score_config: ScoreConfig | None = None,
    row_config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep key clusters until their estimated share of the softmax mass reaches what is asked of their head.

    As `reference.plan_estimated_recall`, in float32: a set differs only where the mass before a cluster equals what is
    asked to within rounding, or between clusters whose rank does. Bounds count keys, exactly.

    Source: docs/svg2.md, sections 6 and 7; the mass of SVG2 (arXiv 2505.18875).
    Shapes: q_means float32 [B, H, Cq, D]; k_means float32 [B, Hkv, Ck, D]; q_offsets int32 [B, H, Cq + 3]; k_offsets
        int32 [B, Hkv, Ck + 3]; ready int32 [1]; asked float32 [B, H].
    Returns: keep int32 [B, H, Cq + 2, ceil((Ck + 2) / 32)]; at_bounds float32 [B, H, 2].
    """
    batches, heads, queries, _ = q_means.shape
    key_heads, keys = k_means.shape[1:3]
    if keys + 2 > LARGEST_ROW:
        sides = (q_means, k_means, q_offsets, k_offsets, ready, asked)
        return reference.plan_estimated_recall(*sides, scale, bounds, rank_by, padded_queries_attend, seed)
    q_offsets, k_offsets = q_offsets.contiguous(), k_offsets.contiguous()
    config = row_config or row_candidates(device_of(q_means), q_means.dtype, keys + 2)[0]
    sizes = k_offsets.diff().narrow(-1, 0, keys)
    keep, held = _empty_rows(q_means, queries + 2, keys + 2)
    launch(
        keep_estimated_recall,
        (batches * heads * (queries + 2),),
        mean_scores(q_means, k_means, scale, score_config),
        sizes.clamp(min=1).double().log().float(),
        q_offsets,
        k_offsets,
        _in_keys(bounds, sizes.sum(-1)),
        asked.contiguous(),
        ready,
        keep,
        held,
        heads,
        heads // key_heads,
        queries,
        keys,
        *seed_words(seed),
        RANK_BY=rank_by,
        PADDED_ATTEND=padded_queries_attend,
        LANES=config.lanes,
        warps=config.warps,
        stages=config.stages,
    )
    return keep, _settled(held, q_offsets, k_offsets, keep, padded_queries_attend, config)


def plan_measured_recall(
    mass: Tensor,
    q_offsets: Tensor,
    q_is_video: Tensor,
    k_offsets: Tensor,
    k_is_video: Tensor,
    target: float,
    bounds: Bounds,
    rank_by: str,
    padded_queries_attend: bool,
    seed: int,
    row_config: RowConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep video blocks until a row, its text included, holds the target share of its mass.

    As `reference.plan_measured_recall`, in float64 with sums in another order: a set differs only where the mass before
    a block equals what is needed to within that rounding.

    Source: docs/adaspa.md, section 13 (not in arXiv 2502.21079).
    Shapes: mass float32 [B, H, Gq, Gk]; q_offsets int32 [B, H, Gq + 1]; q_is_video bool [Gq]; k_offsets int32
        [B, Hkv, Gk + 1]; k_is_video bool [Gk].
    Returns: keep int32 [B, H, Gq, ceil(Gk / 32)]; recall float32 [B, H]; at_bounds float32 [B, H, 2].
    """
    batches, heads, rows, groups = mass.shape
    if groups > LARGEST_ROW:
        sides = (q_offsets, q_is_video, k_offsets, k_is_video)
        return reference.plan_measured_recall(mass, *sides, target, bounds, rank_by, padded_queries_attend, seed)
    q_offsets, k_offsets, q_is_video = q_offsets.contiguous(), k_offsets.contiguous(), q_is_video.contiguous()
    q_bounds, k_bounds = q_offsets.select(1, 0).contiguous(), k_offsets.select(1, 0).contiguous()
    config = row_config or row_candidates(device_of(mass), mass.dtype, groups)[0]
    sizes = k_bounds.diff()
    keep, held = _empty_rows(mass, rows, groups)
    kept_mass, all_mass = (torch.empty(held.shape, dtype=torch.float64, device=mass.device) for _ in range(2))
    launch(
        keep_measured_recall,
        (batches * heads * rows,),
        mass,
        q_bounds,
        q_is_video,
        k_bounds,
        k_is_video.contiguous(),
        _in_keys(bounds, torch.where(k_is_video & occupied(sizes), sizes, 0).sum(-1)),
        torch.full((1,), target, dtype=torch.float64, device=mass.device),  # a number would arrive in float32
        keep,
        held,
        kept_mass,
        all_mass,
        *mass.stride(),
        heads,
        rows,
        groups,
        *seed_words(seed),
        RANK_BY=rank_by,
        PADDED_ATTEND=padded_queries_attend,
        LANES=config.lanes,
        warps=config.warps,
        stages=config.stages,
    )
    at_bounds = _settled(held, q_offsets, k_offsets, keep, padded_queries_attend, config)
    recall = torch.empty(batches, heads, dtype=torch.float64, device=mass.device)
    launch(
        head_recall,
        (batches * heads,),
        kept_mass,
        all_mass,
        q_bounds,
        q_is_video,
        recall,
        heads,
        rows,
        LEVELS=1,
        BLOCK=ROWS_AT_A_TIME,
        warps=4,
        stages=1,
    )
    return keep, torch.where(unreached(at_bounds), 1.0, recall.float()), at_bounds


def _empty_rows(like: Tensor, rows: int, groups: int) -> tuple[Tensor, Tensor]:
    """Room for a keep bitmap int32 [B, H, rows, W], and for what holds each row int32 [B, H, rows]."""
    batches, heads = like.shape[:2]
    words = -(-groups // BITS_PER_WORD)
    keep = torch.empty(batches, heads, rows, words, dtype=torch.int32, device=like.device)
    return keep, torch.empty(batches, heads, rows, dtype=torch.int32, device=like.device)


def _in_keys(bounds: Bounds, keys: Tensor) -> Tensor:
    """What twice the keys before a group and its own may be at most: int32 [..., 2] from int64 [...].

    The product is rounded as in the reference; a bound that even nothing would exceed still lets the first group in.
    """
    wanted = torch.stack([2 * (bound * keys.double()) for bound in bounds], dim=-1)
    return (wanted.ceil().clamp(min=1) - 1).to(torch.int32)


def _settled(
    held: Tensor, q_offsets: Tensor, k_offsets: Tensor, keep: Tensor, padded_queries_attend: bool, config: RowConfig
) -> Tensor:
    """Shares of the queries that the bounds hold, float32 [B, H, 2]; ``keep`` holds everything where out of reach."""
    batches, heads, rows = held.shape
    key_heads, ends = k_offsets.shape[1:]
    at_bounds = torch.empty(batches, heads, 2, dtype=torch.float32, device=held.device)
    launch(
        settle_heads,
        (batches * heads,),
        held,
        q_offsets,
        k_offsets,
        keep,
        at_bounds,
        heads,
        heads // key_heads,
        rows,
        ends - 1,
        UNREACHED=UNREACHED,
        PADDED_ATTEND=padded_queries_attend,
        LANES=config.lanes,
        ROWS=ROWS_AT_A_TIME,
        ROWS_WRITTEN=ROWS_WRITTEN,
        warps=config.warps,
        stages=1,
    )
    return at_bounds
