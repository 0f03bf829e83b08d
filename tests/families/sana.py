"""The Sana line of video models: attention that is linear in the tokens, with softmax here and there."""

from __future__ import annotations

import torch
from families.building import Noise, built, padding
from families.case import CROSS, SPARSE, Built, Case, Regional, Row


def sana_video() -> Built:
    """Linear self-attention, which is no attention of the kind that is looked for; cross-attention to text."""
    from diffusers import SanaVideoTransformer3DModel

    noise = Noise()
    mask = padding(1, 13, 9)
    model = built(
        SanaVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=24,
        sample_size=8,
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 16, 16),
        "encoder_hidden_states": noise(1, 13, 24),
        "timestep": torch.tensor([700]),
        "encoder_attention_mask": mask,
    }


def sana_wm() -> Built:
    """A world model: in every n-th block softmax over all tokens, once as they are and once along camera rays."""
    from diffusers import SanaWMTransformer3DModel

    noise = Noise()
    mask = padding(1, 13, 9)
    model = built(
        SanaWMTransformer3DModel,
        in_channels=8,
        num_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=32,
        chunk_plucker_channels=6,
        caption_channels=24,
        mlp_ratio=2.0,
        mixed_precision="no",
    )
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([8.0, 8.0, 4.0, 4.0])])
    return model, {
        "hidden_states": noise(1, 8, 3, 8, 8),
        "timestep": torch.full((1, 1, 3), 700),
        "encoder_hidden_states": noise(1, 1, 13, 24),
        "encoder_attention_mask": mask,
        "camera_conditions": camera.repeat(1, 3, 1),
        "chunk_plucker": noise(1, 6, 3, 8, 8),
    }


CASES = (
    Case(
        "Sana Video",
        sana_video,
        whole={
            Row("cross", "video:192", 13, "key_bias", "3x8x8", CROSS): 2,
        },
        dense_only="its self-attention is linear: there is nothing to skip",
    ),
    Case(
        "Sana WM",
        sana_wm,
        whole={
            Row("cross", "video:192", 13, "key_padding", "3x8x8", CROSS): 2,
            Row("self", "video:192", 192, "none", "3x8x8", SPARSE): 2,
        },
        regional=Regional(
            2,
            {
                Row("mixed-cross", "mixed:192", 13, "key_padding", "", CROSS): 1,
                Row("self", "video:192", 192, "none", "3x64", SPARSE): 2,
                Row("cross", "video:192", 13, "key_padding", "3x64", CROSS): 1,
            },
        ),
        note="Only every n-th block has softmax attention; the others are linear.",
    ),
)
