"""What a keep bitmap holds whatever the mass: whole rows, padding, groups without tokens. For all planners."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.plan import pack_bits


def complete_rows(
    keep: Tensor, whole: Tensor, q_offsets: Tensor, k_offsets: Tensor, padded_queries_attend: bool
) -> Tensor:
    """Settle what does not depend on mass: rows that keep everything, the padding, and groups without tokens.

    The padding column is never kept; the padding row keeps everything that is valid, or nothing. Bits of groups without
    tokens are cleared: they stand for no pair.

    Shapes: keep int32 [B, H, Gq, ceil(Gk / 32)]; whole bool [B, H, Gq], rows that keep every valid block; q_offsets
        int32 [B, H, Gq + 1]; k_offsets int32 [B, Hkv, Gk + 1].
    """
    shared = q_offsets.shape[1] // k_offsets.shape[1]
    words = pack_bits(occupied(k_offsets.diff())).repeat_interleave(shared, dim=1).unsqueeze(2)
    row_sizes = q_offsets.diff()
    alive = occupied(row_sizes)
    if padded_queries_attend:
        whole, alive = whole | ~alive, row_sizes > 0
    completed = torch.where(whole.unsqueeze(-1), words, keep & words)
    return torch.where(alive.unsqueeze(-1), completed, 0)


def occupied(sizes: Tensor) -> Tensor:
    """Which groups hold tokens and are not padding, which is last: bool as ``sizes`` [..., G]."""
    group = torch.arange(sizes.shape[-1], device=sizes.device)
    return (sizes > 0) & (group < sizes.shape[-1] - 1)
