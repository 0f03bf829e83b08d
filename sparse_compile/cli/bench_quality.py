"""``sparse-attn bench quality``: how close to dense each method comes with each correction, on the demo model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sparse_compile.evaluation.demo_model import TRAINED_SIZES
from sparse_compile.evaluation.sweep import OnStep, Protocol, Sweep, corrections_grid, run_sweep

QUICK_VIDEOS, VIDEOS = 4, 8
CAPTION = "Means over the videos, against dense from the same noise; more in the lines of --json"


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep, print its table, write its rows as JSON lines; 1 if something was compiled again."""
    console = Console()
    largest, smallest = TRAINED_SIZES
    protocol = Protocol(
        size=smallest if arguments.quick else largest,
        videos=arguments.videos or (QUICK_VIDEOS if arguments.quick else VIDEOS),
        steps=arguments.steps,
        seed=arguments.seed,
    )
    grid = corrections_grid()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def started(label: str) -> OnStep:
            generations = protocol.videos + (not label.startswith("dense"))
            task = progress.add_task(label, total=generations * protocol.steps)
            return lambda _: progress.advance(task)

        sweep = run_sweep(protocol, grid, started)
    _print(console, sweep)
    if arguments.json:
        Path(arguments.json).write_text("".join(json.dumps(line) + "\n" for line in sweep.lines()))
    return 1 if any(row.recompilations for row in sweep.rows) else 0


def _print(console: Console, sweep: Sweep) -> None:
    protocol = sweep.protocol
    console.print(
        f"{protocol.videos} videos of {protocol.size} pixels, {protocol.size.tokens} tokens, {protocol.steps} steps,"
        f" seed {protocol.seed}, first {protocol.dense_steps:.0%} of the steps dense",
        highlight=False,
    )
    console.print(f"Noise ceiling (dense eager against dense compiled): {sweep.noise_ceiling:.1f} dB", highlight=False)
    names = ("method", "correction", "density", "density\n_run", "kept\nmass", "PSNR\ndB", "lowest\ndB", "SSIM")
    table = Table(caption=CAPTION, caption_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in names[:2] else "right")
    method = sweep.rows[0].method if sweep.rows else ""
    for row in sweep.rows:
        if row.method != method:
            table.add_section()
            method = row.method
        table.add_row(
            row.method,
            row.correction,
            *(_figure(value, 3) for value in (row.density, row.density_run, row.kept_mass)),
            *(_figure(value, 2) for value in (row.psnr, row.psnr_min)),
            _figure(row.ssim, 3),
        )
    console.print(table)


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
