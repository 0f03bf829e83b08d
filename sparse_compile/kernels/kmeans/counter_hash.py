"""Random numbers without a generator: a hash of counters, the same on every device.

Nothing here reads or advances torch's global generator, whose state belongs to the sampler's noise.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIER = 0x45D9F3B

Word = TypeVar("Word", int, Tensor)


def mix(word: Word) -> Word:
    """Scramble 32-bit words (an int, or an int64 tensor) so that every input bit moves every output bit.

    Two rounds of xor-shift and multiply. The multiplier has 27 bits, so that no product leaves int64.
    """
    for _ in range(2):
        word = ((word >> 16) ^ word) * MULTIPLIER & MASK
    return (word >> 16) ^ word


def hash_counters(seed: int, *counters: int | Tensor) -> Tensor:
    """Hash a seed and counters to int64 values in [0, 2**32); at least one counter is an int64 tensor.

    Counters broadcast. Their order matters: (1, 2) and (2, 1) give different values.
    """
    start = mix((seed & MASK) ^ mix((seed >> 32) & MASK))
    state: int | Tensor = start
    for counter in counters:
        # The constant keeps a run of zero counters from standing still.
        word = mix((counter + 0x9E3779B9) & MASK)
        state = mix((word ^ state) & MASK)
    assert isinstance(state, Tensor)
    return state
