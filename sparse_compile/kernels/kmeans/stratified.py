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
