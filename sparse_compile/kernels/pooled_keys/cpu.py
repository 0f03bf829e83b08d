"""What stands for each key group, for CPU tensors: the reference's arithmetic with less memory traffic.

Keys and values pass through the cache in pieces, twice if coupled. Host reads are free here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.block_sparse_attention.reference import group_of_token
from sparse_compile.kernels.pooled_keys.reference import deviations
from sparse_compile.kernels.token_blocks.spans import inside
from sparse_compile.plan import Groups

TOKENS_AT_ONCE = 1024


def pooled_keys(
    k: Tensor, v: Tensor, k_order: Tensor | None, k_offsets: Tensor, k_video: list[int], coupled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean key, mean value and size of each group, and their coupling; see `reference.pooled_keys`.

    Shapes: k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; any strides; k_order int32 [B, Hkv, Sk] or None; k_offsets int32
        [B, Hkv, Gk + 1]; k_video [start, stop, …].
    Returns: float32 mean_k [B, Hkv, Gk, D], mean_v [B, Hkv, Gk, Dv], log_size [B, Hkv, Gk], and coupling
        [B, Hkv, D, Dv] or [B, Hkv, 0, 0].
    """
    batches, heads, tokens, size = k.shape
    groups, value_size = k_offsets.shape[2] - 1, v.shape[3]
    counts = k_offsets.diff()
    counts[..., -1] = 0
    mean_k = torch.empty((batches, heads, groups, size), dtype=torch.float32)
    mean_v = torch.empty((batches, heads, groups, value_size), dtype=torch.float32)
    coupling = torch.empty((batches, heads, *((size, value_size) if coupled else (0, 0))), dtype=torch.float32)
    visual = inside(k_video, tokens, k.device)
    for batch in range(batches):
        for head in range(heads):
            group = group_of_token(Groups(k_order, k_offsets), batch, head, tokens)
            pieces = list(zip(*(x.split(TOKENS_AT_ONCE) for x in (k[batch, head], v[batch, head], group)), strict=True))
            sums_k = torch.zeros((groups, size), dtype=torch.float64)
            sums_v = torch.zeros((groups, value_size), dtype=torch.float64)
            for part_k, part_v, part_group in pieces:
                sums_k.index_add_(0, part_group, part_k.double())
                sums_v.index_add_(0, part_group, part_v.double())
            count = counts[batch, head].unsqueeze(-1)
            mean_k[batch, head] = torch.where(count > 0, sums_k / count.clamp(min=1), 0)
            mean_v[batch, head] = torch.where(count > 0, sums_v / count.clamp(min=1), 0)
            if coupled:
                counted = visual & (group < groups - 1)
                total = torch.zeros((size, value_size), dtype=torch.float64)
                for (part_k, part_v, part_group), part in zip(pieces, counted.split(TOKENS_AT_ONCE), strict=True):
                    deviation_k = deviations(part_k, mean_k[batch, head], part_group, part)
                    deviation_v = deviations(part_v, mean_v[batch, head], part_group, part)
                    total += deviation_k.t() @ deviation_v
                coupling[batch, head] = total / max(1, int(counted.sum()))
    return mean_k, mean_v, counts.to(torch.float32).log(), coupling
