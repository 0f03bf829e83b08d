"""What others built upon Wan: other conditions, other timesteps, the same self- and cross-attention."""

from __future__ import annotations

import torch
from families.building import Noise, built
from families.case import CROSS, SPARSE, Built, Case, Regional, Row
from families.wan import WAN


def wan_animate() -> Built:
    """Pose latents are added to the video in place; a face is read by an adapter whose frames lie in the batch."""
    from diffusers import WanAnimateTransformer3DModel

    noise = Noise()
    channels = {str(size): 8 for size in (4, 8, 16, 32)}
    config = {**WAN, "in_channels": 20, "num_layers": 2}
    model = built(
        WanAnimateTransformer3DModel,
        **config,
        latent_channels=8,
        image_dim=40,
        added_kv_proj_dim=64,
        motion_encoder_channel_sizes=channels,
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return model, {
        "hidden_states": noise(1, 20, 4, 16, 12),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 512, 24),
        "encoder_hidden_states_image": noise(1, 9, 40),
        "pose_hidden_states": noise(1, 8, 3, 16, 12),
        "face_pixel_values": noise(1, 3, 9, 16, 16),
    }


def chronoedit() -> Built:
    """Two frames, before and after the edit, that are far apart in time."""
    from diffusers import ChronoEditTransformer3DModel

    noise = Noise()
    model = built(ChronoEditTransformer3DModel, **WAN, image_dim=40, added_kv_proj_dim=64, rope_temporal_skip_len=8)
    return model, {
        "hidden_states": noise(1, 8, 2, 16, 20),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 512, 24),
        "encoder_hidden_states_image": noise(1, 9, 40),
    }


def skyreels_v2() -> Built:
    """A timestep for every frame, a frame rate, and blocks of frames that may not look ahead."""
    from diffusers import SkyReelsV2Transformer3DModel

    noise = Noise()
    return built(SkyReelsV2Transformer3DModel, **WAN, inject_sample_info=True), {
        "hidden_states": noise(1, 8, 4, 16, 12),
        "timestep": torch.full((1, 4), 700),
        "encoder_hidden_states": noise(1, 20, 24),
        "enable_diffusion_forcing": True,
        "fps": torch.tensor([1]),
    }


def skyreels_v2_causal() -> Built:
    """Blocks of two frames that may not look ahead: a mask of queries and keys."""
    from diffusers import SkyReelsV2Transformer3DModel

    noise = Noise()
    return built(SkyReelsV2Transformer3DModel, **WAN, num_frame_per_block=2), {
        "hidden_states": noise(1, 8, 4, 16, 12),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 20, 24),
    }


def anyflow() -> Built:
    """Two timesteps a call; frames before channels."""
    from diffusers import AnyFlowTransformer3DModel

    noise = Noise()
    config = {name: value for name, value in WAN.items() if name != "attention_head_dim"}
    return built(AnyFlowTransformer3DModel, **config, attention_head_dim=32), {
        "hidden_states": noise(1, 3, 8, 16, 16),
        "timestep": torch.full((1, 3), 700.0),
        "r_timestep": torch.full((1, 3), 500.0),
        "encoder_hidden_states": noise(1, 20, 24),
    }


def wan_animate_2() -> Built:
    """A generation pass: video and cached reference in one buffer, through flex attention."""
    from diffusers import WanAnimate2Transformer3DModel
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
    from torch.nn.attention.flex_attention import create_block_mask

    noise = Noise()
    model = built(
        WanAnimate2Transformer3DModel,
        text_len=20,
        in_dim=20,
        dim=64,
        ffn_dim=96,
        freq_dim=32,
        text_dim=24,
        out_dim=8,
        num_heads=2,
        num_layers=2,
        use_img_emb=False,
    )
    cache, grid = WanAnimate2KVCache(2), torch.tensor([[2, 8, 8]])
    shared = {"timestep": torch.tensor([700]), "encoder_hidden_states": [noise(14, 24)], "kv_cache": cache}
    with torch.no_grad():
        model(
            hidden_states=[noise(8, 2, 16, 16)],
            condition_latents=[noise(12, 2, 16, 16)],
            kv_cache_mode="extract",
            seq_len=128,
            offset_grid_sizes=grid,
            **shared,
        )
    model.block_masks[2, 64] = create_block_mask(
        lambda b, h, q, k: (k < 192) | (k >= 256), B=None, H=None, Q_LEN=256, KV_LEN=384, device="cpu"
    )
    return model, {
        "hidden_states": [noise(8, 3, 16, 16)],
        "condition_latents": [noise(12, 3, 16, 16)],
        "kv_cache_mode": "cached",
        "seq_len": 192,
        "reference_grid_sizes": grid,
        "origin_len": 5,
        "origin_area": [128, 128],
        **shared,
    }


CASES = (
    Case(
        "Wan 2.2 Animate",
        wan_animate,
        whole={
            Row("self", "video:192", 192, "none", "4x8x6", SPARSE): 2,
            Row("cross", "video:192", 9, "none", "4x8x6", CROSS): 2,
            Row("cross", "video:192", 512, "none", "4x8x6", CROSS): 2,
            Row("cross", "video:48", 3, "none", "8x6", CROSS): 1,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:192", 192, "none", "", SPARSE): 1,
                Row("cross", "video:192", 9, "none", "", CROSS): 1,
                Row("cross", "video:192", 512, "none", "", CROSS): 1,
            },
        ),
    ),
    Case(
        "ChronoEdit",
        chronoedit,
        whole={
            Row("self", "video:160", 160, "none", "2x8x10", SPARSE): 2,
            Row("cross", "video:160", 9, "none", "2x8x10", CROSS): 2,
            Row("cross", "video:160", 512, "none", "2x8x10", CROSS): 2,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:160", 160, "none", "", SPARSE): 1,
                Row("cross", "video:160", 9, "none", "", CROSS): 1,
                Row("cross", "video:160", 512, "none", "", CROSS): 1,
            },
        ),
    ),
    Case(
        "SkyReels-V2",
        skyreels_v2,
        whole={
            Row("self", "video:192", 192, "none", "4x8x6", SPARSE): 2,
            Row("cross", "video:192", 20, "none", "4x8x6", CROSS): 2,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:192", 192, "none", "", SPARSE): 1,
                Row("cross", "video:192", 20, "none", "", CROSS): 1,
            },
        ),
    ),
    Case(
        "SkyReels-V2, frames in causal blocks",
        skyreels_v2_causal,
        whole={
            Row("self", "video:192", 192, "general", "4x8x6", "mask"): 2,
            Row("cross", "video:192", 20, "none", "4x8x6", CROSS): 2,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:192", 192, "general", "", "mask"): 1,
                Row("cross", "video:192", 20, "none", "", CROSS): 1,
            },
        ),
        dense_only="blocks of frames may not look ahead: a mask of queries and keys",
    ),
    Case(
        "AnyFlow",
        anyflow,
        whole={
            Row("self", "video:192", 192, "none", "3x8x8", SPARSE): 2,
            Row("cross", "video:192", 20, "none", "3x8x8", CROSS): 2,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:192", 192, "none", "", SPARSE): 1,
                Row("cross", "video:192", 20, "none", "", CROSS): 1,
            },
        ),
    ),
    Case(
        "Wan 2.2 Animate 2",
        wan_animate_2,
        whole={
            Row("cross", "video:192", 20, "none", "", CROSS): 1,
        },
        graphs=15,
        regional=Regional(
            12,
            {
                Row("cross", "video:192", 20, "none", "", CROSS): 1,
            },
        ),
        dense_only="its self-attention is flex attention with a cache, which is not looked for",
    ),
)
