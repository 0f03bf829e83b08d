"""The grids: what they contain, and that labels tell configurations apart."""

import pytest

from sparse_compile.cli.bench import GRIDS as OFFERED
from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation import grids
from sparse_compile.evaluation.grids import CORRECTIONS, DENSITIES, GRIDS, UNCORRECTED_DENSITIES, control, grid_named
from sparse_compile.evaluation.protocol import Protocol
from sparse_compile.evaluation.sweep import key_of_configuration

each_grid = pytest.mark.parametrize("name", GRIDS)


def test_the_command_offers_every_grid():
    assert tuple(GRIDS) == OFFERED


@each_grid
def test_this_version_accepts_every_configuration(name):
    for configuration in grid_named(name):
        Config.from_options(configuration.options)


@each_grid
def test_every_grid_has_the_controls_of_both_methods(name):
    found = {(c.options["method"], control(c.options)) for c in grid_named(name)}
    assert {(method, kind) for method in ("svg2", "adaspa") for kind in ("everything", "random")} <= found


def test_equal_options_have_equal_labels_and_other_options_other_labels():
    every = [configuration for name in GRIDS for configuration in grid_named(name)]
    without_presets = [configuration for configuration in every if "preset" not in configuration.options]
    every += [configuration.at_warm_up(share) for configuration in without_presets for share in (0.1, 0.3)]
    labels = {(configuration.label, key_of_configuration(Protocol(), configuration)) for configuration in every}
    assert len(labels) == len({label for label, _ in labels}) == len({key for _, key in labels}) > 100


def test_a_series_is_a_label_without_its_budget():
    series = {(c.label, c.series) for c in grid_named("pareto")}
    assert ("svg2 coupled density=0.25", "svg2 coupled density") in series
    assert ("svg2 none top_p=0.9", "svg2 none top_p") in series
    assert ("adaspa none sparsity=0.75", "adaspa none sparsity") in series


def test_another_warm_up_replaces_an_earlier_one():
    plain = grid_named("corrections")[0]
    early = plain.at_warm_up(0.1)
    assert early.label == f"{plain.label} dense_steps=0.1"
    assert early.at_warm_up(0.3) == plain.at_warm_up(0.3)
    assert early.at_warm_up(0.2) == plain == plain.at_warm_up(0.2)


def test_the_quick_grid_is_both_methods_with_each_correction_and_the_controls_of_the_default():
    measured = [c.options for c in grid_named("quick") if control(c.options) is None]
    assert [(options["method"], options["correction"]) for options in measured] == [
        (method, correction) for method in ("svg2", "adaspa") for correction in CORRECTIONS
    ]
    assert all(options.get("density") == 0.25 or options.get("sparsity") == 0.75 for options in measured)
    assert len(grid_named("quick")) == 6 + 4


def test_the_pareto_grid_has_each_density_of_both_methods_and_no_configuration_twice():
    configurations = grid_named("pareto")
    for method in ("svg2", "adaspa"):
        for correction in ("coupled", "none"):
            own = [
                c.options
                for c in configurations
                if (c.options["method"], c.options["correction"]) == (method, correction) and not control(c.options)
            ]
            kept = [o["density"] if method == "svg2" else 1 - o["sparsity"] for o in own if "top_p" not in o]
            assert kept == pytest.approx(DENSITIES if correction == "coupled" else UNCORRECTED_DENSITIES)
    labels = [configuration.label for configuration in configurations]
    assert len(labels) == len(set(labels))


def test_another_warm_up_is_another_configuration_and_the_usual_one_the_same():
    configuration = grid_named("pareto")[-1]
    early = configuration.at_warm_up(0.1)
    assert early.options["dense_steps"] == 0.1
    assert early.label.endswith(" dense_steps=0.1") and early.series.endswith(" dense_steps=0.1")
    assert configuration.at_warm_up(0.2) == configuration
    preset = grid_named("presets")[0]
    assert preset.at_warm_up(0.2).options["dense_steps"] == 0.2


def test_a_method_of_ones_own_stands_beside_the_controls():
    plug_in, *others = grids.of_plug_in("somewhere:Windows")
    assert plug_in.options["method"] == "somewhere:Windows" and plug_in.label.startswith("Windows")
    assert others and all(control(configuration.options) for configuration in others)


def test_an_unknown_grid_is_named():
    with pytest.raises(SparseAttentionError, match=r"got 'paretto'. Known: quick, corrections, pareto"):
        grid_named("paretto")
