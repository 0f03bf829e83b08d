"""Budgets that follow the content: each row keeps key groups until a share of its mass is covered.

The mass is an estimate from means (SVG2, docs/svg2.md, section 7) or measured (AdaSpa, docs/adaspa.md, section 13.1).
Plain torch on any device; nothing is read on the host, and a batch equals its items bit for bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.block_map.completion import complete_rows, occupied
from sparse_compile.kernels.block_map.reference import exclusive_sum, log_mass, ranking, scores, shares
from sparse_compile.kernels.block_map.top_k_reference import recall as kept_share
from sparse_compile.kernels.block_map.top_k_reference import shares as shares_of_all
from sparse_compile.plan import pack_bits

UNREACHED = 0.5
"""A head attends to everything where the ceiling holds down more than this share of its queries."""
REACH = 3.0
"""How far, in logits, calibration may ask for more or less than the target."""
CERTAIN = 1e-4
"""Kept mass is taken to lie this far within (0, 1), where logits are finite."""
SMALL_STEP = 1.0
"""How much less, in logits, is asked where all mass was kept."""


class Bounds(NamedTuple):
    """Floor and ceiling of the share of keys that a row keeps."""

    low: float
    high: float


class Covered(NamedTuple):
    """What rows keep: bool [R, G]; and the rows that the floor holds up and the ceiling holds down, bool [R]."""

    kept: Tensor
    held_up: Tensor
    held_down: Tensor


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
) -> tuple[Tensor, Tensor]:
    """Keep key clusters until their estimated share of the softmax mass reaches what is asked of their head.

    Source: docs/svg2.md, section 7; the mass is that of SVG2 (arXiv 2505.18875).
    Shapes: q_means float32 [B, H, Cq, D]; k_means float32 [B, Hkv, Ck, D]; q_offsets int32 [B, H, Cq + 3]; k_offsets
        int32 [B, Hkv, Ck + 3]; ready int32 [1]; asked float32 [B, H].
    Returns: keep int32 [B, H, Cq + 2, ceil((Ck + 2) / 32)]; at_bounds float32 [B, H, 2], the share of the clustered
        queries that the floor holds up and that the ceiling holds down. A head with too many of the latter keeps all.
    """
    batches, heads = q_means.shape[:2]
    shared = heads // k_means.shape[1]
    maps, at_bounds = [], []
    for batch in range(batches):
        for head in range(heads):
            key_head = head // shared
            sizes = k_offsets[batch, key_head].diff()[:-2]
            similarity = scores(q_means[batch, head], k_means[batch, key_head], scale)
            mass = log_mass(similarity, sizes)
            rank = ranking(rank_by, similarity, mass, seed, head)
            covered = cover(shares(mass), rank, sizes > 0, sizes, 0, asked[batch, head].double(), bounds)
            at_bounds.append(held_shares(covered, q_offsets[batch, head].diff()[:-2]))
            with_text = torch.nn.functional.pad(covered.kept, (0, 1), value=True)
            maps.append(pack_bits(torch.nn.functional.pad(with_text, (0, 1, 0, 2))))
    keep = torch.stack(maps).view(batches, heads, *maps[0].shape)
    held = torch.stack(at_bounds).view(batches, heads, 2)
    row = torch.arange(keep.shape[2], device=keep.device)
    whole = (ready.view(()) == 0) | (row >= keep.shape[2] - 2) | unreached(held).unsqueeze(-1)
    return complete_rows(keep, whole, q_offsets, k_offsets, padded_queries_attend), held


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep video blocks until a row, its text included, holds the target share of its mass.

    Source: docs/adaspa.md, section 13.1 (not in arXiv 2502.21079).
    Shapes: as in `top_k_reference.plan_top_k`.
    Returns: keep int32 [B, H, Gq, ceil(Gk / 32)]; recall float32 [B, H], the share of its mass that a video row keeps,
        mean over the tokens; at_bounds float32 [B, H, 2], as in `plan_estimated_recall`.
    """
    maps, recalls, at_bounds = [], [], []
    for batch, item in enumerate(mass.unbind(0)):
        row_sizes, sizes = q_offsets[batch, 0].diff(), k_offsets[batch, 0].diff()
        rows = (q_is_video & occupied(row_sizes)).unsqueeze(1)
        valid = occupied(sizes)
        candidates = k_is_video & valid
        for head, raw in enumerate(item):
            exact = torch.where(raw.isfinite() & valid, raw, 0).double()
            rank = ranking(rank_by, exact / sizes.clamp(min=1), exact, seed, head)
            total = exact.sum(-1, keepdim=True)
            text = torch.where(k_is_video, 0, exact).sum(-1, keepdim=True)
            covered = cover(exact, rank, candidates, sizes, text, target * total, bounds)
            held = held_shares(covered, torch.where(rows.squeeze(1), row_sizes, 0))
            kept = covered.kept | ~k_is_video | unreached(held)
            recalls.append(kept_share(shares_of_all(torch.where(rows, exact, 0), row_sizes), kept))
            maps.append(pack_bits(kept))
            at_bounds.append(held)
    heads = mass.shape[:2]
    whole = ~q_is_video.expand(q_offsets.shape[0], q_offsets.shape[1], -1)
    keep = torch.stack(maps).view(*heads, *maps[0].shape)
    keep = complete_rows(keep, whole, q_offsets, k_offsets, padded_queries_attend)
    return keep, torch.stack(recalls).view(heads).float(), torch.stack(at_bounds).view(*heads, 2)


