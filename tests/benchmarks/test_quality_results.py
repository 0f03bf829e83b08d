"""What the committed sweep has to show, whatever its figures: the claims of docs/quality.md."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.quality_tables import SWEEP, row_of
from sparse_compile.evaluation import grids
from sparse_compile.evaluation.grids import Configuration, at_density, configuration, control, controls
from sparse_compile.evaluation.results import Row, checkpoint_digest

ALIKE = 0.5
"""Decibels by which PSNR may fall while density rises."""
RUNS_ALIKE = 0.01
"""Difference of density_run up to which rows are compared."""


MEASURED = (*grids.pareto(), *grids.front(), *grids.recall(), *grids.presets())


def row(made: Configuration) -> Row:
    return row_of(SWEEP, made.label)


def rows(*made: Configuration) -> list[Row]:
    return [row(each) for each in made]


def default(density: float) -> Row:
    return row(at_density("svg2", density))


def test_every_row_is_of_the_shipped_checkpoint_and_of_twelve_videos() -> None:
    shown = (grids.pareto, grids.selection, grids.paper, grids.front, grids.recall, grids.presets)
    for made in (each for grid in shown for each in grid()):
        found = row(made)
        assert found["checkpoint"] == checkpoint_digest(), made.label
        assert (found["videos"], found["seeds"], found["steps"]) == (4, [0, 1, 2], 20)
        assert found["recompilations"] == 0


def test_everything_kept_is_lossless_and_random_plans_lose_to_the_method_itself() -> None:
    for made in controls(["coupled", "none"]):
        found = row(made)
        if control(made.options) == "everything":
            assert found["lossless"], made.label
        else:
            assert found["psnr"] < row(at_density(found["method"], 0.25, correction=found["correction"]))["psnr"]


@pytest.mark.parametrize("density", [0.15, 0.25])
def test_the_default_beats_both_papers_at_equal_density_run(density: float) -> None:
    ours, (svg2, adaspa) = default(density), (row(grids.of_paper(method, density)) for method in ("svg2", "adaspa"))
    for theirs, decibels in ((svg2, 5), (adaspa, 3)):
        assert abs(ours["density_run"] - theirs["density_run"]) <= RUNS_ALIKE
        assert ours["psnr"] >= theirs["psnr"] + decibels


def test_the_default_reaches_28_decibels_at_a_quarter_of_the_pairs() -> None:
    found = default(0.25)
    assert found["dense_steps"] == 0.2 and found["density"] == pytest.approx(0.25, abs=0.01)
    assert found["psnr"] >= 28


@pytest.mark.parametrize("correction", ["coupled", "none"])
@pytest.mark.parametrize("method", ["svg2", "adaspa"])
def test_more_pairs_are_no_worse(method: str, correction: str) -> None:
    densities = grids.DENSITIES if correction == "coupled" else grids.UNCORRECTED_DENSITIES
    decibels = [row(at_density(method, density, correction=correction))["psnr"] for density in densities]
    assert all(later >= earlier - ALIKE for earlier, later in itertools.pairwise(decibels)), decibels


@pytest.mark.parametrize("target", grids.TARGETS)
@pytest.mark.parametrize("method", ["svg2", "adaspa"])
def test_a_recall_target_without_a_ceiling_is_met(method: str, target: float) -> None:
    found = row(configuration(method, {"target_recall": target}))
    assert target - 0.01 <= found["kept_mass"] <= target + 0.05
    assert found["at_ceiling"] == 0


def of_preset(name: str) -> Row:
    return row(configuration("svg2", {"preset": name}))


def test_the_quality_preset_reaches_30_decibels_and_presets_are_on_the_front() -> None:
    quality, balanced, fast = (of_preset(name) for name in grids.PRESETS)
    reaching = [found for made in MEASURED if (found := row(made))["psnr"] >= 30]
    assert quality["density_run"] == min(found["density_run"] for found in reaching)
    assert quality["density_run"] <= 0.5
    assert quality["density_run"] >= balanced["density_run"] >= fast["density_run"]
    assert quality["psnr"] >= balanced["psnr"] >= fast["psnr"]
