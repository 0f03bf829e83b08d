"""``sparse-attn bench quality``: what its arguments mean, what it writes, and when it fails."""

import pytest
import torch

from sparse_compile.cli import bench_quality
from sparse_compile.cli.main import build_parser, main
from sparse_compile.evaluation.grids import GRIDS
from sparse_compile.evaluation.reference import Reference
from sparse_compile.evaluation.sweep import key_of_configuration


def parsed(*arguments):
    return build_parser().parse_args(["bench", "quality", *arguments])


@pytest.mark.parametrize(
    ("arguments", "videos", "seeds", "grids"),
    [
        ([], 4, (0, 1, 2), ["pareto"]),
        (["--quick"], 4, (0,), ["quick"]),
        (["--quick", "--seeds", "2", "--videos", "1", "--grid", "paper", "recall"], 1, (0, 1), ["paper", "recall"]),
        (["--method", "somewhere:Windows"], 4, (0, 1, 2), ["plug-in"]),
        (["--method", "somewhere:Windows", "--grid", "quick"], 4, (0, 1, 2), ["quick", "plug-in"]),
    ],
    ids=["default", "quick", "given", "a method", "a method and a grid"],
)
def test_arguments_choose_videos_and_grids(arguments, videos, seeds, grids):
    arguments = parsed(*arguments)
    protocol = bench_quality.protocol_of(arguments)
    assert (protocol.videos, protocol.seeds, str(protocol.size), protocol.steps) == (videos, seeds, "9x32x32", 20)
    assert list(bench_quality.chosen_grids(arguments)) == grids


def test_shares_of_warm_up_repeat_a_grid():
    usual = GRIDS["quick"]()
    repeated = bench_quality.chosen_grids(parsed("--quick", "--warm-up", "0.1", "0.2"))["quick"]
    assert len(repeated) == 2 * len(usual)
    assert {each.options["dense_steps"] for each in repeated[: len(usual)]} == {0.1}
    assert repeated[len(usual) :] == usual


@pytest.fixture
def sweep(monkeypatch):
    """Stands for all that is generated: rows with made-up figures; what it was asked for."""
    asked = []

    def run_sweep(protocol, configurations, reference, results, started, grid):
        asked.append((grid, protocol))
        for configuration in configurations:
            started(configuration.label, len(protocol.seeds))(0)
            results.append(row(protocol, configuration, grid, recompilations=len(asked) - 1))

    videos = torch.zeros(1, 3, 2, 8, 8)
    monkeypatch.setattr(bench_quality, "run_sweep", run_sweep)
    monkeypatch.setattr(bench_quality, "dense_reference", lambda *_: Reference(videos, videos))
    return asked


def row(protocol, configuration, grid, recompilations):
    figures = {"psnr": 30.0, "psnr_min": 29.0, "ssim": 0.9, "flicker_gap": 0.1, "density": 0.25, "density_run": 0.4}
    options = configuration.options
    return {
        "key": key_of_configuration(protocol, configuration),
        "label": configuration.label,
        "series": configuration.series,
        "grid": grid,
        **protocol.to_dict(),
        **figures,
        "kept_mass": None,
        "ceiling": 120.0,
        "method": options["method"],
        "correction": options["correction"],
        "dense_steps": 0.2,
        "options": dict(options),
        "recompilations": recompilations,
        "lossless": options["method"] == "svg2",
    }


def test_the_command_writes_rows_a_table_and_a_plot(sweep, tmp_path, capsys):
    assert main(["bench", "quality", "--quick", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "table.md", "pareto.png", "pareto.svg"}
    table = (tmp_path / "table.md").read_text()
    printed = capsys.readouterr().out
    assert table in printed and "Noise ceiling (dense eager against dense compiled): 120.0 dB" in printed
    assert [(grid, protocol.seeds) for grid, protocol in sweep] == [("quick", (0,))]
    assert "not dense: adaspa coupled sparsity=0, 30.0 dB" in printed and "not dense: svg2" not in printed


def test_it_fails_when_something_was_compiled_again_and_names_it(sweep, tmp_path, capsys):
    arguments = ["--grid", "quick", "presets", "--seeds", "1", "--out", str(tmp_path)]
    assert main(["bench", "quality", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "Compiled again after the first generation: svg2 coupled preset=quality" in printed
    assert "again after the first generation: svg2 none" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "paretto"], "a grid goes by its name; got 'paretto'. Known: quick"),
        (["--method", "nowhere:Class"], "got 'Class coupled'. It says: a method of the form 'module:Class'"),
    ],
    ids=["no such grid", "no such method"],
)
def test_what_cannot_run_is_refused_before_anything_runs(arguments, message, sweep, tmp_path, capsys):
    assert main(["bench", "quality", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not sweep and not list(tmp_path.iterdir())


def test_a_folder_of_other_things_is_refused_before_anything_runs(sweep, tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text("something\nelse\n")
    assert main(["bench", "quality", "--quick", "--out", str(tmp_path)]) == 2
    assert "results are lines of JSON" in capsys.readouterr().err
    assert not sweep


@pytest.mark.parametrize("share", ["-0.1", "1.5"])
def test_a_share_lies_between_nothing_and_everything(share, capsys):
    with pytest.raises(SystemExit):
        parsed("--warm-up", share)
    assert "must lie in [0, 1]" in capsys.readouterr().err
