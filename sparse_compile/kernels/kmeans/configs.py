"""Tile sizes of the k-means kernels. Starting points are the tables of flash-kmeans (arXiv 2603.09229)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparse_compile.kernels.launching import Device, architecture_family, lanes


class Assign(NamedTuple):
    """Of `assign`: tokens of a program, centroids of a step."""

    points: int
    centroids: int
    warps: int
    stages: int


class Update(NamedTuple):
    """Of `update`: tokens of a step."""

    rows: int
    warps: int
    stages: int


_ASSIGN: dict[int, tuple[Assign, ...]] = {
    80: (Assign(128, 32, 4, 2), Assign(64, 64, 4, 2), Assign(128, 64, 8, 2), Assign(64, 32, 4, 2)),
    89: (Assign(128, 32, 4, 2), Assign(64, 64, 4, 2), Assign(128, 64, 8, 2), Assign(64, 32, 4, 2)),
    90: (Assign(128, 64, 4, 2), Assign(128, 128, 8, 2), Assign(128, 64, 8, 3), Assign(64, 64, 4, 2)),
    100: (Assign(128, 64, 4, 2), Assign(128, 128, 8, 2), Assign(128, 64, 8, 3), Assign(64, 64, 4, 2)),
    120: (Assign(128, 32, 4, 2), Assign(64, 64, 4, 2), Assign(128, 64, 8, 2), Assign(64, 32, 4, 2)),
}
"""For 16-bit tokens of up to 128 elements."""
_ASSIGN_WIDE: tuple[Assign, ...] = (
    Assign(64, 32, 4, 2),
    Assign(64, 64, 8, 2),
    Assign(128, 32, 8, 2),
    Assign(32, 32, 4, 2),
)
"""For 16-bit tokens of more elements."""
_ASSIGN_FLOAT32: tuple[Assign, ...] = (Assign(64, 32, 8, 2), Assign(32, 32, 4, 2), Assign(32, 16, 4, 2))
"""For float32, whose products hold more in registers."""


def assign_candidates(device: Device, dtype: torch.dtype, size: int) -> tuple[Assign, ...]:
    """Tiles of `assign`, best first, for D = ``size``: those that fit the shared memory of ``device``."""
    if dtype.itemsize == 4:
        table = _ASSIGN_FLOAT32
    else:
        table = _ASSIGN[architecture_family(device.architecture)] if size <= 128 else _ASSIGN_WIDE
    row = lanes(size) * dtype.itemsize
    return tuple(c for c in table if (c.points + c.stages * c.centroids) * row <= device.shared_memory)


def update_candidates(device: Device, dtype: torch.dtype, size: int) -> tuple[Update, ...]:
    """Tiles of `update`, best first. Sixteen kilobytes of float32 rows keep many programs on a multiprocessor."""
    most = max(8, 4096 // lanes(size))
    return (Update(most, 4, 2), Update(most, 2, 2), Update(2 * most, 4, 2))
