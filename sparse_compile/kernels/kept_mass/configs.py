"""Tile sizes of the kernels that measure kept mass. Chosen by what fits and compiles; none was timed."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparse_compile.kernels.launching import Device, architecture_family

PROGRAMS_PER_MULTIPROCESSOR = 4
ORDER_BLOCK = 1024
"""Positions of the grouped order that one program searches for probe rows."""


class Config(NamedTuple):
    """How a program compares probe rows with keys.

    block_rows: probe rows of a program, at most.
    block_keys: keys loaded at a time.
    """

    block_rows: int
    block_keys: int
    warps: int
    stages: int


def candidates(device: Device, dtype: torch.dtype, size: int) -> tuple[Config, ...]:
    """Configurations for queries and keys of ``size`` elements of ``dtype``, best first."""
    narrow = architecture_family(device.architecture) in (89, 120)
    if dtype.itemsize == 4:
        if size > 128:
            return (Config(32, 16, 8, 1), Config(16, 16, 4, 1))
        return (Config(64, 32, 8, 1 if narrow else 2), Config(32, 32, 4, 1), Config(32, 32, 8, 2))
    if size > 128:
        return (Config(64, 32, 8, 2), Config(32, 32, 4, 2))
    if size > 64:
        return (Config(64, 32, 4, 3), Config(64, 32, 4, 2), Config(64, 64, 8, 2 if narrow else 3), Config(32, 64, 4, 2))
    return (Config(64, 64, 4, 2 if narrow else 3), Config(64, 32, 4, 3), Config(32, 64, 4, 2))
