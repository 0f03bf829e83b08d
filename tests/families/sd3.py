"""Stable Diffusion 3: joint attention, image first."""

from __future__ import annotations

import torch
from families.building import Noise, built
from families.case import SPARSE, Built, Case, Row


def sd3() -> Built:
    """An image model: joint attention, image first; one block attends among the image tokens as well."""
    from diffusers import SD3Transformer2DModel

    noise = Noise()
    model = built(
        SD3Transformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model, {
        "hidden_states": noise(2, 4, 16, 20),
        "encoder_hidden_states": noise(2, 23, 24),
        "pooled_projections": noise(2, 20),
        "timestep": torch.tensor([700, 700]),
    }


CASES = (
    Case(
        "Stable Diffusion 3 and 3.5",
        sd3,
        whole={
            Row("joint", "video:80+text:23", 103, "none", "8x10", SPARSE): 2,
            Row("self", "video:80", 80, "none", "8x10", SPARSE): 1,
        },
    ),
)
