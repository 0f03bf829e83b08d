"""What stands for each key group, for CUDA tensors: three launches and a few on arrays of positions."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.launching import Device, device_of, lanes, launch
from sparse_compile.kernels.permutation.group_of_position import group_at_position
from sparse_compile.kernels.pooled_keys import triton_kernels
from sparse_compile.kernels.pooled_keys.configs import (
    MOST_CHUNKS,
    PROGRAMS_PER_MULTIPROCESSOR,
    CouplingConfig,
    MeansConfig,
    coupling_candidates,
    means_candidates,
)
from sparse_compile.kernels.token_blocks.spans import inside

"""The least that ``tl.dot`` takes along a dimension."""
ELEMENTS_AT_ONCE = 1024


def pooled_keys(
    k: Tensor,
    v: Tensor,
    k_order: Tensor | None,
    k_offsets: Tensor,
    k_video: list[int],
    coupled: bool,
    *,
    means_config: MeansConfig | None = None,
    coupling_config: CouplingConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean key, mean value and size of each group, and their coupling; see `reference.pooled_keys`.

    Source: SVG-EAR (arXiv 2603.08982), PISA (arXiv 2602.01077), docs/correction.md.
    Shapes: k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; any strides; k_order int32 [B, Hkv, Sk] or None; k_offsets int32
        [B, Hkv, Gk + 1]; k_video [start, stop, …].
    Dtypes: k and v float16, bfloat16 or float32.
    Returns: float32 mean_k [B, Hkv, Gk, D], mean_v [B, Hkv, Gk, Dv], log_size [B, Hkv, Gk], and coupling
        [B, Hkv, D, Dv] or [B, Hkv, 0, 0].

    Nothing is read on the host. Equal inputs give equal bits, and a batch those of its items.
    """
    batches, heads, _, size = k.shape
    groups, value_size = k_offsets.shape[2] - 1, v.shape[3]
    device, largest = device_of(k), max(size, value_size)
    config = means_candidates(device, k.dtype, largest)[0] if means_config is None else means_config

    def empty(*shape: int) -> Tensor:
        return torch.empty((batches, heads, *shape), dtype=torch.float32, device=k.device)

    mean_k, mean_v, log_size = empty(groups, size), empty(groups, value_size), empty(groups)
    k_offsets = k_offsets.contiguous()
    order = None if k_order is None else k_order.contiguous()
    launch(
        triton_kernels.group_means,
        (batches * heads * groups,),
        k,
        v,
        k_offsets if order is None else order,
        k_offsets,
        mean_k,
        mean_v,
        log_size,
        groups,
        heads,
        *k.stride(),
        *v.stride(),
        0 if order is None else order.shape[2],
        HAS_ORDER=order is not None,
        D=size,
        DV=value_size,
        D_PAD=lanes(size),
        DV_PAD=lanes(value_size),
        BLOCK_ROWS=config.block_rows,
        warps=config.warps,
        stages=config.stages,
    )
    if not coupled:
        return mean_k, mean_v, log_size, empty(0, 0)
    chosen = coupling_candidates(device, k.dtype, largest)[0] if coupling_config is None else coupling_config
    return mean_k, mean_v, log_size, _coupling(k, v, order, k_offsets, k_video, mean_k, mean_v, device, chosen)


def _coupling(
    k: Tensor,
    v: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    video: list[int],
    mean_k: Tensor,
    mean_v: Tensor,
    device: Device,
    config: CouplingConfig,
) -> Tensor:
    """Covariance of keys and values within their groups, the mean over the visual keys: float32 [B, Hkv, D, Dv].

    Workspace: at most `MOST_CHUNKS` matrices a head, and the group of each position.
    """
    batches, heads, tokens, size = k.shape
    groups, value_size = mean_k.shape[2], v.shape[3]
    block_d = min(config.block_size, lanes(size))
    block_dv = min(config.block_size, lanes(value_size))
    pieces = -(-size // block_d) * -(-value_size // block_dv)
    chunks, chunk_tokens = _chunks(tokens, heads * pieces, device, config.block_rows)
    partials = torch.empty((batches, heads, chunks, size, value_size), dtype=torch.float32, device=k.device)
    counts = torch.empty((batches, heads, chunks), dtype=torch.int32, device=k.device)
    coupling = torch.empty((batches, heads, size, value_size), dtype=torch.float32, device=k.device)
    launch(
        triton_kernels.partial_coupling,
        (batches * heads * chunks * pieces,),
        k,
        v,
        offsets if order is None else order,
        group_at_position(offsets, tokens),
        inside(video, tokens, k.device).view(torch.uint8),
        mean_k,
        mean_v,
        partials,
        counts,
        tokens,
        groups,
        heads,
        chunks,
        chunk_tokens,
        *k.stride(),
        *v.stride(),
        0 if order is None else order.shape[2],
        HAS_ORDER=order is not None,
        D=size,
        DV=value_size,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        BLOCK_ROWS=config.block_rows,
        warps=config.warps,
        stages=config.stages,
    )
    launch(
        triton_kernels.sum_of_partials,
        (batches * heads * -(-size * value_size // ELEMENTS_AT_ONCE),),
        partials,
        counts,
        coupling,
        chunks,
        SIZE=size * value_size,
        BLOCK=ELEMENTS_AT_ONCE,
        warps=4,
        stages=1,
    )
    return coupling


def _chunks(tokens: int, programs: int, device: Device, block_rows: int) -> tuple[int, int]:
    """Into how many chunks a head's positions are cut, and how long they are: enough for the whole GPU.

    ``programs``: how many there are a chunk in one batch item. The number of items is left out, so that a batch is
    summed as its items are.
    """
    wanted = -(-PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors // programs)
    wanted = max(1, min(wanted, MOST_CHUNKS, -(-tokens // block_rows)))
    chunk_tokens = max(1, -(-tokens // (wanted * block_rows))) * block_rows
    return max(1, -(-tokens // chunk_tokens)), chunk_tokens
