"""Which key blocks each query block attends to, by mass and a budget a head (docs/adaspa.md, sections 5 and 6).

Plain torch on any device; nothing is read on the host. Blocks are ranked one (batch item, head) at a time, so that
memory stays bounded and a batch equals its items bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compile.kernels.block_map.completion import complete_rows, occupied
from sparse_compile.kernels.block_map.reference import ranking
from sparse_compile.plan import pack_bits

HEAD_THRESHOLD = 0.8
"""Recall above which a head may give blocks to others (docs/adaspa.md, section 6)."""
FEWER, EVEN, MORE = 0, 1, 2
"""The three budgets of a head, in ascending order."""


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the video blocks with the most mass in each video row, and all text; text rows keep everything.

    Source: AdaSpa (arXiv 2502.21079), equations 12 to 14, row by row.
    Shapes: mass float32 [B, H, Gq, Gk]; q_offsets int32 [B, H, Gq + 1]; q_is_video bool [Gq]; k_offsets int32
        [B, Hkv, Gk + 1]; k_is_video bool [Gk]. The blocks of an item are those of its first head: all heads are cut
        alike.
    Returns: keep int32 [B, H, Gq, ceil(Gk / 32)]; recall float32 [B, H], the share of its mass that a video row keeps,
        mean over the tokens (1 where there is no mass); counts int32 [B, H], the video blocks that each video row
        keeps. The counts of an item sum to H times the even count. Mass that is not finite counts as 0.
    """
    maps, recalls, counts = [], [], []
    for batch, item in enumerate(mass.unbind(0)):
        row_sizes, sizes = q_offsets[batch, 0].diff(), k_offsets[batch, 0].diff()
        rows = (q_is_video & occupied(row_sizes)).unsqueeze(1)
        candidates = k_is_video & occupied(sizes)
        blocks = candidates.sum()
        count = even_count(blocks, sparsity)
        budgets = three_budgets(count, blocks)
        own_maps, own_recalls = [], []
        for head, raw in enumerate(item):
            exact = torch.where(raw.isfinite(), raw, 0).double()
            place = places(exact, candidates, sizes, rank_by, seed, head)
            kept = [candidates & (place < budget) | ~k_is_video for budget in budgets]
            share = shares(torch.where(rows & occupied(sizes), exact, 0), row_sizes)
            own_maps.append(torch.stack([pack_bits(level) for level in kept]))
            own_recalls.append(torch.stack([recall(share, level) for level in kept]))
        by_level = torch.stack(own_recalls)  # [H, 3]
        level = chosen_levels(by_level[:, FEWER], by_level[:, EVEN], head_adaptive)
        index = torch.arange(len(own_maps), device=mass.device)
        maps.append(torch.stack(own_maps)[index, level])
        recalls.append(by_level[index, level])
        counts.append(torch.stack(budgets)[level])
    whole = ~q_is_video.expand(q_offsets.shape[0], q_offsets.shape[1], -1)
    keep = complete_rows(torch.stack(maps), whole, q_offsets, k_offsets, padded_queries_attend)
    return keep, torch.stack(recalls).float(), torch.stack(counts).to(torch.int32)


def kept_blocks(
    keep: Tensor,
    ready: Tensor,
    q_offsets: Tensor,
    q_is_video: Tensor,
    k_offsets: Tensor,
    k_is_video: Tensor,
    padded_queries_attend: bool,
) -> Tensor:
    """A stored keep bitmap for the tokens of this call; everything that is valid where there is none yet.

    Shapes: keep int32 [B, H, Gq, ceil(Gk / 32)]; ready int32 [1]; q_offsets int32 [B, H, Gq + 1]; q_is_video bool [Gq];
        k_offsets int32 [B, Hkv, Gk + 1]; k_is_video bool [Gk].
    Returns: int32 as ``keep``. Text is kept by all, and keeps everything. A video row without a bit had no tokens when
        the plan was made: it keeps everything too. A group without tokens is neither kept nor keeps anything.
    """
    whole = (ready == 0) | ~q_is_video | (keep == 0).all(-1)
    return complete_rows(keep | pack_bits(~k_is_video), whole, q_offsets, k_offsets, padded_queries_attend)


