"""A recipe so small that a run takes a second."""

import pytest
import torch

from sparse_compile.evaluation.demo_model import VideoSize
from training.presets import PRESETS, ModelShape, Preset, Stage


@pytest.fixture
def tiny_preset(monkeypatch):
    stages = (Stage(0.5, VideoSize(1, 16, 16), batch=2), Stage(0.5, VideoSize(2, 16, 24), batch=1))
    preset = Preset(
        model=ModelShape(layers=2, heads=2, head_size=16),
        stages=stages,
        continued_stages=stages[1:],
        learning_rate=0.02,
        continued_learning_rate=0.01,
        autocast=False,
        device="cpu",
    )
    monkeypatch.setitem(PRESETS, "tiny", preset)
    return preset


@pytest.fixture(autouse=True)
def _threads_as_before():
    """A command sets the number of threads of its process, which here is that of all tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
