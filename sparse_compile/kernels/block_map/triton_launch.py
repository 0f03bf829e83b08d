"""Launches of the planners' Triton kernels: no sort, no loop over heads, nothing read on the host.

Rows of more than `LARGEST_ROW` key groups do not fit into a program: they are planned by the references, in plain
torch and head by head, wherever the tensors live.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.block_map import reference, top_k_reference
from sparse_compile.kernels.block_map.completion import occupied
from sparse_compile.kernels.block_map.configs import (
    LARGEST_ROW,
    RowConfig,
    ScoreConfig,
    row_candidates,
    score_candidates,
)
from sparse_compile.kernels.block_map.triton_kernels import head_recall, keep_top_k, keep_top_p, score_tile
from sparse_compile.kernels.launching import device_of, launch
from sparse_compile.plan import BITS_PER_WORD

LEVELS = 3
"""The budgets of `top_k_reference`: FEWER, EVEN and MORE."""
ROWS_AT_A_TIME = 512
"""Rows that `head_recall` adds up in one step."""


def plan_top_p(
    q_means: Tensor,
    k_means: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    ready: Tensor,
    scale: float,
    top_p: float,
    min_kept: float,
    density: float | None,
    rank_by: str,
    padded_queries_attend: bool,
    seed: int,
    score_config: ScoreConfig | None = None,
    row_config: RowConfig | None = None,
) -> Tensor:
    """Choose key clusters by estimated softmax mass, and give the keep bitmap of a Plan.

    As `reference.plan_top_p`, in float32: a set differs only where the mass before a cluster equals ``top_p`` to within
    rounding, or between clusters whose rank does. ``density`` counts keys, exactly.

    Source: SVG2 (arXiv 2505.18875); docs/svg2.md, sections 4, 6 and 7.
    Shapes: q_means float32 [B, H, Cq, D]; k_means float32 [B, Hkv, Ck, D]; q_offsets int32 [B, H, Cq + 3];
        k_offsets int32 [B, Hkv, Ck + 3]; ready int32 [1].
    Returns: int32 [B, H, Cq + 2, ceil((Ck + 2) / 32)]. A group without tokens is neither kept nor keeps anything.
    """
    batches, heads, queries, _ = q_means.shape
    key_heads, keys = k_means.shape[1:3]
    if keys + 2 > LARGEST_ROW:
        sides = (q_means, k_means, q_offsets, k_offsets, ready)
        return reference.plan_top_p(*sides, scale, top_p, min_kept, density, rank_by, padded_queries_attend, seed)
    q_offsets, k_offsets = q_offsets.contiguous(), k_offsets.contiguous()
    config = row_config or row_candidates(device_of(q_means), q_means.dtype, keys + 2)[0]
    share = top_p if density is None else density
    rule = "all" if share >= 1 else "top_p" if density is None else "density"
    scored = rule != "all" and (rule == "top_p" or rank_by in ("mass", "mass_per_key"))
    sizes = k_offsets.diff().narrow(-1, 0, keys)
    unread = k_offsets  # stands for a tensor that the rule has no use for
    minimum = 1
    scores = log_sizes = bounds = unread
    if scored:
        scores = mean_scores(q_means, k_means, scale, score_config)
        log_sizes = sizes.clamp(min=1).double().log().float()
    if rule == "top_p":
        minimum = max(1, reference.smallest_count(min_kept, keys))
    if rule == "density":
        wanted = 2 * (share * sizes.sum(-1)).double()  # [B, Hkv]; the product is rounded as in the reference
        bounds = (wanted.ceil().clamp(min=1) - 1).to(torch.int32)
    words = -(-(keys + 2) // BITS_PER_WORD)
    keep = torch.empty(batches, heads, queries + 2, words, dtype=torch.int32, device=q_means.device)
    launch(
        keep_top_p,
        (batches * heads * (queries + 2),),
        scores,
        log_sizes,
        q_offsets,
        k_offsets,
        bounds,
        ready,
        keep,
        heads,
        heads // key_heads,
        queries,
        keys,
        top_p,
        minimum,
        *seed_words(seed),
        RULE=rule,
        RANK_BY=rank_by,
        SCORED=scored,
        COUNTED=minimum > 1,
        PADDED_ATTEND=padded_queries_attend,
        LANES=config.lanes,
        warps=config.warps,
        stages=config.stages,
    )
    return keep


def plan_top_k(
    mass: Tensor,
    q_offsets: Tensor,
    q_is_video: Tensor,
    k_offsets: Tensor,
    k_is_video: Tensor,
    sparsity: float,
    head_adaptive: str,
    rank_by: str,
    padded_queries_attend: bool,
    seed: int,
    row_config: RowConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the video blocks with the most mass in each video row, and all text; text rows keep everything.

    As `top_k_reference.plan_top_k`. At each of the three budgets the blocks are the same, bit for bit. Recalls are
    sums in float64 in another order: heads trade differently only where recalls tie, with each other or with
    `top_k_reference.HEAD_THRESHOLD`, to within that rounding.

    Source: AdaSpa (arXiv 2502.21079), equations 12 to 14, row by row; docs/adaspa.md, sections 5 and 6.
    Shapes: mass float32 [B, H, Gq, Gk]; q_offsets int32 [B, H, Gq + 1]; q_is_video bool [Gq]; k_offsets int32
        [B, Hkv, Gk + 1]; k_is_video bool [Gk].
    Returns: keep int32 [B, H, Gq, ceil(Gk / 32)]; recall float32 [B, H]; counts int32 [B, H].
    """
    batches, heads, _, groups = mass.shape
    if groups > LARGEST_ROW:
        sides = (q_offsets, q_is_video, k_offsets, k_is_video)
        return top_k_reference.plan_top_k(mass, *sides, sparsity, head_adaptive, rank_by, padded_queries_attend, seed)
    q_bounds, k_bounds = q_offsets.select(1, 0).contiguous(), k_offsets.select(1, 0).contiguous()
    blocks = (k_is_video & occupied(k_bounds.diff())).sum(-1)  # [B]
    budgets = torch.stack(top_k_reference.three_budgets(top_k_reference.even_count(blocks, sparsity), blocks), dim=-1)
    budgets = budgets.to(torch.int32)  # [B, LEVELS]
    sides = (q_bounds, q_is_video.contiguous(), k_bounds, k_is_video.contiguous())
    maps, by_level = _at_all_budgets(mass, *sides, budgets, rank_by, padded_queries_attend, seed, row_config)
    fewer, even, _ = by_level.unbind(-1)
    traded = [top_k_reference.chosen_levels(*item, head_adaptive) for item in zip(fewer, even, strict=True)]
    level = torch.stack(traded)  # [B, H]
    index = level.view(batches, heads, 1, 1, 1).expand(-1, -1, 1, *maps.shape[3:])
    keep = maps.gather(2, index).squeeze(2)
    recall = by_level.gather(2, level.unsqueeze(-1)).squeeze(-1)
    return keep, recall.float(), budgets.gather(1, level)


