"""Video models with joint attention over text and video: ConsisID, EasyAnimate, Motif-Video."""

from __future__ import annotations

from typing import Any

import torch
from families.building import Noise, built, padding
from families.case import CROSS, SPARSE, Built, Case, Regional, Row

CONSISID: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 24,
    "num_layers": 1,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 18,
}
FACE: dict[str, Any] = {
    "is_train_face": True,
    "cross_attn_interval": 1,
    "cross_attn_dim_head": 16,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 20,
    "LFE_vit_dim": 16,
    "LFE_depth": 5,
    "LFE_dim_head": 16,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 3,
    "LFE_num_querie": 6,
    "LFE_output_dim": 42,
    "LFE_ff_mult": 2,
}
MOTIF: dict[str, Any] = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 2,
    "text_embed_dim": 24,
    "rope_axes_dim": (8, 12, 12),
}


def consisid() -> Built:
    """CogVideoX with a face: attention to the face is written by hand, so only the joint attention is a site."""
    from diffusers import ConsisIDTransformer3DModel

    noise = Noise()
    return built(ConsisIDTransformer3DModel, **CONSISID, **FACE), {
        "hidden_states": noise(2, 3, 4, 16, 16),
        "encoder_hidden_states": noise(2, 18, 24),
        "timestep": torch.tensor([700, 700]),
        "id_cond": noise(2, 20),
        "id_vit_hidden": [noise(2, 7, 16) for _ in range(5)],
    }


def easyanimate() -> Built:
    """Text in front; the second block shares its projections between text and video."""
    from diffusers import EasyAnimateTransformer3DModel

    noise = Noise()
    model = built(
        EasyAnimateTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=16,
        sample_height=16,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=16,
        text_embed_dim=24,
        add_norm_text_encoder=True,
    )
    return model, {
        "hidden_states": noise(2, 4, 3, 16, 16),
        "timestep": torch.tensor([700, 700]),
        "encoder_hidden_states": noise(2, 18, 24),
    }


def motif_video() -> Built:
    """Joint and cross-attention in one block; the last blocks join the video with its own encoding instead of text."""
    from diffusers import MotifVideoTransformer3DModel

    noise = Noise()
    model = built(
        MotifVideoTransformer3DModel,
        **MOTIF,
        num_single_layers=2,
        num_decoder_layers=1,
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    return model, {
        "hidden_states": noise(1, 9, 5, 16, 16),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 14, 24),
        "encoder_attention_mask": padding(1, 14, 9),
    }


def motif_video_i2v() -> Built:
    """Image tokens between video and text."""
    from diffusers import MotifVideoTransformer3DModel

    model = built(MotifVideoTransformer3DModel, **MOTIF, num_single_layers=1, image_embed_dim=20)
    return model, {**motif_video()[1], "image_embeds": Noise(1)(1, 11, 20)}


CASES = (
    Case(
        "ConsisID",
        consisid,
        whole={
            Row("joint", "text:18+video:192", 210, "none", "3x8x8", SPARSE): 1,
        },
        note="Attention to the face is written by hand and stays as it is.",
    ),
    Case(
        "EasyAnimate",
        easyanimate,
        whole={
            Row("joint", "text:18+video:192", 210, "none", "3x8x8", SPARSE): 2,
        },
    ),
    Case(
        "Motif-Video",
        motif_video,
        whole={
            Row("joint", "video:320+text:14", 334, "key_padding", "5x8x8", SPARSE): 2,
            Row("cross", "video:320", 14, "key_padding", "5x8x8", CROSS): 2,
            Row("self", "video:320+video:320", 640, "none", "5x8x8", SPARSE): 1,
        },
        regional=Regional(
            3,
            {
                Row("joint", "video:320+text:14", 334, "key_padding", "", SPARSE): 2,
                Row("cross", "video:320", 14, "key_padding", "", CROSS): 2,
                Row("joint", "video:320+text:320", 640, "none", "", SPARSE): 1,
            },
        ),
        note="Block by block, the last blocks take their second video stream for text, which is kept whole.",
    ),
    Case(
        "Motif-Video, image to video",
        motif_video_i2v,
        whole={
            Row("joint", "video:320+image:11+text:14", 345, "key_padding", "5x8x8", SPARSE): 2,
        },
        regional=Regional(
            2,
            {
                Row("joint", "video:320+text:25", 345, "key_padding", "", SPARSE): 2,
            },
        ),
    ),
)
