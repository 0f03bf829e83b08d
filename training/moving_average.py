"""The average of the weights over the last few hundred steps, which is what a checkpoint holds."""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST_DECAY = 0.995


class MovingAverage:
    """An exponential moving average of a model's state, short at first so that the start is soon forgotten."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Take in the weights after the ``step``-th step, counted from 0."""
        decay = min(LONGEST_DECAY, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            self.values[name].lerp_(value, 1 - decay)

    def load(self, values: dict[str, Tensor]) -> None:
        """Go on from saved values, which must name the same tensors."""
        for name, value in self.values.items():
            value.copy_(values[name])
