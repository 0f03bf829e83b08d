"""``sparse-attn demo`` and ``explain`` from end to end, in few steps."""

import json

import pytest
import torch

from sparse_compile.cli.main import main

SMALL = ["--size", "9x32x32", "--steps", "5"]


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("regional", [[], ["--regional"]], ids=["whole model", "regional"])
def test_the_demo_writes_pictures_and_figures(regional, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    arguments = ["demo", *SMALL, *regional, "--prompts", "1", "--out", str(tmp_path), "--json", str(figures)]
    assert main(arguments) == 0

    written = {path.name for path in tmp_path.iterdir()}
    assert {
        "comparison.png",
        "video_0_dense.gif",
        "video_0_sparse.gif",
        "video_0_side_by_side.gif",
    } <= written
    result = json.loads(figures.read_text())
    (video,) = result["videos"]
    assert 0.05 < video["density"] < 0.6
    assert video["density"] < video["density_run"] < 1
    assert 10 < video["psnr"] < 120
    assert result["report"]["compilations"] == 3
    assert result["seconds"]["sparse"]["run"] > 0
    printed = capsys.readouterr().out
    assert "PSNR dB" in printed
    assert "not speed" in printed


@pytest.mark.slow
def test_keeping_everything_changes_nothing(tmp_path):
    figures = tmp_path / "figures.json"
    everything = ["--options", "density=1.0"]
    arguments = [
        "demo",
        *SMALL,
        "--prompts",
        "1",
        "--out",
        str(tmp_path),
        "--json",
        str(figures),
        *everything,
    ]
    assert main(arguments) == 0
    (video,) = json.loads(figures.read_text())["videos"]
    assert video["density"] == 1
    assert video["psnr"] > 60


@pytest.mark.slow
def test_a_demo_in_which_nothing_becomes_sparse_says_so(tmp_path, capsys):
    arguments = ["demo", *SMALL, "--prompts", "1", "--out", str(tmp_path), "--options", "min_tokens=5000"]
    assert main(arguments) == 1
    assert "Nothing became sparse" in capsys.readouterr().out


@pytest.mark.slow
def test_explain_prints_every_attention_and_why(tmp_path, capsys):
    assert main(["explain", *SMALL]) == 0
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
