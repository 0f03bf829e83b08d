"""Tile sizes of the kernels that make pooled keys. Chosen by what fits and compiles; none was timed."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparse_compile.kernels.launching import Device, architecture_family

PROGRAMS_PER_MULTIPROCESSOR = 3
MOST_CHUNKS = 32


class MeansConfig(NamedTuple):
    """How a program adds up a group.

    block_rows: keys and values loaded at a time; their float32 sum is added up in float64.
    """

    block_rows: int
    warps: int
    stages: int


class CouplingConfig(NamedTuple):
    """How a program multiplies deviations.

    block_rows: keys and values loaded at a time.
    block_size: rows and columns of the piece of the matrix that a program makes, at most.
    """

    block_rows: int
    block_size: int
    warps: int
    stages: int


def means_candidates(device: Device, dtype: torch.dtype, size: int) -> tuple[MeansConfig, ...]:
    """Configurations for the means, best first. ``size``: the larger one of a key and a value."""
    if size > 128:
        return (MeansConfig(32, 8, 1), MeansConfig(16, 4, 1))
    return (MeansConfig(32, 4, 1), MeansConfig(64, 8, 1), MeansConfig(16, 4, 1))


def coupling_candidates(device: Device, dtype: torch.dtype, size: int) -> tuple[CouplingConfig, ...]:
    """Configurations for the coupling matrix, best first. ``size``: the larger one of a key and a value."""
    family = architecture_family(device.architecture)
    whole, quarter = CouplingConfig(32, 128, 8, 1), CouplingConfig(32, 64, 4, 1)
    if size <= 64:
        return (quarter, CouplingConfig(64 if family in (90, 100) else 16, 64, 8, 1))
    if family in (90, 100):  # the sums need few registers, or none: rows are loaded ahead if they are small
        deep = (CouplingConfig(64, 128, 8, 2),) if dtype.itemsize == 2 else ()
        return (*deep, CouplingConfig(64, 128, 8, 1), whole, quarter)
    return (whole, quarter) if family == 80 and dtype.itemsize == 2 else (quarter, whole)
