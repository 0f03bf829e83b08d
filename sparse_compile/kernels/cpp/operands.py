"""What the C++ kernels ask of the tensors they are given."""

from __future__ import annotations

from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """``x`` itself where its last dimension is dense, whatever its other strides; else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
