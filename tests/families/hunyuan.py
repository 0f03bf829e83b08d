"""The HunyuanVideo line: joint attention, video first."""

from __future__ import annotations

import torch
from families.building import Noise, built, padding
from families.case import SPARSE, Built, Case, Inputs, Regional, Row

HUNYUAN_VIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (8, 12, 12),
}


def inputs(*video: int) -> Inputs:
    """Latents of this shape, and a prompt of 14 tokens of which 9 are valid."""
    noise = Noise()
    return {
        "hidden_states": noise(*video),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 14, 24),
        "encoder_attention_mask": padding(1, 14, 9),
        "pooled_projections": noise(1, 20),
        "guidance": torch.tensor([6000.0]),
    }


def hunyuan_video() -> Built:
    """Joint attention, video first, with a key-padding mask; the text refiner attends among text."""
    from diffusers import HunyuanVideoTransformer3DModel

    return built(HunyuanVideoTransformer3DModel, **HUNYUAN_VIDEO), inputs(1, 4, 5, 16, 16)


def hunyuan_video_i2v() -> Built:
    """Image to video by a replaced first frame: its tokens are cut off, modulated and put back in every layer."""
    from diffusers import HunyuanVideoTransformer3DModel

    model = built(HunyuanVideoTransformer3DModel, **HUNYUAN_VIDEO, image_condition_type="token_replace")
    return model, inputs(1, 4, 4, 16, 12)


def hunyuan_video_15() -> Built:
    """Text from two encoders and an image, sorted by what is valid; a mask that is an outer product."""
    from diffusers import HunyuanVideo15Transformer3DModel

    noise = Noise()
    masks = padding(1, 14, 9), padding(1, 6, 4)
    model = built(
        HunyuanVideo15Transformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=24,
        text_embed_2_dim=20,
        image_embed_dim=28,
        rope_axes_dim=(8, 12, 12),
        target_size=16,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 8, 10),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": noise(1, 14, 24),
        "encoder_attention_mask": masks[0],
        "encoder_hidden_states_2": noise(1, 6, 20),
        "encoder_attention_mask_2": masks[1],
        "image_embeds": noise(1, 5, 28),
    }


def framepack() -> Built:
    """History at three resolutions in front of the video; as many text tokens as are valid."""
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    noise = Noise()
    mask = padding(1, 14, 9)
    model = built(
        HunyuanVideoFramepackTransformer3DModel,
        **HUNYUAN_VIDEO,
        has_image_proj=True,
        image_proj_dim=28,
        has_clean_x_embedder=True,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 16, 16),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 14, 24),
        "encoder_attention_mask": mask,
        "pooled_projections": noise(1, 20),
        "image_embeds": noise(1, 7, 28),
        "indices_latents": torch.arange(19, 22),
        "guidance": torch.tensor([6000.0]),
        "latents_clean": noise(1, 4, 2, 16, 16),
        "indices_latents_clean": torch.tensor([0, 18]),
        "latents_history_2x": noise(1, 4, 2, 16, 16),
        "indices_latents_history_2x": torch.tensor([16, 17]),
        "latents_history_4x": noise(1, 4, 4, 16, 16),
        "indices_latents_history_4x": torch.arange(12, 16),
    }


def hunyuan_image() -> Built:
    """An image model: two text encoders sorted by what is valid, behind the image."""
    from diffusers import HunyuanImageTransformer2DModel

    noise = Noise()
    masks = padding(1, 14, 9), padding(1, 6, 4)
    model = built(
        HunyuanImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=24,
        text_embed_2_dim=20,
        rope_axes_dim=(16, 16),
    )
    return model, {
        "hidden_states": noise(1, 4, 12, 10),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": noise(1, 14, 24),
        "encoder_attention_mask": masks[0],
        "encoder_hidden_states_2": noise(1, 6, 20),
        "encoder_attention_mask_2": masks[1],
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
    Case(
        "HunyuanVideo I2V",
        hunyuan_video_i2v,
        whole={
            Row("text-self", "text:14", 14, "general", "", "text_only"): 1,
            Row("joint", "video:192+text:14", 206, "key_padding", "4x8x6", SPARSE): 3,
        },
        regional=Regional(
            2,
            {
                Row("self", "video:14", 14, "general", "", "text_only"): 1,
            },
        ),
        note="Compile the whole model: the blocks that replace the first frame are not among its repeated blocks.",
    ),
    Case(
        "HunyuanVideo 1.5",
        hunyuan_video_15,
        whole={
            Row("text-self", "text:14", 14, "general", "", "text_only"): 1,
            Row("joint", "video:240+text:25", 265, "outer", "", SPARSE): 1,
        },
        graphs=3,
        regional=Regional(
            3,
            {
                Row("self", "video:14", 14, "general", "", "text_only"): 1,
                Row("joint", "video:240+text:25", 265, "outer", "", SPARSE): 1,
            },
        ),
        note="Dynamo compiles it block by block by itself: the graph has no grid.",
    ),
    Case(
        "FramePack",
        framepack,
        whole={
            Row("text-self", "text:14", 14, "general", "", "text_only"): 1,
            Row("joint", "video:340+text:16", 356, "none", "", SPARSE): 3,
        },
        graphs=5,
        note="Dynamo compiles it block by block by itself: history and video are one part.",
    ),
    Case(
        "HunyuanImage 2.1",
        hunyuan_image,
        whole={
            Row("self", "video:14", 14, "general", "", "text_only"): 1,
            Row("joint", "video:120+text:20", 140, "key_padding", "", SPARSE): 3,
        },
        graphs=9,
        regional=Regional(
            3,
            {
                Row("joint", "video:120+text:20", 140, "key_padding", "", SPARSE): 3,
            },
        ),
        note="Dynamo compiles it block by block by itself: the graph has no grid.",
    ),
)
