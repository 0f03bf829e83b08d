"""Image models that refine image and text apart and then join them: Lumina-Image 2.0, Z-Image; and Lumina-Next."""

from __future__ import annotations

from typing import Any

import torch
from families.building import Noise, built, padding
from families.case import CROSS, SPARSE, Built, Case, Regional, Row


def lumina2() -> Built:
    """Each sample's text is cut to its length and written in front of its image, behind a graph break."""
    from diffusers import Lumina2Transformer2DModel

    noise = Noise()
    model = built(
        Lumina2Transformer2DModel,
        sample_size=16,
        in_channels=4,
        hidden_size=64,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(50, 32, 32),
        cap_feat_dim=24,
    )
    return model, {
        "hidden_states": noise(2, 4, 16, 20),
        "timestep": torch.tensor([0.7, 0.7]),
        "encoder_hidden_states": noise(2, 15, 24),
        "encoder_attention_mask": padding(2, 15, 10).bool(),
    }


def lumina_next() -> Built:
    """Self- and cross-attention side by side; masks of keys are expanded to heads and queries."""
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    noise = Noise()
    model: Any = built(
        LuminaNextDiT2DModel,
        sample_size=16,
        in_channels=4,
        hidden_size=64,
        num_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=24,
    )
    model.pad_token.zero_()  # its class leaves it as memory was
    return model, {
        "hidden_states": noise(2, 4, 16, 20),
        "timestep": torch.tensor([0.7, 0.7]),
        "encoder_hidden_states": noise(2, 15, 24),
        "encoder_mask": padding(2, 15, 10),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 32, 32),
        "cross_attention_kwargs": {},
    }


def z_image() -> Built:
    """One class of block for image, text and both: block by block they look alike."""
    from diffusers import ZImageTransformer2DModel

    noise = Noise()
    model: Any = built(
        ZImageTransformer2DModel,
        in_channels=4,
        dim=64,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[8, 12, 12],
        axes_lens=[256, 32, 32],
    )
    model.rope_embedder(torch.zeros(1, 3, dtype=torch.int32))  # made at the first call, which would break the graph
    return model, {"x": [noise(4, 1, 16, 20)], "t": torch.tensor([0.7]), "cap_feats": [noise(15, 24)]}


CASES = (
    Case(
        "Lumina-Image 2.0",
        lumina2,
        whole={
            Row("text-self", "text:15", 15, "key_padding", "", "text_only"): 1,
            Row("unknown-self", "unknown:80", 80, "none", "", "unknown_tokens"): 1,
            Row("mixed-self", "mixed:95", 95, "key_padding", "", "unknown_tokens"): 1,
        },
        graphs=4,
        dense_only="streams are joined behind a graph break: text_tokens tells the border",
    ),
    Case(
        "Lumina-Next",
        lumina_next,
        whole={
            Row("self", "video:80", 80, "key_padding", "8x10", SPARSE): 1,
            Row("cross", "video:80", 15, "key_padding", "8x10", CROSS): 1,
        },
    ),
    Case(
        "Z-Image",
        z_image,
        whole={
            Row("joint", "video:80+learned:16", 96, "none", "8x10", SPARSE): 1,
            Row("text-self", "text:15+learned:17", 32, "none", "", "text_only"): 1,
            Row("joint", "video:80+learned:16+text:15+learned:17", 128, "none", "8x10", SPARSE): 1,
        },
        regional=Regional(
            3,
            {
                Row("self", "video:96", 96, "none", "", SPARSE): 1,
                Row("self", "video:32", 32, "none", "", "too_short"): 1,
                Row("self", "video:128", 128, "none", "", SPARSE): 1,
            },
        ),
        video=("x",),
        note="Block by block, both streams come joined: text_tokens splits them.",
    ),
)
