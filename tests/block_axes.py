"""Blocks of tokens along an axis, as AdaSpa cuts them, and random mass between two axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """The blocks of one side: int32 [B, H, G + 1] and bool [G]. The last is padding."""

    offsets: Tensor
    is_video: Tensor

    @property
    def alive(self) -> Tensor:
        """Blocks with tokens, bool [B, G]; padding is none."""
        return torch.nn.functional.pad(self.offsets[:, 0, :-1].diff() > 0, (0, 1))

    def item(self, number: int) -> Axis:
        """One item of the batch, as a batch of one."""
        return Axis(self.offsets[number : number + 1], self.is_video)


def axis(
    kinds: str, sizes: Sequence[int] | Sequence[Sequence[int]] | None = None, *, heads: int = 1, padding: int = 0
) -> Axis:
    """Blocks of the kinds v (video) and t (text), and padding; ``sizes`` are one list for each batch item."""
    items = [sizes or [4] * len(kinds)] if not sizes or isinstance(sizes[0], int) else sizes
    offsets = torch.tensor([[0, *own, padding] for own in items]).cumsum(-1).int()
    is_video = torch.tensor([kind == "v" for kind in kinds] + [False])
    return Axis(offsets.unsqueeze(1).repeat(1, heads, 1), is_video)


def random_mass(query: Axis, key: Axis, *, heads: int = 1, seed: int = 0, contrast: float = 2.0) -> Tensor:
    """Positive mass where there are tokens, 0 elsewhere: float32 [B, H, Gq, Gk]."""
    shape = (query.offsets.shape[0], heads, query.is_video.numel(), key.is_video.numel())
    mass = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * contrast).exp()
    return mass * query.alive[:, None, :, None] * key.alive[:, None, None, :]
