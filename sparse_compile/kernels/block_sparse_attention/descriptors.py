"""TMA descriptors of keys and values: what the hardware asks of strides and addresses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_compile.kernels.launching import is_aligned

ALIGNMENT = 16
"""Bytes that an address and all strides but the last are multiples of."""


def fits_descriptor(x: Tensor) -> bool:
    """Whether TMA can read x [B, H, S, D] as it lies in memory."""
    step = x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    regular = all(stride > 0 and stride * step % ALIGNMENT == 0 for stride in strides)
    return regular and x.shape[3] * step % ALIGNMENT == 0 and x.numel() > 0 and is_aligned(x)


def descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """A descriptor of x [B, H, S, D] in blocks [1, 1, rows, columns]; what lies behind its end reads as 0."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    least = ALIGNMENT // x.element_size()  # a dimension of size 1 may have any stride, 0 among them, but not for TMA
    strides = [stride if size > 1 else least for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, columns])
