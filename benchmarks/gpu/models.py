"""Video transformers with the sizes of Wan 2.1 and HunyuanVideo and random weights, in plain torch.

What costs time is there: attention, projections, norms, RoPE, modulation, feed-forward. What a checkpoint would need is
not. Of HunyuanVideo only the dual-stream block exists here; its single-stream blocks do about the same work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH, TEXT, TIME = 64, 128, 256
"""Channels of a patch of latents, of a text token and of the embedded time, as the model gets them."""


class ModelSize(NamedTuple):
    """A model, and the tokens of one video."""

    name: str
    joint: bool
    """Text in the self-attention, as HunyuanVideo has it; else cross-attention, as Wan has it."""
    layers: int
    dim: int
    heads: int
    feed_forward: int
    video: int
    text: int


MODELS = {
    model.name: model
    for model in (
        ModelSize("wan_720p", False, 40, 5120, 40, 13_824, 75_600, 512),
        ModelSize("hunyuan_720p", True, 60, 3072, 24, 12_288, 118_800, 256),
        ModelSize("wan_480p", False, 30, 1536, 12, 8960, 32_760, 512),
        ModelSize("toy_wan", False, 5, 64, 2, 128, 320, 12),
        ModelSize("toy_hunyuan", True, 5, 64, 2, 128, 320, 12),
    )
}
"""Sizes of the published configurations: Wan 2.1 14B and 1.3B, HunyuanVideo (20 dual and 40 single blocks)."""


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: x [B, H, S, D], cos and sin [S, D / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class FeedForward(nn.Module):
    """Two projections."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, dim] to the same."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Projections(nn.Module):
    """q, k and v of one stream of tokens, with RMS norms on q and k, and the way back."""

    def __init__(self, dim: int, heads: int, norm_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.across_heads = norm_size == dim
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(norm_size, eps=1e-6), nn.RMSNorm(norm_size, eps=1e-6)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, dim] to three of [B, H, S, D]; keys and values from other tokens where they are given."""
        source = x if keys is None else keys
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        if self.across_heads:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        if not self.across_heads:
            q, k = self.norm_q(q), self.norm_k(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def back(self, out: Tensor) -> Tensor:
        """[B, H, S, D] to [B, S, dim]."""
        return self.to_out(out.transpose(1, 2).flatten(2))


class WanBlock(nn.Module):
    """Self-attention over the video, cross-attention to the text, feed-forward."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        dim = size.dim
        self.norm1, self.norm3 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn1, self.attn2 = Projections(dim, size.heads, dim), Projections(dim, size.heads, dim)
        self.ffn = FeedForward(dim, size.feed_forward)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_cos: Tensor, rotary_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Video [B, S, dim] and text [B, T, dim], which stays as it is; temb [B, 6, dim]."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + temb).chunk(6, 1)
        q, k, v = self.attn1(self.norm1(hidden_states) * (1 + scale) + shift)
        q, k = rotated(q, rotary_cos, rotary_sin), rotated(k, rotary_cos, rotary_sin)
        hidden_states = hidden_states + gate * self.attn1.back(F.scaled_dot_product_attention(q, k, v))
        q, k, v = self.attn2(self.norm2(hidden_states), encoder_hidden_states)
        hidden_states = hidden_states + self.attn2.back(F.scaled_dot_product_attention(q, k, v))
        inner = self.ffn(self.norm3(hidden_states) * (1 + ffn_scale) + ffn_shift)
        return hidden_states + ffn_gate * inner, encoder_hidden_states


