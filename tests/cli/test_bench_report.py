"""``sparse-attn bench report``: what is on the page and what is refused; from end to end in few steps."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sparse_compile
from sparse_compile.cli import bench_report, demo
from sparse_compile.cli.main import main
from sparse_compile.evaluation import page
from sparse_compile.evaluation.comparison import Run
from sparse_compile.evaluation.tap import TappedAttention
from sparse_compile.runtime.call_figures import CallReport
from sparse_compile.runtime.figures import GenerationReport, HeadReport
from sparse_compile.runtime.report import Report

SMALL = ["--size", "9x32x32", "--steps", "5"]
LAYERS = ("blocks.0.attn1", "blocks.1.attn1")
FEW_CLUSTERS = ["q_clusters=4", "k_clusters=8", "block_size=8"]


@pytest.fixture(autouse=True)
def forget_what_was_compiled(monkeypatch):
    for name in ("METHOD", "DENSITY", "SPARSITY", "MIN_TOKENS"):
        monkeypatch.delenv(f"SPARSE_ATTN_{name}", raising=False)
    yield
    torch.compiler.reset()


class FakeModel:
    """Stands for pipeline, compiler and tap: random videos, made-up reports, random q, k and v of few tokens."""

    def __init__(self):
        self.densities = {"svg2": 0.25, "adaspa": 0.3}
        self.tapped_at = None

    def compile_transformer(self, pipeline, backend, options, *, regional):
        pipeline.options = options

    def run_generations(self, pipeline, scenes, size, *, steps, seed, on_step):
        videos = torch.rand(len(scenes), 3, *size, generator=torch.Generator().manual_seed(seed))
        return Run(videos * (1.0 if pipeline.options is None else 0.9), 5.0, (2.0, 4.0)[: len(scenes)])

    def explain(self, pipeline):
        density = self.densities[pipeline.options["method"]]
        figures = (density, None if density is None else density + 0.2, None if density is None else 0.6)
        calls = (
            []
            if density is None
            else [CallReport(layer, 0, 1, 2, "cond", "sparse", density, 0.6, 0) for layer in LAYERS]
        )
        heads = [] if density is None else [HeadReport(layer, 0, "cond", [density] * 2, [0.6] * 2) for layer in LAYERS]
        return Report(
            generations=[GenerationReport([], *figures)] * 2, calls=calls, heads=heads, warnings=["mind <this>"]
        )

    def tap(self, pipeline, scene, size, *, steps, seed, at, on_step):
        self.tapped_at = at
        generator = torch.Generator().manual_seed(seed)
        return [
            TappedAttention(layer, step, "cond", *torch.randn(3, 1, 2, 64, 8, generator=generator).unbind(0), 8**-0.5)
            for step in at
            for layer in LAYERS
        ]


@pytest.fixture
def model(monkeypatch):
    fake = FakeModel()
    for module in (demo, bench_report):
        monkeypatch.setattr(module, "load_pipeline", lambda: SimpleNamespace(options=None))
    for name in ("compile_transformer", "run_generations"):
        monkeypatch.setattr(demo, name, getattr(fake, name))
    monkeypatch.setattr(sparse_compile, "explain", fake.explain)
    monkeypatch.setattr(bench_report, "tap", fake.tap)
    monkeypatch.setattr(page, "png_of", lambda figure: b"")  # tests/evaluation/test_plots.py draws
    return fake


@pytest.fixture
def report(tmp_path):
    """Run the command with these arguments: its exit code, and the page."""

    def run(*arguments, options=FEW_CLUSTERS):
        file = tmp_path / "out" / "report.html"
        code = main(["bench", "report", *SMALL, "--out", str(file), "--options", *options, *arguments])
        return code, file.read_text() if file.exists() else None

    return run


def headings(text):
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", text)


def test_the_page_has_all_sections_and_nothing_else_is_needed(model, report):
    code, text = report()
    assert code == 0
    assert headings(text) == [
        "What was run",
        "Methods",
        "Clips",
        "Layers and steps",
        "Heads",
        "Plans",
        "Single attention calls",
        "Warnings",
    ]
    assert not re.findall(r'(?:src|href|srcset)="(?!data:image/|#)', text)
    assert "<script" not in text
    assert "mind &lt;this&gt;" in text
    assert text.count("data:image/gif") == 2 * 2  # videos x methods
    assert model.tapped_at == (1, 2, 3)
    assert f"torch {torch.__version__}" in text


def test_results_of_a_sweep_are_shown_too(model, report, tmp_path):
    shared = {
        "videos": 4,
        "seeds": [0],
        "size": "9x32x32",
        "tokens": 576,
        "steps": 20,
        "guidance": 2.0,
        "ceiling": 99.0,
    }
    row = {
        "label": "svg2 a quarter", "series": "svg2", "method": "svg2", "correction": "none", "dense_steps": 0.2,
        "options": {"density": 0.25}, "density": 0.25, "density_run": 0.4, "psnr": 27.5, "psnr_min": 24.0,
    }  # fmt: skip
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps({**shared, **row}) + "\n")
    _, text = report("--results", str(file))
    assert headings(text)[-1] == "Quality sweep: results.jsonl"
    assert "svg2 a quarter" in text


def test_pictures_are_written_for_documents(model, report, tmp_path):
    report("--pictures", str(tmp_path / "pictures"))
    names = {f"{what}_{method}.png" for what in ("density", "heads") for method in ("svg2", "adaspa")}
    written = {path.name: path for path in (tmp_path / "pictures").iterdir()}
    assert written.keys() == names | {"plans_0.png", "plans_1.png"}
    with Image.open(written["plans_0.png"]) as picture:
        assert picture.width > 2 * picture.height


def test_a_method_that_made_nothing_sparse_is_named_and_not_judged(model, report, capsys):
    model.densities["adaspa"] = None
    code, text = report()
    assert code == 1
    assert "Nothing became sparse with adaspa" in capsys.readouterr().out
    assert "Nothing was sparse." in text
    assert "for svg2: recall" in text
    assert "for adaspa: recall" not in text


def test_without_anything_sparse_there_are_no_single_calls(model, report):
    model.densities = {"svg2": None, "adaspa": None}
    code, text = report()
    assert code == 1
    assert "Plans" not in headings(text)
    assert model.tapped_at is None


@pytest.mark.parametrize(
    ("options", "message"), [(["top=1"], "top_p"), (["method=nowhere:Class"], "must be importable")]
)
def test_what_cannot_run_is_refused_before_anything_runs(options, message, model, report, capsys):
    assert report(options=options) == (2, None)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_is_made_from_end_to_end(report, tmp_path):
    options = ["q_clusters=8", "k_clusters=24", "kmeans_iters_init=4"]
    code, text = report("--prompts", "1", "--pictures", str(tmp_path / "pictures"), options=options)
    assert code == 0
    assert text.count("<img ") == text.count('alt="')
    assert "Plans" in headings(text)
    assert 100_000 < len(text) < 12_000_000
    for path in (tmp_path / "pictures").iterdir():
        assert 1000 < path.stat().st_size < 400_000
