"""What people do to a tiny Wan besides making its attention sparse, and what is to come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor, nn


@dataclass(frozen=True)
class Composition:
    """One thing done to a pipeline, before or after it is enabled."""

    title: str
    """Its row in docs/composition.md."""
    apply: Callable[[WanPipeline], None]
    reason: str | None = None
    """Why self-attention stays dense; None: it becomes sparse."""
    found: bool = True
    """Whether there is attention to be found."""
    either_order: bool = False
    """Whether it is tried after `enable` too."""
    quick: bool = False


def add_lora(pipe: WanPipeline, name: str = "first", seed: int = 1) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets)
    pipe.transformer.add_adapter(config, adapter_name=name)
    pipe.transformer.requires_grad_(False)


def fuse_lora(pipe: WanPipeline) -> None:
    add_lora(pipe)
    pipe.transformer.fuse_lora()


def unfuse_lora(pipe: WanPipeline) -> None:
    fuse_lora(pipe)
    pipe.transformer.unfuse_lora()


def quantize(pipe: WanPipeline) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def cast_layerwise(pipe: WanPipeline) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def offload_blocks(pipe: WanPipeline) -> None:
    where = torch.device("cpu")
    pipe.transformer.enable_group_offload(where, offload_type="block_level", num_blocks_per_group=1)


def offload_leaves(pipe: WanPipeline) -> None:
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def offload_sequentially(pipe: WanPipeline) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)


def offload_model(pipe: WanPipeline) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))


def fuse_projections(pipe: WanPipeline) -> None:
    for module in pipe.transformer.modules():
        if hasattr(module, "fuse_projections"):
            module.fuse_projections()


class Processor:
    """Attention without rotary positions."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return attn.to_out[0](self.attend(q, k, v).transpose(1, 2).flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


class HandWritten(Processor):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


COMPOSITIONS = [
    Composition("LoRA loaded", add_lora, either_order=True),
    Composition("LoRA fused", fuse_lora),
    Composition("LoRA unfused", unfuse_lora),
    Composition("torchao int8 weight-only linears", quantize, either_order=True),
    Composition("Layerwise casting", cast_layerwise, reason="unknown_tokens", either_order=True),
    Composition("Group offload, block level", offload_blocks, either_order=True, quick=True),
    Composition("Group offload, leaf level", offload_leaves, reason="no_parameter"),
    Composition("Sequential CPU offload", offload_sequentially, reason="no_parameter"),
    Composition("Model CPU offload", offload_model, either_order=True),
    Composition("Attention back end `native`", lambda pipe: pipe.transformer.set_attention_backend("native")),
    Composition(
        "Attention back end `_native_math`", lambda pipe: pipe.transformer.set_attention_backend("_native_math")
    ),
    Composition("Attention back end `flex`", lambda pipe: pipe.transformer.set_attention_backend("flex"), found=False),
    Composition("A processor that calls SDPA", lambda pipe: pipe.transformer.set_attn_processor(Processor())),
    Composition(
        "A processor that attends by hand", lambda pipe: pipe.transformer.set_attn_processor(HandWritten()), found=False
    ),
    Composition("Fused projections", fuse_projections),
    Composition("Gradient checkpointing", lambda pipe: pipe.transformer.enable_gradient_checkpointing()),
    Composition("channels_last", lambda pipe: pipe.transformer.to(memory_format=torch.channels_last_3d)),
]
