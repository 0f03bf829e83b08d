"""Whether a sparse call can be faster than dense attention on this CPU: a formula with measured constants.

    dense  = queries * keys * products / (DENSE * threads)                                       for each head
    sparse = dense * density / efficiency                                                        kept pairs
           + (queries * key groups + compared) * products / (DENSE * efficiency * threads)       pooled keys, k-means
           + (queries + keys) * products * TOKEN / threads                                       sorting, means, probes
           + HEAD                                                                                once a head
           + CALL                                                                                once a call

``products`` is the size of a key plus that of a value. docs/cpu.md says how the constants were measured. They decide
under ``min_tokens=auto`` alone; a number takes every site of that length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparse_compile.sites import Site
from sparse_compile.strategies.base import Effort

DENSE = 38.0
"""Multiply-adds a nanosecond and thread of torch's dense attention, in any dtype."""
EFFICIENCY = {"portable": 0.3, "avx2": 0.9, "avx512": 1.0, "avx512_bf16": 1.0, "amx": 1.0}
"""Kept pairs a second over pairs a second of dense attention, by instruction set, on ragged plans."""
EFFICIENCY_OF_PAIRS = 1.7
"""The same for bfloat16 where its products have an instruction."""
MULTIPLIES_PAIRS = ("avx512_bf16", "amx")
TOKEN = 4.0
"""Nanoseconds a token, channel and thread."""
CALL, HEAD = 1e6, 0.7e6
"""Nanoseconds of a call, and of each of its heads, whatever the number of tokens."""


class Estimate(NamedTuple):
    """Milliseconds of one call of a site, densely and sparsely."""

    dense: float
    sparse: float

    def __str__(self) -> str:
        return f"estimated {self.sparse:.1f} ms sparse, {self.dense:.1f} ms dense"


def estimate(site: Site, effort: Effort, level: str, threads: int) -> Estimate:
    """What a call of a site takes.

    Args:
        site: its sizes, [B, H, S, D], and its dtype.
        effort: what a sparse call computes.
        level: the instruction set, as `sparse_compile.kernels.cpp.isa` names it.
        threads: how many torch uses.
    """
    batch, heads, queries, size = site.query_sizes
    keys = site.key_sizes[2]
    products = size + site.value_sizes[3]
    heads *= batch
    efficiency = EFFICIENCY[level]
    if site.dtype is torch.bfloat16 and level in MULTIPLIES_PAIRS:
        efficiency = EFFICIENCY_OF_PAIRS
    dense = heads * queries * keys * products / (DENSE * threads)
    planned = heads * (queries * effort.key_groups + effort.compared) * products / (DENSE * efficiency * threads)
    once = heads * (queries + keys) * products * TOKEN / threads + CALL + heads * HEAD
    return Estimate(dense / 1e6, (dense * effort.density / efficiency + planned + once) / 1e6)
