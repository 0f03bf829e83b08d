"""``sparse-attn demo`` and ``explain``: what is printed, written and refused; from end to end in few steps."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sparse_compile
from sparse_compile.cli import demo
from sparse_compile.cli.main import main
from sparse_compile.evaluation.comparison import Run
from sparse_compile.runtime.figures import GenerationReport
from sparse_compile.runtime.report import Report

SMALL = ["--size", "9x32x32", "--steps", "5"]
PLUG_IN = "sparse_compile.strategies.adaspa:AdaSpa"


@pytest.fixture(autouse=True)
def forget_what_was_compiled(monkeypatch):
    for name in ("METHOD", "DENSITY", "SPARSITY", "MIN_TOKENS"):
        monkeypatch.delenv(f"SPARSE_ATTN_{name}", raising=False)
    yield
    torch.compiler.reset()


class FakeModel:
    """Stands for pipeline and compiler: notes what is compiled and gives random videos and made-up reports."""

    def __init__(self):
        self.compiled = []
        self.densities = {"svg2": (0.25, 0.35), "adaspa": (0.3, 0.4)}

    def load_pipeline(self):
        return SimpleNamespace(backend=None, options=None)

    def compile_transformer(self, pipeline, backend, options, *, regional):
        pipeline.backend, pipeline.options = backend, options
        self.compiled.append((backend, options, regional))

    def run_generations(self, pipeline, scenes, size, *, steps, seed, on_step):
        videos = torch.rand(len(scenes), 3, *size, generator=torch.Generator().manual_seed(seed))
        damage = {None: 1.0, "svg2": 0.9, "adaspa": 0.8}.get((pipeline.options or {}).get("method"), 0.5)
        for step in range(steps * (len(scenes) + 1)):
            on_step(step)
        return Run(videos * damage, 5.0, (2.0, 4.0)[: len(scenes)])

    def explain(self, pipeline):
        densities = self.densities.get(pipeline.options["method"], (0.5,))
        generations = [
            GenerationReport([], density, None if density is None else density + 0.2, kept_mass)
            for density, kept_mass in [(0.9, None), *((density, 0.6) for density in densities)]
        ]
        return Report(generations=generations, compilations=3)


@pytest.fixture
def model(monkeypatch):
    fake = FakeModel()
    for name in ("load_pipeline", "compile_transformer", "run_generations"):
        monkeypatch.setattr(demo, name, getattr(fake, name))
    monkeypatch.setattr(sparse_compile, "explain", fake.explain)
    return fake


@pytest.fixture
def show(tmp_path):
    """Run the demo with these arguments: its exit code, and the JSON that it wrote."""

    def run(*arguments, prompts=2):
        figures = tmp_path / "figures.json"
        common = ["--prompts", str(prompts), "--out", str(tmp_path), "--json", str(figures)]
        code = main(["demo", *SMALL, *common, *arguments])
        return code, json.loads(figures.read_text()) if figures.exists() else None

    return run


def test_dense_runs_once_and_each_method_with_its_own_options(model, show):
    code, result = show("--options", "density=0.5", "block_size=8", "dense_steps=1", "--regional")
    assert code == 0
    (dense, _, _), *methods = model.compiled
    assert dense == "inductor"
    assert [(backend, options["method"], regional) for backend, options, regional in methods] == [
        ("sparse_attn", "svg2", True),
        ("sparse_attn", "adaspa", True),
    ]
    svg2, adaspa = (options for _, options, _ in methods)
    assert (svg2["density"], svg2["dense_steps"], "block_size" in svg2) == ("0.5", "1", False)
    assert (adaspa["block_size"], adaspa["dense_steps"], "density" in adaspa) == ("8", "1", False)
    assert result["runs"]["svg2"]["options"]["density"] == 0.5


def test_a_method_runs_alone(model, show, tmp_path):
    code, result = show("--options", "method=adaspa", "sparsity=0.5", prompts=1)
    assert code == 0
    assert [backend for backend, _, _ in model.compiled] == ["inductor", "sparse_attn"]
    assert list(result["runs"]) == ["adaspa"]
    assert result["runs"]["adaspa"]["options"]["sparsity"] == 0.5
    assert not list(tmp_path.glob("*svg2*"))


def test_a_method_in_the_environment_runs_alone(model, show, monkeypatch):
    monkeypatch.setenv("SPARSE_ATTN_METHOD", "svg2")
    _, result = show()
    assert list(result["runs"]) == ["svg2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["topp=0.5"], "got 'topp'. Did you mean 'top_p'?"),
        (["sparsity=2"], "'sparsity' must be"),
        (["method=svg2", "sparsity=0.5"], "belongs to method 'adaspa'"),
        (["method=sgv2"], "'method' must name an installed strategy"),
        (["method=nowhere:Class"], "must be importable"),
        (["search_steps=2,30"], "search_steps must lie within the run"),
    ],
    ids=["unknown", "out of range", "of the other method", "no such method", "no such module", "behind the last step"],
)
def test_what_cannot_run_is_refused_before_anything_runs(options, message, model, show, tmp_path, capsys):
    assert show("--options", *options) == (2, None)
    assert message in capsys.readouterr().err
    assert not model.compiled
    assert not list(tmp_path.iterdir())


def test_the_json_holds_the_context_and_each_run(model, show):
    _, result = show("--seed", "3")
    assert list(result["runs"]) == ["svg2", "adaspa"]
    assert (result["size"], result["tokens"], result["steps"], result["seed"]) == ("9x32x32", 576, 5, 3)
    assert (result["regional"], result["threads"]) == (False, torch.get_num_threads())
    assert set(result["versions"]) == {"sparse_compile", "torch", "python"}
    assert len(result["prompts"]) == 2
    assert result["dense"]["seconds"] == {"compile": 3.0, "run": 3.0, "each": [2.0, 4.0]}
    svg2, adaspa = result["runs"].values()
    assert list(svg2) == ["options", "seconds", "videos", "mean", "report"]
    assert (svg2["options"]["method"], svg2["options"]["correction"]) == ("svg2", "coupled")
    assert (adaspa["options"]["method"], adaspa["options"]["correction"]) == ("adaspa", "coupled")
    assert svg2["report"]["compilations"] == 3


def test_each_video_has_the_figures_of_its_own_generation_and_is_compared_with_dense(model, show):
    _, result = show()
    svg2, adaspa = result["runs"].values()
    assert [video["prompt"] for video in svg2["videos"]] == result["prompts"]
    assert [video["density"] for video in svg2["videos"]] == [0.25, 0.35]
    assert [video["density_run"] for video in svg2["videos"]] == pytest.approx([0.45, 0.55])
    assert [video["kept_mass"] for video in svg2["videos"]] == [0.6, 0.6]
    dense = torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0))
    psnr = [-10 * torch.log10((0.1 * video).square().mean()).item() for video in dense]
    assert [video["psnr"] for video in svg2["videos"]] == pytest.approx(psnr, abs=0.01)
    assert svg2["mean"]["density"] == pytest.approx(0.3)
    assert svg2["mean"]["psnr"] == pytest.approx(sum(psnr) / 2, abs=0.01)
    assert adaspa["mean"]["psnr"] < svg2["mean"]["psnr"] - 3


def rows_of(printed, start):
    """The cells of the rows of a table that begin with a word."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line[:1] == "│"]
    return [cells for cells in lines if cells[0].startswith(start)]


