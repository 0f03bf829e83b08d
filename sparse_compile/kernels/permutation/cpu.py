"""Group tokens by label, for CPU tensors: the C++ kernel `cpu.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels.cpp.build import library


def sort_labels(labels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """As `reference.sort_labels`, by a counting sort; heads run on different threads.

    Raises:
        RuntimeError: a label lies outside [0, groups).
    """
    order = torch.empty(labels.shape, dtype=torch.int32)
    offsets = torch.empty((*labels.shape[:2], groups + 1), dtype=torch.int32)
    library().sort_labels(labels.contiguous(), order, offsets)
    return order, offsets
