"""The sections of the report hold the figures of the run that they are about."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from sparse_compile.evaluation import page
from sparse_compile.evaluation.comparison import Run
from sparse_compile.evaluation.demo_model import SHOWCASE, VideoSize
from sparse_compile.evaluation.judged_heads import JudgedHead, KeptPairs, judge, judged_steps, telling_heads
from sparse_compile.evaluation.method_runs import MethodRun
from sparse_compile.evaluation.quality_section import quality_sections
from sparse_compile.evaluation.report_sections import (
    Measured,
    clips_section,
    head_maps_of,
    heads_section,
    layer_table,
    layers_section,
    methods_section,
    monitor_notes,
    newest_calls,
    run_section,
    warnings_section,
)
from sparse_compile.evaluation.site_figures import SiteFigures, site_figures
from sparse_compile.evaluation.site_sections import maps_of, plans_section, sites_section
from sparse_compile.evaluation.tap import TappedAttention
from sparse_compile.runtime.call_figures import CallReport
from sparse_compile.runtime.figures import GenerationReport, HeadReport, StepReport
from sparse_compile.runtime.report import Report

SIZE = VideoSize(3, 16, 16)
LAYERS = ("blocks.0.attn1", "blocks.1.attn1")
SVG2 = {"method": "svg2", "q_clusters": 4, "k_clusters": 8, "density": 0.3}


@pytest.fixture(autouse=True)
def drawings_are_not_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/evaluation/test_plots.py renders them."""
    monkeypatch.setattr(page, "png_of", lambda figure: b"")


def a_call(layer: str, generation: int, step: int, density: float) -> CallReport:
    sparse = density < 1
    mass = density + 0.25 if sparse else None
    phase = "sparse" if sparse else "dense"
    return CallReport(layer, 0 if sparse else None, generation, step, "cond", phase, density, mass, 0)


def a_report(densities: Sequence[float] = (0.125, 0.25, 0.5), warnings: Sequence[str] = ()) -> Report:
    """A dense and a sparse step in each of as many generations as densities; the first one compiles."""
    calls = [
        a_call(layer, generation, step, density)
        for layer in LAYERS
        for generation, sparse in enumerate(densities)
        for step, density in enumerate((1.0, sparse))
    ]
    heads = [
        HeadReport(layer, 0, branch, [0.25, 0.25], [mass, 0.5])
        for layer in LAYERS
        for branch, mass in (("cond", 0.5), ("uncond", 0.75))
    ]
    return Report(calls=calls, heads=heads, warnings=list(warnings))


def a_row(psnr: float, density: float | None = 0.25) -> dict[str, object]:
    run = None if density is None else density + 0.2
    figures = {"psnr": psnr, "psnr_frame": psnr, "ssim": 0.9, "flicker_gap": 0.01}
    return {"prompt": "a scene", "density": density, "density_run": run, "kept_mass": 0.6, **figures}


def measured(**reports: Report) -> Measured:
    dense = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    methods = {
        name: MethodRun(
            {"method": name, "top_p": 0.5}, Run(dense * 0.9, 1.0, (1.0, 1.0)), report, [a_row(20), a_row(30)]
        )
        for name, report in reports.items()
    }
    return Measured([("versions", "1.2.3")], SIZE, SHOWCASE[:2], dense, methods)


def test_the_page_tells_what_the_monitor_decided_in_the_newest_generations() -> None:
    def step(number: int, note: str) -> StepReport:
        return StepReport(number, "cond", "sparse", 0.25, 0.5, 0, 0.25, 1, note=note)

    steps = [[step(1, "an old decision")], [step(1, ""), step(2, "searched again")], [step(1, "no search")]]
    report = a_report()
    report.generations = [GenerationReport(each, 0.25, 0.25, 0.5) for each in steps]
    told = ["Video 0, step 2: searched again.", "Video 1, step 1: no search."]
    assert monitor_notes(report, 2) == told
    (part,) = layers_section(measured(adaspa=report)).parts
    assert list(part.text) == told


# ---------------------------------------------------------------------- the run


def test_the_run_is_told_with_its_facts_and_options() -> None:
    (part,) = run_section(measured(svg2=a_report())).parts
    assert part.facts == [("versions", "1.2.3"), ("svg2", "method=svg2, top_p=0.5")]


def test_methods_have_means_and_the_lowest_psnr_and_each_video_is_there() -> None:
    (part,) = methods_section(measured(svg2=a_report(), adaspa=a_report())).parts
    (table,) = part.tables
    assert [row[0] for row in table.rows] == ["svg2", "adaspa"]
    assert table.rows[0][1:] == ["25.0", "20.0", "0.900", "0.010", "0.250", "0.450", "0.600"]
    assert len(table.header) == len(table.rows[0])
    (each,) = part.details
    assert [(row[0], row[1]) for row in each.rows][:2] == [("svg2, video 0", "20.0"), ("svg2, video 1", "30.0")]
    assert {len(row) for row in each.rows} == {len(each.header)}


