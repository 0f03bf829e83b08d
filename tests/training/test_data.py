"""The training data: repeatable, in range, and drawn as it was when the shipped model was trained."""

import math

import pytest
import torch

from sparse_compile.evaluation.demo_model import COLOURS, SHAPES, SLOTS, VideoSize, draw_scenes, prompt_embeds
from training.data import COLOUR_VALUES, draw_attributes, embed, render
from training.objective import Randomness, draw_batch, draw_times

SIZE = VideoSize(5, 32, 48)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randomness():
    return Randomness.of(5, torch.device("cpu"))


def drawn(seed, size=SIZE, count=4):
    generator = seeded(seed)
    return render(draw_attributes(count, generator), size, generator)


def test_a_seed_means_the_same_videos():
    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


@pytest.mark.parametrize("size", [VideoSize(1, 32, 32), VideoSize(5, 32, 48), VideoSize(3, 64, 96)], ids=str)
def test_videos_have_the_asked_shape_and_range(size):
    video = drawn(0, size, count=3)
    assert video.shape == (3, 3, *size)
    assert video.dtype == torch.float32
    assert video.min() >= -1
    assert video.max() <= 1
    assert video.std() > 0.2


def test_videos_are_drawn_as_the_shipped_model_has_seen_them():
    video = drawn(7)
    assert video.mean().item() == pytest.approx(-0.178602, abs=1e-5)
    assert video[0, :, 2, 16, 24].tolist() == pytest.approx([-0.167485, 0.167485, -0.190375], abs=1e-4)


def test_shapes_move_and_stay_inside():
    """Two white circles over blue, one of which is whole in every frame: more pixels than its smallest area."""
    attributes = torch.tensor([[0, 5, 0, 2, 0, 5, 0, 2, 0, 2]]).repeat(8, 1)
    video = render(attributes, VideoSize(12, 32, 32), seeded(0))
    white = (video.amin(dim=1) > 0.3).flatten(2)
    assert white.sum(dim=2).min() > math.pi * 4.5**2
    assert (white[:, 1:] != white[:, :-1]).any(dim=2).all()


def test_attributes_cover_every_word():
    attributes = draw_attributes(400, seeded(0))
    assert [column.unique().numel() for column in attributes.unbind(1)] == [len(words) for words in SLOTS]
    assert len(COLOUR_VALUES) == len(COLOURS)
    assert len(SHAPES) == 3


def test_prompts_are_those_of_the_demo():
    scenes = draw_scenes(5, seed=1)
    assert torch.equal(embed(torch.tensor([scene.attributes for scene in scenes])), prompt_embeds(scenes))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_null_prompt_is_zeros(share):
    batch = draw_batch(8, VideoSize(1, 32, 32), randomness(), null_share=share)
    empty = (batch.prompts == 0).flatten(1).all(dim=1)
    assert empty.all() if share else not empty.any()


def test_a_batch_goes_from_video_to_noise():
    batch = draw_batch(6, SIZE, randomness())
    times = batch.times.view(-1, 1, 1, 1, 1)
    video = batch.noised - times * batch.velocity
    assert video.abs().max() <= 1 + 1e-4
    noise = torch.randn(video.shape, generator=randomness().noise)
    torch.testing.assert_close(video + batch.velocity, noise)


def test_times_lean_towards_the_noise():
    times = draw_times(4000, seeded(0))
    assert 0 < times.min() < 0.05
    assert 0.95 < times.max() < 1
    assert 0.55 < times.mean() < 0.7
