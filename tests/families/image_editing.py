"""Models that make and edit images: Qwen-Image, JoyImage-Edit, FLUX.2 and FLUX.3; references are image tokens too."""

from __future__ import annotations

from typing import Any

import torch
from families.building import Noise, built, grid_ids, padding
from families.case import SPARSE, Built, Case, Regional, Row

QWEN: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (8, 12, 12),
}
JOY: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "text_dim": 24,
    "mlp_width_ratio": 2.0,
    "num_layers": 1,
    "rope_dim_list": [8, 12, 12],
}
FLUX: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (8, 8, 8, 8),
}


def qwen_image() -> Built:
    """Text in front, with a mask of its padding."""
    from diffusers import QwenImageTransformer2DModel

    noise = Noise()
    return built(QwenImageTransformer2DModel, **QWEN), {
        "hidden_states": noise(2, 120, 16),
        "encoder_hidden_states": noise(2, 15, 24),
        "encoder_hidden_states_mask": padding(2, 15, 10).long(),
        "timestep": torch.tensor([0.7, 0.7]),
        "img_shapes": [[(1, 10, 12)]] * 2,
    }


def qwen_image_edit() -> Built:
    """The reference image is packed behind the new one, and has a time of its own."""
    from diffusers import QwenImageTransformer2DModel

    noise = Noise()
    return built(QwenImageTransformer2DModel, **{**QWEN, "num_layers": 1}, zero_cond_t=True), {
        "hidden_states": noise(1, 200, 16),
        "encoder_hidden_states": noise(1, 15, 24),
        "timestep": torch.tensor([0.7]),
        "img_shapes": [[(1, 10, 12), (1, 8, 10)]],
    }


def qwen_image21() -> Built:
    """Text attends causally; the image attends to text and itself, in an attention of its own."""
    from diffusers import QwenImage21Transformer2DModel

    noise = Noise()
    slots = torch.zeros(1, 15 + 120 // 4, dtype=torch.bool)
    slots[:, 15:] = True
    model = built(
        QwenImage21Transformer2DModel,
        patch_size=1,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        context_in_dim=24,
        axes_dims_rope=(8, 12, 12),
    )
    return model, {
        "hidden_states": noise(1, 120, 16),
        "encoder_hidden_states": noise(1, 15, 24),
        "timestep": torch.tensor([0.7]),
        "img_shapes": [[(1, 10, 12)]],
        "img_mask": slots,
    }


def joyimage_edit() -> Built:
    """Several images in one sixth axis, the new one moved in front of its references."""
    from diffusers import JoyImageEditTransformer3DModel

    noise = Noise()
    return built(JoyImageEditTransformer3DModel, **JOY), {
        "hidden_states": noise(1, 2, 4, 1, 16, 16),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 14, 24),
    }


def joyimage_edit_plus() -> Built:
    """Patches of images of different sizes, padded to one length."""
    from diffusers import JoyImageEditPlusTransformer3DModel

    noise = Noise()
    return built(JoyImageEditPlusTransformer3DModel, **JOY), {
        "hidden_states": noise(2, 130, 4, 1, 2, 2),
        "timestep": torch.tensor([700, 700]),
        "encoder_hidden_states": noise(2, 14, 24),
        "encoder_hidden_states_mask": padding(2, 14, 9),
        "shape_list": [[(1, 8, 8), (1, 8, 8)], [(1, 8, 8), (1, 6, 8)]],
    }


def flux2() -> Built:
    """Text in front; the single blocks get both streams joined."""
    from diffusers import Flux2Transformer2DModel

    noise = Noise()
    return built(Flux2Transformer2DModel, **FLUX, patch_size=1, timestep_guidance_channels=16), {
        "hidden_states": noise(1, 120, 8),
        "encoder_hidden_states": noise(1, 15, 24),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]),
        "img_ids": grid_ids(10, 12, axes=4),
        "txt_ids": torch.zeros(15, 4),
    }


