"""Image models built like FLUX.1: Chroma, Bria, FIBO, LongCat-Image, Ovis-Image."""

from __future__ import annotations

from typing import Any

import torch
from families.building import Noise, built, grid_ids
from families.case import SPARSE, Built, Case, Regional, Row
from torch import nn

CONFIG: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": [8, 12, 12],
}


def with_packed_inputs(model: nn.Module) -> Built:
    """Text in front of packed image tokens."""
    noise = Noise()
    return model, {
        "hidden_states": noise(1, 120, 8),
        "encoder_hidden_states": noise(1, 15, 24),
        "timestep": torch.tensor([0.7]),
        "img_ids": grid_ids(10, 12, axes=3),
        "txt_ids": torch.zeros(15, 3),
    }


def chroma() -> Built:
    """The mask is the outer product of one of tokens: rows of padding give nothing."""
    from diffusers import ChromaTransformer2DModel

    approximator = {
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 32,
        "approximator_layers": 1,
    }
    model, kwargs = with_packed_inputs(built(ChromaTransformer2DModel, **CONFIG, **approximator))
    mask = torch.ones(1, 135, dtype=torch.bool)
    mask[:, 10:15] = False
    return model, {**kwargs, "attention_mask": mask}


def bria() -> Built:
    """FLUX.1 with other time embeddings."""
    from diffusers import BriaTransformer2DModel

    return with_packed_inputs(built(BriaTransformer2DModel, **CONFIG))


def bria_fibo() -> Built:
    """Every block gets a layer of the text encoder."""
    from diffusers import BriaFiboTransformer2DModel

    model, kwargs = with_packed_inputs(built(BriaFiboTransformer2DModel, **CONFIG, text_encoder_dim=20))
    layers = [Noise(1)(1, 15, 20) for _ in range(2)]
    return model, {**kwargs, "text_encoder_layers": layers}


def longcat_image() -> Built:
    """FLUX.1's blocks; the streams stay apart between them."""
    from diffusers import LongCatImageTransformer2DModel

    return with_packed_inputs(built(LongCatImageTransformer2DModel, **CONFIG, pooled_projection_dim=24))


def ovis_image() -> Built:
    """FLUX.1's blocks, with gated feed-forward layers."""
    from diffusers import OvisImageTransformer2DModel

    return with_packed_inputs(built(OvisImageTransformer2DModel, **CONFIG, out_channels=8))


CASES = (
    Case(
        "Chroma",
        chroma,
        whole={
            Row("joint", "text:15+video:120", 135, "outer", "", SPARSE): 2,
        },
        regional=Regional(
            2,
            {
                Row("joint", "text:15+video:120", 135, "outer", "", SPARSE): 1,
                Row("self", "video:135", 135, "outer", "", SPARSE): 1,
            },
        ),
        note="Block by block, single blocks get both streams joined: text_tokens splits them.",
    ),
    Case(
        "Bria",
        bria,
        whole={
            Row("joint", "text:15+video:120", 135, "none", "", SPARSE): 2,
        },
    ),
    Case(
        "FIBO",
        bria_fibo,
        whole={
            Row("joint", "text:15+video:120", 135, "none", "", SPARSE): 2,
        },
        regional=Regional(
            2,
            {
                Row("joint", "text:15+video:120", 135, "none", "", SPARSE): 1,
                Row("self", "video:135", 135, "none", "", SPARSE): 1,
            },
        ),
        note="Block by block, single blocks get both streams joined: text_tokens splits them.",
    ),
    Case(
        "LongCat-Image",
        longcat_image,
        whole={
            Row("joint", "text:15+video:120", 135, "none", "", SPARSE): 2,
        },
        regional=Regional(
            2,
            {
                Row("joint", "text:15+video:120", 135, "none", "", SPARSE): 2,
            },
        ),
    ),
    Case(
        "Ovis-Image",
        ovis_image,
        whole={
            Row("joint", "text:15+video:120", 135, "none", "", SPARSE): 2,
        },
        regional=Regional(
            2,
            {
                Row("joint", "text:15+video:120", 135, "none", "", SPARSE): 2,
            },
        ),
    ),
)
