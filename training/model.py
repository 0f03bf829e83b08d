"""The transformer that is trained: diffusers' Wan model, unmodified, on pixels instead of latents."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel

from sparse_compile.evaluation.demo_model import PATCH, TEXT_DIM
from training.presets import ModelShape


def build(shape: ModelShape) -> WanTransformer3DModel:
    """A model with random weights from torch's global generator, ready to be trained."""
    model = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_size,
        in_channels=3,
        out_channels=3,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=4 * shape.width,
        num_layers=shape.layers,
        rope_max_seq_len=256,
    )
    # Each block starts as the identity and the model at a velocity of zero, which trains faster.
    torch.nn.init.zeros_(model.proj_out.weight)
    for block in model.blocks:
        for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            torch.nn.init.zeros_(last.weight)
    return model


def shape_of(model: WanTransformer3DModel) -> ModelShape:
    """How large a model is."""
    config = model.config
    return ModelShape(layers=config.num_layers, heads=config.num_attention_heads, head_size=config.attention_head_dim)