def test_each_video_moves_beside_its_dense_one_and_their_difference() -> None:
    parts = clips_section(measured(svg2=a_report(), adaspa=a_report())).parts
    assert [part.title for part in parts] == [f"Video {n}: {scene}" for n, scene in enumerate(SHOWCASE[:2])]
    pictures = [picture for part in parts for picture in part.pictures]
    assert [picture.caption.partition(":")[0] for picture in pictures] == ["svg2", "adaspa"] * 2
    assert "PSNR 30.0 dB" in pictures[2].caption
    with Image.open(io.BytesIO(base64.b64decode(pictures[0].light.partition(",")[2]))) as gif:
        assert gif.n_frames == SIZE.frames
        assert gif.width > 3 * 160


# ---------------------------------------------------------------------- layers and heads


def test_the_generation_that_compiles_is_left_out() -> None:
    calls = newest_calls(a_report(), 2)
    assert {call.generation for call in calls} == {1, 2}


def test_layers_are_shown_and_told_in_words_and_numbers() -> None:
    (part,) = layers_section(measured(svg2=a_report())).parts
    density, mass = part.pictures
    assert "2 layers, 2 steps. Sparse calls compute 0.25 to 0.50 of the pairs, 0.38 on average" in density.alt
    assert "the first sparse step is 1" in density.alt
    assert "between 0.50 and 0.75, 0.62 on average" in mass.alt
    assert part.details[0] == layer_table(newest_calls(a_report(), 2))
    assert part.details[0].rows[0] == [LAYERS[0], "2", "0.375", "0.625", "0.500"]


def test_a_method_that_was_dense_throughout_has_no_picture() -> None:
    run = measured(svg2=Report(calls=[a_call(LAYERS[0], 0, 0, 1.0)]))
    (part,) = layers_section(run).parts
    assert (part.text, part.pictures) == (["Nothing was sparse."], ())
    (heads,) = heads_section(run).parts
    assert not heads.pictures
    assert heads.text


def test_heads_are_means_over_the_branches() -> None:
    mass, density = head_maps_of(a_report())
    assert (mass.title, dict(mass.values)) == ("kept mass", {layer: [0.625, 0.5] for layer in LAYERS})
    assert (density.title, dict(density.values)) == ("density", {layer: [0.25, 0.25] for layer in LAYERS})
    (picture,) = heads_section(measured(svg2=a_report())).parts[0].pictures
    assert "kept mass 0.50 to 0.62, mean 0.56; density 0.25 to 0.25" in picture.alt


def test_heads_whose_mass_was_not_measured_have_their_density() -> None:
    report = Report(heads=[HeadReport(LAYERS[0], 0, "cond", [0.5], None)])
    assert [each.title for each in head_maps_of(report)] == ["density"]


def test_warnings_are_shown_under_their_method() -> None:
    parts = warnings_section(measured(svg2=a_report(warnings=["mind this"]), adaspa=a_report())).parts
    assert [(part.title, list(part.warnings), list(part.text)) for part in parts] == [
        ("svg2", ["mind this"], []),
        ("adaspa", [], ["None."]),
    ]


# ---------------------------------------------------------------------- single calls


def figures_of(layer: str, step: int, head: int, recall: float, branch: str = "cond") -> SiteFigures:
    return SiteFigures(layer, step, branch, head, 0.25, recall, None, 0.1, 0.1)


@pytest.mark.parametrize(
    ("steps", "dense_steps", "judged"),
    [(20, 0.2, (4, 11, 18)), (5, 0.2, (1, 2, 3)), (3, 1, (1, 2)), (2, 1, (1,)), (2, 2, ())],
)
def test_judged_steps_lie_in_the_sparse_part_of_the_run(
    steps: int, dense_steps: float | int, judged: tuple[int, ...]
) -> None:
    assert judged_steps({"dense_steps": dense_steps}, steps) == judged


def test_the_telling_heads_gain_most_and_least_at_the_middle_step() -> None:
    rows = [figures_of(LAYERS[0], step, head, recall) for step in (1, 2, 3) for head, recall in enumerate((0.5, 0.9))]
    rows += [figures_of(LAYERS[1], 2, 0, 0.26), figures_of(LAYERS[1], 2, 0, 0.1, "uncond")]
    assert telling_heads(rows) == [rows[3], rows[6]]
    assert telling_heads(rows[:1]) == rows[:1]


