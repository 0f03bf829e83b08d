"""``sparse-attn demo``: the same videos with dense and with sparse attention, side by side, with figures."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import sparse_compile
from sparse_compile.evaluation.comparison import (
    Run,
    compile_transformer,
    demo_options,
    measure,
    run_generations,
)
from sparse_compile.evaluation.demo_model import Scene, VideoSize, demo_scenes, load_pipeline
from sparse_compile.evaluation.pictures import (
    Comparison,
    write_contact_sheet,
    write_gif,
    write_side_by_side_gif,
)

CAPTION = (
    "This shows correctness and quality, not speed: the videos are tiny, and on a CPU sparse attention of "
    "this version runs in plain torch."
)
SECONDS_NOTE = "run: mean of the videos, all compiled\ncompile: a first generation minus the same one repeated"


def run(arguments: argparse.Namespace) -> int:
    """Generate, compare, write pictures and print; 1 when nothing became sparse although it should have."""
    console = Console()
    options = demo_options(dict(arguments.options))
    size = VideoSize(*map(int, arguments.size.split("x")))
    scenes = demo_scenes(arguments.prompts, arguments.seed + 1000)

    dense, sparse, report = _generate_both(arguments, options, size, scenes, console)
    rows = _rows(scenes, measure(sparse.videos, dense.videos), report)
    result = _result(arguments, options, size, (dense, sparse), rows, report)

    folder = Path(arguments.out)
    _write_pictures(folder, dense, sparse, rows, _heading(arguments, size))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    _print_tables(console, result)
    console.print(f"Pictures: {folder}/comparison.png and {folder}/*.gif")
    console.print(CAPTION, style="dim")
    if report["density"] is None and options.get("method") != "dense":
        console.print("Nothing became sparse: `sparse-attn explain` says why.", style="bold red")
        return 1
    return 0


def _generate_both(
    arguments: argparse.Namespace,
    options: Mapping[str, object],
    size: VideoSize,
    scenes: Sequence[Scene],
    console: Console,
) -> tuple[Run, Run, dict[str, Any]]:
    """Dense with plain Inductor, then sparse, each with its own pipeline; and the sparse one's report."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = (len(scenes) + 1) * arguments.steps
    runs = []
    with Progress(*columns, console=console) as progress:
        for label, backend, given in (
            ("dense  (torch.compile)", "inductor", None),
            ("sparse (sparse_attn)", "sparse_attn", options),
        ):
            task = progress.add_task(label, total=total)
            pipeline = load_pipeline()
            compile_transformer(pipeline, backend, given, regional=arguments.regional)
            runs.append(
                run_generations(
                    pipeline,
                    scenes,
                    size,
                    steps=arguments.steps,
                    seed=arguments.seed,
                    on_step=lambda _, task=task: progress.advance(task),  # type: ignore[misc]
                )
            )
    report: dict[str, Any] = sparse_compile.explain(pipeline).to_dict()
    return runs[0], runs[1], report


def _rows(scenes: Sequence[Scene], measured: list[dict[str, float]], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a video: prompt, densities of its own generation where the report has them, metrics."""
    generations = report["generations"][-len(scenes) :]
    if len(generations) < len(scenes):
        generations = [report] * len(scenes)
    return [
        {
            "prompt": str(scene),
            "density": generation["density"],
            "density_run": generation["density_run"],
            **figures,
        }
        for scene, figures, generation in zip(scenes, measured, generations, strict=True)
    ]


def _result(
    arguments: argparse.Namespace,
    options: Mapping[str, object],
    size: VideoSize,
    runs: tuple[Run, Run],
    rows: list[dict[str, Any]],
    report: dict[str, Any],
) -> dict[str, Any]:
    """Everything the demo found, as JSON holds it."""
    return {
        "versions": {
            "sparse_compile": sparse_compile.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "size": str(size),
        "tokens": size.tokens,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "regional": arguments.regional,
        "options": dict(options),
        "seconds": {
            name: {"compile": run.compile_seconds, "run": run.mean_seconds, "each": list(run.seconds)}
            for name, run in zip(("dense", "sparse"), runs, strict=True)
        },
        "videos": rows,
        "report": report,
    }


def _heading(arguments: argparse.Namespace, size: VideoSize) -> str:
    return f"{size} pixels, {size.tokens} tokens, {arguments.steps} steps, seed {arguments.seed}"


def _write_pictures(folder: Path, dense: Run, sparse: Run, rows: list[dict[str, Any]], heading: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    comparisons = []
    for number, row in enumerate(rows):
        density = _figure(row["density"], 2)
        caption = f"density {density}   ·   PSNR {row['psnr']:.1f} dB   ·   SSIM {row['ssim']:.3f}"
        title = row["prompt"].capitalize()
        comparison = Comparison(title, caption, dense.videos[number], sparse.videos[number])
        write_gif(comparison.dense, folder / f"video_{number}_dense.gif")
        write_gif(comparison.sparse, folder / f"video_{number}_sparse.gif")
        write_side_by_side_gif(comparison, folder / f"video_{number}_side_by_side.gif")
        comparisons.append(comparison)
    write_contact_sheet(comparisons, folder / "comparison.png", heading=heading)


def _print_tables(console: Console, result: Mapping[str, Any]) -> None:
    quality = Table(title="Sparse against dense, same noise", title_justify="left", caption_justify="left")
    quality.add_column("video", justify="right")
    for name in ("density", "density_run", "PSNR dB", "SSIM", "flicker gap"):
        quality.add_column(name, justify="right")
    for number, row in enumerate(result["videos"]):
        console.print(f"Video {number}: {row['prompt']}", highlight=False)
        quality.add_row(
            str(number),
            _figure(row["density"], 3),
            _figure(row["density_run"], 3),
            _figure(row["psnr"], 1),
            _figure(row["ssim"], 3),
            _figure(row["flicker_gap"], 3),
        )
    times = Table(title="Seconds", title_justify="left", caption=SECONDS_NOTE, caption_justify="left")
    times.add_column("attention")
    for name in ("run", "compile", "compilations"):
        times.add_column(name, justify="right")
    compilations = {"dense": "-", "sparse": str(result["report"]["compilations"])}
    for name, seconds in result["seconds"].items():
        times.add_row(name, _figure(seconds["run"], 2), _figure(seconds["compile"], 1), compilations[name])
    console.print(quality)
    console.print(times)


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
