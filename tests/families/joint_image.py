"""Image models with joint attention: AuraFlow, CogView3+, CogView4, GLM-Image, HiDream, ERNIE-Image, Krea 2, PRX."""

from __future__ import annotations

from typing import Any

import torch
from families.building import Noise, built, grid_ids, padding
from families.case import SPARSE, Built, Case, Regional, Row
from torch import Tensor

COGVIEW: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "text_embed_dim": 24,
    "time_embed_dim": 16,
    "condition_dim": 8,
}


def latents_and_text(time: float = 700.0) -> dict[str, Tensor]:
    """What most of these models are called with."""
    noise = Noise()
    return {
        "hidden_states": noise(2, 4, 16, 20),
        "encoder_hidden_states": noise(2, 15, 24),
        "timestep": torch.tensor([time, time]),
    }


def auraflow() -> Built:
    """Text in front, with register tokens; positions are chosen from a learned table."""
    from diffusers import AuraFlowTransformer2DModel

    model = built(
        AuraFlowTransformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pos_embed_max_size=144,
    )
    return model, latents_and_text(0.7)


def cogview3_plus() -> Built:
    """Text in front; conditioned on sizes and crops."""
    from diffusers import CogView3PlusTransformer2DModel

    sizes = dict.fromkeys(("original_size", "target_size", "crop_coords"), torch.tensor([[16.0, 20.0]] * 2))
    model = built(CogView3PlusTransformer2DModel, **COGVIEW, pos_embed_max_size=16, sample_size=16)
    return model, {**latents_and_text(), **sizes}


def cogview4() -> Built:
    """CogView3+ with rotary positions on the image."""
    from diffusers import CogView4Transformer2DModel

    sizes = dict.fromkeys(("original_size", "target_size", "crop_coords"), torch.tensor([[16.0, 20.0]] * 2))
    config = {**COGVIEW, "pos_embed_max_size": 16, "sample_size": 16, "rope_axes_dim": (16, 16)}
    return built(CogView4Transformer2DModel, **config), {**latents_and_text(), **sizes}


def glm_image() -> Built:
    """The tokens of a prior model are added to the image's."""
    from diffusers import GlmImageTransformer2DModel

    sizes = dict.fromkeys(("target_size", "crop_coords"), torch.tensor([[16.0, 20.0]] * 2))
    model = built(GlmImageTransformer2DModel, **COGVIEW, prior_vq_quantizer_codebook_size=32)
    return model, {
        **latents_and_text(),
        **sizes,
        "prior_token_id": torch.arange(80).expand(2, -1) % 32,
        "prior_token_drop": torch.zeros(2, 80, dtype=torch.bool),
    }


def hidream() -> Built:
    """Several text streams behind the image, and experts chosen by data."""
    from diffusers import HiDreamImageTransformer2DModel

    noise = Noise()
    model = built(
        HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[24, 20],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(32, 32),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    return model, {
        "hidden_states": noise(2, 4, 16, 20),
        "timesteps": torch.tensor([700, 700]),
        "encoder_hidden_states_t5": noise(2, 9, 24),
        "encoder_hidden_states_llama3": noise(2, 2, 11, 20),
        "pooled_embeds": noise(2, 16),
    }


def ernie_image() -> Built:
    """The tokens come in front of the batch; text behind the image."""
    from diffusers import ErnieImageTransformer2DModel

    noise = Noise()
    model = built(
        ErnieImageTransformer2DModel,
        hidden_size=64,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=96,
        in_channels=8,
        out_channels=8,
        text_in_dim=24,
        rope_axes_dim=(8, 12, 12),
    )
    return model, {
        "hidden_states": noise(2, 8, 10, 12),
        "timestep": torch.tensor([700.0, 700.0]),
        "text_bth": noise(2, 15, 24),
        "text_lens": torch.tensor([15, 10]),
    }


def krea2() -> Built:
    """Layers of the text encoder attend to each other, token by token, before text joins the image."""
    from diffusers import Krea2Transformer2DModel

    noise = Noise()
    model = built(
        Krea2Transformer2DModel,
        in_channels=8,
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=24,
        num_text_layers=3,
        text_num_attention_heads=3,
        text_num_key_value_heads=3,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 12, 12),
    )
    return model, {
        "hidden_states": noise(2, 120, 8),
        "encoder_hidden_states": noise(2, 15, 3, 24),
        "timestep": torch.tensor([0.7, 0.7]),
        "position_ids": torch.cat([torch.zeros(15, 3), grid_ids(10, 12, axes=3)]),
        "encoder_attention_mask": padding(2, 15, 10).bool(),
    }


def prx() -> Built:
    """The image attends to text and itself; text asks nothing."""
    from diffusers import PRXTransformer2DModel

    model = built(
        PRXTransformer2DModel,
        in_channels=4,
        patch_size=2,
        context_in_dim=24,
        hidden_size=64,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[16, 16],
    )
    return model, {**latents_and_text(0.7), "attention_mask": padding(2, 15, 10).bool()}


CASES = (
    Case(
        "AuraFlow",
        auraflow,
        whole={
            Row("joint", "learned:8+text:15+video:80", 103, "none", "8x10", SPARSE): 2,
        },
    ),
    Case(
        "CogView3-Plus",
        cogview3_plus,
        whole={
            Row("joint", "text:15+video:80", 95, "none", "8x10", SPARSE): 1,
        },
    ),
    Case(
        "CogView4",
        cogview4,
        whole={
            Row("joint", "text:15+video:80", 95, "none", "8x10", SPARSE): 1,
        },
    ),
    Case(
        "GLM-Image",
        glm_image,
        whole={
            Row("joint", "text:15+video:80", 95, "none", "", SPARSE): 1,
        },
        graphs=2,
        regional=Regional(
            1,
            {
                Row("joint", "text:15+video:80", 95, "none", "", SPARSE): 1,
            },
        ),
    ),
    Case(
        "HiDream-I1",
        hidream,
        whole={
            Row("joint", "video:256+text:31", 287, "none", "", SPARSE): 1,
            Row("self", "video:287", 287, "none", "", SPARSE): 1,
        },
        graphs=20,
        note="Experts chosen by data break it into many graphs.",
    ),
    Case(
        "ERNIE-Image",
        ernie_image,
        whole={
            Row("joint", "video:120+text:15", 135, "key_padding", "10x12", SPARSE): 2,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:135", 135, "key_padding", "", SPARSE): 1,
            },
        ),
        note="Block by block, both streams come joined: text_tokens splits them.",
    ),
    Case(
        "Krea 2",
        krea2,
        whole={
            Row("text-self", "text:3", 3, "none", "", "text_only"): 1,
            Row("text-self", "text:15", 15, "key_padding", "", "text_only"): 1,
            Row("joint", "text:15+video:120", 135, "key_padding", "", SPARSE): 1,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:135", 135, "key_padding", "", SPARSE): 1,
            },
        ),
        note="Block by block, both streams come joined: text_tokens splits them.",
    ),
    Case(
        "PRX",
        prx,
        whole={
            Row("self+extra", "video:80", 95, "key_padding", "8x10", SPARSE): 1,
        },
        note="The image attends to text and itself; text is kept whole.",
    ),
)
