"""Options and environment become one checked Config."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from sparse_compile.budgets import BUDGETS
from sparse_compile.config import Config, declared_options
from sparse_compile.errors import SparseAttentionError
from sparse_compile.option_values import layer_ranges
from sparse_compile.presets import PRESET_NAMES, PRESETS


def test_defaults_are_those_of_the_table() -> None:
    config = Config.from_options(None, environ={})
    assert (config.method, config.min_kept, config.rank_by) == ("svg2", 0.1, "mass")
    assert all(getattr(config, budget) is None for budget in BUDGETS)
    assert (config.density_at_work, config.sparsity_at_work) == (0.25, 0.8)
    assert (config.kmeans_iters_init, config.kmeans_iters) == (50, 2)
    assert (config.dense_steps, config.dense_layers) == (0.2, 0.03)
    assert config.q_clusters is config.k_clusters is config.min_tokens is None
    assert not config.strict


def test_every_field_is_a_declared_option_with_a_doc() -> None:
    assert set(declared_options()) == {field.name for field in dataclasses.fields(Config)}
    assert all(option.doc and option.accepts for option in declared_options().values())


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("top_p", 0, r"\(0, 1\]"),
        ("top_p", 1.01, r"\(0, 1\]"),
        ("top_p", float("nan"), r"\(0, 1\]"),
        ("top_p", "much", r"\(0, 1\]"),
        ("top_p", True, r"\(0, 1\]"),
        ("min_kept", None, r"\[0, 1\]"),
        ("target_recall", 1, r"\(0, 1\)"),
        ("preset", "best", "none, quality, balanced or fast"),
        ("min_kept", 2, r"\[0, 1\]"),
        ("density", 0.0, "none or a number"),
        ("rank_by", "size", "mass_per_key"),
        ("q_clusters", 0, "auto or an integer"),
        ("k_clusters", 1.5, "auto or an integer"),
        ("kmeans_iters", 0, "integer >= 1"),
        ("dense_steps", 1.5, "share"),
        ("dense_steps", -1, "share"),
        ("dense_layers", "2-1", "list such as"),
        ("dense_layers", "first", "list such as"),
        ("min_tokens", -5, "auto or an integer"),
        ("text_position", "middle", "first or last"),
        ("kernel", "cuda", "cpu or reference"),
        ("strict", "maybe", "true or false"),
        ("lowering", "aot", "inductor or eager"),
        ("seed", -1, "integer >= 0"),
    ],
)
def test_a_value_out_of_range_names_the_rule_and_the_value(name: str, value: object, part: str) -> None:
    with pytest.raises(SparseAttentionError, match=rf"'{name}' must be .*{part}") as caught:
        Config.from_options({name: value}, environ={})
    assert repr(value) in str(caught.value)
    assert "options table" in str(caught.value)


def test_an_unknown_option_gets_the_nearest_name() -> None:
    with pytest.raises(SparseAttentionError, match=r"got 'topp'\. Did you mean 'top_p'\?"):
        Config.from_options({"topp": 0.5}, environ={})
    with pytest.raises(SparseAttentionError, match="Known: method, preset"):
        Config.from_options({"zzz": 0.5}, environ={})


def test_two_budgets_contradict_each_other() -> None:
    with pytest.raises(
        SparseAttentionError, match=r"one budget .*got 'density=0.2, top_p=0.9'\. Leave out all but one"
    ):
        Config.from_options({"top_p": 0.9, "density": 0.2}, environ={})
    with pytest.raises(SparseAttentionError, match="one budget"):
        Config.from_options({"method": "adaspa", "sparsity": 0.5, "target_recall": 0.9}, environ={})
    with pytest.raises(SparseAttentionError, match="min_density must not be above max_density"):
        Config.from_options({"target_recall": 0.9, "max_density": 0.01}, environ={})


@pytest.mark.parametrize(
    ("options", "density"),
    [
        ({}, 0.25),
        ({"density": 0.5}, 0.5),
        ({"top_p": 0.9}, None),
        ({"target_recall": 0.9}, None),
        ({"top_p": "none"}, 0.25),
    ],
)
def test_the_fixed_density_holds_where_no_other_budget_is_given(options: dict[str, object], density: float) -> None:
    assert Config.from_options(options, environ={}).density_at_work == density


def test_a_budget_of_none_leaves_what_lies_below_it() -> None:
    assert Config.from_options({"target_recall": None}, environ={"SPARSE_ATTN_DENSITY": "0.5"}).density == 0.5
    chosen = {"preset": "quality", "top_p": "none"}
    assert Config.from_options(chosen, environ={}).density == PRESETS["svg2"]["quality"]["density"]


def test_a_ceiling_counts_under_a_target_alone() -> None:
    assert Config(max_density=0.01).density_at_work == 0.25


def test_a_budget_given_as_an_option_replaces_one_of_the_environment() -> None:
    config = Config.from_options({"target_recall": 0.9}, environ={"SPARSE_ATTN_DENSITY": "0.5"})
    assert (config.target_recall, config.density) == (0.9, None)


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_a_preset_sets_what_is_not_given(method: str, preset: str) -> None:
    chosen = {"method": method, "preset": preset}
    config = Config.from_options(chosen, environ={})
    settings = PRESETS[method][preset]
    assert settings and all(getattr(config, name) == value for name, value in settings.items())
    by_option = Config.from_options({**chosen, "dense_steps": 3, "target_recall": 0.8}, environ={})
    assert (by_option.dense_steps, by_option.target_recall, by_option.density, by_option.sparsity) == (
        3,
        0.8,
        None,
        None,
    )
    by_variable = Config.from_options(chosen, environ={"SPARSE_ATTN_DENSE_STEPS": "0.5"})
    assert by_variable.dense_steps == 0.5


def test_a_preset_of_a_variable_counts_and_a_method_without_presets_has_none() -> None:
    environ = {"SPARSE_ATTN_PRESET": "fast"}
    assert Config.from_options({}, environ) == Config.from_options({"preset": "fast"}, environ={})
    with pytest.raises(SparseAttentionError, match=r"presets exist for svg2, adaspa; got .*'dense'"):
        Config.from_options({"method": "dense"}, environ)


def test_options_win_over_the_environment_and_both_over_defaults() -> None:
    environ = {"SPARSE_ATTN_TOP_P": "0.5", "SPARSE_ATTN_STRICT": "yes", "SPARSE_ATTN_DENSE_STEPS": "3"}
    config = Config.from_options({"top_p": 0.7}, environ=environ)
    assert (config.top_p, config.strict, config.dense_steps) == (0.7, True, 3)
    assert config.changed() == {"top_p": 0.7, "strict": True, "dense_steps": 3}


def test_a_point_makes_a_share_and_none_a_count() -> None:
    as_text = [Config.from_options({}, {"SPARSE_ATTN_DENSE_STEPS": text}).dense_steps for text in ("1", "1.0", "0.25")]
    assert [(value, type(value)) for value in as_text] == [(1, int), (1.0, float), (0.25, float)]


def test_an_unknown_variable_is_one_warning_with_the_nearest_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # the options are read for every graph
            Config.from_options({}, environ={"SPARSE_ATTN_TOPP": "0.5", "OTHER_TOPP": "1"})
    assert [record.getMessage() for record in caplog.records] == [
        "unknown environment variable SPARSE_ATTN_TOPP is ignored; did you mean SPARSE_ATTN_TOP_P?"
    ]


def test_a_variable_of_the_other_method_is_one_warning_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"SPARSE_ATTN_TOP_P": "0.5", "SPARSE_ATTN_DENSE_STEPS": "3"}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            config = Config.from_options({"method": "adaspa"}, environ)
    assert (config.top_p, config.dense_steps) == (Config().top_p, 3)
    assert [record.getMessage() for record in caplog.records] == [
        "environment variable SPARSE_ATTN_TOP_P is for method svg2 and has no effect on method adaspa"
    ]
    assert Config.from_options({}, environ).top_p == 0.5


def test_the_variable_of_another_project_is_never_ours(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Config.from_options({}, environ={"SPARSE_ATTN_BACKEND": "flash"}) == Config()
    assert not caplog.records


def test_equal_options_are_equal_configs_however_they_are_written() -> None:
    assert Config(top_p=1, k_clusters=None) == Config.from_options({"top_p": "1.0", "k_clusters": "auto"}, environ={})
    assert hash(Config(top_p=1)) == hash(Config(top_p=1.0))


@pytest.mark.parametrize(
    ("text", "ranges"), [("0", ((0, 0),)), ("0-2,-1", ((0, 2), (-1, -1))), (" 3 , 5-5", ((3, 3), (5, 5)))]
)
def test_lists_of_layers(text: str, ranges: tuple[tuple[int, int], ...]) -> None:
    assert layer_ranges(text) == ranges
