"""Which group each position of the grouped order lies in: the bounds of the groups, the other way round."""

from __future__ import annotations

import torch
from torch import Tensor


def group_at_position(offsets: Tensor, tokens: int) -> Tensor:
    """The group at every position of the grouped order, for all batch items and heads at once.

    Shapes: offsets int32 [B, H, G + 1], the first 0, the last ``tokens``.
    Returns: int32 [B, H, tokens], contiguous. Empty groups are at no position. Nothing is read on the host.
    """
    position = torch.arange(tokens, dtype=offsets.dtype, device=offsets.device)
    return groups_of(offsets, position.expand(*offsets.shape[:2], tokens))


def groups_of(offsets: Tensor, position: Tensor) -> Tensor:
    """The group of each given position: int32 [B, H, n] from int32 positions [B, H, n], each in [0, last offset)."""
    return torch.searchsorted(offsets[..., 1:].contiguous(), position.contiguous(), right=True, out_int32=True)
