"""Small attention modules, and the verdict on the one attention of a graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from dynamo_capture import SMALL
from torch import Tensor, nn

from sparse_compile.config import Config
from sparse_compile.passes.classify_sites import classify_sites
from sparse_compile.passes.match_attention import match_attention
from sparse_compile.sites import Reason, Site
from sparse_compile.testing import Captured, capture

BATCH, TOKENS, TEXT, WIDTH = 2, 96, 10, 32


class Block(nn.Module):
    """One attention with a projection above it; what a test needs is a keyword away."""

    def __init__(self, *, heads: int = 2, key_heads: int = 2, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.heads, self.key_heads, self.dtype = heads, key_heads, dtype

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.to(self.dtype or x.dtype).unflatten(2, (heads, -1)).transpose(1, 2)

    def forward(self, query: Tensor, key: Tensor, **settings: Any) -> Tensor:
        q = self.split(self.to_q(query), self.heads)
        k = self.split(key[..., : WIDTH // self.heads * self.key_heads], self.key_heads)
        return F.scaled_dot_product_attention(q, k, k, **settings)


class SelfAttention(Block):
    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
        return super().forward(hidden_states, hidden_states, attn_mask=mask, **settings)


class Joint(Block):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        return super().forward(x, x, attn_mask=mask)


class TokenRefiner(SelfAttention):
    """Attends among text, whatever its input is called."""


class RefinedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.refiner = TokenRefiner()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.refiner(hidden_states)


class Patched(Block):
    """Video made of several axes, and text."""

    def forward(self, latents: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = torch.cat([latents.flatten(2).mT, encoder_hidden_states], dim=1)
        return super().forward(x, x)


class PatchedBoth(Block):
    """Video and text, both made of several axes."""

    def forward(self, latents: Tensor, caption: Tensor) -> Tensor:
        x = torch.cat([latents.flatten(2).mT, caption.flatten(2).mT], dim=1)
        return super().forward(x, x)


def video() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH)


def text(tokens: int = TEXT) -> Tensor:
    return torch.randn(BATCH, tokens, WIDTH)


def only(captured: Captured, config: Config = SMALL, refusal: Reason | None = None) -> Site:
    sites = match_attention(captured.graph_module, captured.inputs)
    (site,) = classify_sites(sites, config, captured.inputs, lambda site: refusal)
    return site


def site_of(function: Any, *args: Any, config: Config = SMALL, dynamic: bool | None = None, **kwargs: Any) -> Site:
    return only(capture(function, *args, dynamic=dynamic, **kwargs)[0], config)


def reason_of(function: Any, *args: Any, config: Config = SMALL, **kwargs: Any) -> Reason | None:
    decision = site_of(function, *args, config=config, **kwargs).decision
    assert decision is not None
    return decision.reason
