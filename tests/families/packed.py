"""Models that pack text, video and sound into one sequence by index, so that a graph cannot tell what lies where."""

from __future__ import annotations

import torch
from families.building import Noise, built, grid_ids
from families.case import SPARSE, Built, Case, Regional, Row


def minimax_h3() -> Built:
    """Rows of video, sound and text, copied by index into one sequence; text is refined before."""
    from diffusers import MiniMaxH3Transformer3DModel

    noise = Noise()
    text, video, audio = 13, 192, 21
    model = built(
        MiniMaxH3Transformer3DModel,
        num_attention_heads=2,
        attention_head_dim=32,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=64,
        in_channels=4,
        audio_in_channels=6,
        text_dim=24,
        freq_dim=32,
        time_embed_hidden_dim=32,
        time_embed_dim=24,
        rope_freq_dim=4,
    )
    tags = torch.tensor([1] * text + [0] * video + [2] * audio)
    rows = torch.arange(text + video + audio)
    positions = [torch.arange(float(n))[:, None].expand(-1, 3) for n in (text, audio)]
    return model, {
        "hidden_states": noise(1, video, 16),
        "audio_hidden_states": noise(1, audio, 6),
        "encoder_hidden_states": noise(1, text, 24),
        "timestep": torch.tensor([0.7, 0.0]),
        "timestep_indices": (tags == 1).long(),
        "token_tags": tags,
        "position_ids": torch.cat([positions[0], grid_ids(3, 8, 8, axes=3), positions[1]]),
        "video_indices": rows[text : text + video],
        "audio_indices": rows[text + video :],
        "text_indices": rows[:text],
    }


def cosmos3() -> Built:
    """Text attends causally to itself; video attends to text and itself, with fewer key heads than query heads."""
    from diffusers import Cosmos3OmniTransformer

    noise = Noise()
    text, video = 13, 192
    model = built(
        Cosmos3OmniTransformer,
        head_dim=32,
        hidden_size=64,
        intermediate_size=96,
        latent_channel=4,
        latent_patch_size=2,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        patch_latent_dim=16,
        vocab_size=50,
        rope_axes_dim=[8, 4, 4],
    )
    rows = torch.arange(text + video)
    positions = torch.cat([torch.arange(float(text))[:, None].expand(-1, 3), grid_ids(3, 8, 8, axes=3)])
    return model, {
        "input_ids": torch.arange(text),
        "text_indexes": rows[:text],
        "position_ids": positions.long().T.contiguous(),
        "und_len": text,
        "sequence_length": text + video,
        "vision_tokens": [noise(1, 4, 3, 16, 16)],
        "vision_token_shapes": [(3, 8, 8)],
        "vision_sequence_indexes": rows[text:],
        "vision_mse_loss_indexes": rows[text:],
        "vision_timesteps": torch.full((video,), 700.0),
        "vision_noisy_frame_indexes": [torch.arange(3)],
    }


def omnigen() -> Built:
    """An image model: prompt, time and image in one sequence, with a mask that is causal in the prompt."""
    from diffusers import OmniGenTransformer2DModel

    noise = Noise()
    before = 14
    tokens = before + 80
    mask = torch.ones(tokens, tokens).tril()
    mask[before:] = 1
    model = built(
        OmniGenTransformer2DModel,
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        num_layers=1,
        pad_token_id=0,
        vocab_size=50,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        pos_embed_max_size=16,
        time_step_dim=16,
    )
    return model, {
        "hidden_states": noise(1, 4, 16, 20),
        "timestep": torch.tensor([0.7]),
        "input_ids": torch.arange(1, before)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask[None],
        "position_ids": torch.arange(tokens)[None],
    }


def ideogram4() -> Built:
    """An image model: text and image share one padded sequence, with a mask of segments."""
    from diffusers import Ideogram4Transformer2DModel

    noise = Noise()
    text, image = 15, 120
    tokens = text + image
    model = built(
        Ideogram4Transformer2DModel,
        in_channels=8,
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        intermediate_size=64,
        adaln_dim=16,
        llm_features_dim=24,
        mrope_section=(8, 4, 4),
    )
    return model, {
        "hidden_states": noise(1, tokens, 8),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": noise(1, tokens, 24),
        "position_ids": torch.cat([torch.zeros(text, 3), grid_ids(10, 12, axes=3)])[None].long(),
        "segment_ids": torch.ones(1, tokens).long(),
        "indicator": torch.cat([torch.zeros(1, text), torch.ones(1, image)], 1).long(),
    }


CASES = (
    Case(
        "MiniMax-H3",
        minimax_h3,
        whole={
            Row("text-self", "text:13", 13, "none", "", "text_only"): 1,
            Row("mixed-self", "mixed:226", 226, "none", "", "token_order_unknown"): 2,
        },
        regional=Regional(
            2,
            {
                Row("self", "video:13", 13, "none", "", "too_short"): 1,
                Row("self", "video:226", 226, "none", "", SPARSE): 1,
            },
        ),
        dense_only="rows of text, video and sound are packed by index",
        note="Block by block, the streams come joined: text_tokens splits them.",
    ),
    Case(
        "Cosmos 3",
        cosmos3,
        whole={
            Row("mixed-self", "mixed:13", 13, "none", "", "token_order_unknown"): 2,
            Row("self+extra", "mixed:192", 205, "none", "", "token_order_unknown"): 2,
        },
        regional=Regional(
            1,
            {
                Row("text-self", "text:13", 13, "none", "", "text_only"): 1,
                Row("self+extra", "video:192", 205, "none", "", SPARSE): 1,
            },
        ),
        video=("vision_tokens",),
        dense_only="rows of text and video are packed by index",
        quick=True,
        note="Video attends to text and itself; text is kept whole.",
    ),
    Case(
        "OmniGen",
        omnigen,
        whole={
            Row("self", "video:94", 94, "general", "", "mask"): 1,
        },
        graphs=4,
        dense_only="the mask is causal in the prompt",
    ),
    Case(
        "Ideogram 4",
        ideogram4,
        whole={
            Row("self", "video:135", 135, "general", "", "mask"): 1,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:135", 135, "general", "", "mask"): 1,
            },
        ),
        dense_only="the mask is one of segments",
    ),
)
