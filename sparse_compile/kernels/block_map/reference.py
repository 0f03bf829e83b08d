"""Which key clusters each query cluster attends to, from means and sizes (docs/svg2.md, sections 4, 6 and 7).

Plain torch on any device; nothing is read on the host. One (batch item, head) at a time, so that memory stays
bounded and a batch equals its items bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compile.kernels.block_map.completion import complete_rows
from sparse_compile.kernels.kmeans.counter_hash import hash_counters
from sparse_compile.plan import pack_bits


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
) -> Tensor:
    """Choose key clusters by estimated softmax mass, and give the keep bitmap of a Plan.

    Source: SVG2 (arXiv 2505.18875).
    Shapes: q_means float32 [B, H, Cq, D]; k_means float32 [B, Hkv, Ck, D]; q_offsets int32 [B, H, Cq + 3];
        k_offsets int32 [B, Hkv, Ck + 3]; ready int32 [1].
    Returns: int32 [B, H, Cq + 2, ceil((Ck + 2) / 32)]. A group without tokens is neither kept nor keeps
        anything.
    """
    batches, heads, _, _ = q_means.shape
    shared = heads // k_means.shape[1]
    minimum = smallest_count(min_kept, k_means.shape[2])
    attend_all = ready.view(()) == 0
    rows = []
    for batch in range(batches):
        for head in range(heads):
            key_head = head // shared
            video_sizes = k_offsets[batch, key_head].diff()[:-2]
            similarity = scores(q_means[batch, head], k_means[batch, key_head], scale)
            mass = log_mass(similarity, video_sizes)
            rank = ranking(rank_by, similarity, mass, seed, head)
            rows.append(select(mass, rank, video_sizes, top_p, minimum, density))
    kept = torch.stack(rows).view(batches, heads, *rows[0].shape)
    with_text = torch.nn.functional.pad(kept, (0, 1), value=True)  # everyone attends to text, and text to everything
    keep = pack_bits(torch.nn.functional.pad(with_text, (0, 1, 0, 2)))
    row = torch.arange(keep.shape[2], device=keep.device)
    whole = (attend_all | (row >= keep.shape[2] - 2)).expand(keep.shape[:3])
    return complete_rows(keep, whole, q_offsets, k_offsets, padded_queries_attend)


def smallest_count(min_kept: float, clusters: int) -> int:
    """floor(min_kept * clusters), untouched by the rounding of the product (0.29 * 100 is 28.999…)."""
    return math.floor(min_kept * clusters + 1e-9)


def scores(q_means: Tensor, k_means: Tensor, scale: float) -> Tensor:
    """Scaled products of means [Cq, D] and [Ck, D]: [Cq, Ck] in float64, whatever precision is set."""
    return (q_means.double() @ k_means.double().t()) * scale


def log_mass(similarity: Tensor, sizes: Tensor) -> Tensor:
    """a_ij = s_ij + ln m_j: log of the softmax mass of cluster j at query mean i; -inf for an empty cluster.

    Shapes: similarity [Cq, Ck]; sizes int32 [Ck].
    """
    return torch.where(sizes > 0, similarity + sizes.clamp(min=1).to(similarity.dtype).log(), -math.inf)


def ranking(rank_by: str, similarity: Tensor, mass: Tensor, seed: int, head: int) -> Tensor:
    """What clusters are ordered by, largest first: [Cq, Ck]."""
    if rank_by == "mass":
        return mass
    if rank_by == "mass_per_key":
        return similarity
    row = torch.arange(mass.shape[0], device=mass.device).unsqueeze(1)
    column = torch.arange(mass.shape[1], device=mass.device)
    return hash_counters(seed, head, row, column, device=mass.device).to(mass.dtype)


def shares(mass: Tensor) -> Tensor:
    """Softmax of log masses over the non-empty clusters; 0 for the empty ones, also where all are."""
    peak = mass.amax(-1, keepdim=True)
    weights = (mass - torch.where(torch.isfinite(peak), peak, 0)).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)


def select(mass: Tensor, rank: Tensor, sizes: Tensor, top_p: float, minimum: int, density: float | None) -> Tensor:
    """Keep the first clusters of each row, up to a mass (top_p) or to a share of the keys (density).

    Shapes: mass (a_ij) and rank [Cq, Ck]; sizes int32 [Ck], the same for all rows.
    Returns: bool [Cq, Ck]. The cluster at which the mass first exceeds top_p is kept. Ties: lower j first.
    """
    occupied = (sizes > 0).expand_as(mass)
    if (top_p if density is None else density) >= 1:
        return occupied
    order = torch.where(occupied, rank, -math.inf).argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(mass.shape[1], device=mass.device)
    if density is None:
        ranked = shares(mass).gather(-1, order)
        taken = (exclusive_sum(ranked) <= top_p) | (place < minimum)
    else:
        ranked = sizes.to(mass.dtype).expand_as(mass).gather(-1, order)
        taken = (exclusive_sum(ranked) + ranked / 2 < density * sizes.sum()) | (place == 0)
    return torch.zeros_like(taken).scatter(-1, order, taken) & occupied


def exclusive_sum(x: Tensor) -> Tensor:
    """Sum of everything before each place of the last dimension; exactly 0 at the first."""
    return torch.nn.functional.pad(x, (1, 0))[..., :-1].cumsum(-1)
