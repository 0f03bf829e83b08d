"""The shipped model: its prompts, its pipeline, and that it still draws what it was trained to draw."""

import json
from importlib import resources

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation.demo_model import (
    SHIFT,
    SHOWCASE,
    SLOTS,
    TRAINED_SIZES,
    Scene,
    VideoSize,
    demo_scenes,
    draw_scenes,
    generate,
    load_pipeline,
    prompt_embeds,
)

SMALL = VideoSize(4, 32, 32)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def sample_by_hand(model, scenes, noise, steps, guidance):
    """Classifier-free guidance written out: what the pipeline must amount to."""
    cond = prompt_embeds(scenes)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        time = t.expand(len(x))
        with torch.no_grad():
            with_prompt = model(x, time, cond, return_dict=False)[0]
            without = model(x, time, torch.zeros_like(cond), return_dict=False)[0]
        velocity = without + guidance * (with_prompt - without)
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
    return x.clamp(-1, 1)


def test_the_pipeline_equals_sampling_written_out_by_hand(pipeline):
    scenes = draw_scenes(2, 3)
    noise = torch.randn(2, 3, *SMALL, generator=torch.Generator().manual_seed(7))
    expected = sample_by_hand(pipeline.transformer, scenes, noise, steps=3, guidance=2.0)
    actual = generate(pipeline, scenes, SMALL, steps=3, guidance=2.0, latents=noise)
    assert torch.equal(actual, expected)


def test_the_seed_is_that_of_the_starting_noise(pipeline):
    scenes = demo_scenes(1, 0)
    noise = torch.randn(1, 3, *SMALL, generator=torch.Generator().manual_seed(7))
    from_seed = generate(pipeline, scenes, SMALL, steps=1, seed=7)
    assert torch.equal(from_seed, generate(pipeline, scenes, SMALL, steps=1, latents=noise))
    assert not torch.equal(from_seed, generate(pipeline, scenes, SMALL, steps=1, seed=8))


@pytest.mark.parametrize("size", [SMALL, *TRAINED_SIZES], ids=str)
def test_videos_have_the_size_that_was_asked_for(pipeline, size):
    steps_done = []
    video = generate(pipeline, demo_scenes(1, 0), size, steps=1, on_step=steps_done.append)
    assert video.shape == (1, 3, *size)
    assert video.abs().max() <= 1
    assert steps_done == [0]


def test_sizes_know_their_tokens():
    assert [size.tokens for size in TRAINED_SIZES] == [1152, 576]


def test_the_model_draws_the_colours_of_the_prompt(pipeline):
    words = ("circle", "red", "plain", "slow")
    scene = Scene.of(words, words, ("plain", "blue"))
    video = generate(pipeline, [scene], TRAINED_SIZES[1], steps=12)[0]
    red, _, blue = video
    share_of_red_shapes = (red > blue + 0.5).float().mean()
    share_of_blue_background = (blue > red + 0.2).float().mean()
    assert 0.03 < share_of_red_shapes < 0.5
    assert share_of_blue_background > 0.4


def test_the_weights_can_be_loaded_in_bfloat16():
    pipeline = load_pipeline(torch.bfloat16)
    assert pipeline.transformer.dtype == torch.bfloat16
    assert generate(pipeline, demo_scenes(1, 0), SMALL, steps=1).isfinite().all()


def test_a_scene_reads_as_a_sentence():
    scene = Scene.of(("square", "blue", "plain", "slow"), ("circle", "red", "striped", "fast"), ("dotted", "green"))
    sentence = "a fast striped red circle in front of a slow plain blue square, dotted green background"
    assert str(scene) == sentence


def test_unknown_words_are_refused():
    with pytest.raises(SparseAttentionError, match="got 'purple'"):
        Scene.of(("square", "purple", "plain", "slow"), ("circle", "red", "plain", "slow"), ("plain", "red"))


def test_drawn_scenes_depend_on_the_seed_alone():
    assert draw_scenes(4, 1) == draw_scenes(4, 1) != draw_scenes(4, 2)
    for scene in draw_scenes(20, 0):
        assert all(0 <= index < len(words) for index, words in zip(scene.attributes, SLOTS, strict=True))


def test_demo_scenes_begin_with_the_showcase():
    assert demo_scenes(2, 0) == list(SHOWCASE[:2])
    assert demo_scenes(6, 0)[len(SHOWCASE) :] == draw_scenes(2, 0)


def test_embeddings_are_the_numbers_that_the_model_was_trained_with():
    embeds = prompt_embeds([Scene((0,) * 10), Scene((2, 5, 2, 2, 2, 5, 2, 2, 2, 5))])
    assert embeds.shape == (2, 10, 64)
    trained = torch.tensor([[0.6745, 0.7316, 0.9535], [3.1522, -1.0216, 1.5300]])
    assert embeds[:, -1, :3].allclose(trained, atol=1e-4)


def test_the_checkpoint_is_package_data_and_describes_itself():
    folder = resources.files("sparse_compile.evaluation") / "tiny_video_dit"
    config = json.loads((folder / "config.json").read_text())
    assert config["num_layers"] == 6
    assert (folder / "README.md").read_text().startswith("# tiny_video_dit")
    assert (folder / "diffusion_pytorch_model.safetensors").is_file()
