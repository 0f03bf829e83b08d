"""The recipes: their sizes, their stages, and the schedule over them."""

import dataclasses

import pytest
import torch

from sparse_compile.evaluation.demo_model import VideoSize
from training.model import build, shape_of
from training.presets import PRESETS, Stage, stage_at
from training.schedule import FLOOR, WARM_UP_STEPS, learning_rate_factor
from training.trainer import Length, Trainer


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_gpu_model_fits_into_a_checkpoint_of_25_mb():
    with torch.device("meta"):
        count = parameters(build(PRESETS["gpu"].model))
    assert 10.5e6 < count < 11.8e6
    assert 2 * count <= 25e6


def test_the_cpu_model_is_the_shipped_one():
    model = build(PRESETS["cpu"].model)
    assert 1.7e6 < parameters(model) < 1.8e6
    assert shape_of(model) == PRESETS["cpu"].model


def test_the_gpu_preset_trains_on_videos_of_many_tokens():
    assert [stage.size.tokens for stage in PRESETS["gpu"].stages] == [864, 6528, 12672]


def test_the_gpu_preset_takes_a_step_with_small_videos():
    stages = (Stage(1.0, VideoSize(2, 16, 16), batch=2),)
    shape = dataclasses.replace(PRESETS["gpu"].model, layers=2)
    preset = dataclasses.replace(PRESETS["gpu"], model=shape, stages=stages)
    torch.manual_seed(0)
    trainer = Trainer(build(preset.model), preset, length=Length(steps=1), seed=0, device=torch.device("cpu"))
    before = trainer.model.proj_out.weight.detach().clone()
    assert 0.5 < trainer.step() < 3
    assert trainer.done == 1
    assert not torch.equal(before, trainer.model.proj_out.weight)
    assert trainer.model.proj_out.weight.dtype == torch.float32


@pytest.mark.parametrize(("done", "number"), [(0.0, 0), (0.49, 0), (0.51, 1), (0.99, 1), (1.0, 1), (1.5, 1)])
def test_stages_follow_each_other_by_their_shares(done, number):
    stages = (Stage(2.0, VideoSize(1, 4, 4), 1), Stage(2.0, VideoSize(2, 4, 4), 1))
    assert stage_at(stages, done) is stages[number]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_videos_grow_from_stage_to_stage(preset):
    for stages in (preset.stages, preset.continued_stages):
        tokens = [stage.size.tokens for stage in stages]
        assert tokens == sorted(tokens)
        assert sum(stage.share for stage in stages) <= 1 + 1e-9


def test_the_learning_rate_warms_up_and_falls():
    assert learning_rate_factor(0, 0.0) == pytest.approx(1 / WARM_UP_STEPS)
    assert learning_rate_factor(WARM_UP_STEPS, 0.0) == pytest.approx(1)
    assert learning_rate_factor(10_000, 0.5) == pytest.approx((1 + FLOOR) / 2)
    assert learning_rate_factor(10_000, 1.0) == learning_rate_factor(10_000, 1.2) == pytest.approx(FLOOR)
