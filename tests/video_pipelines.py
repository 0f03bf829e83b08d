"""diffusers' own pipelines around tiny transformers, and the embeddings to call them with."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from families.building import Noise, built
from families.cogvideox import COGVIDEOX
from families.wan import WAN
from torch import Tensor, nn

FLOW = diffusers.FlowMatchEulerDiscreteScheduler
ONE_LAYER = {**WAN, "num_layers": 1}


def embeds(*shape: int, seed: int = 1) -> Tensor:
    return Noise(seed)(*shape)


def prompts(tokens: int, channels: int, mask: bool = False) -> dict[str, Any]:
    """Embeddings of a prompt and a negative prompt; the prompt's padding is masked."""
    found = {
        "prompt_embeds": embeds(1, tokens, channels),
        "negative_prompt_embeds": embeds(1, tokens, channels, seed=2),
    }
    if mask:
        valid = torch.ones(1, tokens)
        valid[:, tokens - 4 :] = 0
        found |= {"prompt_attention_mask": valid, "negative_prompt_attention_mask": torch.ones(1, tokens)}
    return found


SIZE = {"height": 128, "width": 128, "num_frames": 9}
"""3 x 8 x 8 tokens behind an autoencoder of 4 x 8 x 8 and patches of 1 x 2 x 2."""


def without_encoders(pipeline: type, *names: str, **components: Any) -> Any:
    return pipeline(**dict.fromkeys(("tokenizer", "text_encoder", "vae", *names)), **components)


def wan(pipeline: type = diffusers.WanPipeline, scheduler: Any = None, **components: Any) -> Any:
    model = built(diffusers.WanTransformer3DModel, **ONE_LAYER)
    return without_encoders(pipeline, transformer=model, scheduler=scheduler or FLOW(), **components)


def wan_two() -> Any:
    second = built(diffusers.WanTransformer3DModel, **ONE_LAYER)
    return wan(transformer_2=second, boundary_ratio=0.6)


class StandIn(nn.Module):
    """In the place of a component that a pipeline insists on; without weights."""

    dtype = torch.float32
    device = torch.device("cpu")