class HunyuanBlock(nn.Module):
    """Attention over video and text together; two streams with weights of their own."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        dim, head = size.dim, size.dim // size.heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(4))
        self.attn, self.attn_text = Projections(dim, size.heads, head), Projections(dim, size.heads, head)
        self.ffn, self.ffn_text = FeedForward(dim, size.feed_forward), FeedForward(dim, size.feed_forward)
        self.modulation = nn.Parameter(torch.randn(2, 1, 6, dim) / dim**0.5)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_cos: Tensor, rotary_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Video [B, S, dim] and text [B, T, dim]; temb [B, 6, dim]."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation[0] + temb).chunk(6, 1)
        t_shift, t_scale, t_gate, t_ffn_shift, t_ffn_scale, t_ffn_gate = (self.modulation[1] + temb).chunk(6, 1)
        q, k, v = self.attn(self.norms[0](hidden_states) * (1 + scale) + shift)
        q, k = rotated(q, rotary_cos, rotary_sin), rotated(k, rotary_cos, rotary_sin)
        text = self.attn_text(self.norms[1](encoder_hidden_states) * (1 + t_scale) + t_shift)
        q, k, v = (torch.cat(pair, 2) for pair in zip((q, k, v), text, strict=True))
        out = F.scaled_dot_product_attention(q, k, v)
        video = hidden_states.shape[1]
        hidden_states = hidden_states + gate * self.attn.back(out[:, :, :video])
        encoder_hidden_states = encoder_hidden_states + t_gate * self.attn_text.back(out[:, :, video:])
        inner = self.ffn(self.norms[2](hidden_states) * (1 + ffn_scale) + ffn_shift)
        inner_text = self.ffn_text(self.norms[3](encoder_hidden_states) * (1 + t_ffn_scale) + t_ffn_shift)
        return hidden_states + ffn_gate * inner, encoder_hidden_states + t_ffn_gate * inner_text


class VideoTransformer(nn.Module):
    """Patches, text and time in, patches out.

    Args:
        size: which model.
        layers: blocks, each with weights of its own.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, size: ModelSize, layers: int) -> None:
        super().__init__()
        self.patch_embedding, self.text_embedding = nn.Linear(PATCH, size.dim), nn.Linear(TEXT, size.dim)
        self.time_embedding = nn.Linear(TIME, 6 * size.dim)
        block = HunyuanBlock if size.joint else WanBlock
        self.blocks = nn.ModuleList(block(size) for _ in range(layers))
        self.norm_out, self.proj_out = nn.LayerNorm(size.dim, eps=1e-6), nn.Linear(size.dim, PATCH)
        half = size.dim // size.heads // 2
        angles = torch.arange(size.video)[:, None] / 1e4 ** (torch.arange(half) / half)
        self.register_buffer("rotary_cos", angles.cos(), persistent=False)
        self.register_buffer("rotary_sin", angles.sin(), persistent=False)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """One step: hidden_states [B, S, PATCH], encoder_hidden_states [B, T, TEXT], timestep [B, TIME]."""
        temb = self.time_embedding(timestep).unflatten(-1, (6, -1))
        hidden_states = self.patch_embedding(hidden_states)
        encoder_hidden_states = self.text_embedding(encoder_hidden_states)
        for block in self.blocks:
            hidden_states, encoder_hidden_states = block(
                hidden_states, encoder_hidden_states, temb, self.rotary_cos, self.rotary_sin
            )
        return self.proj_out(self.norm_out(hidden_states))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(size: ModelSize, layers: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> VideoTransformer:
    """A model with random weights, made where it runs."""
    torch.manual_seed(seed)
    with default_dtype(dtype), device:
        model = VideoTransformer(size, layers)
    return model.eval().requires_grad_(False)


def inputs_of(size: ModelSize, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """The arguments of one step."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = {"hidden_states": (1, size.video, PATCH), "encoder_hidden_states": (1, size.text, TEXT)}
    sizes["timestep"] = (1, TIME)
    return {name: torch.randn(s, generator=generator, device=device, dtype=dtype) for name, s in sizes.items()}


def layers_that_fit(size: ModelSize, device: torch.device, dtype: torch.dtype) -> int:
    """Blocks whose weights fit beside the activations of one; all of them where the device is no GPU."""
    if device.type != "cuda":
        return size.layers
    with torch.device("meta"):
        parameters = sum(p.numel() for p in VideoTransformer(size, 1).blocks.parameters())
    tokens = size.video + size.text
    activations = tokens * (16 * size.dim + 3 * size.feed_forward)
    free = 0.85 * torch.cuda.mem_get_info(device)[0] / dtype.itemsize
    return max(0, min(size.layers, int((free - activations) / parameters)))
