"""The Flux line: joint attention, text first, packed tokens."""

from __future__ import annotations

import torch
from families.building import Noise, built
from families.case import SPARSE, Built, Case, Regional, Row


def flux() -> Built:
    """An image model: joint attention, text first, packed tokens."""
    from diffusers import FluxTransformer2DModel

    noise = Noise()
    model = built(
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(8, 12, 12),
    )
    return model, {
        "hidden_states": noise(1, 120, 8),
        "encoder_hidden_states": noise(1, 15, 24),
        "pooled_projections": noise(1, 20),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(10.0), torch.arange(12.0)),
        "txt_ids": torch.zeros(15, 3),
    }


CASES = (
    Case(
        "Flux.1",
        flux,
        whole={
            Row("joint", "text:15+video:120", 135, "none", "", SPARSE): 3,
        },
        regional=Regional(
            3,
            {
                Row("joint", "text:15+video:120", 135, "none", "", SPARSE): 3,
            },
        ),
    ),
)