def _at_all_budgets(
    mass: Tensor,
    q_bounds: Tensor,
    q_is_video: Tensor,
    k_bounds: Tensor,
    k_is_video: Tensor,
    budgets: Tensor,
    rank_by: str,
    padded_queries_attend: bool,
    seed: int,
    row_config: RowConfig | None,
) -> tuple[Tensor, Tensor]:
    """Bitmaps int32 [B, H, LEVELS, Gq, W] and recalls float64 [B, H, LEVELS] of every head at every budget.

    Shapes: as in `plan_top_k`; q_bounds int32 [B, Gq + 1], k_bounds int32 [B, Gk + 1], budgets int32 [B, LEVELS].
    """
    batches, heads, rows, groups = mass.shape
    config = row_config or row_candidates(device_of(mass), mass.dtype, groups)[0]
    words = -(-groups // BITS_PER_WORD)
    maps = torch.empty(batches, heads, LEVELS, rows, words, dtype=torch.int32, device=mass.device)
    kept_mass = torch.empty(batches, heads, LEVELS, rows, dtype=torch.float64, device=mass.device)
    all_mass = torch.empty(batches, heads, rows, dtype=torch.float64, device=mass.device)
    recall = torch.empty(batches, heads, LEVELS, dtype=torch.float64, device=mass.device)
    launch(
        keep_top_k,
        (batches * heads * rows,),
        mass,
        q_bounds,
        q_is_video,
        k_bounds,
        k_is_video,
        budgets,
        maps,
        kept_mass,
        all_mass,
        *mass.stride(),
        heads,
        rows,
        groups,
        *seed_words(seed),
        RANK_BY=rank_by,
        PADDED_ATTEND=padded_queries_attend,
        LEVELS=LEVELS,
        LEVEL_LANES=4,
        LANES=config.lanes,
        warps=config.warps,
        stages=config.stages,
    )
    launch(
        head_recall,
        (batches * heads * LEVELS,),
        kept_mass,
        all_mass,
        q_bounds,
        q_is_video,
        recall,
        heads,
        rows,
        LEVELS=LEVELS,
        BLOCK=ROWS_AT_A_TIME,
        warps=4,
        stages=1,
    )
    return maps, recall


def mean_scores(q_means: Tensor, k_means: Tensor, scale: float, config: ScoreConfig | None) -> Tensor:
    """Scaled products of means [B, H, Cq, D] and [B, Hkv, Ck, D]: float32 [B, H, Cq, Ck]."""
    batches, heads, queries, size = q_means.shape
    keys = k_means.shape[2]
    chosen = config or score_candidates(device_of(q_means), q_means.dtype, size)[0]
    scores = torch.empty(batches, heads, queries, keys, dtype=torch.float32, device=q_means.device)
    launch(
        score_tile,
        (batches * heads * -(-queries // chosen.block_q), -(-keys // chosen.block_k)),
        q_means,
        k_means,
        scores,
        *q_means.stride(),
        *k_means.stride(),
        heads,
        heads // k_means.shape[1],
        queries,
        keys,
        scale,
        D=size,
        BLOCK_Q=chosen.block_q,
        BLOCK_K=chosen.block_k,
        BLOCK_D=chosen.block_d,
        warps=chosen.warps,
        stages=chosen.stages,
    )
    return scores


def seed_words(seed: int) -> tuple[int, int]:
    """The two halves of a seed, each as a signed number of 32 bits: one type whatever the seed."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return (low ^ 0x80000000) - 0x80000000, (high ^ 0x80000000) - 0x80000000
