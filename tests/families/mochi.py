"""Mochi: joint attention over as many text tokens as are valid."""

from __future__ import annotations

import torch
from families.building import Noise, built
from families.case import CROSS, SPARSE, Built, Case, Row


def mochi() -> Built:
    """Joint attention over the valid text tokens, gathered in every layer: their number depends on data."""
    from diffusers import MochiTransformer3DModel

    noise = Noise()
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[:, 11:] = False
    model = built(
        MochiTransformer3DModel,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=24,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=12,
        max_sequence_length=16,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 16, 16),
        "encoder_hidden_states": noise(1, 16, 24),
        "timestep": torch.tensor([700]),
        "encoder_attention_mask": mask,
    }


CASES = (
    Case(
        "Mochi 1",
        mochi,
        whole={
            Row("learned-cross", "learned:1", 17, "key_padding", "", CROSS): 1,
            Row("joint", "video:192+text:997", 1189, "none", "3x8x8", SPARSE): 1,
            Row("joint", "video:192+mixed:1009", 1201, "none", "3x8x8", SPARSE): 1,
        },
        fullgraph=True,
        note="Needs fullgraph=True: otherwise Dynamo breaks the graph at every layer, where text is gathered.",
    ),
)
