"""Audio models: their latents are called like those of video, and their attention is treated like it."""

from __future__ import annotations

import torch
from families.building import Noise, built
from families.case import CROSS, SPARSE, Built, Case, Regional, Row


def stable_audio() -> Built:
    """One token of global conditions in front; fewer key heads than query heads."""
    from diffusers import StableAudioDiTModel
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    noise = Noise()
    model = built(
        StableAudioDiTModel,
        sample_size=128,
        in_channels=8,
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=8,
        cross_attention_dim=24,
        time_proj_dim=16,
        global_states_input_dim=20,
        cross_attention_input_dim=24,
    )
    return model, {
        "hidden_states": noise(2, 8, 128),
        "timestep": torch.tensor([0.7, 0.7]),
        "encoder_hidden_states": noise(2, 15, 24),
        "global_hidden_states": noise(2, 1, 20),
        "rotary_embedding": get_1d_rotary_pos_embed(16, 129, use_real=True, repeat_interleave_real=False),
    }


def stable_audio3() -> Built:
    """Memory tokens in front, and the difference of two attentions."""
    from diffusers import StableAudio3DiTModel

    noise = Noise()
    model = built(
        StableAudio3DiTModel,
        io_channels=8,
        embed_dim=64,
        depth=1,
        num_heads=2,
        cond_token_dim=24,
        global_cond_dim=20,
        local_add_cond_dim=9,
        timestep_features_dim=16,
        ff_mult=2.0,
        num_memory_tokens=4,
    )
    return model, {
        "hidden_states": noise(1, 8, 128),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": noise(1, 15, 24),
        "global_hidden_states": noise(1, 20),
    }


def ace_step() -> Built:
    """Every second layer attends within a window, by a mask; the other half sees everything."""
    from diffusers import AceStepTransformer1DModel

    noise = Noise()
    model = built(
        AceStepTransformer1DModel,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        sliding_window=16,
    )
    return model, {
        "hidden_states": noise(1, 256, 8),
        "timestep": torch.tensor([0.7]),
        "timestep_r": torch.tensor([0.7]),
        "encoder_hidden_states": noise(1, 15, 64),
        "context_latents": noise(1, 256, 16),
    }


def longcat_audio() -> Built:
    """Masks of keys on both attentions; a skip over all blocks."""
    from diffusers import LongCatAudioDiTTransformer

    noise = Noise()
    model = built(
        LongCatAudioDiTTransformer,
        dit_dim=64,
        dit_depth=1,
        dit_heads=2,
        dit_text_dim=24,
        latent_dim=8,
        ff_mult=2.0,
    )
    return model, {
        "hidden_states": noise(1, 128, 8),
        "encoder_hidden_states": noise(1, 15, 24),
        "encoder_attention_mask": torch.ones(1, 15, dtype=torch.bool),
        "timestep": torch.tensor([0.7]),
        "attention_mask": torch.ones(1, 128, dtype=torch.bool),
        "latent_cond": noise(1, 128, 8),
    }


CASES = (
    Case(
        "Stable Audio",
        stable_audio,
        whole={
            Row("self", "video:1+video:128", 129, "none", "", SPARSE): 1,
            Row("cross", "video:1+video:128", 15, "none", "", CROSS): 1,
        },
        note="Audio, treated as video is.",
    ),
    Case(
        "Stable Audio 3",
        stable_audio3,
        whole={
            Row("joint", "learned:4+video:128", 132, "none", "", SPARSE): 2,
            Row("cross", "learned:4+video:128", 15, "none", "", CROSS): 2,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:132", 132, "none", "", SPARSE): 2,
                Row("cross", "video:132", 15, "none", "", CROSS): 2,
            },
        ),
        note="Audio, treated as video is.",
    ),
    Case(
        "ACE-Step",
        ace_step,
        whole={
            Row("self", "video:128", 128, "general", "", "mask"): 1,
            Row("cross", "video:128", 15, "none", "", CROSS): 2,
            Row("self", "video:128", 128, "none", "", SPARSE): 1,
        },
        note="Audio, treated as video is; layers with a window stay dense.",
    ),
    Case(
        "LongCat-Audio",
        longcat_audio,
        whole={
            Row("self", "video:128", 128, "key_padding", "", SPARSE): 1,
            Row("cross", "video:128", 15, "key_padding", "", CROSS): 1,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:128", 128, "key_padding", "", SPARSE): 1,
                Row("cross", "video:128", 15, "key_padding", "", CROSS): 1,
            },
        ),
        note="Audio, treated as video is.",
    ),
)
