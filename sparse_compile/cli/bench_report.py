"""``sparse-attn bench report``: one page about the methods on the demo model, with everything on it."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import sparse_compile
from sparse_compile.cli.demo import check_method, generate_all
from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation.comparison import demo_runs
from sparse_compile.evaluation.demo_model import PATCH, Scene, VideoSize, demo_scenes, load_pipeline
from sparse_compile.evaluation.judged_heads import JudgedHead, judge, judged_steps, telling_heads
from sparse_compile.evaluation.method_runs import MethodRun, shown
from sparse_compile.evaluation.page import Part, Section, render
from sparse_compile.evaluation.plan_pictures import pair_maps
from sparse_compile.evaluation.plots import density_map, head_maps, png_of
from sparse_compile.evaluation.quality_section import quality_sections
from sparse_compile.evaluation.report_sections import (
    Measured,
    clips_section,
    head_maps_of,
    heads_section,
    layers_section,
    methods_section,
    newest_calls,
    run_section,
    warnings_section,
)
from sparse_compile.evaluation.results import ResultsFile, checkpoint_digest
from sparse_compile.evaluation.site_figures import SiteFigures, site_figures
from sparse_compile.evaluation.site_sections import maps_of, plans_section, sites_section
from sparse_compile.evaluation.tap import tap

TITLE = "Sparse attention against dense"
PICTURE_DPI = 110
"""Of the files of ``--pictures``, which go into documents."""


@dataclass(frozen=True)
class Judged:
    """Single calls of the demo model: figures by method, and a few heads to look at."""

    steps: tuple[int, ...]
    figures: dict[str, list[SiteFigures]]
    heads: list[JudgedHead]
    notes: list[str]
    """Why a method has no figures."""

    @property
    def apart(self) -> int:
        """Steps between two judged ones."""
        return self.steps[1] - self.steps[0] if len(self.steps) > 1 else 1


def run(arguments: argparse.Namespace) -> int:
    """Generate, judge, draw, write the page; 1 when a method made nothing sparse although it should have."""
    console = Console()
    chosen = demo_runs(dict(arguments.options))
    for options in chosen.values():
        check_method(Config.from_options(options), arguments.steps)
    results = [(path.name, ResultsFile(path).rows()) for path in map(Path, arguments.results)]
    size = VideoSize(*map(int, arguments.size.split("x")))
    scenes = demo_scenes(arguments.prompts, arguments.seed + 1000)

    dense, methods = generate_all(arguments, chosen, size, scenes, console)
    measured = Measured(_facts(arguments, size, scenes), size, scenes, dense.videos, methods)
    judged = _judge(arguments, size, scenes[0], chosen, methods, console)
    sections = [
        run_section(measured),
        methods_section(measured),
        clips_section(measured),
        layers_section(measured),
        heads_section(measured),
        *_site_sections(judged, size),
        warnings_section(measured),
        *quality_sections(results),
    ]
    page = Path(arguments.out)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(TITLE, f"{', '.join(map(shown, methods))}; {_heading(arguments, size)}", sections))
    console.print(f"Report: {page} ({page.stat().st_size / 2**20:.1f} MiB)", highlight=False)
    if arguments.pictures:
        _write_pictures(Path(arguments.pictures), measured, judged)
    failed = [method for method, made in methods.items() if made.nothing_sparse]
    for method in failed:
        console.print(f"Nothing became sparse with {method}: `sparse-attn explain` says why.", style="bold red")
    return 1 if failed else 0


def _heading(arguments: argparse.Namespace, size: VideoSize) -> str:
    return f"{size} pixels, {size.tokens} tokens, {arguments.steps} steps, seed {arguments.seed}"


def _facts(arguments: argparse.Namespace, size: VideoSize, scenes: Sequence[Scene]) -> list[tuple[str, str]]:
    versions = (
        f"sparse_compile {sparse_compile.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    return [
        ("versions", versions),
        ("model", f"the demo model, checkpoint {checkpoint_digest()}"),
        ("videos", f"{len(scenes)} of {size} (frames x height x width), {size.tokens} tokens"),
        ("protocol", f"{arguments.steps} steps, guidance 2, noise of seed {arguments.seed} + number of the video"),
        ("dense", "torch.compile with Inductor, same noise"),
        *((f"video {number}", str(scene)) for number, scene in enumerate(scenes)),
    ]


def _judge(
    arguments: argparse.Namespace,
    size: VideoSize,
    scene: Scene,
    chosen: Mapping[str, dict[str, object]],
    methods: Mapping[str, MethodRun],
    console: Console,
) -> Judged:
    """Tap the dense model, judge each method that was sparse on what it computed."""
    options = {
        method: given
        for method, given in chosen.items()
        if any(row["density"] is not None for row in methods[method].rows)
    }
    if not options:
        return Judged((), {}, [], [])
    at = judged_steps(next(iter(options.values())), arguments.steps)
    judged = Judged(at, {}, [], [])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("dense, tapped", total=at[-1] + 1)
        tapped = tap(
            load_pipeline(),
            scene,
            size,
            steps=arguments.steps,
            seed=arguments.seed,
            at=at,
            on_step=_counted(progress, task),
        )
        for method, given in options.items():
            task = progress.add_task(f"{shown(method)}, single calls", total=len(tapped))
            try:
                judged.figures[method] = site_figures(
                    tapped,
                    given,
                    reuse_after=judged.apart,
                    kernel=_kernel_of(methods[method]),
                    on_call=partial(progress.advance, task),
                )
            except SparseAttentionError as error:
                judged.notes.append(f"{shown(method)}: {error}")
    if judged.figures:
        own = {method: options[method] for method in judged.figures}
        rows = next(iter(judged.figures.values()))
        judged.heads.extend(judge(tapped, row, own) for row in telling_heads(rows))
    return judged


def _counted(progress: Progress, task: TaskID) -> Callable[[int], None]:
    return lambda _: progress.advance(task)


def _kernel_of(made: MethodRun) -> str:
    """The implementation that the compiled runs used, if it can do without compilation."""
    return "cpu" if any(site.kernel == "cpu" for site in made.report.sites) else "reference"


def _site_sections(judged: Judged, size: VideoSize) -> list[Section]:
    notes = [Section("Single attention calls", judged.notes, [Part()])] if judged.notes else []
    if not judged.figures:
        return notes
    return [
        plans_section(judged.heads, _tokens_per_frame(size)),
        sites_section(judged.figures, judged.steps, judged.apart),
        *notes,
    ]


def _tokens_per_frame(size: VideoSize) -> int:
    return (size.height // PATCH) * (size.width // PATCH)


def _write_pictures(folder: Path, measured: Measured, judged: Judged) -> None:
    """Some of the pictures as files, for documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for method, made in measured.methods.items():
        calls = newest_calls(made.report, len(measured.scenes))
        if not any(call.sparse for call in calls):
            continue
        drawings = {"density": density_map(calls, f"{shown(method)}: density")}
        if maps := head_maps_of(made.report):
            drawings["heads"] = head_maps(maps, f"{shown(method)}: newest sparse calls")
        for name, drawing in drawings.items():
            (folder / f"{name}_{shown(method)}.png").write_bytes(png_of(drawing, PICTURE_DPI))
    for number, head in enumerate(judged.heads):
        drawing = pair_maps(maps_of(head), _tokens_per_frame(measured.size), str(head))
        (folder / f"plans_{number}.png").write_bytes(png_of(drawing, PICTURE_DPI))
