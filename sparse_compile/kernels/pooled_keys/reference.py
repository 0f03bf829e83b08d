"""What stands for each key group, in plain torch: the definition of correct (docs/correction.md).

Every function but the first treats one (batch item, key head). Nothing is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.block_sparse_attention.reference import group_of_token
from sparse_compile.kernels.precision import compute_dtype, copied
from sparse_compile.kernels.token_blocks.spans import inside
from sparse_compile.plan import Groups


def pooled_keys(
    k: Tensor, v: Tensor, k_order: Tensor | None, k_offsets: Tensor, k_video: list[int], coupled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean key, mean value and size of each group, and how keys and values vary together within the groups.

    Source: SVG-EAR (arXiv 2603.08982): a mean key and a mean value stand for a group; PISA (arXiv 2602.01077): the
        terms after the mean of a Taylor expansion. One matrix per head for the first of them: docs/correction.md.
    Shapes: k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; any strides; k_order int32 [B, Hkv, Sk] or None; k_offsets int32
        [B, Hkv, Gk + 1]; k_video [start, stop, …], positions of the visual keys before grouping.
    Returns: float32 mean_k [B, Hkv, Gk, D]; mean_v [B, Hkv, Gk, Dv]; log_size [B, Hkv, Gk], the natural log of the
        number of keys; coupling [B, Hkv, D, Dv], or [B, Hkv, 0, 0] unless ``coupled``. An empty group and the last
        one, padding, have means of 0 and a log_size of -inf.

    Padding touches nothing, not even as NaN. A valid key or value that is not finite makes the mean of its group, and
    if it is visual the coupling, not finite.
    """
    batches, heads, tokens, size = k.shape
    groups, value_size = k_offsets.shape[2] - 1, v.shape[3]
    counts = k_offsets.diff()
    counts = torch.cat([counts[..., :-1], torch.zeros_like(counts[..., -1:])], -1)

    def empty(*shape: int) -> Tensor:
        return torch.empty((batches, heads, *shape), dtype=torch.float32, device=k.device)

    mean_k, mean_v = empty(groups, size), empty(groups, value_size)
    coupling = empty(size, value_size) if coupled else empty(0, 0)
    visual = inside(k_video, tokens, k.device)
    for batch in range(batches):
        for head in range(heads):
            own_k, own_v = k[batch, head], v[batch, head]
            order = None if k_order is None else k_order[batch, head]
            offsets, count = k_offsets[batch, head], counts[batch, head]
            mean_k[batch, head] = group_means(own_k, order, offsets, count)
            mean_v[batch, head] = group_means(own_v, order, offsets, count)
            if coupled:
                group = group_of_token(Groups(k_order, k_offsets), batch, head, tokens)
                counted = visual & (group < groups - 1)
                deviation_k = deviations(own_k, mean_k[batch, head], group, counted)
                deviation_v = deviations(own_v, mean_v[batch, head], group, counted)
                coupling[batch, head] = (deviation_k.t() @ deviation_v) / counted.sum().clamp(min=1)
    return mean_k, mean_v, counts.to(torch.float32).log(), coupling


def group_means(x: Tensor, order: Tensor | None, offsets: Tensor, counts: Tensor) -> Tensor:
    """Mean of x [S, D] over each group, float64 [G, D]; 0 where ``counts`` int32 [G] is 0, whatever lies there.

    Sums run in the grouped order in float64, where a million terms still round to the right float32.
    """
    if order is None:
        order = torch.arange(x.shape[0], dtype=offsets.dtype, device=x.device)
    sums = torch.nn.functional.embedding_bag(
        order.contiguous(), copied(x, torch.float64), offsets.contiguous(), mode="sum", include_last_offset=True
    )
    counts = counts.unsqueeze(-1)
    return torch.where(counts > 0, sums / counts.clamp(min=1), 0)


def deviations(x: Tensor, means: Tensor, group: Tensor, counted: Tensor) -> Tensor:
    """How far each token lies from the mean of its group, [S, D]; 0 where it is not ``counted`` (bool [S]).

    Differences before the product: the sum of products minus a product of sums would cancel.
    """
    compute = compute_dtype(x.dtype)
    return (x.to(compute) - means.to(compute).index_select(0, group)).masked_fill_(~counted.unsqueeze(-1), 0)
