"""Pictures of a report show the numbers they were given, under the names of layers, steps and heads."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm
from PIL import Image

from sparse_compile.evaluation.plan_pictures import DECADES, MOST_CELLS, PairMap, pair_maps
from sparse_compile.evaluation.plots import (
    DARK,
    LIGHT,
    MOST_LINES,
    MOST_TICKS,
    SCREEN_DPI,
    WIDTH,
    HeadMap,
    density_map,
    head_maps,
    kept_mass_by_step,
    png_of,
    short_names,
)
from sparse_compile.runtime.call_figures import CallReport


def a_call(layer: int, step: int, density: float, mass: float | None = None, branch: str = "cond") -> CallReport:
    dense = density == 1
    return CallReport(
        f"blocks.{layer}.attn1", None if dense else 0, 1, step, branch, "dense" if dense else "sparse", density, mass, 0
    )


CALLS = [
    a_call(0, 0, 1.0),
    a_call(0, 1, 0.2, 0.5),
    a_call(0, 1, 0.4, 0.7, "uncond"),
    a_call(0, 2, 0.3, 0.9),
    a_call(1, 0, 1.0),
    a_call(1, 1, 0.5, 0.6),
]


def labels(ticks) -> list[str]:
    return [tick.get_text() for tick in ticks]


def test_density_is_a_row_a_layer_and_a_column_a_step_with_gaps_where_nothing_ran() -> None:
    axes = density_map(CALLS, "svg2: density").axes[0]
    shown = np.ma.filled(axes.images[0].get_array(), math.nan)
    np.testing.assert_allclose(shown, [[1.0, 0.3, 0.3], [1.0, 0.5, math.nan]])
    assert axes.images[0].get_clim() == (0, 1)
    assert (labels(axes.get_yticklabels()), labels(axes.get_xticklabels())) == (["0", "1"], ["0", "1", "2"])
    assert (axes.get_title(), axes.get_xlabel()) == ("svg2: density", "denoising step")
    assert axes.get_ylabel() == "layer N of blocks.N.attn1"


def test_kept_mass_is_a_line_a_layer_over_its_sparse_steps() -> None:
    axes = kept_mass_by_step(CALLS, "svg2").axes[0]
    assert [line.get_label() for line in axes.lines] == ["0", "1"]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 0.6], [2, 0.9]])
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[1, 0.6]])
    assert len({line.get_marker() for line in axes.lines}) == 2  # told apart without colour
    assert axes.get_legend().get_title().get_text() == "layer N of blocks.N.attn1"


def test_many_layers_have_no_legend_and_fewer_ticks_than_names() -> None:
    layers = MOST_LINES + 30
    calls = [a_call(layer, step, 0.25, 0.5) for layer in range(layers) for step in range(50)]
    lines = kept_mass_by_step(calls, "svg2").axes[0]
    assert lines.get_legend() is None
    assert len(lines.lines) == layers
    axes = density_map(calls, "svg2").axes[0]
    assert 5 < len(axes.get_yticks()) <= MOST_TICKS
    assert 5 < len(axes.get_xticks()) <= MOST_TICKS


def test_heads_of_layers_stand_side_by_side_with_their_numbers() -> None:
    masses = {"blocks.0.attn1": [0.5, 0.75], "blocks.1.attn1": [0.9]}
    densities = {"blocks.0.attn1": [0.2, 0.2], "blocks.1.attn1": [0.3]}
    figure = head_maps([HeadMap("kept mass", masses), HeadMap("density", densities)], "svg2")
    left, right = figure.axes[:2]
    assert (left.get_title(), right.get_title()) == ("kept mass", "density")
    np.testing.assert_allclose(np.ma.filled(left.images[0].get_array(), math.nan), [[0.5, 0.75], [0.9, math.nan]])
    assert [text.get_text() for text in left.texts] == ["0.50", "0.75", "0.90"]
    assert figure.get_suptitle() == "svg2"


def test_many_heads_have_no_numbers() -> None:
    values = {f"blocks.{layer}": [0.5] * 40 for layer in range(3)}
    axes = head_maps([HeadMap("kept mass", values)], "svg2").axes[0]
    assert not axes.texts
    assert len(axes.get_xticks()) <= MOST_TICKS


@pytest.mark.parametrize(
    ("layers", "names", "axis"),
    [
        (["blocks.0.attn1", "blocks.10.attn1"], ["0", "10"], "layer N of blocks.N.attn1"),
        (["a.0.x", "b.0.y"], ["a.x", "b.y"], "layer N of N.0.N"),
        (["blocks.0", "single.0.attn"], ["blocks.0", "single.0.attn"], "layer"),
        (["blocks.0.attn1"], ["blocks.0.attn1"], "layer"),
    ],
    ids=["one number", "two parts", "of different depth", "alone"],
)
def test_names_are_as_short_as_they_can_be(layers: list[str], names: list[str], axis: str) -> None:
    assert short_names(layers) == (names, axis)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_a_picture_has_the_colours_of_its_page(theme) -> None:
    figure = density_map(CALLS, "svg2", theme)
    with Image.open(io.BytesIO(png_of(figure, SCREEN_DPI))) as picture:
        pixels = np.asarray(picture.convert("RGB"))
        assert picture.width == WIDTH * SCREEN_DPI
    paper = tuple(int(theme.paper[at : at + 2], 16) for at in (1, 3, 5))
    assert tuple(pixels[2, 2]) == pytest.approx(paper, abs=3)
    assert figure.axes[0].title.get_color() == theme.ink


# ---------------------------------------------------------------------- plans


def test_a_plan_shows_pairs_and_borders_of_frames() -> None:
    kept = torch.zeros(12, 12, dtype=torch.bool)
    kept[3, 5] = True
    figure = pair_maps([PairMap("svg2", kept, False)], tokens_per_frame=4)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), kept.double().numpy())
    assert axes.images[0].get_clim() == (0, 1)
    borders = {line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[1]}
    assert borders == {4, 8}
    assert len(axes.lines) == 4


def test_true_attention_is_on_a_logarithmic_scale_below_its_strongest_pair() -> None:
    mass = torch.softmax(10 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0)), 1)
    axes = pair_maps([PairMap("true", mass, True), PairMap("plan", mass > 0.1, False)], 4, "a head").axes
    assert isinstance(axes[0].images[0].norm, LogNorm)
    low, high = axes[0].images[0].get_clim()
    assert high == pytest.approx(mass.max().item())
    assert high / low == pytest.approx(10**DECADES)
    assert not isinstance(axes[1].images[0].norm, LogNorm)


def test_long_sequences_are_averaged_over_squares_and_keep_their_axes() -> None:
    tokens = 2 * MOST_CELLS + 1
    kept = torch.zeros(tokens, tokens, dtype=torch.bool)
    kept[:3, 0] = True
    axes = pair_maps([PairMap("svg2", kept, False)], 100).axes[0]
    cells = axes.images[0].get_array()
    assert max(cells.shape) <= MOST_CELLS
    assert cells[0, 0] == pytest.approx(1 / 3)
    assert cells.mean() * cells.size == pytest.approx(1 / 3)
    assert axes.images[0].get_extent() == [0, tokens, tokens, 0]
