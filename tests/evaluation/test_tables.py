"""Rows of a sweep as Markdown and as a picture."""

import pytest
from matplotlib.axes import Axes
from PIL import Image

from sparse_compile.evaluation import pareto_plot
from sparse_compile.evaluation.grids import at_density, configuration
from sparse_compile.evaluation.tables import Column, cheapest, markdown, report

CEILING = 110.0


def row(configured, psnr, density, *, warm_up=0.2, **changes):
    return {
        "label": configured.label,
        "series": configured.series,
        "options": dict(configured.options),
        "method": configured.options["method"],
        "correction": configured.options["correction"],
        "dense_steps": warm_up,
        "psnr": psnr,
        "psnr_min": psnr - 3,
        "ssim": 0.9,
        "flicker_gap": 0.125,
        "density": density,
        "density_run": None if density is None else warm_up + (1 - warm_up) * density,
        "kept_mass": 0.5,
        "ceiling": CEILING,
        "videos": 4,
        "seeds": [0, 1, 2],
        "size": "9x32x32",
        "tokens": 576,
        "steps": 20,
        "guidance": 2.0,
        **changes,
    }


ROWS = [
    row(at_density("svg2", 1.0), 109.0, 1.0),
    row(at_density("svg2", 0.25, rank_by="random"), 24.0, 0.25),
    row(at_density("svg2", 0.25), 33.0, 0.25),
    row(at_density("svg2", 0.1), 29.0, 0.1),
    row(at_density("svg2", 0.25).at_warm_up(0.1), 31.0, 0.25, warm_up=0.1),
    row(at_density("adaspa", 0.25, correction="none"), 21.0, 0.25),
    row(configuration("svg2", {"top_p": 0.9}), 40.0, None),
]


def section(text, heading):
    return text.partition(f"## {heading}")[2].partition("##")[0]


def test_a_table_has_numbers_at_the_right_and_dashes_for_what_is_unknown():
    columns = [Column("name", "label"), Column("PSNR", "psnr", ".1f"), Column("mass", "kept_mass", ".2f")]
    assert markdown(columns, [{"label": "a", "psnr": 30.26, "kept_mass": None}]) == (
        "| name | PSNR | mass |\n| --- | ---: | ---: |\n| a | 30.3 | - |"
    )


def test_the_report_names_the_videos_and_the_ceiling_first():
    text = report(ROWS)
    assert text.index("Noise ceiling (dense eager against dense compiled): 110.0 dB") < text.index("## Controls")
    assert "4 scenes of 9x32x32 pixels, 576 tokens, from the noise of seeds 0, 1, 2; 20 steps, guidance 2." in text


def test_controls_stand_apart_and_each_warm_up_share_has_its_table():
    text = report(ROWS)
    controls, early, usual = (
        section(text, name) for name in ("Controls", "First 10% of the steps dense", "First 20% of the steps dense")
    )
    assert "svg2 coupled density=1 " in controls and "rank_by=random" in controls and controls.count("\n| ") == 4
    assert "| svg2 coupled density=0.25 dense_steps=0.1 | 0.250 | 0.325 | 0.50 | 31.0 | 28.0 | 0.900 | 0.125 |" in early
    assert "| svg2 coupled density=0.25 | 0.250 | 0.400 |" in usual and "random" not in usual


def test_the_cheapest_run_that_reaches_a_psnr_is_found_for_each_series():
    found = {costs["series"]: costs for costs in cheapest(ROWS[2:])}
    svg2 = found["svg2 coupled density"]
    assert (svg2["25"], svg2["28"], svg2["30"], svg2["32"]) == ("0.280 (3.6x)",) * 2 + ("0.400 (2.5x)",) * 2
    assert found["adaspa none sparsity"]["25"] is None
    assert found["svg2 coupled top_p"]["25"] is None, "without a density nothing is known to be cheap"


@pytest.fixture
def drawn(monkeypatch):
    """The labels of everything that is drawn, with its points."""
    lines = {}
    plot = Axes.plot

    def noted(axes, x, y, *style, **named):
        lines.setdefault(named.get("label", "random"), []).append((x, y))
        return plot(axes, x, y, *style, **named)

    monkeypatch.setattr(Axes, "plot", noted)
    return lines


def test_the_plot_has_a_line_for_each_series_and_crosses_for_random_plans(drawn, tmp_path):
    png, svg = pareto_plot.draw(ROWS, tmp_path / "pareto")
    assert Image.open(png).width > 800 and "<svg" in svg.read_text()
    assert drawn["svg2 coupled density"] == [((pytest.approx(0.28), pytest.approx(0.4)), (29.0, 33.0))]
    assert drawn["random"] == [(pytest.approx(0.4), 24.0)]
    assert "svg2 coupled top_p" not in drawn


@pytest.mark.parametrize(("ceiling", "lines"), [(34.0, 1), (110.0, 0)])
def test_the_ceiling_is_a_line_where_it_is_near(ceiling, lines, monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(Axes, "axhline", lambda _, y, **named: found.append(y))
    pareto_plot.draw([{**each, "ceiling": ceiling} for each in ROWS], tmp_path / "pareto")
    assert found == [ceiling] * lines
