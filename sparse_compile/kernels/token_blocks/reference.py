"""Cut a token axis into blocks: the groups of methods that keep tokens in place (docs/adaspa.md, section 3)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sparse_compile.kernels.permutation.reference import sort_labels


def partition(tokens: int, video: list[int], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The blocks of a token axis in order: int32 [n] behind the last token of each, bool [n] whether it is visual.

    The axis is cut at every bound of ``video`` [start, stop, …], then each piece into blocks, of which only the last
    may be shorter. A piece without tokens has no block. Made by arithmetic on the device: a copy from the host would
    wait for it.
    """
    stops, visual = [], []
    for piece, (start, stop) in enumerate(itertools.pairwise([0, *video, tokens])):
        number = torch.arange(-(-(stop - start) // block), dtype=torch.int32, device=device)
        stops.append((start + (number + 1) * block).clamp(max=stop))
        visual.append(torch.full_like(number, piece % 2, dtype=torch.bool))
    return torch.cat(stops), torch.cat(visual)


def token_blocks(x: Tensor, valid: Tensor | None, video: list[int], block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group the tokens of x by block, padding last.

    Shapes: x [B, H, S, D], of which only the shape counts; valid bool [B or 1, S] or None; video [start, stop, …].
    Returns: order int32 [B, H, S], or [B, H, 0] without a mask, where tokens stay in place; offsets int32
        [B, H, G + 1]; and is_video bool [G]. A block keeps its place whether or not all of its tokens are padding.
    """
    batches, heads, tokens, _ = x.shape
    stops, is_video = partition(tokens, video, block, x.device)
    is_video = torch.nn.functional.pad(is_video, (0, 1))
    if valid is None:
        offsets = torch.nn.functional.pad(stops, (1, 1))
        offsets.narrow(0, -1, 1).fill_(tokens)  # assigning to one element would copy a number from the host
        return x.new_empty((batches, heads, 0), dtype=torch.int32), _for_heads(offsets, batches, heads), is_video
    position = torch.arange(tokens, dtype=torch.int32, device=x.device)
    own = torch.searchsorted(stops, position, right=True)
    labels = torch.where(valid, own, len(stops)).to(torch.int32)
    order, offsets = sort_labels(labels.unsqueeze(1), len(stops) + 1)
    return _for_heads(order, batches, heads), _for_heads(offsets, batches, heads), is_video


def _for_heads(x: Tensor, batches: int, heads: int) -> Tensor:
    """Repeat [n] or [B or 1, 1, n] for each batch item and head."""
    return x.expand(batches, heads, x.shape[-1]).contiguous()
