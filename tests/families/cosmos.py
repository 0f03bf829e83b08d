"""Cosmos: video self-attention and cross-attention to text."""

from __future__ import annotations

import torch
from families.building import Noise, built
from families.case import CROSS, SPARSE, Built, Case, Row

COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 24,
    "adaln_lora_dim": 8,
    "max_size": (8, 32, 32),
    "concat_padding_mask": False,
}


def cosmos() -> Built:
    """Self- and cross-attention, learned positions; the padding mask, off here, would need torchvision."""
    from diffusers import CosmosTransformer3DModel

    noise = Noise()
    model = built(CosmosTransformer3DModel, **COSMOS)
    return model, {
        "hidden_states": noise(1, 4, 3, 16, 16),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": noise(1, 13, 24),
        "fps": 24,
    }


def cosmos_predict25() -> Built:
    """Cosmos Predict 2.5: a condition mask beside the latents, a timestep a frame, image tokens beside the text."""
    from diffusers import CosmosTransformer3DModel

    noise = Noise()
    model = built(
        CosmosTransformer3DModel,
        **{**COSMOS, "in_channels": 5},
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=28,
        encoder_hidden_states_channels=24,
        img_context_dim_in=12,
        img_context_num_tokens=7,
        img_context_dim_out=64,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 16, 12),
        "condition_mask": torch.zeros(1, 1, 3, 16, 12),
        "timestep": torch.full((1, 1, 3, 1, 1), 0.7),
        "encoder_hidden_states": (noise(1, 13, 28), noise(1, 7, 12)),
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
    Case(
        "Cosmos Predict 2.5",
        cosmos_predict25,
        whole={
            Row("self", "video:144", 144, "none", "3x8x6", SPARSE): 2,
            Row("cross", "video:144", 13, "none", "3x8x6", CROSS): 2,
            Row("cross", "video:144", 7, "none", "3x8x6", CROSS): 2,
        },
    ),
)
