"""Cosmos: video self-attention and cross-attention to text."""

from __future__ import annotations

import torch
from families.building import Noise, built
from families.case import CROSS, SPARSE, Built, Case, Row


def cosmos() -> Built:
    """Self- and cross-attention, learned positions; the padding mask, off here, would need torchvision."""
    from diffusers import CosmosTransformer3DModel

    noise = Noise()
    model = built(
        CosmosTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=24,
        adaln_lora_dim=8,
        max_size=(8, 32, 32),
        concat_padding_mask=False,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 16, 16),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": noise(1, 13, 24),
        "fps": 24,
    }


CASES = (
    Case(
        "Cosmos 1",
        cosmos,
        whole={
            Row("self", "video:192", 192, "none", "3x8x8", SPARSE): 2,
            Row("cross", "video:192", 13, "none", "3x8x8", CROSS): 2,
        },
    ),
)
