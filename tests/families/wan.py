"""The Wan line: video self-attention, and cross-attention to text and images."""

from __future__ import annotations

import torch
from families.building import Noise, built
from families.case import CROSS, SPARSE, Built, Case, Regional, Row

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}


def wan_t2v() -> Built:
    """Video self-attention on a grid of (5, 8, 12), and cross-attention to 20 text tokens."""
    from diffusers import WanTransformer3DModel

    noise = Noise()
    return built(WanTransformer3DModel, **WAN), {
        "hidden_states": noise(1, 8, 5, 16, 24),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 20, 24),
    }


def wan_ti2v_per_token_time() -> Built:
    """Wan 2.2 5B: a timestep for every video token."""
    model, kwargs = wan_t2v()
    timestep = torch.full((1, 480), 700.0)
    timestep[:, :96] = 0.0
    return model, {**kwargs, "timestep": timestep}


def wan_i2v() -> Built:
    """Two cross-attentions: to text (512 tokens, fixed by the model) and to 9 image tokens."""
    from diffusers import WanTransformer3DModel

    noise = Noise()
    return built(WanTransformer3DModel, **WAN, image_dim=40, added_kv_proj_dim=64), {
        "hidden_states": noise(1, 8, 3, 16, 16),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 512, 24),
        "encoder_hidden_states_image": noise(1, 9, 40),
    }


def wan_vace() -> Built:
    """A second stream in the shape of the video, from control frames."""
    from diffusers import WanVACETransformer3DModel

    noise = Noise()
    return built(WanVACETransformer3DModel, **WAN, vace_layers=[0, 1], vace_in_channels=16), {
        "hidden_states": noise(1, 8, 4, 16, 16),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 20, 24),
        "control_hidden_states": noise(1, 16, 4, 16, 16),
        "control_hidden_states_scale": torch.ones(2),
    }


CASES = (
    Case(
        "Wan 2.1 and 2.2 T2V",
        wan_t2v,
        whole={
            Row("self", "video:480", 480, "none", "5x8x12", SPARSE): 2,
            Row("cross", "video:480", 20, "none", "5x8x12", CROSS): 2,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:480", 480, "none", "", SPARSE): 1,
                Row("cross", "video:480", 20, "none", "", CROSS): 1,
            },
        ),
        quick=True,
    ),
    Case(
        "Wan 2.2 TI2V 5B",
        wan_ti2v_per_token_time,
        whole={
            Row("self", "video:480", 480, "none", "5x8x12", SPARSE): 2,
            Row("cross", "video:480", 20, "none", "5x8x12", CROSS): 2,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:480", 480, "none", "", SPARSE): 1,
                Row("cross", "video:480", 20, "none", "", CROSS): 1,
            },
        ),
    ),
    Case(
        "Wan 2.1 I2V",
        wan_i2v,
        whole={
            Row("self", "video:192", 192, "none", "3x8x8", SPARSE): 2,
            Row("cross", "video:192", 9, "none", "3x8x8", CROSS): 2,
            Row("cross", "video:192", 512, "none", "3x8x8", CROSS): 2,
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
        "Wan VACE",
        wan_vace,
        whole={
            Row("self", "control:256", 256, "none", "4x8x8", SPARSE): 2,
            Row("cross", "control:256", 20, "none", "4x8x8", CROSS): 2,
            Row("self", "video:256", 256, "none", "4x8x8", SPARSE): 2,
            Row("cross", "video:256", 20, "none", "4x8x8", CROSS): 2,
        },
        regional=Regional(
            3,
            {
                Row("self", "control:256", 256, "none", "", SPARSE): 2,
                Row("cross", "control:256", 20, "none", "", CROSS): 2,
                Row("self", "video:256", 256, "none", "", SPARSE): 1,
                Row("cross", "video:256", 20, "none", "", CROSS): 1,
            },
        ),
    ),
)
