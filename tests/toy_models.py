"""Small models of our own, where a diffusers transformer would only be slower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Self-attention with separate projections and a qk-norm, as most video transformers have it."""

    def __init__(self, dim: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = self.norm_q(self.to_q(hidden_states)), self.to_k(hidden_states), self.to_v(hidden_states)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return hidden_states + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Stack(nn.Module):
    """Equal blocks in a row."""

    def __init__(self, layers: int = 2, dim: int = 32, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.eval().requires_grad_(False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def tokens(count: int = 128, dim: int = 32, batch: int = 1, seed: int = 0) -> Tensor:
    """Hidden states [batch, count, dim]."""
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(seed))


EAGER = {"lowering": "eager", "min_tokens": 1, "dense_layers": 0, "kmeans_iters_init": 4}
"""Options that make tests quick: no code generation, small models may go sparse."""
