"""The training loop: one step, what it is measured by, and the state from which it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from training.moving_average import MovingAverage
from training.muon import Muon
from training.objective import Randomness, draw_batch, velocity_loss
from training.presets import Preset, Stage, stage_at
from training.schedule import learning_rate_factor

LOG_EVERY = 50
"""Steps a row of the log."""


@dataclass(frozen=True)
class Length:
    """How long a run is: by the clock, or by steps, which makes it repeatable."""

    minutes: float | None = None
    steps: int | None = None

    def done(self, steps: int, minutes: float) -> float:
        """How much of the run is behind, 0 to 1 and beyond."""
        if self.steps is not None:
            return steps / self.steps
        assert self.minutes is not None
        return minutes / self.minutes


@dataclass(frozen=True)
class LogRow:
    """The mean loss of some steps."""

    step: int
    minutes: float
    loss: float
    tokens: int


class Trainer:
    """A model in training, with everything that the next step depends on."""

    def __init__(
        self,
        model: WanTransformer3DModel,
        preset: Preset,
        *,
        length: Length,
        seed: int,
        device: torch.device,
        continued: bool = False,
        compiled: bool = False,
    ) -> None:
        """Take a model, with random weights or (``continued``) from a checkpoint, and move it to ``device``."""
        self.model = model.to(device).train()
        self.preset = preset
        self.length = length
        self.stages = preset.continued_stages if continued else preset.stages
        self.peak = preset.continued_learning_rate if continued else preset.learning_rate
        self.average = MovingAverage(self.model)
        hidden: list[torch.nn.Parameter] = []
        self.other: list[torch.nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            in_block = name.startswith("blocks.") and parameter.ndim == 2
            (hidden if in_block else self.other).append(parameter)
        self.muon = Muon(hidden, lr=self.peak)
        self.adam = torch.optim.AdamW(self.other, lr=self.peak / 10, betas=(0.9, 0.98), weight_decay=0.0)
        self.random = Randomness.of(seed, device)
        self.steps = 0
        self.seconds = 0.0
        self.log: list[LogRow] = []
        self._losses: list[float] = []
        self._forward = torch.compile(self.model, dynamic=False) if compiled else self.model

    @property
    def minutes(self) -> float:
        """Time spent in steps, of interrupted runs too."""
        return self.seconds / 60

    @property
    def done(self) -> float:
        """How much of the run is behind, 0 to 1 and beyond."""
        return self.length.done(self.steps, self.minutes)

    @property
    def stage(self) -> Stage:
        """What the next step trains on."""
        return stage_at(self.stages, self.done)

    def run(self, after_step: Callable[[Trainer], None]) -> None:
        """Train until the end of the run; what ``after_step`` takes counts as training time."""
        start = time.monotonic() - self.seconds
        while self.done < 1:
            self.step()
            self.seconds = time.monotonic() - start
            after_step(self)

    def step(self) -> float:
        """One update of the weights; returns the loss."""
        stage = self.stage
        factor = learning_rate_factor(self.steps, self.done)
        for optimizer, peak in ((self.muon, self.peak), (self.adam, self.peak / 10)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        batch = draw_batch(stage.batch, stage.size, self.random)
        loss = velocity_loss(self._forward, batch, autocast=self.preset.autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.other, 1.0)
        for optimizer in (self.muon, self.adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model, self.steps)
        self.steps += 1
        self._losses.append(loss.item())
        if self.steps % LOG_EVERY == 0:
            mean = sum(self._losses) / len(self._losses)
            self.log.append(LogRow(self.steps, round(self.minutes, 2), round(mean, 4), stage.size.tokens))
            self._losses.clear()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors, numbers and words only."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.values,
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "scenes": self.random.scenes.get_state(),
            "noise": self.random.noise.get_state(),
            "steps": self.steps,
            "seconds": self.seconds,
            "log": [asdict(row) for row in self.log],
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same preset."""
        self.model.load_state_dict(state["model"])
        self.average.load(state["average"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.random.scenes.set_state(state["scenes"])
        self.random.noise.set_state(state["noise"])
        self.steps = state["steps"]
        self.seconds = state["seconds"]
        self.log = [LogRow(**row) for row in state["log"]]
        self._losses = list(state["losses"])
