"""``sparse-attn demo``: the same videos with dense attention and with each method, side by side, with figures."""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import sparse_compile
from sparse_compile.config import Config
from sparse_compile.evaluation.comparison import (
    Run,
    compile_transformer,
    demo_runs,
    measure,
    resolved_options,
    run_generations,
)
from sparse_compile.evaluation.demo_model import Scene, VideoSize, demo_scenes, load_pipeline
from sparse_compile.evaluation.method_runs import MethodRun, figure, shown, video_rows
from sparse_compile.evaluation.pictures import (
    Comparison,
    Variant,
    write_contact_sheet,
    write_gif,
    write_side_by_side_gif,
)
from sparse_compile.phases import Moment
from sparse_compile.strategies.catalogue import load_strategy

CAPTION = (
    "This shows correctness and quality, not speed: the videos are tiny, and the seconds are those of a CPU. A few "
    "videos do not rank methods; `sparse-attn bench quality` makes more."
)
QUALITY_NOTE = "density: pairs computed in sparse calls\ndensity_run: in all calls; compare methods where it is equal"
SECONDS_NOTE = "run: mean of the videos, all compiled\ncompile: a first generation minus the same one repeated"
FIGURES = {
    "density": ("density", 3),
    "density_run": ("density_run", 3),
    "kept_mass": ("kept\nmass", 3),
    "psnr": ("PSNR dB", 1),
    "ssim": ("SSIM", 3),
    "flicker_gap": ("flicker\ngap", 3),
}
"""The columns of the table by their name in the JSON: heading, digits."""


def run(arguments: argparse.Namespace) -> int:
    """Generate, compare, write pictures and print; 1 when a method made nothing sparse although it should have."""
    console = Console()
    chosen = demo_runs(dict(arguments.options))
    for options in chosen.values():
        check_method(Config.from_options(options), arguments.steps)
    size = VideoSize(*map(int, arguments.size.split("x")))
    scenes = demo_scenes(arguments.prompts, arguments.seed + 1000)

    dense, methods = generate_all(arguments, chosen, size, scenes, console)
    result = _result(arguments, size, scenes, dense, methods)

    folder = Path(arguments.out)
    _write_pictures(folder, scenes, dense, methods, _heading(arguments, size))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    _print_tables(console, result)
    console.print(f"Pictures: {folder}/comparison.png and {folder}/*.gif")
    console.print(CAPTION, style="dim")
    failed = [method for method, made in methods.items() if made.nothing_sparse]
    for method in failed:
        console.print(f"Nothing became sparse with {method}: `sparse-attn explain` says why.", style="bold red")
    return 1 if failed else 0


def check_method(config: Config, steps: int) -> None:
    """Refuse what would fail only after the dense videos: an unknown method, or steps that the run does not have.

    Raises:
        SparseAttentionError: there is no such method, or an option does not fit this many steps.
    """
    load_strategy(config.method).phase(Moment(0, steps), None, config)


