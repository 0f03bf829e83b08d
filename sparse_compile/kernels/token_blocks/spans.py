"""Which tokens of an axis an op looks at: those inside spans of positions, and those that are no padding."""

from __future__ import annotations

import torch
from torch import Tensor


def inside(spans: list[int], tokens: int, device: torch.device) -> Tensor:
    """Which token positions lie in one of the spans [start, stop, …]: bool [S]."""
    position = torch.arange(tokens, device=device)
    found = torch.zeros((tokens,), dtype=torch.bool, device=device)
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        found = found | ((position >= start) & (position < stop))
    return found


def present(valid: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Which tokens of one batch item are no padding: bool [S], from bool [B or 1, S] or None (all)."""
    if valid is None:
        return torch.ones((tokens,), dtype=torch.bool, device=device)
    return valid[batch if valid.shape[0] > 1 else 0]
