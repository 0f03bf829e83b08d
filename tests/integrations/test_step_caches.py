"""Step caches of diffusers: what they skip moves nothing, and what they hide stays dense with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from tiny_pipelines import OPTIONS, cog_pipeline, run, run_cog, wan_pipeline
from torch import Tensor

import sparse_compile

STEPS = 6


def first_block(pipe: Any) -> Any:
    return FirstBlockCacheConfig(threshold=2.0)


def pyramid(pipe: Any) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: pipe._current_timestep,
    )


def magnitudes(pipe: Any) -> Any:
    return MagCacheConfig(
        threshold=10.0, max_skip_steps=1, num_inference_steps=STEPS, mag_ratios=torch.full((STEPS,), 0.9)
    )


def faster(pipe: Any) -> Any:
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks",),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: pipe._current_timestep,
        tensor_format="BFCHW",
    )


def generate(pipe: Any) -> Tensor:
    return run_cog(pipe, STEPS) if "Cog" in type(pipe).__name__ else run(pipe, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("config", [first_block, pyramid, magnitudes, faster])
def test_a_step_cache_around_a_compiled_model_gives_what_it_gives_eagerly(config: Callable[[Any], Any]) -> None:
    make = cog_pipeline if config is faster else wan_pipeline
    cached, pipe = make(), make()
    for one in (cached, pipe):
        one.transformer.enable_cache(config(one))
    want, dense = generate(cached), generate(make())
    assert (want - dense).abs().max() > 1e-3, "the cache skips something"
    pipe.transformer.compile(backend="sparse_attn", options={**OPTIONS, "top_p": 1.0})
    sparse_compile.attach(pipe)
    got = generate(pipe)
    scale = want.abs().max()
    torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=2e-4)
    assert torch.equal(generate(pipe), got)
    sites = sparse_compile.explain(pipe).sites
    assert all(site.decision == "sparse" or site.reason for site in sites)
    assert any(site.decision == "sparse" for site in sites) is (config is not magnitudes)