def test_the_tables_have_a_row_a_video_and_method_and_a_mean(model, show, capsys):
    model.densities["adaspa"] = (0.3, None)
    assert show()[0] == 0
    printed = capsys.readouterr().out
    *svg2, times = rows_of(printed, "svg2")
    assert [row[:5] for row in svg2] == [
        ["svg2", "0", "0.250", "0.450", "0.600"],
        ["svg2", "1", "0.350", "0.550", "0.600"],
        ["svg2", "mean", "0.300", "0.500", "0.600"],
    ]
    assert [row[:4] for row in rows_of(printed, "adaspa")[:3]] == [
        ["adaspa", "0", "0.300", "0.500"],
        ["adaspa", "1", "-", "-"],
        ["adaspa", "mean", "0.300", "0.500"],
    ]
    assert times == ["svg2", "3.00", "3.0", "3"]
    assert rows_of(printed, "dense") == [["dense", "3.00", "3.0", "-"]]
    assert max(map(len, printed.splitlines())) <= 80
    assert "not speed" in printed


def test_one_video_has_no_mean_row(model, show, capsys):
    show(prompts=1)
    assert [row[:2] for row in rows_of(capsys.readouterr().out, "svg2")[:-1]] == [["svg2", "0"]]


@pytest.mark.parametrize(
    ("options", "code"), [([], 1), (["method=adaspa"], 1), (["method=svg2"], 0)], ids=["both", "alone", "the other"]
)
def test_a_method_that_made_nothing_sparse_is_named(options, code, model, show, capsys):
    model.densities["adaspa"] = (None, None)
    assert show(*(["--options", *options] if options else []))[0] == code
    assert ("Nothing became sparse with adaspa" in capsys.readouterr().out) == (code == 1)


