"""Time as the strategies see it: a phase, and the moment it is chosen for.

Only the Clock (runtime/clock.py) moves time; everybody else reads these values.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple


class Phase(StrEnum):
    """What one call of an attention layer does. Each phase has a compiled graph of its own."""

    DENSE = "dense"
    """Attention as it was."""
    SEARCH = "search"
    """Fill the state that later calls read; see the strategy for what the output is."""
    SPARSE = "sparse"
    """Attend sparsely with the state of earlier calls."""
    REFINE = "refine"
    """Attend sparsely after renewing the state at less than the cost of a search."""


class Moment(NamedTuple):
    """One denoising step of a generation; steps count from 0."""

    step: int
    steps: int
    stale: tuple[int, ...] = ()
    """Steps from which on plans that were made before them are to be made anew, whatever the schedule says."""
    sound: tuple[int, ...] = ()
    """Steps at which the plans that are held proved as good as new: a search that was due then is not needed."""

    def count(self, amount: float | int) -> int:
        """Steps that ``amount`` stands for: an int is a count, a float a share of all steps, rounded half up."""
        if isinstance(amount, int):
            return amount
        return math.floor(amount * self.steps + 0.5 + 1e-9)  # 0.29 * 50 is 14.499…, on paper 14.5
