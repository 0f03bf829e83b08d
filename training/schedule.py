"""How the learning rate goes over a run."""

from __future__ import annotations

import math

WARM_UP_STEPS = 60
FLOOR = 0.02
"""Share of the learning rate that is left at the end."""


def learning_rate_factor(step: int, done: float) -> float:
    """A short warm-up by steps, then half a cosine over the run; ``done`` is 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (FLOOR + (1 - FLOOR) * cosine)
