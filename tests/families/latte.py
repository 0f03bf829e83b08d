"""Models on the oldest attention processor: Latte and Allegro."""

from __future__ import annotations

import torch
from families.building import Noise, built
from families.case import CROSS, SPARSE, Built, Case, Row


def allegro() -> Built:
    """As its pipeline calls it: a mask for the text alone. A head size that is no power of two."""
    from diffusers import AllegroTransformer3DModel

    noise = Noise()
    model = built(
        AllegroTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_width=8,
        sample_height=8,
        sample_frames=3,
        caption_channels=20,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 16, 16),
        "encoder_hidden_states": noise(1, 17, 20),
        "timestep": torch.tensor([700]),
        "encoder_attention_mask": torch.ones(1, 17),
    }


def allegro_with_mask() -> Built:
    """A mask for the video as well, which its attention adds as a floating-point bias per key."""
    model, kwargs = allegro()
    return model, {**kwargs, "attention_mask": torch.ones(1, 3, 16, 16)}


def latte() -> Built:
    """Spatial and temporal attention: frames, or space, lie in the batch."""
    from diffusers import LatteTransformer3DModel

    noise = Noise()
    model = built(
        LatteTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=20,
        video_length=5,
    )
    return model, {
        "hidden_states": noise(1, 4, 5, 16, 16),
        "encoder_hidden_states": noise(1, 11, 20),
        "timestep": torch.tensor([700]),
    }


CASES = (
    Case(
        "Allegro",
        allegro,
        whole={
            Row("self", "video:192", 192, "none", "3x8x8", SPARSE): 2,
            Row("cross", "video:192", 17, "key_bias", "3x8x8", CROSS): 2,
        },
    ),
    Case(
        "Allegro, masked",
        allegro_with_mask,
        whole={
            Row("self", "video:192", 192, "key_bias", "3x8x8", "key_bias"): 2,
            Row("cross", "video:192", 17, "key_bias", "3x8x8", CROSS): 2,
        },
        dense_only="its attention has a floating-point bias per key",
    ),
    Case(
        "Latte",
        latte,
        whole={
            Row("self", "video:64", 64, "none", "8x8", "factorised_attention"): 2,
            Row("cross", "video:64", 11, "none", "8x8", CROSS): 2,
            Row("self", "video:5", 5, "none", "", "factorised_attention"): 2,
        },
        dense_only="frames or space lie in the batch: its attention is factorised",
        quick=True,
    ),
)
