"""The steps of Lloyd's k-means for CPU tensors: the C++ kernel `cpu.cpp` (docs/svg2.md, section 5).

They take all heads at once. Host reads are free here, so that the driver stops at a fixed point, which changes no bit
of the result. float64, which is for tests, is left to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.cpp.build import library
from sparse_compile.kernels.cpp.operands import dense_rows
from sparse_compile.kernels.kmeans import reference
from sparse_compile.kernels.kmeans.reference import stratified_sample

__all__ = ["STOPS_AT_FIXED_POINT", "assign", "countable", "stratified_sample", "update"]

STOPS_AT_FIXED_POINT = True


def countable(x: Tensor) -> Tensor:
    """As `reference.countable`: bool [S] for x [S, D], or [B, H, S] for [B, H, S, D]."""
    if x.dtype is torch.float64:
        return reference.countable(x)
    result = torch.empty(x.shape[:-1], dtype=torch.bool)
    library().countable(_by_heads(x), result)
    return result


def assign(x: Tensor, centroids: Tensor, included: Tensor) -> Tensor:
    """As `reference.assign`, of one head or of all.

    Source: SVG2 (arXiv 2505.18875); flash-kmeans (arXiv 2603.09229), which keeps no scores either.
    Shapes: x [S, D], its centroids [C, D] and included [S], or x [B, H, S, D], centroids [B, H, C, D] and included
        [B, H, S]; any strides.
    Dtypes: x float32, float16 or bfloat16; centroids are rounded to it. Products are summed in float32.
    Returns: int32 [S] or [B, H, S].
    """
    if x.dtype is torch.float64:
        return reference.assign(x, centroids, included)
    labels = torch.empty(x.shape[:-1], dtype=torch.int32)
    library().assign(_by_heads(x), _by_heads(_dense(centroids, torch.float32)), _dense(included, torch.bool), labels)
    return labels


def update(x: Tensor, labels: Tensor, included: Tensor, centroids: Tensor) -> Tensor:
    """As `reference.update`, of one head or of all; shapes as in `assign`, labels int32.

    Returns: float32 of the shape of ``centroids``. A cluster is summed in float64 in token order, by one thread.
    """
    if x.dtype is torch.float64:
        return reference.update(x, labels, included, centroids)
    means = centroids.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    library().update(_by_heads(x), _dense(labels, torch.int32), _dense(included, torch.bool), _by_heads(means))
    return means


def _by_heads(x: Tensor) -> Tensor:
    """[S, D] as one head of one batch item; rows are dense."""
    return dense_rows(x if x.dim() == 4 else x.expand(1, 1, *x.shape))


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()