def flux3() -> Built:
    """Text, image and references first attend each to itself, then together."""
    from diffusers import Flux3Transformer2DModel

    noise = Noise()
    return built(Flux3Transformer2DModel, **FLUX, cond_in_channels=8, timestep_channels=16), {
        "hidden_states": noise(1, 120, 8),
        "encoder_hidden_states": noise(1, 15, 24),
        "timestep": torch.tensor([0.7]),
        "img_ids": grid_ids(10, 12, axes=4),
        "txt_ids": torch.zeros(15, 4),
        "image_cond_hidden_states": noise(1, 80, 8),
        "image_cond_ids": grid_ids(8, 10, axes=4, offset=1.0),
    }


CASES = (
    Case(
        "Qwen-Image",
        qwen_image,
        whole={
            Row("joint", "text:15+video:120", 135, "key_padding", "", SPARSE): 2,
        },
        regional=Regional(
            1,
            {
                Row("joint", "text:15+video:120", 135, "key_padding", "", SPARSE): 1,
            },
        ),
    ),
    Case(
        "Qwen-Image-Edit",
        qwen_image_edit,
        whole={
            Row("joint", "text:15+video:200", 215, "none", "", SPARSE): 1,
        },
        regional=Regional(
            1,
            {
                Row("joint", "text:15+video:200", 215, "none", "", SPARSE): 1,
            },
        ),
        note="References are video tokens too.",
    ),
    Case(
        "Qwen-Image 2.1",
        qwen_image21,
        whole={
            Row("self", "video:15", 15, "general", "", "too_short"): 2,
            Row("self+extra", "video:120", 135, "none", "", SPARSE): 2,
        },
        graphs=9,
        regional=Regional(
            1,
            {
                Row("self", "video:15", 15, "general", "", "too_short"): 1,
                Row("self+extra", "video:120", 135, "none", "", SPARSE): 1,
            },
        ),
        note="The image attends to the prompt and itself; the prompt is kept whole.",
    ),
    Case(
        "JoyImage-Edit",
        joyimage_edit,
        whole={
            Row("joint", "video:64+video:64+text:14", 142, "none", "1x8x8", SPARSE): 1,
        },
        regional=Regional(
            1,
            {
                Row("joint", "video:128+text:14", 142, "none", "", SPARSE): 1,
            },
        ),
        note="References are video tokens too.",
    ),
    Case(
        "JoyImage-Edit Plus",
        joyimage_edit_plus,
        whole={
            Row("joint", "video:130+text:14", 144, "key_padding", "", SPARSE): 1,
        },
        regional=Regional(
            1,
            {
                Row("joint", "video:130+text:14", 144, "key_padding", "", SPARSE): 1,
            },
        ),
        note="References are video tokens too.",
    ),
    Case(
        "FLUX.2",
        flux2,
        whole={
            Row("joint", "text:15+video:120", 135, "none", "", SPARSE): 2,
        },
        regional=Regional(
            2,
            {
                Row("joint", "text:15+video:120", 135, "none", "", SPARSE): 1,
                Row("self", "video:135", 135, "none", "", SPARSE): 1,
            },
        ),
        note="Block by block, single blocks get both streams joined: text_tokens splits them.",
    ),
    Case(
        "FLUX.3",
        flux3,
        whole={
            Row("text-self", "text:15", 15, "none", "", "text_only"): 1,
            Row("self", "video:120", 120, "none", "", SPARSE): 1,
            Row("self", "video:80", 80, "none", "", SPARSE): 1,
            Row("joint", "text:15+video:120+video:80", 215, "none", "", SPARSE): 1,
        },
        regional=Regional(
            3,
            {
                Row("self", "video:15", 15, "none", "", "too_short"): 1,
                Row("self", "video:120", 120, "none", "", SPARSE): 1,
                Row("joint", "text:15+video:200", 215, "none", "", SPARSE): 1,
            },
        ),
        note="References are video tokens too.",
    ),
)
