"""The HunyuanVideo line: joint attention, video first."""

from __future__ import annotations

import torch
from families.building import Noise, built
from families.case import SPARSE, Built, Case, Regional, Row


def hunyuan_video() -> Built:
    """Joint attention, video first, with a key-padding mask; the text refiner attends among text."""
    from diffusers import HunyuanVideoTransformer3DModel

    noise = Noise()
    mask = torch.ones(1, 14)
    mask[:, 9:] = 0
    model = built(
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=24,
        pooled_projection_dim=20,
        rope_axes_dim=(8, 12, 12),
    )
    return model, {
        "hidden_states": noise(1, 4, 5, 16, 16),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 14, 24),
        "encoder_attention_mask": mask,
        "pooled_projections": noise(1, 20),
        "guidance": torch.tensor([6000.0]),
    }


CASES = (
    Case(
        "HunyuanVideo",
        hunyuan_video,
        whole={
            Row("text-self", "text:14", 14, "general", "", "text_only"): 1,
            Row("joint", "video:320+text:14", 334, "key_padding", "5x8x8", SPARSE): 3,
        },
        regional=Regional(
            5,
            {
                Row("self", "video:14", 14, "general", "", "text_only"): 1,
                Row("joint", "video:320+text:14", 334, "key_padding", "", SPARSE): 3,
            },
        ),
        quick=True,
    ),
)
