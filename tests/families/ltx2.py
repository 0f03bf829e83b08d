"""The LTX-2 line: video and audio in one model, each with text, attending to each other."""

from __future__ import annotations

from typing import Any

import torch
from families.building import Noise, built, padding
from families.case import CROSS, SPARSE, Built, Case, Regional, Row

LTX2: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "cross_attention_dim": 64,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32,
    "num_layers": 1,
    "caption_channels": 24,
}


def ltx2() -> Built:
    """Six attentions a block: video, audio, text for each of them, and both ways between them."""
    from diffusers import LTX2VideoTransformer3DModel

    noise = Noise()
    return built(LTX2VideoTransformer3DModel, **LTX2), {
        "hidden_states": noise(2, 4 * 8 * 6, 8),
        "audio_hidden_states": noise(2, 31, 6),
        "encoder_hidden_states": noise(2, 22, 24),
        "audio_encoder_hidden_states": noise(2, 22, 24),
        "timestep": torch.tensor([[700.0], [700.0]]),
        "encoder_attention_mask": padding(2, 22, 15),
        "audio_encoder_attention_mask": padding(2, 22, 15),
        "num_frames": 4,
        "height": 8,
        "width": 6,
        "audio_num_frames": 31,
    }


def ltx23() -> Built:
    """LTX-2.3: gated attention, modulated prompts, an attention that guidance can switch off, split rotary halves."""
    from diffusers import LTX2VideoTransformer3DModel

    gates = dict.fromkeys(
        ("gated_attn", "audio_gated_attn", "cross_attn_mod", "audio_cross_attn_mod", "perturbed_attn"), True
    )
    model = built(LTX2VideoTransformer3DModel, **LTX2, **gates, rope_type="split")
    return model, {**ltx2()[1], "sigma": torch.tensor([0.7, 0.7])}


def sana_wm_refiner() -> Built:
    """The second stage of SANA-WM: LTX-2's video half; "refiner" in its name does not make it text."""
    from diffusers import SanaWMLTX2RefinerTransformer3DModel

    noise = Noise()
    model: Any = built(SanaWMLTX2RefinerTransformer3DModel, **LTX2)
    rotary = model.build_rotary_emb_for_absolute_positions(1, [0, 1, 2, 3], 8, 6, torch.device("cpu"), 24.0)
    return model, {
        "hidden_states": noise(1, 4 * 8 * 6, 8),
        "encoder_hidden_states": noise(1, 22, 24),
        "timestep": torch.full((1, 192), 0.7),
        "video_rotary_emb": rotary,
    }


BLOCK = {
    Row("self", "video:192", 192, "none", "", SPARSE): 1,
    Row("audio-self", "audio:31", 31, "none", "", "audio_only"): 1,
    Row("cross", "video:192", 22, "key_bias", "", CROSS): 1,
    Row("audio-cross", "audio:31", 22, "key_bias", "", CROSS): 1,
    Row("cross", "video:192", 31, "none", "", CROSS): 1,
    Row("audio-cross", "audio:31", 192, "none", "", CROSS): 1,
}
"""The attentions of one block, which is all that the models have."""

CASES = (
    Case(
        "LTX-2",
        ltx2,
        whole=BLOCK,
        regional=Regional(1, BLOCK),
    ),
    Case(
        "LTX-2.3",
        ltx23,
        whole=BLOCK,
        regional=Regional(1, BLOCK),
    ),
    Case(
        "SANA-WM, refiner",
        sana_wm_refiner,
        whole={
            Row("self", "video:192", 192, "none", "", SPARSE): 1,
            Row("cross", "video:192", 22, "none", "", CROSS): 1,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:192", 192, "none", "", SPARSE): 1,
                Row("cross", "video:192", 22, "none", "", CROSS): 1,
            },
        ),
        note="The refiner of SANA-WM is a model of its own.",
    ),
)