class FrameCoder(StandIn):
    """In the place of an autoencoder: frames become latents of the pipeline's size."""

    config = SimpleNamespace(
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        z_dim=4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scaling_factor=1.0,
        latent_channels=4,
        mel_bins=64,
        sample_rate=16000,
        mel_hop_length=160,
    )
    temperal_downsample = (True, True)
    temporal_compression_ratio = 4
    spatial_compression_ratio = 8

    def encode(self, video: Tensor) -> Any:
        frames = (video.shape[2] - 1) // 4 + 1
        small = nn.functional.interpolate(video.mean(1, keepdim=True), (frames, *(n // 8 for n in video.shape[3:])))
        latents = small.repeat(1, 4, 1, 1, 1)
        return SimpleNamespace(
            latents=latents,
            latent_dist=SimpleNamespace(sample=lambda _=None, generator=None: latents, mode=lambda: latents),
        )


def wan_i2v() -> Any:
    model = built(diffusers.WanTransformer3DModel, **{**ONE_LAYER, "in_channels": 12, "out_channels": 4})
    pipe = diffusers.WanImageToVideoPipeline(None, None, None, FLOW(), transformer=model)
    pipe.vae = FrameCoder()
    return pipe


def skyreels(pipeline: type = diffusers.SkyReelsV2Pipeline) -> Any:
    model = built(diffusers.SkyReelsV2Transformer3DModel, **ONE_LAYER)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return without_encoders(pipeline, transformer=model, scheduler=scheduler)


def cogvideox(pipeline: type = diffusers.CogVideoXPipeline) -> Any:
    model = built(diffusers.CogVideoXTransformer3DModel, **{**COGVIDEOX, "num_layers": 1})
    return without_encoders(pipeline, transformer=model, scheduler=diffusers.CogVideoXDDIMScheduler())


HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size_t": 1,
    "text_embed_dim": 24,
    "rope_axes_dim": (8, 12, 12),
}


def hunyuan() -> Any:
    model = built(
        diffusers.HunyuanVideoTransformer3DModel,
        **HUNYUAN,
        patch_size=2,
        num_single_layers=1,
        guidance_embeds=True,
        pooled_projection_dim=20,
    )
    return without_encoders(
        diffusers.HunyuanVideoPipeline, "tokenizer_2", "text_encoder_2", transformer=model, scheduler=FLOW()
    )


def hunyuan_text(negative: bool) -> dict[str, Any]:
    mask = torch.ones(1, 14)
    mask[:, 9:] = 0
    found = {"prompt_embeds": embeds(1, 14, 24), "pooled_prompt_embeds": embeds(1, 20), "prompt_attention_mask": mask}
    if negative:
        found |= {f"negative_{name}": value.flip(-1) for name, value in found.items() if "mask" not in name}
        found |= {"negative_prompt_attention_mask": mask, "true_cfg_scale": 3.0}
    return found


def hunyuan_15(guider: Callable[[], Any]) -> Any:
    model = built(
        diffusers.HunyuanVideo15Transformer3DModel,
        **{**HUNYUAN, "in_channels": 65, "out_channels": 32, "num_layers": 2},
        text_embed_2_dim=20,
        image_embed_dim=12,
        task_type="t2v",
    )
    pipe = diffusers.HunyuanVideo15Pipeline(None, None, model, FrameCoder(), FLOW(), None, None, guider())
    pipe.vae_scale_factor_spatial, pipe.num_channels_latents, pipe.vision_num_semantic_tokens = 16, 32, 5
    return pipe


def hunyuan_15_text() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for prefix, seed in (("", 1), ("negative_", 2)):
        found[f"{prefix}prompt_embeds"] = embeds(1, 14, 24, seed=seed)
        found[f"{prefix}prompt_embeds_mask"] = torch.tensor([[1] * (9 + seed) + [0] * (5 - seed)])
        found[f"{prefix}prompt_embeds_2"] = embeds(1, 6, 20, seed=seed)
        found[f"{prefix}prompt_embeds_mask_2"] = torch.tensor([[1] * 4 + [0] * 2])
    return found


def framepack() -> Any:
    model = built(
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        **HUNYUAN,
        patch_size=2,
        num_single_layers=1,
        pooled_projection_dim=20,
        has_image_proj=True,
        image_proj_dim=12,
        has_clean_x_embedder=True,
    )
    pipe = diffusers.HunyuanVideoFramepackPipeline(None, None, model, FrameCoder(), FLOW(), *[None] * 4)
    pipe.encode_image = lambda image, device=None: embeds(1, 5, 12)
    return pipe


def cosmos(pipeline: type, scheduler: Any, channels: int = 4) -> Any:
    model = built(
        diffusers.CosmosTransformer3DModel,
        in_channels=channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=24,
        adaln_lora_dim=8,
        max_size=(8, 32, 32),
        concat_padding_mask=False,
    )
    return without_encoders(pipeline, transformer=model, scheduler=scheduler, safety_checker=StandIn())


def cosmos_1() -> Any:
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", prediction_type="epsilon"
    )
    return cosmos(diffusers.CosmosTextToWorldPipeline, scheduler)


def kandinsky() -> Any:
    model = built(
        diffusers.Kandinsky5Transformer3DModel,
        in_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=20,
        time_dim=16,
        out_visual_dim=4,
        model_dim=64,
        ff_dim=96,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(8, 12, 12),
    )
    return without_encoders(
        diffusers.Kandinsky5T2VPipeline, "tokenizer_2", "text_encoder_2", transformer=model, scheduler=FLOW()
    )


def kandinsky_text() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for prefix, seed in (("", 1), ("negative_", 2)):
        found[f"{prefix}prompt_embeds_qwen"] = embeds(1, 14, 24, seed=seed)
        found[f"{prefix}prompt_embeds_clip"] = embeds(1, 20, seed=seed)
        found[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, 14], dtype=torch.int32)
    return found


def ltx(pipeline: type = diffusers.LTXPipeline) -> Any:
    model = built(
        diffusers.LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        num_layers=1,
        caption_channels=24,
    )
    return without_encoders(pipeline, transformer=model, scheduler=FLOW())


class Connectors(StandIn):
    """In the place of LTX-2's: text for video and for audio, as it came."""

    def forward(self, text: Tensor, mask: Tensor, padding_side: str) -> tuple[Tensor, Tensor, Tensor]:
        return text, text.flip(-1), mask


def ltx2() -> Any:
    model = built(
        diffusers.LTX2VideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        audio_in_channels=64,
        audio_out_channels=64,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
        num_layers=2,
        caption_channels=24,
        rope_double_precision=False,
        perturbed_attn=True,
    )
    pipe = without_encoders(
        diffusers.LTX2Pipeline,
        "audio_vae",
        "vocoder",
        transformer=model,
        scheduler=FLOW(),
        connectors=Connectors(),
    )
    pipe.vae, pipe.audio_vae = FrameCoder(), FrameCoder()
    for vae, channels in ((pipe.vae, 8), (pipe.audio_vae, 64)):
        vae.latents_mean, vae.latents_std = torch.zeros(channels), torch.ones(channels)
    return pipe


def mochi() -> Any:
    model = built(
        diffusers.MochiTransformer3DModel,
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
    return without_encoders(diffusers.MochiPipeline, transformer=model, scheduler=FLOW())


def allegro() -> Any:
    model = built(
        diffusers.AllegroTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=48,
        sample_width=16,
        sample_height=16,
        sample_frames=3,
        caption_channels=20,
    )
    return without_encoders(
        diffusers.AllegroPipeline, transformer=model, scheduler=diffusers.EulerAncestralDiscreteScheduler()
    )


def stable_diffusion_3() -> Any:
    model = built(
        diffusers.SD3Transformer2DModel,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=32,
    )
    names = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    return without_encoders(diffusers.StableDiffusion3Pipeline, *names, transformer=model, scheduler=FLOW())