def tapped() -> list[TappedAttention]:
    generator = torch.Generator().manual_seed(0)
    return [
        TappedAttention(layer, step, "cond", *torch.randn(3, 1, 2, 48, 8, generator=generator).unbind(0), 8**-0.5)
        for step in (1, 2)
        for layer in LAYERS
    ]


def test_a_judged_head_agrees_with_the_figures_of_its_call() -> None:
    calls = tapped()
    rows = site_figures(calls, SVG2, reuse_after=1)
    chosen = rows[-1]
    head = judge(calls, chosen, {"svg2": SVG2})
    kept = head.kept["svg2"]
    assert (head.layer, head.step, head.branch, head.head) == (LAYERS[1], 2, "cond", 1)
    assert (kept.density, kept.recall) == (pytest.approx(chosen.density), pytest.approx(chosen.recall))
    assert (head.mass * kept.pairs).sum().item() / 48 == pytest.approx(chosen.recall)


def test_plans_stand_beside_true_attention() -> None:
    pairs = torch.eye(12, dtype=torch.bool)
    kept = {"svg2": KeptPairs(pairs, 0.1, 0.4), "adaspa": KeptPairs(pairs, 0.2, 0.5)}
    head = JudgedHead(LAYERS[0], 3, "cond", 1, torch.full((12, 12), 1 / 12), kept)
    assert [each.title for each in maps_of(head)] == [
        "true attention",
        "svg2: density 0.10, recall 0.40",
        "adaspa: density 0.20, recall 0.50",
    ]
    section = plans_section([head], 4)
    (part,) = section.parts
    assert part.title == "Most to gain: blocks.0.attn1, head 1, step 3, branch cond"
    assert len(part.pictures) == 3
    assert "0.20 of all, which hold 0.50 of the attention" in part.pictures[2].alt


def test_single_calls_have_their_spread_and_a_picture() -> None:
    rows = site_figures(tapped(), SVG2, reuse_after=1)
    section = sites_section({"svg2": rows}, (1, 2), 1)
    assert "steps 1, 2 (2 layers, 4 heads" in section.text[0]
    table = section.parts[0].tables[0]
    assert [row[0] for row in table.rows] == ["density", "recall", "reuse_recall", "rel_l1", "rel_l2"]
    assert table.header == ("figure", "mean", "p5", "minimum", "p95", "maximum")
    mean, _, low, _, high = (float(value) for value in table.rows[1][1:])
    assert 0 < low <= mean <= high <= 1
    (picture,) = section.parts[-1].pictures
    assert f"The lowest recall is {min(row.recall for row in rows):.2f}" in picture.alt


# ---------------------------------------------------------------------- results of a sweep


def swept(series: str, density: float, psnr: float, **options: object) -> dict[str, object]:
    shared = {"videos": 4, "seeds": [0, 1], "size": "9x32x32", "tokens": 576, "steps": 20, "guidance": 2.0}
    found = {"density": density, "density_run": density + 0.2, "kept_mass": 0.5, "psnr": psnr, "psnr_min": psnr - 2}
    chosen = {"method": "svg2", "density": density, **options}
    row = {"label": f"{series} {density}", "series": series, "method": "svg2", "correction": "none", "dense_steps": 0.2}
    return {**shared, **found, **row, "options": chosen, "ssim": 0.9, "flicker_gap": 0.1, "ceiling": 120.0}


def test_a_sweep_has_its_plot_and_its_tables() -> None:
    rows = [swept("svg2", 0.25, 26.0), swept("svg2", 0.5, 31.0), swept("random", 0.25, 15.0, rank_by="random")]
    (section,) = quality_sections([("results.jsonl", rows)])
    assert section.title == "Quality sweep: results.jsonl"
    assert "Noise ceiling (dense eager against dense compiled): 120.0 dB" in section.text[0]
    assert sum(len(part.pictures) for part in section.parts) == 1
    cost, controls = (table for part in section.parts for table in part.tables)
    assert cost.rows[0][1:4] == ["0.450 (2.2x)", "0.700 (1.4x)", "0.700 (1.4x)"]
    assert [row[0] for row in controls.rows] == ["random 0.25"]
    (each,) = (table for part in section.parts for table in part.details)
    assert each.caption == "First 20% of the steps dense"
    assert [row[0] for row in each.rows] == ["svg2 0.25", "svg2 0.5"]


def test_a_file_without_rows_of_a_sweep_says_so() -> None:
    (section,) = quality_sections([("other.jsonl", [{"key": 1}])])
    assert section.text == ["It holds no rows of a sweep."]
    assert quality_sections([]) == []
