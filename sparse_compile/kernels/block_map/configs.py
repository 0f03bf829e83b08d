"""Sizes of tiles and numbers of warps of the planners' kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparse_compile.kernels.launching import Device, lanes

LARGEST_ROW = 8192
"""Groups of a row that one program holds in its registers."""
SMALLEST_ROW = 32


class ScoreConfig(NamedTuple):
    """A tile of scores: ``block_q`` by ``block_k``, summed ``block_d`` at a time."""

    block_q: int
    block_k: int
    block_d: int
    warps: int
    stages: int


class RowConfig(NamedTuple):
    """One row a program, in ``lanes`` lanes: a power of two of at least 32."""

    lanes: int
    warps: int
    stages: int


def score_candidates(device: Device, dtype: torch.dtype, size: int) -> tuple[ScoreConfig, ...]:
    """Tiles of scores, best first. Products in full float32 run on no matrix unit, so all GPUs have the same list.

    Args:
        device: unused so far.
        dtype: unused: means are float32.
        size: D.
    """
    deep = 32 if size > 16 else 16
    return (ScoreConfig(64, 64, deep, 8, 2), ScoreConfig(32, 64, deep, 4, 2), ScoreConfig(32, 32, deep, 4, 2))


def row_candidates(device: Device, dtype: torch.dtype, size: int) -> tuple[RowConfig, ...]:
    """Warps of a row, best first. Fewer warps wait less for each other, more have fewer lanes each.

    Args:
        device: unused so far.
        dtype: unused: keys are integers.
        size: groups of a row, at most `LARGEST_ROW`.
    """
    row = lanes(size, SMALLEST_ROW)
    order = (8, 16, 32) if row <= 2048 else (16, 32)  # lanes of a thread; more warps than 16 would leave it too little
    warps = [min(16, max(1, row // (32 * per_thread))) for per_thread in order]
    return tuple(RowConfig(row, number, 1) for number in dict.fromkeys(warps))
