"""The precision that kernels compute in, and copies that take a tensor there."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products, scores and means of an input of ``dtype``: float64 for float64, float32 for all others."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def copied(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new contiguous copy in ``dtype``, by default that of the computation.

    A copy even where nothing changes: no result then depends on the strides or the alignment of ``x``.
    """
    target = compute_dtype(x.dtype) if dtype is None else dtype
    return x.to(target, copy=True, memory_format=torch.contiguous_format)
