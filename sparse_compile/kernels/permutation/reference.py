"""Group tokens by label: a stable sort of small integers, and the bounds of the groups (docs/svg2.md, 8)."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_labels(labels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sort tokens by label, keeping the order of tokens that share one.

    Shapes: labels int32 [B, H, S] with values in [0, groups).
    Returns: order int32 [B, H, S], the token at each position of the grouped order; offsets int32
        [B, H, groups + 1], where group g holds the positions offsets[g] to offsets[g + 1] - 1.
    """
    grouped, order = torch.sort(labels.contiguous(), dim=-1, stable=True)
    edges = torch.arange(groups + 1, dtype=grouped.dtype, device=labels.device)
    edges = edges.expand(*labels.shape[:-1], groups + 1).contiguous()
    offsets = torch.searchsorted(grouped, edges, out_int32=True)
    return order.to(torch.int32), offsets
