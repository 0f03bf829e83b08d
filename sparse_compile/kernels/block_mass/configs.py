"""Tile sizes of the kernels of block masses. Chosen by what fits and compiles; none was timed."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparse_compile.kernels.launching import Device, architecture_family, lanes


class Config(NamedTuple):
    """How a program multiplies rows and keys; for `sum_blocks` and `renew_lse` alike.

    block_m: slots of query rows of a program, a power of two.
    block_n: slots of keys at a time, a power of two.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


NARROW = {
    80: (Config(128, 64, 4, 3), Config(64, 64, 4, 3)),
    89: (Config(128, 64, 8, 3), Config(64, 64, 4, 3), Config(128, 64, 4, 3)),
    90: (Config(128, 64, 8, 3), Config(128, 128, 8, 2), Config(128, 128, 8, 3), Config(128, 64, 4, 3)),
    100: (Config(128, 64, 4, 3), Config(128, 128, 8, 3), Config(64, 64, 4, 3)),
    120: (Config(64, 64, 4, 3), Config(128, 64, 4, 3)),
}
"""16-bit inputs with D of at most 128. On sm_90 the first leaves room for a second program on the multiprocessor: one
multiplies while the other takes exponentials."""
WIDE = (Config(64, 64, 8, 2), Config(64, 32, 4, 3))
"""16-bit inputs and wider heads."""
FULL = {90: (Config(64, 64, 8, 2), Config(64, 32, 4, 3)), 100: (Config(64, 32, 8, 2),)}
"""float32 inputs with D of at most 128. Elsewhere, three products in TF32 leave registers for few keys at a time."""
FEW_KEYS = (Config(64, 16, 4, 2), Config(32, 16, 4, 2))


def candidates(device: Device, dtype: torch.dtype, size: int) -> tuple[Config, ...]:
    """Configurations that fit the shared memory, best first. ``size``: D."""
    family = architecture_family(device.architecture)
    if dtype is torch.float32:
        known = FEW_KEYS[1:] if size > 128 else FULL.get(family, FEW_KEYS)
    else:
        known = WIDE if size > 128 else NARROW[family]
    item = torch.finfo(dtype).bits // 8
    return tuple(config for config in known if shared_memory(config, size, item) <= device.shared_memory)


def shared_memory(config: Config, size: int, item: int) -> int:
    """Bytes that the tiles of rows and of keys take, and some for sums across warps."""
    padded = lanes(size)
    return (config.block_m + config.stages * config.block_n) * padded * item + 4096
