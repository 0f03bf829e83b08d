"""The Kandinsky line: channels last, text blocks of their own, video self-attention."""

from __future__ import annotations

import torch
from families.building import Noise, built
from families.case import CROSS, SPARSE, Built, Case, Regional, Row


def kandinsky5() -> Built:
    """Video self-attention and cross-attention to text that attended to itself before."""
    from diffusers import Kandinsky5Transformer3DModel

    noise = Noise()
    model = built(
        Kandinsky5Transformer3DModel,
        in_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=20,
        time_dim=16,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=64,
        ff_dim=96,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(8, 12, 12),
    )
    return model, {
        "hidden_states": noise(1, 3, 16, 16, 4),
        "encoder_hidden_states": noise(1, 15, 24),
        "timestep": torch.tensor([700.0]),
        "pooled_projections": noise(1, 20),
        "visual_rope_pos": (torch.arange(3), torch.arange(8), torch.arange(8)),
        "text_rope_pos": torch.arange(15),
    }


def kandinsky6() -> Built:
    """Video and audio denoised together: each with its own text, and with attention to the other."""
    from diffusers import Kandinsky6Transformer3DModel

    noise = Noise()
    mask = torch.ones(1, 15, dtype=torch.bool)
    mask[:, 11:] = False
    model = built(
        Kandinsky6Transformer3DModel,
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=20,
        time_dim=16,
        model_dim=64,
        ff_dim=96,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(8, 12, 12),
        in_audio_dim=6,
        out_audio_dim=6,
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
    )
    return model, {
        "hidden_states": noise(1, 3, 16, 16, 9),
        "encoder_hidden_states": noise(1, 15, 24),
        "pooled_projections": noise(1, 20),
        "timestep": torch.tensor([700.0]),
        "audio_hidden_states": noise(1, 37, 6),
        "encoder_attention_mask": mask,
    }


def kandinsky6_sr() -> Built:
    """Super-resolution by attention that its authors made sparse: blocks of 8 x 8, through flex attention."""
    from diffusers import Kandinsky6SRTransformer3DModel

    noise = Noise()
    model = built(
        Kandinsky6SRTransformer3DModel,
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=16,
        model_dim=64,
        ff_dim=96,
        num_visual_blocks=2,
        axes_dims=(8, 12, 12),
    )
    return model, {"hidden_states": noise(1, 2, 16, 16, 9), "timestep": torch.tensor([700.0])}


CASES = (
    Case(
        "Kandinsky 5",
        kandinsky5,
        whole={
            Row("text-self", "text:15", 15, "none", "", "text_only"): 1,
            Row("self", "video:192", 192, "none", "3x8x8", SPARSE): 2,
            Row("cross", "video:192", 15, "none", "3x8x8", CROSS): 2,
        },
        regional=Regional(
            2,
            {
                Row("self", "video:15", 15, "none", "", "too_short"): 1,
                Row("self", "video:192", 192, "none", "", SPARSE): 1,
                Row("cross", "video:192", 15, "none", "", CROSS): 1,
            },
        ),
    ),
    Case(
        "Kandinsky 6",
        kandinsky6,
        whole={
            Row("text-self", "text:15", 15, "key_padding", "", "text_only"): 2,
            Row("self", "video:192", 192, "none", "3x8x8", SPARSE): 2,
            Row("cross", "video:192", 15, "key_padding", "3x8x8", CROSS): 2,
            Row("audio-self", "audio:37", 37, "none", "", "audio_only"): 2,
            Row("audio-cross", "audio:37", 15, "key_padding", "", CROSS): 2,
            Row("cross", "video:192", 37, "none", "3x8x8", CROSS): 2,
            Row("audio-cross", "audio:37", 192, "none", "", CROSS): 2,
        },
        regional=Regional(
            2,
            {
                Row("self", "video:15", 15, "key_padding", "", "too_short"): 1,
                Row("self", "video:192", 192, "none", "", SPARSE): 1,
                Row("cross", "video:192", 15, "key_padding", "", CROSS): 1,
                Row("audio-self", "audio:37", 37, "none", "", "audio_only"): 1,
                Row("audio-cross", "audio:37", 15, "key_padding", "", CROSS): 1,
                Row("cross", "video:192", 37, "none", "", CROSS): 1,
                Row("audio-cross", "audio:37", 192, "none", "", CROSS): 1,
            },
        ),
    ),
    Case(
        "Kandinsky 6 SR",
        kandinsky6_sr,
        whole={},
        regional=Regional(
            1,
            {},
        ),
        dense_only="its attention is block-sparse already, through flex attention",
    ),
)
