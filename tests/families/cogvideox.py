"""CogVideoX: joint attention, text first."""

from __future__ import annotations

import torch
from families.building import Noise, built, rotary_table
from families.case import SPARSE, Built, Case, Row

COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 18,
}


def cogvideox() -> Built:
    """Joint attention, text first, positions added to the tokens, both guidance branches in one batch."""
    from diffusers import CogVideoXTransformer3DModel

    noise = Noise()
    return built(CogVideoXTransformer3DModel, **COGVIDEOX), {
        "hidden_states": noise(2, 3, 4, 16, 16),
        "encoder_hidden_states": noise(2, 18, 24),
        "timestep": torch.tensor([700, 700]),
    }


def cogvideox_rope() -> Built:
    """CogVideoX 5B: rotary positions on the video part only."""
    from diffusers import CogVideoXTransformer3DModel

    noise = Noise()
    model = built(CogVideoXTransformer3DModel, **COGVIDEOX, use_rotary_positional_embeddings=True)
    return model, {
        "hidden_states": noise(2, 3, 4, 16, 16),
        "encoder_hidden_states": noise(2, 18, 24),
        "timestep": torch.tensor([700, 700]),
        "image_rotary_emb": rotary_table(3 * 8 * 8, 32),
    }


def cogvideox_15() -> Built:
    """CogVideoX 1.5 I2V: patches of two frames, the first image beside the latents, an offset token."""
    from diffusers import CogVideoXTransformer3DModel

    noise = Noise()
    config = {**COGVIDEOX, "in_channels": 8, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 16}
    model = built(CogVideoXTransformer3DModel, **config, use_rotary_positional_embeddings=True)
    return model, {
        "hidden_states": noise(2, 6, 8, 16, 12),
        "encoder_hidden_states": noise(2, 18, 24),
        "timestep": torch.tensor([700, 700]),
        "ofs": torch.tensor([2.0, 2.0]),
        "image_rotary_emb": rotary_table(3 * 8 * 6, 32),
    }


CASES = (
    Case(
        "CogVideoX 2B",
        cogvideox,
        whole={
            Row("joint", "text:18+video:192", 210, "none", "3x8x8", SPARSE): 2,
        },
        quick=True,
    ),
    Case(
        "CogVideoX 5B",
        cogvideox_rope,
        whole={
            Row("joint", "text:18+video:192", 210, "none", "3x8x8", SPARSE): 2,
        },
    ),
    Case(
        "CogVideoX 1.5 I2V",
        cogvideox_15,
        whole={
            Row("joint", "text:18+video:144", 162, "none", "3x8x6", SPARSE): 2,
        },
    ),
)
