"""Models that generate a video piece by piece, with what was generated as history or in a cache."""

from __future__ import annotations

import torch
from families.building import Noise, built
from families.case import CROSS, SPARSE, Built, Case, Regional, Row
from families.wan import WAN


def helios() -> Built:
    """History at three resolutions in front of the video; text is read by the video alone."""
    from diffusers import HeliosTransformer3DModel

    noise = Noise()
    config = {name: value for name, value in WAN.items() if name != "rope_max_seq_len"}
    model = built(HeliosTransformer3DModel, **config, rope_dim=(12, 10, 10), is_amplify_history=True)
    return model, {
        "hidden_states": noise(1, 8, 3, 16, 16),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": noise(1, 20, 24),
        "indices_hidden_states": torch.arange(19, 22).unsqueeze(0),
        "indices_latents_history_short": torch.tensor([[17, 18]]),
        "indices_latents_history_mid": torch.tensor([[15, 16]]),
        "indices_latents_history_long": torch.arange(11, 15).unsqueeze(0),
        "latents_history_short": noise(1, 8, 2, 16, 16),
        "latents_history_mid": noise(1, 8, 2, 16, 16),
        "latents_history_long": noise(1, 8, 4, 16, 16),
    }


def anyflow_far() -> Built:
    """A cache of keys in front of the video, and causal chunks: through flex attention, without any other."""
    from diffusers import AnyFlowFARTransformer3DModel

    noise = Noise()
    model = built(AnyFlowFARTransformer3DModel, **WAN, full_chunk_limit=2, chunk_partition=(1, 2))
    caches = [
        {"compressed_cache": noise(2, 1, 2, 16, 32), "full_cache": noise(2, 1, 2, 192, 32)}
        for _ in range(WAN["num_layers"])
    ]
    return model, {
        "hidden_states": noise(1, 2, 8, 16, 16),
        "timestep": torch.full((1, 2), 700.0),
        "r_timestep": torch.full((1, 2), 500.0),
        "encoder_hidden_states": noise(1, 20, 24),
        "chunk_partition": [1, 2],
        "kv_cache": caches,
        "kv_cache_flag": {"is_cache_step": False, "num_cached_chunks": 1},
    }


CASES = (
    Case(
        "Helios",
        helios,
        whole={
            Row("self", "control:4+control:16+control:128+video:192", 340, "none", "3x8x8", SPARSE): 2,
            Row("cross", "video:192", 20, "none", "3x8x8", CROSS): 2,
        },
        regional=Regional(
            1,
            {
                Row("self", "video:340", 340, "none", "", SPARSE): 1,
                Row("cross", "video:192", 20, "none", "", CROSS): 1,
            },
        ),
        quick=True,
    ),
    Case(
        "AnyFlow FAR",
        anyflow_far,
        whole={
            Row("cross", "video:128", 20, "none", "2x8x8", CROSS): 2,
        },
        regional=Regional(
            1,
            {
                Row("cross", "video:128", 20, "none", "", CROSS): 1,
            },
        ),
        dense_only="its self-attention is flex attention with a cache, which is not looked for",
    ),
)