def test_a_run_that_is_dense_by_choice_is_no_failure_and_keeps_the_dense_videos(model, show, tmp_path, capsys):
    model.densities["dense"] = (None,)
    assert show("--options", "method=dense", prompts=1)[0] == 0
    assert "Nothing became sparse" not in capsys.readouterr().out
    assert (tmp_path / "video_0_dense.gif").read_bytes() != (tmp_path / "video_0_method_dense.gif").read_bytes()


def test_every_video_has_its_gifs_and_the_sheet_has_them_all(model, show, tmp_path):
    show()
    names = [f"video_{video}_{what}.gif" for video in (0, 1) for what in ("dense", "svg2", "adaspa", "side_by_side")]
    assert {path.name for path in tmp_path.iterdir()} == {*names, "comparison.png", "figures.json"}
    with Image.open(tmp_path / "comparison.png") as sheet:
        assert 2 * 5 * 128 < sheet.height < 2 * 6.5 * 128


def test_a_plug_in_has_its_class_as_label_and_a_plain_file_name(model, show, tmp_path, capsys):
    _, result = show("--options", f"method={PLUG_IN}", prompts=1)
    assert list(result["runs"]) == [PLUG_IN]
    assert (tmp_path / "video_0_sparse_compile_strategies_adaspa_AdaSpa.gif").exists()
    assert len(rows_of(capsys.readouterr().out, "AdaSpa")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("regional", [[], ["--regional"]], ids=["whole model", "regional"])
def test_the_demo_writes_pictures_and_figures(regional, show, tmp_path, capsys):
    code, result = show(*regional, prompts=1)
    assert code == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"comparison.png", "video_0_side_by_side.gif"}
    for run in result["runs"].values():
        (video,) = run["videos"]
        assert 0.05 < video["density"] < 0.6
        assert video["density"] < video["density_run"] < 1
        assert video["density"] < video["kept_mass"] < 1
        assert 10 < video["psnr"] < 120
        assert run["seconds"]["run"] > 0
    # Of five steps one is dense; AdaSpa searches in it, so that nothing else of it is.
    assert [run["report"]["compilations"] for run in result["runs"].values()] == [3, 2]
    assert "PSNR dB" in capsys.readouterr().out


@pytest.mark.slow
def test_keeping_everything_changes_nothing(show):
    code, result = show("--options", "density=1.0", "sparsity=0", prompts=1)
    assert code == 0
    for run in result["runs"].values():
        (video,) = run["videos"]
        assert video["density"] == 1
        assert video["psnr"] > 60


@pytest.mark.slow
def test_a_demo_in_which_nothing_becomes_sparse_says_so(show, capsys):
    assert show("--options", "min_tokens=5000", prompts=1)[0] == 1
    printed = capsys.readouterr().out
    assert "Nothing became sparse with svg2" in printed
    assert "Nothing became sparse with adaspa" in printed


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--options", "method=adaspa"]], ids=["svg2", "adaspa"])
def test_explain_prints_every_attention_and_why(options, capsys):
    assert main(["explain", *SMALL, *options]) == 0
    printed = capsys.readouterr().out
    assert "blocks.0.attn1" in printed
    assert "cross-attention" in printed
    assert "6 of 12 sites sparse" in printed


@pytest.mark.slow
def test_explain_writes_json(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert main(["explain", *SMALL, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [site["decision"] for site in report["sites"]].count("sparse") == 6
    assert main(["explain", *SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compilations"] == report["compilations"]
