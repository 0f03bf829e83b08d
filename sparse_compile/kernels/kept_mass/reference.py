"""The attention mass that a Plan keeps, measured on probe rows, in plain torch (docs/adaspa.md, section 13)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compile.kernels.block_sparse_attention.reference import group_of_token
from sparse_compile.kernels.kmeans.stratified import one_of_each_stratum
from sparse_compile.kernels.precision import copied
from sparse_compile.kernels.token_blocks.spans import inside, present
from sparse_compile.plan import Plan, unpack_bits

ROLE = 2
"""Keeps the choice of rows apart from the two samples of `kmeans`, which a call may make with the same seed."""
SCORES_AT_ONCE = 2**24


def kept_mass(
    q: Tensor,
    k: Tensor,
    q_valid: Tensor | None,
    q_video: list[int],
    plan: Plan,
    scale: float,
    rows: int,
    seed: int,
) -> Tensor:
    """Mean over probe rows of the share of their softmax mass that the plan keeps.

    One row at random in each of ``rows`` equal strata of the valid visual queries, the same for equal seeds. With no
    more of them than ``rows``, each is looked at once and the mean is exact. Rows without a finite log-sum-exp over the
    valid keys do not count.

    Source: docs/adaspa.md, section 13 (not in arXiv 2502.21079).
    Shapes: q [B, H, Sq, D] and k [B, Hkv, Sk, D], any strides; q_valid bool [B or 1, Sq] or None; q_video
        [start, stop, …].
    Dtypes: computed in float32, or in float64 for float64 inputs.
    Returns: float32 [B, H] in [0, 1]; NaN where no row counts. Keys of the padding group touch nothing, not even as
        NaN. Nothing is read on the host.
    """
    batches, heads, queries, _ = q.shape
    keys = k.shape[2]
    measured = torch.full((batches, heads), math.nan, dtype=torch.float32, device=q.device)
    if queries == 0 or keys == 0:
        return measured
    shared = heads // k.shape[1]
    video = inside(q_video, queries, q.device)
    at_once = max(1, SCORES_AT_ONCE // keys)
    for batch in range(batches):
        included = video & present(q_valid, batch, queries, q.device)
        for head in range(heads):
            key_head = head // shared
            token, occupied = one_of_each_stratum(included, rows, seed, ROLE, head)
            q_group = group_of_token(plan.query_side, batch, head, queries).index_select(0, token)
            k_group = group_of_token(plan.key_side, batch, key_head, keys)
            key, own = copied(k[batch, key_head]), q[batch, head]
            bits = plan.keep[batch, head]
            parts = []
            for chosen, group in zip(token.split(at_once), q_group.split(at_once), strict=True):
                logits = (copied(own.index_select(0, chosen)) @ key.t()) * scale
                kept = unpack_bits(bits.index_select(0, group), plan.key_groups).index_select(1, k_group)
                parts.append(row_shares(logits, k_group < plan.key_groups - 1, kept))
            share = torch.cat(parts)
            counted = occupied & share.isfinite()
            total = torch.where(counted, share, 0).sum(dtype=torch.float64)
            measured[batch, head] = total / counted.sum()
    return measured


def row_shares(logits: Tensor, valid: Tensor, kept: Tensor) -> Tensor:
    """exp(lse over the kept keys - lse over the valid keys) of each row, [n] in [0, 1].

    NaN where the latter is not finite. Shapes: logits [n, Sk]; valid bool [Sk]; kept bool [n, Sk].
    """
    allowed = torch.where(valid, logits, -math.inf)
    weights = (allowed - allowed.amax(-1, keepdim=True)).exp()
    return (torch.where(kept, weights, 0).sum(-1) / weights.sum(-1)).clamp(max=1)