def cover(
    mass: Tensor, rank: Tensor, candidates: Tensor, sizes: Tensor, sure: Tensor | int, needed: Tensor, bounds: Bounds
) -> Covered:
    """Keep candidates, highest rank first, until with what is sure they hold the mass that is needed; within bounds.

    A bound on the keys is met as closely as whole groups allow; one group is always kept. Ties go to the lower group.
    NaN is never enough: a row whose mass cannot be told keeps what the ceiling allows.
    Shapes: mass and rank [R, G]; candidates bool and sizes int32 [G]; sure and needed [R, 1] or [].
    """
    order = torch.where(candidates, rank, -math.inf).argsort(dim=-1, descending=True, stable=True)
    weighed = torch.where(candidates, mass, 0).gather(-1, order)
    keys = torch.where(candidates, sizes, 0).expand_as(order).gather(-1, order).double()
    wanted = ~(sure + exclusive_sum(weighed) >= needed)
    middle = exclusive_sum(keys) + keys / 2
    all_keys = keys.sum(-1, keepdim=True)
    first = torch.arange(order.shape[1], device=order.device) == 0
    least, most = ((middle < bound * all_keys) | first for bound in bounds)
    real = candidates.expand_as(order).gather(-1, order)
    taken = (wanted | least) & most & real
    kept = torch.zeros_like(taken).scatter(-1, order, taken)
    return Covered(kept, (least & ~wanted & real).any(-1), (wanted & ~most & real).any(-1))


def held_shares(covered: Covered, tokens: Tensor) -> Tensor:
    """The shares of the queries that the floor and the ceiling hold, float32 [2]. Shapes: tokens int32 [R]."""
    held = torch.stack([covered.held_up, covered.held_down])
    return (torch.where(held, tokens, 0).sum(-1).double() / tokens.sum().clamp(min=1)).float()


def unreached(at_bounds: Tensor) -> Tensor:
    """The heads that cannot reach their target below the ceiling: bool [...] of [..., 2]."""
    return at_bounds[..., 1] > UNREACHED


def calibrate(measured: Tensor, at_bounds: Tensor, target: float, asked: Tensor) -> None:
    """Ask more of the estimate where less than the target was kept, and less where more was. In place.

    The odds of what is asked are multiplied by the odds of the target over those of what was measured. Where all mass
    was kept, these are without bound, so that less is asked in small steps: a peaky head comes down in a few calls, and
    a flat one does not fall from everything to far too little. Nothing changes where nothing could be measured, and in
    heads that are out of reach: they attend to everything whatever the estimate says.

    Shapes: measured and asked float32 [B, H]; at_bounds float32 [B, H, 2]; an ``asked`` of 0 has not been calibrated
        yet and stands for the target.
    """
    goal = math.log(target) - math.log1p(-target)
    before = from_target(asked, target)
    change = goal - torch.logit(measured.double(), eps=CERTAIN)
    change = torch.where(measured > 1 - CERTAIN, change.clamp(min=-SMALL_STEP), change)
    renewed = torch.sigmoid((torch.logit(before.double()) + change).clamp(goal - REACH, goal + REACH))
    asked.copy_(torch.where(measured.isfinite() & ~unreached(at_bounds), renewed, before))


def from_target(asked: Tensor, target: float) -> Tensor:
    """What is asked of each head, the target where nothing was calibrated yet."""
    return torch.where(asked > 0, asked, target)


def keep_weak_heads_whole(
    keep: Tensor, recall: Tensor, q_offsets: Tensor, k_offsets: Tensor, min_recall: float, padded_queries_attend: bool
) -> tuple[Tensor, Tensor]:
    """Let heads attend to everything whose plan keeps less than ``min_recall`` of their mass.

    Shapes: keep int32 [B, H, Gq, W]; recall float32 [B, H]; q_offsets int32 [B, H, Gq + 1]; k_offsets int32
        [B, Hkv, Gk + 1].
    Returns: the bitmaps, and the recalls, then 1 for these heads.
    """
    weak = recall < min_recall
    whole = weak.unsqueeze(-1).expand(keep.shape[:3])
    return complete_rows(keep, whole, q_offsets, k_offsets, padded_queries_attend), torch.where(weak, 1.0, recall)
