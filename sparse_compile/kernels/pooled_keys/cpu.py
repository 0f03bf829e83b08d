"""What stands for each key group, for CPU tensors: the C++ kernel `cpu.cpp` (docs/correction.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.cpp.build import library
from sparse_compile.kernels.cpp.operands import dense_rows
from sparse_compile.kernels.pooled_keys import reference
from sparse_compile.kernels.token_blocks.spans import inside


def pooled_keys(
    k: Tensor, v: Tensor, k_order: Tensor | None, k_offsets: Tensor, k_video: list[int], coupled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean key, mean value and size of each group, and their coupling; see `reference.pooled_keys`.

    Source: SVG-EAR (arXiv 2603.08982), PISA (arXiv 2602.01077), docs/correction.md.
    Shapes: k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; any strides; k_order int32 [B, Hkv, Sk] or None; k_offsets int32
        [B, Hkv, Gk + 1]; k_video [start, stop, …].
    Dtypes: float32, float16 or bfloat16. Means are summed in float64; the coupling in float32 over a thousand tokens,
        and these sums in float64. float64 is for tests, and goes through the reference.
    Returns: float32 mean_k [B, Hkv, Gk, D], mean_v [B, Hkv, Gk, Dv], log_size [B, Hkv, Gk], and coupling
        [B, Hkv, D, Dv] or [B, Hkv, 0, 0].

    Raises:
        RuntimeError: the bounds or the order of the groups leave the tensors.

    No result depends on the number of threads, and a batch gives what its items give.
    """
    if k.dtype is torch.float64:
        return reference.pooled_keys(k, v, k_order, k_offsets, k_video, coupled)
    batches, heads, tokens, size = k.shape
    groups, value_size = k_offsets.shape[2] - 1, v.shape[3]
    counts = k_offsets.diff()
    counts[..., -1] = 0
    mean_k, mean_v = (torch.zeros((batches, heads, groups, width), dtype=torch.float32) for width in (size, value_size))
    coupling = torch.empty((batches, heads, *((size, value_size) if coupled else (0, 0))), dtype=torch.float32)
    library().pooled_keys(
        dense_rows(k),
        dense_rows(v),
        None if k_order is None else k_order.contiguous(),
        k_offsets.contiguous(),
        inside(k_video, tokens, k.device),
        mean_k,
        mean_v,
        coupling,
    )
    return mean_k, mean_v, counts.to(torch.float32).log(), coupling
