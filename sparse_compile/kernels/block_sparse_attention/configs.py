"""Tile sizes of the block-sparse attention kernel, by architecture, head size and kind of plan.

Where to start from is calculated and checked by compilation alone (docs/kernels.md): registers, shared memory and
spills are known for every row, speed for none until it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sparse_compile.kernels.launching import Device, architecture_family
from sparse_compile.kernels.work_lists.triton_launch import Tiling

SHORT_PIECE = 16
"""Keys of a piece where groups are ragged: the finest that still loads whole cache lines, and a step of the MMA."""


class AttentionConfig(NamedTuple):
    """How one launch runs.

    block_q, block_k: queries of a tile, keys of a chunk.
    descriptors: load keys and values by TMA; for whole pieces only.
    persistent: programs per multiprocessor that take tile after tile; 0: one program a tile.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int
    descriptors: bool = False
    persistent: int = 0

    def tiling(self, *, ragged: bool, short: AttentionConfig | None = None) -> Tiling:
        """How the work lists cut the plan; ``short``: the configuration for what is left of a row."""
        piece = SHORT_PIECE if ragged else self.block_k
        return Tiling(self.block_q, self.block_k, piece, 0 if short is None else short.block_q)


_POINTERS: dict[int, dict[int, tuple[AttentionConfig, ...]]] = {
    80: {
        64: (AttentionConfig(128, 64, 8, 3), AttentionConfig(64, 64, 4, 3)),
        128: (AttentionConfig(128, 32, 8, 3), AttentionConfig(64, 32, 4, 3)),
        256: (AttentionConfig(64, 32, 8, 2),),
    },
    89: {
        64: (AttentionConfig(128, 32, 8, 2), AttentionConfig(64, 32, 4, 2)),
        128: (AttentionConfig(128, 32, 8, 2), AttentionConfig(64, 32, 4, 2)),
        256: (AttentionConfig(64, 32, 8, 1),),
    },
    90: {
        64: (
            AttentionConfig(128, 64, 8, 3),
            AttentionConfig(128, 64, 8, 3, persistent=1),
            AttentionConfig(64, 64, 4, 3),
        ),
        128: (
            AttentionConfig(128, 64, 8, 3),
            AttentionConfig(128, 64, 8, 3, persistent=1),
            AttentionConfig(64, 64, 4, 3),
        ),
        256: (AttentionConfig(64, 64, 8, 2),),
    },
    100: {
        64: (
            AttentionConfig(128, 64, 8, 3),
            AttentionConfig(128, 64, 8, 3, persistent=1),
            AttentionConfig(64, 64, 4, 2),
        ),
        128: (
            AttentionConfig(128, 64, 8, 3),
            AttentionConfig(128, 64, 8, 3, persistent=1),
            AttentionConfig(64, 64, 4, 3),
        ),
        256: (AttentionConfig(64, 32, 8, 2),),
    },
    120: {
        64: (AttentionConfig(128, 32, 8, 2), AttentionConfig(64, 32, 4, 2)),
        128: (AttentionConfig(128, 32, 8, 2), AttentionConfig(64, 32, 4, 2)),
        256: (AttentionConfig(64, 32, 8, 1),),
    },
}
"""By architecture and by the largest head size that a row is for, best first; one with tiles of 64 queries in each."""
_RAGGED: dict[tuple[int, int], tuple[AttentionConfig, ...]] = {(120, 128): (AttentionConfig(64, 32, 8, 2),)}
"""Instead of these for ragged plans, by architecture and head size, where they spill."""
_DESCRIPTORS: dict[int, tuple[AttentionConfig, ...]] = {
    90: (AttentionConfig(128, 64, 8, 3, descriptors=True), AttentionConfig(64, 64, 4, 3, descriptors=True)),
    100: (AttentionConfig(128, 64, 8, 3, descriptors=True), AttentionConfig(64, 64, 4, 3, descriptors=True)),
}
"""Before those of pointers, for blocks in place with head sizes up to 128."""
_FLOAT32: dict[int, tuple[AttentionConfig, ...]] = {
    64: (AttentionConfig(64, 32, 4, 2), AttentionConfig(32, 32, 4, 2)),
    128: (AttentionConfig(32, 32, 4, 2), AttentionConfig(32, 16, 4, 2)),
    256: (AttentionConfig(16, 32, 4, 1), AttentionConfig(16, 16, 4, 1)),
}
"""float32, on every architecture: products of three TF32 parts need registers."""
_SMALL_ROWS = 96
"""Mean queries of a row up to which a tile of 64 is filled better than one of 128."""


def short_of(config: AttentionConfig, rows: Sequence[AttentionConfig]) -> AttentionConfig | None:
    """The first of ``rows`` whose tiles have half the queries of ``config``'s, and equal chunks; None without one."""
    halves = (row for row in rows if row.block_q * 2 == config.block_q and row.block_k == config.block_k)
    return next(halves, None)


def candidates(
    device: Device, dtype: torch.dtype, size: int, *, ragged: bool, mean_row: float
) -> tuple[AttentionConfig, ...]:
    """The configurations to choose from, best first.

    Args:
        device: the GPU.
        dtype: of q, k and v.
        size: the larger of the head sizes of keys and values, at most 256.
        ragged: whether key groups are of any size, anywhere, rather than blocks in place.
        mean_row: mean number of queries of a row.
    """
    width = next(limit for limit in (64, 128, 256) if size <= limit)
    if dtype is torch.float32:
        return _FLOAT32[width]
    family = architecture_family(device.architecture)
    rows = _POINTERS[family][width]
    if ragged:
        rows = _RAGGED.get((family, width), rows)
    elif width <= 128:
        rows = _DESCRIPTORS.get(family, ()) + rows
    if mean_row <= _SMALL_ROWS:
        rows = tuple(row for row in rows if row.block_q <= 64) or rows
    return rows
