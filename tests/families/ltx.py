"""LTX-Video: packed tokens, so that the graph has no grid."""

from __future__ import annotations

import torch
from families.building import Noise, built
from families.case import CROSS, SPARSE, Built, Case, Regional, Row


def ltx() -> Built:
    """Tokens arrive packed, so the graph has no grid; the cross-attention has a floating-point mask."""
    from diffusers import LTXVideoTransformer3DModel

    noise = Noise()
    mask = torch.ones(2, 22)
    mask[:, 15:] = 0
    model = built(
        LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        num_layers=2,
        caption_channels=24,
    )
    return model, {
        "hidden_states": noise(2, 4 * 8 * 6, 8),
        "encoder_hidden_states": noise(2, 22, 24),
        "timestep": torch.tensor([700, 700]),
        "encoder_attention_mask": mask,
        "num_frames": 4,
        "height": 8,
        "width": 6,
    }


CASES = (
    Case(
        "LTX-Video",
        ltx,
        whole={
            Row("self", "video:192", 192, "none", "", SPARSE): 2,
            Row("cross", "video:192", 22, "key_bias", "", CROSS): 2,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:192", 192, "none", "", SPARSE): 1,
                Row("cross", "video:192", 22, "key_bias", "", CROSS): 1,
            },
        ),
        quick=True,
    ),
)