def even_count(blocks: Tensor, sparsity: float) -> Tensor:
    """k0, the video blocks that a row keeps of ``blocks`` (int64 []): rounded, at least 1, and 0 if there are none.

    Taken in float64, and lifted above the rounding of the product: half of 0.1 * 15 blocks counts as a half.
    """
    wanted = ((1 - sparsity) * blocks.double() + 0.5 + 1e-9).floor().to(torch.int64)
    return torch.minimum(wanted.clamp(min=1), blocks)


def three_budgets(count: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k0 - d, k0 and k0 + d (int64 []), where d is half of k0, or less to stay within 1 and ``blocks``."""
    room = torch.minimum(count - 1, blocks - count).clamp(min=0)
    step = torch.minimum(count // 2, room)
    return count - step, count, count + step


def chosen_levels(fewer: Tensor, even: Tensor, head_adaptive: str) -> Tensor:
    """Which of the three budgets each head gets: int64 [H] of FEWER, EVEN and MORE, as many FEWER as MORE.

    ``paper``: heads above the threshold at the even count give. ``guarded``: heads that stay above it after giving.
    Of either, at most half of the heads, the best first; as many others receive, the worst at the even count first.
    Ties go to the lower head. Anything else: no head trades.

    Shapes: fewer and even [H], recall at the lowest and at the even budget.
    """
    if head_adaptive not in ("paper", "guarded"):
        return torch.full_like(even, EVEN, dtype=torch.int64)
    basis = even if head_adaptive == "paper" else fewer
    number = (basis > HEAD_THRESHOLD).sum().clamp(max=even.shape[0] // 2)
    gives = _rank(-basis) < number
    receives = _rank(torch.where(gives, math.inf, even)) < number
    return EVEN + receives.to(torch.int64) - gives.to(torch.int64)


def places(exact: Tensor, candidates: Tensor, sizes: Tensor, rank_by: str, seed: int, head: int) -> Tensor:
    """The place of each candidate in the order of its row, 0 for the first; ties go to the lower block.

    Shapes: exact float64 [Gq, Gk]; candidates bool [Gk]; sizes int32 [Gk]. Returns: int64 [Gq, Gk]; every other block
        comes behind the candidates.
    """
    rank = ranking(rank_by, exact / sizes.clamp(min=1), exact, seed, head)
    return _rank(torch.where(candidates, -rank, math.inf))


def shares(valid: Tensor, sizes: Tensor) -> Tensor:
    """The share of all mass that each pair of blocks holds, float64 [Gq, Gk], every row counting by its tokens.

    A row is divided by its own sum first: with the log-sum-exp of an earlier step the sums have drifted, and a row of
    large drift would speak for the others. Shapes: valid [Gq, Gk]; sizes int32 [Gq].
    """
    total = valid.sum(-1, keepdim=True)
    weight = torch.where(total > 0, sizes.unsqueeze(-1), 0).to(valid.dtype)
    return valid / torch.where(total > 0, total, 1) * (weight / weight.sum().clamp(min=1))


def recall(share: Tensor, kept: Tensor) -> Tensor:
    """Sum of the shares [Gq, Gk] that are kept, float64 []; 1 where there is no mass at all."""
    total = torch.where(kept, share, 0).sum().clamp(max=1)
    return torch.where((share > 0).any(), total, torch.ones_like(total))  # a number would have the default dtype


def _rank(x: Tensor) -> Tensor:
    """The place of each element in ascending order of the last dimension, int64; ties go to the lower index."""
    order = x.argsort(dim=-1, stable=True)
    place = torch.arange(x.shape[-1], device=x.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)
