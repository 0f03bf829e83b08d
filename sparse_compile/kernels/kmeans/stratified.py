"""A random token of each of n equal strata: a sample spread evenly over the tokens (docs/svg2.md, section 5.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.kmeans.counter_hash import hash_counters


def one_of_each_stratum(included: Tensor, strata: int, seed: int, role: int, head: int) -> tuple[Tensor, Tensor]:
    """Choose one token in each of ``strata`` equal runs of the included tokens.

    The place within a stratum is a hash of (seed, role, head, stratum), so a batch equals its items and a repeated
    generation repeats. ``role`` keeps the choices made for different purposes apart: 0 query means, 1 key means,
    2 probe rows.

    Shapes: included bool [S], S at least 1.
    Returns: token int64 [strata]; and bool [strata], which strata have tokens. With fewer tokens than strata each token
        is a stratum of its own and the other strata name a neighbour's; without any, ``token`` is arbitrary.
    """
    rank = included.to(torch.int64).cumsum(0)
    total = rank[-1]
    number = torch.arange(strata + 1, device=included.device)
    bounds = number * total // strata
    start, width = bounds[:-1], bounds.diff()
    offset = hash_counters(seed, role, head, number[:-1], device=included.device) % width.clamp(min=1)
    wanted = torch.minimum(start + offset, (total - 1).clamp(min=0)) + 1
    token = torch.searchsorted(rank, wanted).clamp(max=included.shape[0] - 1)
    return token, width > 0


def one_of_each_stratum_of_heads(
    included: Tensor, strata: int, seed: int, role: int, heads: int
) -> tuple[Tensor, Tensor]:
    """`one_of_each_stratum` for every batch item and head at once, without a loop over them.

    Shapes: included bool [B, H, S], or [B, 1, S] where all heads share the tokens; S at least 1.
    Returns: token int64 [B, H, strata]; occupied bool [B, H, strata]. Head h of them is what `one_of_each_stratum`
        gives for ``head=h``.
    """
    batches, apart, tokens = included.shape
    device = included.device
    rank = included.to(torch.int64).cumsum(-1)
    total = rank.narrow(-1, tokens - 1, 1)
    number = torch.arange(strata + 1, device=device)
    bounds = number * total // strata  # [B, apart, strata + 1]
    start, width = bounds.narrow(-1, 0, strata), bounds.diff()
    head = torch.arange(heads, device=device).unsqueeze(-1)
    hashed = hash_counters(seed, role, head, number.narrow(0, 0, strata), device=device)  # [H, strata]
    wanted = torch.minimum(start + hashed % width.clamp(min=1), (total - 1).clamp(min=0)) + 1
    wanted = wanted.reshape(batches, apart, heads // apart * strata)  # heads that share the tokens share a search
    token = torch.searchsorted(rank, wanted).clamp(max=tokens - 1).view(batches, heads, strata)
    return token, (width > 0).expand(batches, heads, strata)
