"""Image models whose self-attention is of the image alone: PixArt, SANA, Hunyuan-DiT, DiT."""

from __future__ import annotations

import torch
from families.building import Noise, built, padding, rotary_table
from families.case import CROSS, SPARSE, Built, Case, Row


def pixart() -> Built:
    """Self- and cross-attention, the latter with a bias per key."""
    from diffusers import PixArtTransformer2DModel

    noise = Noise()
    model = built(
        PixArtTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=32,
        sample_size=16,
        caption_channels=24,
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": noise(2, 4, 16, 20),
        "encoder_hidden_states": noise(2, 15, 24),
        "timestep": torch.tensor([700, 700]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": padding(2, 15, 10),
    }


def sana() -> Built:
    """Self-attention is linear, which is no softmax attention; cross-attention is left."""
    from diffusers import SanaTransformer2DModel

    noise = Noise()
    model = built(
        SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=16,
    )
    return model, {
        "hidden_states": noise(2, 4, 10, 12),
        "encoder_hidden_states": noise(2, 15, 24),
        "timestep": torch.tensor([700, 700]),
    }


def hunyuan_dit() -> Built:
    """Two text streams joined for cross-attention; the second half of the blocks joins channels of the first."""
    from diffusers import HunyuanDiT2DModel

    noise = Noise()
    model = built(
        HunyuanDiT2DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=32,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=24,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=11,
        text_len_t5=14,
        use_style_cond_and_image_meta_size=False,
    )
    return model, {
        "hidden_states": noise(2, 4, 16, 20),
        "timestep": torch.tensor([700.0, 700.0]),
        "encoder_hidden_states": noise(2, 11, 24),
        "text_embedding_mask": torch.ones(2, 11),
        "encoder_hidden_states_t5": noise(2, 14, 16),
        "text_embedding_mask_t5": torch.ones(2, 14),
        "image_rotary_emb": rotary_table(80, 16),
    }


def dit() -> Built:
    """Conditioned on a class: no text at all."""
    from diffusers import DiTTransformer2DModel

    model = built(
        DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=20,
        norm_type="ada_norm_zero",
    )
    return model, {
        "hidden_states": Noise()(2, 4, 20, 20),
        "timestep": torch.tensor([700, 700]),
        "class_labels": torch.tensor([1, 2]),
    }


CASES = (
    Case(
        "PixArt",
        pixart,
        whole={
            Row("self", "video:80", 80, "none", "8x10", SPARSE): 1,
            Row("cross", "video:80", 15, "key_bias", "8x10", CROSS): 1,
        },
    ),
    Case(
        "SANA",
        sana,
        whole={
            Row("cross", "video:120", 15, "none", "10x12", CROSS): 1,
        },
        dense_only="self-attention is linear, which is no softmax attention",
    ),
    Case(
        "Hunyuan-DiT",
        hunyuan_dit,
        whole={
            Row("self", "video:80", 80, "none", "8x10", SPARSE): 4,
            Row("cross", "video:80", 25, "none", "8x10", CROSS): 4,
        },
    ),
    Case(
        "DiT",
        dit,
        whole={
            Row("self", "video:100", 100, "none", "10x10", SPARSE): 1,
        },
    ),
)
