"""What a training run is made of: the model's shape, the stages it goes through, the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_compile.evaluation.demo_model import VideoSize


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """How large the transformer is."""

    layers: int
    heads: int
    head_size: int

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_size


@dataclass(frozen=True)
class Stage:
    """A part of the run at one video size."""

    share: float
    """Of the run's time, relative to the other stages."""
    size: VideoSize
    batch: int


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A recipe."""

    model: ModelShape
    stages: tuple[Stage, ...]
    """From random weights: short videos first."""
    continued_stages: tuple[Stage, ...]
    """From a checkpoint."""
    learning_rate: float
    """Of Muon at the height of the schedule; AdamW has a tenth of it."""
    continued_learning_rate: float
    autocast: bool
    """Compute in bfloat16 over float32 weights."""
    device: str
    """Used if it is there."""


PRESETS = {
    "cpu": Preset(
        model=ModelShape(layers=6, heads=4, head_size=32),
        stages=(
            Stage(0.25, VideoSize(4, 32, 32), batch=5),
            Stage(0.45, VideoSize(9, 32, 32), batch=3),
            Stage(0.30, VideoSize(12, 32, 48), batch=2),
        ),
        continued_stages=(
            Stage(0.35, VideoSize(9, 32, 32), batch=3),
            Stage(0.40, VideoSize(12, 32, 48), batch=2),
            Stage(0.25, VideoSize(16, 32, 48), batch=2),
        ),
        learning_rate=0.02,
        continued_learning_rate=0.01,
        autocast=False,
        device="cpu",
    ),
    "gpu": Preset(
        model=ModelShape(layers=10, heads=4, head_size=64),
        stages=(
            Stage(0.25, VideoSize(9, 32, 48), batch=64),
            Stage(0.35, VideoSize(17, 64, 96), batch=16),
            Stage(0.40, VideoSize(33, 64, 96), batch=8),
        ),
        continued_stages=(
            Stage(0.35, VideoSize(17, 64, 96), batch=16),
            Stage(0.40, VideoSize(33, 64, 96), batch=8),
        ),
        learning_rate=0.02,
        continued_learning_rate=0.01,
        autocast=True,
        device="cuda",
    ),
}


def stage_at(stages: Sequence[Stage], done: float) -> Stage:
    """The stage of a run that is ``done`` (0 to 1) of the way through."""
    reached = done * sum(stage.share for stage in stages)
    for stage in stages:
        reached -= stage.share
        if reached < 0:
            return stage
    return stages[-1]
