"""The dense-against-sparse runner: options, seeds, times."""

import pytest
import torch

from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation.comparison import (
    DEMO_OPTIONS,
    Run,
    compile_transformer,
    demo_options,
    measure,
    run_generations,
)
from sparse_compile.evaluation.demo_model import VideoSize, demo_scenes, generate, load_pipeline
from sparse_compile.evaluation.metrics import to_unit_range

SMALL = VideoSize(4, 32, 32)


def test_what_is_given_wins_over_the_options_of_the_demo():
    assert demo_options({}) == dict(DEMO_OPTIONS)
    assert demo_options({"density": "0.5"}) == {**DEMO_OPTIONS, "density": "0.5"}


def test_the_environment_wins_over_the_options_of_the_demo(monkeypatch):
    monkeypatch.setenv("SPARSE_ATTN_K_CLUSTERS", "40")
    assert "k_clusters" not in demo_options({})


def test_a_top_p_is_not_replaced_by_the_density_of_the_demo():
    assert "density" not in demo_options({"top_p": "0.8"})


def test_wrong_options_are_refused_before_anything_runs():
    with pytest.raises(SparseAttentionError, match="Did you mean 'density'"):
        demo_options({"densty": "0.5"})


def test_every_video_has_its_own_seed_and_the_first_is_also_the_warm_up():
    pipeline = load_pipeline()
    scenes = demo_scenes(2, 0)
    steps = []
    run = run_generations(pipeline, scenes, SMALL, steps=2, seed=5, on_step=steps.append)
    assert steps == [0, 1] * 3
    assert run.videos.shape == (2, 3, *SMALL)
    second = to_unit_range(generate(pipeline, scenes[1:], SMALL, steps=2, seed=6))
    assert torch.equal(run.videos[1:], second)


def test_compile_time_is_what_the_first_generation_took_longer():
    run = Run(torch.zeros(0), first_seconds=10.0, seconds=(2.0, 4.0))
    assert run.compile_seconds == 8.0
    assert run.mean_seconds == 3.0


def test_measures_come_one_row_a_video():
    videos = torch.rand(2, 3, 4, 16, 16)
    rows = measure(videos, torch.cat([videos[:1], videos[1:] * 0.5]))
    assert [row["psnr"] == 120 for row in rows] == [True, False]
    assert list(rows[0]) == ["psnr", "psnr_frame", "ssim", "flicker_gap"]


@pytest.mark.parametrize("regional", [False, True], ids=["whole model", "regional"])
def test_a_compiled_transformer_draws_the_same(regional):
    scenes = demo_scenes(1, 0)
    pipeline = load_pipeline()
    expected = generate(pipeline, scenes, SMALL, steps=1)
    compile_transformer(pipeline, "eager", regional=regional)
    assert torch.equal(generate(pipeline, scenes, SMALL, steps=1), expected)