def generate_all(
    arguments: argparse.Namespace,
    chosen: Mapping[str, dict[str, object]],
    size: VideoSize,
    scenes: Sequence[Scene],
    console: Console,
) -> tuple[Run, dict[str, MethodRun]]:
    """Dense with plain Inductor, then each method, each with a pipeline of its own."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def generate(label: str, backend: str, options: dict[str, object] | None) -> tuple[Run, WanPipeline]:
            task = progress.add_task(label, total=(len(scenes) + 1) * arguments.steps)
            pipeline = load_pipeline()
            compile_transformer(pipeline, backend, options, regional=arguments.regional)
            made = run_generations(
                pipeline,
                scenes,
                size,
                steps=arguments.steps,
                seed=arguments.seed,
                on_step=lambda _: progress.advance(task),
            )
            return made, pipeline

        dense, _ = generate("dense (torch.compile)", "inductor", None)
        methods = {}
        for method, options in chosen.items():
            made, pipeline = generate(f"{shown(method)} (sparse_attn)", "sparse_attn", options)
            report = sparse_compile.explain(pipeline)
            rows = video_rows(scenes, measure(made.videos, dense.videos), report)
            methods[method] = MethodRun(resolved_options(options), made, report, rows)
    return dense, methods


def _result(
    arguments: argparse.Namespace,
    size: VideoSize,
    scenes: Sequence[Scene],
    dense: Run,
    methods: Mapping[str, MethodRun],
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
        "prompts": [str(scene) for scene in scenes],
        "dense": {"seconds": _seconds(dense)},
        "runs": {
            method: {
                "options": made.options,
                "seconds": _seconds(made.run),
                "videos": made.rows,
                "mean": made.mean,
                "report": made.report.to_dict(),
            }
            for method, made in methods.items()
        },
    }


def _seconds(run: Run) -> dict[str, Any]:
    return {"compile": run.compile_seconds, "run": run.mean_seconds, "each": list(run.seconds)}


def _heading(arguments: argparse.Namespace, size: VideoSize) -> str:
    return f"{size} pixels, {size.tokens} tokens, {arguments.steps} steps, seed {arguments.seed}"


def _file_name(method: str) -> str:
    """What the method is called in names of files: ``module:Class`` has a character that not all systems allow."""
    return re.sub(r"\W+", "_", shown(method) if method == "dense" else method, flags=re.ASCII)


def _write_pictures(
    folder: Path, scenes: Sequence[Scene], dense: Run, methods: Mapping[str, MethodRun], heading: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    comparisons = []
    for number, scene in enumerate(scenes):
        variants = []
        write_gif(dense.videos[number], folder / f"video_{number}_dense.gif")
        for method, made in methods.items():
            row, video = made.rows[number], made.run.videos[number]
            notes = (
                f"density {figure(row['density'], 2)}",
                f"PSNR {figure(row['psnr'], 1)} dB",
                f"SSIM {figure(row['ssim'], 3)}",
            )
            variants.append(Variant(shown(method), video, notes))
            write_gif(video, folder / f"video_{number}_{_file_name(method)}.gif")
        comparison = Comparison(str(scene).capitalize(), dense.videos[number], tuple(variants))
        write_side_by_side_gif(comparison, folder / f"video_{number}_side_by_side.gif")
        comparisons.append(comparison)
    write_contact_sheet(comparisons, folder / "comparison.png", heading=heading)


def _print_tables(console: Console, result: Mapping[str, Any]) -> None:
    for number, prompt in enumerate(result["prompts"]):
        console.print(f"Video {number}: {prompt}", highlight=False)
    quality = Table(
        title="Sparse against dense, same noise",
        title_justify="left",
        caption=QUALITY_NOTE,
        caption_justify="left",
    )
    quality.add_column("method")
    for heading in ("video", *(heading for heading, _ in FIGURES.values())):
        quality.add_column(heading, justify="right")
    times = Table(title="Seconds", title_justify="left", caption=SECONDS_NOTE, caption_justify="left")
    times.add_column("attention")
    for heading in ("run", "compile", "compilations"):
        times.add_column(heading, justify="right")
    _add_times(times, "dense", result["dense"]["seconds"], "-")
    for method, made in result["runs"].items():
        rows = [(str(number), row) for number, row in enumerate(made["videos"])]
        if len(rows) > 1:
            rows.append(("mean", made["mean"]))
        for video, row in rows:
            figures = (figure(row[name], digits) for name, (_, digits) in FIGURES.items())
            quality.add_row(shown(method), video, *figures, style="bold" if video == "mean" else None)
        quality.add_section()
        _add_times(times, shown(method), made["seconds"], str(made["report"]["compilations"]))
    console.print(quality)
    console.print(times)


def _add_times(table: Table, name: str, seconds: Mapping[str, float], compilations: str) -> None:
    table.add_row(name, figure(seconds["run"], 2), figure(seconds["compile"], 1), compilations)
