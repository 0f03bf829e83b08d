"""Two groups of tokens, those that count and then padding: what a dense attention under a padding mask needs."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.permutation.reference import sort_labels
from sparse_compile.plan import Groups, Plan


def valid_first(valid: Tensor | None, batches: int, heads: int, tokens: int, device: torch.device) -> Groups:
    """Order the valid tokens of each batch item before its padding.

    Shapes: valid bool [B or 1, S] or None (all).
    Returns: order int32 [B, H, S], None without a mask; offsets int32 [B, H, 3]. Nothing is read on the host.
    """
    if valid is None:
        offsets = torch.full((batches, heads, 3), tokens, dtype=torch.int32, device=device)
        offsets[..., 0] = 0
        return Groups(None, offsets)
    order, offsets = sort_labels((~valid).to(torch.int32).unsqueeze(1), 2)
    return Groups(order.expand(batches, heads, tokens).contiguous(), offsets.expand(batches, heads, 3).contiguous())


def dense_plan(
    q: Tensor, k: Tensor, q_valid: Tensor | None, k_valid: Tensor | None, padded_queries_attend: bool
) -> Plan:
    """The Plan of dense attention: all valid keys are one group, which every valid query keeps.

    Shapes: q [B, H, Sq, D] and k [B, Hkv, Sk, D], of which only shapes are read; q_valid bool [B or 1, Sq] and k_valid
        bool [B or 1, Sk], or None.
    """
    batches, heads, queries, _ = q.shape
    query = valid_first(q_valid, batches, heads, queries, q.device)
    key = valid_first(k_valid, batches, k.shape[1], k.shape[2], q.device)
    keep = torch.ones((batches, heads, 2, 1), dtype=torch.int32, device=q.device)
    if not padded_queries_attend:
        keep[:, :, 1] = 0
    return Plan(*query, *key, keep)
