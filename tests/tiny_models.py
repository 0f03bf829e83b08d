"""Tiny diffusers transformers with random weights; what their graphs hold is in tiny_model_tables.py.

Text, image and video lengths differ in every model, so that a wrong split shows. Head sizes are small; use a
``min_tokens`` of at most 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lively_weights import lively

Built = tuple[torch.nn.Module, dict[str, Any]]
"""A model and the keyword arguments of one call."""

BUILDERS: dict[str, Callable[[], Built]] = {}
FULLGRAPH = frozenset({"mochi"})
"""Models that Dynamo breaks apart unless it must not."""


def builder(function: Callable[[], Built]) -> Callable[[], Built]:
    BUILDERS[function.__name__] = function
    return function


class Noise:
    """Random tensors of one seeded generator."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)


def built(model_class: type[torch.nn.Module], **config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return lively(model_class(**config).eval().requires_grad_(False))


def rotary_table(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10000 ** -(torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(tokens), frequencies).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


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
COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 18,
}


@builder
def wan_t2v() -> Built:
    """Video self-attention on a grid of (5, 8, 12), and cross-attention to 20 text tokens."""
    from diffusers import WanTransformer3DModel

    noise = Noise()
    return built(WanTransformer3DModel, **WAN), {
        "hidden_states": noise(1, 8, 5, 16, 24),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 20, 24),
    }


@builder
def wan_ti2v_per_token_time() -> Built:
    """Wan 2.2 5B: a timestep for every video token."""
    model, kwargs = wan_t2v()
    timestep = torch.full((1, 480), 700.0)
    timestep[:, :96] = 0.0
    return model, {**kwargs, "timestep": timestep}


@builder
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


@builder
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


@builder
def hunyuan_video() -> Built:
    """Joint attention, video first, with a key-padding mask; the text refiner attends among text."""
    from diffusers import HunyuanVideoTransformer3DModel

    noise = Noise()
    mask = torch.ones(1, 14)
    mask[:, 9:] = 0
    model = built(
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=24,
        pooled_projection_dim=20,
        rope_axes_dim=(8, 12, 12),
    )
    return model, {
        "hidden_states": noise(1, 4, 5, 16, 16),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 14, 24),
        "encoder_attention_mask": mask,
        "pooled_projections": noise(1, 20),
        "guidance": torch.tensor([6000.0]),
    }


@builder
def cogvideox() -> Built:
    """Joint attention, text first, positions added to the tokens, both guidance branches in one batch."""
    from diffusers import CogVideoXTransformer3DModel

    noise = Noise()
    return built(CogVideoXTransformer3DModel, **COGVIDEOX), {
        "hidden_states": noise(2, 3, 4, 16, 16),
        "encoder_hidden_states": noise(2, 18, 24),
        "timestep": torch.tensor([700, 700]),
    }


@builder
def cogvideox_rope() -> Built:
    """CogVideoX 5B: rotary positions on the video part only."""
    from diffusers import CogVideoXTransformer3DModel

    noise = Noise()
    model = built(CogVideoXTransformer3DModel, **COGVIDEOX, use_rotary_positional_embeddings=True)
    return model, {
        "hidden_states": noise(2, 3, 4, 16, 16),
        "encoder_hidden_states": noise(2, 18, 24),
        "timestep": torch.tensor([700, 700]),
        "image_rotary_emb": rotary_table(3 * 8 * 8, 32),
    }


@builder
def ltx() -> Built:
    """Tokens arrive packed, so the graph has no grid; the cross-attention has a floating-point mask."""
    from diffusers import LTXVideoTransformer3DModel

    noise = Noise()
    mask = torch.ones(2, 22)
    mask[:, 15:] = 0
    model = built(
        LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        num_layers=2,
        caption_channels=24,
    )
    return model, {
        "hidden_states": noise(2, 4 * 8 * 6, 8),
        "encoder_hidden_states": noise(2, 22, 24),
        "timestep": torch.tensor([700, 700]),
        "encoder_attention_mask": mask,
        "num_frames": 4,
        "height": 8,
        "width": 6,
    }


@builder
def mochi() -> Built:
    """Joint attention over the valid text tokens, gathered in every layer: their number depends on data."""
    from diffusers import MochiTransformer3DModel

    noise = Noise()
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[:, 11:] = False
    model = built(
        MochiTransformer3DModel,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=24,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=12,
        max_sequence_length=16,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 16, 16),
        "encoder_hidden_states": noise(1, 16, 24),
        "timestep": torch.tensor([700]),
        "encoder_attention_mask": mask,
    }


@builder
def cosmos() -> Built:
    """Self- and cross-attention, learned positions; the padding mask, off here, would need torchvision."""
    from diffusers import CosmosTransformer3DModel

    noise = Noise()
    model = built(
        CosmosTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=24,
        adaln_lora_dim=8,
        max_size=(8, 32, 32),
        concat_padding_mask=False,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 16, 16),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": noise(1, 13, 24),
        "fps": 24,
    }


@builder
def allegro() -> Built:
    """The oldest attention processor, a floating-point mask per key, a head size that is no power of two."""
    from diffusers import AllegroTransformer3DModel

    noise = Noise()
    model = built(
        AllegroTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_width=8,
        sample_height=8,
        sample_frames=3,
        caption_channels=20,
    )
    return model, {
        "hidden_states": noise(1, 4, 3, 16, 16),
        "encoder_hidden_states": noise(1, 17, 20),
        "timestep": torch.tensor([700]),
        "attention_mask": torch.ones(1, 3, 16, 16),
        "encoder_attention_mask": torch.ones(1, 17),
    }


@builder
def latte() -> Built:
    """Spatial and temporal attention: frames, or space, lie in the batch."""
    from diffusers import LatteTransformer3DModel

    noise = Noise()
    model = built(
        LatteTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=20,
        video_length=5,
    )
    return model, {
        "hidden_states": noise(1, 4, 5, 16, 16),
        "encoder_hidden_states": noise(1, 11, 20),
        "timestep": torch.tensor([700]),
    }


@builder
def flux() -> Built:
    """An image model: joint attention, text first, packed tokens."""
    from diffusers import FluxTransformer2DModel

    noise = Noise()
    model = built(
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(8, 12, 12),
    )
    return model, {
        "hidden_states": noise(1, 120, 8),
        "encoder_hidden_states": noise(1, 15, 24),
        "pooled_projections": noise(1, 20),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(10.0), torch.arange(12.0)),
        "txt_ids": torch.zeros(15, 3),
    }


@builder
def sd3() -> Built:
    """An image model: joint attention, image first; one block attends among the image tokens as well."""
    from diffusers import SD3Transformer2DModel

    noise = Noise()
    model = built(
        SD3Transformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model, {
        "hidden_states": noise(2, 4, 16, 20),
        "encoder_hidden_states": noise(2, 23, 24),
        "pooled_projections": noise(2, 20),
        "timestep": torch.tensor([700, 700]),
    }
