"""Random numbers without a generator: a hash of counters, the same on every device.

Nothing here reads or advances torch's global generator, whose state belongs to the sampler's noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIER = 0x45D9F3B


def mix(word: Tensor) -> Tensor:
    """Scramble 32-bit words in an int64 tensor, so that every input bit moves every output bit.

    Two rounds of xor-shift and multiply. The multiplier has 27 bits, so that no product leaves int64.
    """
    for _ in range(2):
        word = ((word >> 16) ^ word) * MULTIPLIER & MASK
    return (word >> 16) ^ word


def hash_counters(seed: int, *counters: int | Tensor, device: torch.device) -> Tensor:
    """Hash a seed and counters (ints or int64 tensors, which broadcast) to int64 values in [0, 2**32).

    The order of the counters matters: (1, 2) and (2, 1) give different values.
    """
    state = torch.zeros((), dtype=torch.int64, device=device)
    for counter in (seed & MASK, (seed >> 32) & MASK, *counters):
        # The constant keeps a run of zero counters from standing still.
        state = mix((state ^ (counter + 0x9E3779B9)) & MASK)
    return state
