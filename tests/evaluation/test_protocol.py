"""Which videos a sweep makes."""

import pytest
import torch

from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation import protocol as under_test
from sparse_compile.evaluation.demo_model import VideoSize, draw_scenes
from sparse_compile.evaluation.protocol import Protocol


def test_each_video_has_its_own_noise_whatever_is_made_beside_it():
    alone, four = Protocol(videos=1), Protocol(videos=4)
    noise = four.noise(2)
    assert noise.shape == (4, 3, 9, 32, 32)
    torch.testing.assert_close(alone.noise(2), noise[:1], rtol=0, atol=0)
    expected = torch.randn(3, 9, 32, 32, generator=torch.Generator().manual_seed(2003))
    torch.testing.assert_close(noise[3], expected, rtol=0, atol=0)
    assert not torch.equal(noise, four.noise(1))


def test_the_scenes_are_the_same_under_every_seed():
    assert Protocol(seeds=(7,)).scenes() == Protocol().scenes() == draw_scenes(4, 1000)


def test_all_scenes_of_a_seed_are_one_generation(monkeypatch):
    calls = []

    def generate(pipeline, scenes, size, **given):
        calls.append((pipeline, scenes, size, given))
        return torch.full((len(scenes), 3, *size), -1.0)

    monkeypatch.setattr(under_test, "generate", generate)
    protocol = Protocol(size=VideoSize(2, 8, 8), videos=3, steps=5)
    videos = protocol.generate("pipeline", 1, on_step=print)
    assert videos.shape == (3, 3, 2, 8, 8) and videos.unique().tolist() == [0]
    [(pipeline, scenes, size, given)] = calls
    assert (pipeline, len(scenes), size) == ("pipeline", 3, (2, 8, 8))
    assert torch.equal(given.pop("latents"), protocol.noise(1))
    assert given == {"steps": 5, "guidance": 2.0, "on_step": print}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"videos": 0}, "a seed has 1 to 1000 videos; got 0"),
        ({"videos": 1001}, "Take more seeds"),
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1, 1)}, "seeds are different integers"),
    ],
    ids=["no video", "noise of the next seed", "no seed", "a seed twice"],
)
def test_a_protocol_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(SparseAttentionError, match=message):
        Protocol(**fields)
