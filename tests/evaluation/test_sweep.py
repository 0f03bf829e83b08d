"""The sweep behind ``sparse-attn bench quality``, in few steps."""

from __future__ import annotations

import json

import pytest
import torch

from sparse_compile.cli import bench_quality
from sparse_compile.cli.main import build_parser, main
from sparse_compile.evaluation import sweep
from sparse_compile.evaluation.demo_model import TRAINED_SIZES
from sparse_compile.evaluation.sweep import CORRECTIONS, Protocol, Row, Sweep, corrections_grid, run_sweep

PROTOCOL = Protocol(TRAINED_SIZES[1], videos=1, steps=3, seed=0, dense_steps=0.4)


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    yield
    torch.compiler.reset()


def row(method="svg2", correction="none", recompilations=0) -> Row:
    figures = {"psnr": 30.0, "psnr_min": 29.0, "psnr_each": [29.0, 31.0], "ssim": 0.9, "flicker_gap": 0.1}
    densities = {"density": 0.25, "density_run": 0.4, "kept_mass": None}
    return Row(method, correction, {}, **figures, **densities, compilations=3, recompilations=recompilations, seconds=1)


def test_the_grid_has_both_methods_with_each_correction_at_a_quarter_of_the_pairs() -> None:
    grid = corrections_grid()
    assert [(options["method"], options["correction"]) for options in grid] == [
        (method, correction) for method in ("svg2", "adaspa") for correction in CORRECTIONS
    ]
    assert all(options.get("density") == 0.25 or options.get("sparsity") == 0.75 for options in grid)


def test_a_sweep_measures_each_configuration_on_the_same_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "compile_transformer", without_code_generation(sweep.compile_transformer))
    steps: dict[str, int] = {}

    def on_step(label: str) -> sweep.OnStep:
        steps[label] = 0
        return lambda _: steps.update({label: steps[label] + 1})

    exact = {"method": "svg2", "density": 1.0, "correction": "none"}
    coarse = {"method": "adaspa", "sparsity": 0.9, "block_size": 16, "correction": "none"}
    found = run_sweep(PROTOCOL, [exact, coarse], on_step)
    whole, rough = found.rows
    assert steps == {"dense, eager": 3, "dense, compiled": 3, "svg2, none": 6, "adaspa, none": 6}
    assert whole.psnr > 80 and whole.density == pytest.approx(1.0)
    assert rough.psnr < 60 and rough.density == pytest.approx(0.1, abs=0.02)
    assert 0 < rough.kept_mass < 0.9 < whole.kept_mass <= 1
    assert whole.recompilations == rough.recompilations == 0
    lines = list(found.lines())
    assert [line["method"] for line in lines] == ["svg2", "adaspa"]
    assert {"revision", "torch", "tokens", "noise_ceiling", "seed", "density_run", "psnr_each"} <= lines[0].keys()
    json.dumps(lines)


def without_code_generation(compile_transformer):
    def quick(pipeline, backend, options=None):
        if backend == "sparse_attn":
            compile_transformer(pipeline, backend, {**options, "lowering": "eager"})

    return quick


@pytest.mark.parametrize(("recompilations", "code"), [(0, 0), (1, 1)])
def test_the_command_writes_lines_and_fails_when_something_was_compiled_again(
    recompilations, code, monkeypatch, tmp_path, capsys
) -> None:
    asked = []

    def fake_sweep(protocol, grid, on_step):
        asked.append(protocol)
        return Sweep(protocol, 120.0, {"torch": "2"}, [row(), row("adaspa", "pooled", recompilations)])

    monkeypatch.setattr(bench_quality, "run_sweep", fake_sweep)
    target = tmp_path / "rows.jsonl"
    assert main(["bench", "quality", "--quick", "--json", str(target)]) == code
    assert (asked[0].videos, asked[0].size) == (4, TRAINED_SIZES[1])
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["correction"] for line in lines] == ["none", "pooled"]
    assert lines[0]["size"] == "9x32x32" and lines[0]["noise_ceiling"] == 120.0
    printed = capsys.readouterr().out
    assert "adaspa" in printed and "30.00" in printed


def test_without_quick_the_videos_are_larger_and_more() -> None:
    arguments = build_parser().parse_args(["bench", "quality"])
    assert not arguments.quick and arguments.videos is None
    assert bench_quality.VIDEOS > bench_quality.QUICK_VIDEOS
