"""The dense-against-sparse runner: options, seeds, times."""

import pytest
import torch

from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation.comparison import (
    Run,
    compile_transformer,
    demo_options,
    demo_runs,
    measure,
    resolved_options,
    run_generations,
)
from sparse_compile.evaluation.demo_model import VideoSize, demo_scenes, generate, load_pipeline
from sparse_compile.evaluation.metrics import to_unit_range

SMALL = VideoSize(4, 32, 32)


SVG2 = {"method": "svg2", "min_tokens": 64, "dense_layers": 0, "density": 0.25, "q_clusters": 24, "k_clusters": 72}
ADASPA = {"method": "adaspa", "min_tokens": 64, "dense_layers": 0, "sparsity": 0.75, "block_size": 16}
PLUG_IN = {"method": "module:Class", "min_tokens": 64, "dense_layers": 0}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("METHOD", "DENSITY", "SPARSITY", "MIN_TOKENS"):
        monkeypatch.delenv(f"SPARSE_ATTN_{name}", raising=False)


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        ({}, {}, SVG2),
        ({"method": "adaspa"}, {}, ADASPA),
        ({}, {"SPARSE_ATTN_METHOD": "adaspa"}, ADASPA),
        ({"method": "svg2"}, {"SPARSE_ATTN_METHOD": "adaspa"}, SVG2),
        ({"method": "module:Class"}, {}, PLUG_IN),
        ({"density": "0.5"}, {}, {**SVG2, "density": "0.5"}),
        ({"method": "adaspa", "block_size": "8"}, {}, {**ADASPA, "block_size": "8"}),
    ],
    ids=["default", "adaspa", "environment", "given over environment", "plug-in", "svg2's option", "adaspa's option"],
)
def test_a_run_has_what_suits_its_method_and_what_is_given_wins(given, environ, expected):
    assert demo_options(given, environ) == expected


@pytest.mark.parametrize("value", ["40", "auto"], ids=["a value", "the default"])
def test_the_environment_wins_over_the_options_of_the_demo(value):
    assert "k_clusters" not in demo_options({}, {"SPARSE_ATTN_K_CLUSTERS": value})


def test_the_environment_of_the_process_is_read(monkeypatch):
    monkeypatch.setenv("SPARSE_ATTN_METHOD", "adaspa")
    assert list(demo_runs({})) == ["adaspa"]


@pytest.mark.parametrize(
    ("given", "environ"), [({"top_p": "0.8"}, {}), ({}, {"SPARSE_ATTN_TOP_P": "0.8"})], ids=["given", "environment"]
)
def test_a_top_p_is_not_replaced_by_the_density_of_the_demo(given, environ):
    assert "density" not in demo_options(given, environ)


def test_without_a_method_each_option_goes_to_the_runs_that_read_it():
    runs = demo_runs({"density": "0.5", "block_size": "8", "dense_steps": "1"}, {})
    assert runs == {
        "svg2": {**SVG2, "density": "0.5", "dense_steps": "1"},
        "adaspa": {**ADASPA, "block_size": "8", "dense_steps": "1"},
    }


def test_a_variable_of_one_method_leaves_the_run_of_the_other_as_it_was():
    environ = {"SPARSE_ATTN_DENSITY": "0.5", "SPARSE_ATTN_SEARCH_STEPS": "1", "SPARSE_ATTN_SEED": "3"}
    configs = {method: Config.from_options(options, environ) for method, options in demo_runs({}, environ).items()}
    assert (configs["svg2"].density, configs["svg2"].search_steps) == (0.5, Config.search_steps)
    assert (configs["adaspa"].density, configs["adaspa"].search_steps) == (None, (1,))
    assert [config.seed for config in configs.values()] == [3, 3]


@pytest.mark.parametrize(
    ("given", "environ", "method"),
    [
        ({"method": "svg2", "seed": "3"}, {}, "svg2"),
        ({"method": "dense", "seed": "3"}, {}, "dense"),
        ({"method": "module:Class", "seed": "3"}, {}, "module:Class"),
        ({"seed": "3"}, {"SPARSE_ATTN_METHOD": "svg2"}, "svg2"),
    ],
    ids=["built-in", "dense", "plug-in", "environment, though it is the default"],
)
def test_a_method_that_was_chosen_runs_alone_with_all_options(given, environ, method):
    runs = demo_runs(given, environ)
    assert list(runs) == [method]
    assert (runs[method]["method"], runs[method]["seed"]) == (method, "3")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"densty": "0.5"}, "Did you mean 'density'"),
        ({"sparsity": "1.5"}, "'sparsity' must be none or a number in"),
        ({"method": "svg2", "sparsity": "0.5"}, "'sparsity' belongs to method 'adaspa'"),
        ({"method": "adaspa", "density": "0.5"}, "'density' belongs to method 'svg2'"),
        ({"preset": "best"}, "quality, balanced or fast"),
    ],
    ids=["unknown", "out of range", "adaspa's under svg2", "svg2's under adaspa", "no preset"],
)
def test_wrong_options_are_refused(given, message):
    with pytest.raises(SparseAttentionError, match=message):
        demo_runs(given, {})


def test_resolved_options_are_the_values_that_the_backend_reads():
    environ = {"SPARSE_ATTN_DENSITY": "0.5", "SPARSE_ATTN_SEED": "3"}
    runs = demo_runs({"sparsity": "0.5"}, environ)
    assert resolved_options(runs["svg2"], environ) == {**SVG2, "density": 0.5, "seed": 3, "correction": "coupled"}
    assert resolved_options(runs["adaspa"], environ) == {**ADASPA, "sparsity": 0.5, "seed": 3, "correction": "coupled"}


@pytest.mark.parametrize(
    ("given", "correction"),
    [
        ({"method": "svg2", "correction": "none"}, "none"),
        ({"method": "adaspa", "correction": "auto"}, "coupled"),
        ({"method": "module:Class"}, "auto"),
    ],
    ids=["given", "auto", "a plug-in decides itself"],
)
def test_the_correction_of_a_run_is_named(given, correction):
    assert resolved_options(demo_options(given, {}), {})["correction"] == correction


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
