"""Two groups of tokens, those that count and then padding: what a dense attention under a padding mask needs."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.permutation.reference import sort_labels
from sparse_compile.plan import Groups


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
