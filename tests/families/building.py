"""What tiny models and their inputs are made of: seeded noise, shaken weights, rotary tables."""

from __future__ import annotations

from typing import Any

import torch
from lively_weights import lively


class Noise:
    """Random tensors of one seeded generator."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)


def built(model_class: type[torch.nn.Module], **config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return lively(model_class(**config).eval().requires_grad_(False))


def rotary_table(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10000 ** -(torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(tokens), frequencies).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def grid_ids(*grid: int, axes: int, offset: float = 0.0) -> torch.Tensor:
    """Positions [tokens, axes] of packed tokens: of a last grid axis in the last column, ``offset`` in the first."""
    ids = torch.zeros(*grid, axes)
    ids[..., 0] = offset
    for column, size in enumerate(grid, axes - len(grid)):
        shape = [-1 if at == column - axes + len(grid) else 1 for at in range(len(grid))]
        ids[..., column] = torch.arange(float(size)).view(shape)
    return ids.flatten(0, -2)


def padding(batch: int, tokens: int, valid: int) -> torch.Tensor:
    """A mask [batch, tokens] of ones, of which the last row ends at ``valid``."""
    mask = torch.ones(batch, tokens)
    mask[-1, valid:] = 0
    return mask
