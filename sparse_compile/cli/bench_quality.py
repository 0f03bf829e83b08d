"""``sparse-attn bench quality``: how close to dense each configuration comes, and at which density."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation import grids, pareto_plot, tables
from sparse_compile.evaluation.demo_model import VideoSize
from sparse_compile.evaluation.grids import Configuration, control
from sparse_compile.evaluation.protocol import OnStep, Protocol
from sparse_compile.evaluation.reference import dense_reference
from sparse_compile.evaluation.results import ResultsFile, Row
from sparse_compile.evaluation.sweep import checked, key_of_configuration, refused, run_sweep
from sparse_compile.phases import Moment
from sparse_compile.strategies.catalogue import load_strategy

VIDEOS = 4
SEEDS, QUICK_SEEDS = 3, 1
RESULTS, TABLE, PLOT = "results.jsonl", "table.md", "pareto"


def run(arguments: argparse.Namespace) -> int:
    """Measure what has no row yet, then write and print the tables; 1 if something was compiled again."""
    console = Console()
    folder = Path(arguments.out)
    protocol = protocol_of(arguments)
    chosen = chosen_grids(arguments)
    for configurations in chosen.values():
        _check(protocol, configurations)
    results = ResultsFile(folder / RESULTS)
    results.rows()  # a file that is no file of rows is refused before anything is generated
    with _Steps(console, protocol) as steps:
        reference = dense_reference(protocol, folder, steps.started)
        console.print(f"Noise ceiling (dense eager against dense compiled): {reference.ceiling:.1f} dB")
        for grid, configurations in chosen.items():
            run_sweep(protocol, configurations, reference, results, steps.started, grid)
    rows = _rows(protocol, chosen, results)
    report = tables.report(rows)
    (folder / TABLE).write_text(report)
    console.print(report, markup=False, highlight=False, soft_wrap=True)
    pictures = pareto_plot.draw(rows, folder / PLOT)
    console.print(f"Written: {', '.join(map(str, [results.path, folder / TABLE, *pictures]))}", soft_wrap=True)
    recompiled = [row["label"] for row in rows if row["recompilations"]]
    for label in recompiled:
        console.print(f"Compiled again after the first generation: {label}", style="bold red")
    for row in rows:
        if control(row["options"]) == "everything" and not row["lossless"]:
            console.print(f"Everything kept, and not dense: {row['label']}, {row['psnr']:.1f} dB", style="bold red")
    return 1 if recompiled else 0


def protocol_of(arguments: argparse.Namespace) -> Protocol:
    """The videos that were asked for."""
    seeds = arguments.seeds or (QUICK_SEEDS if arguments.quick else SEEDS)
    size = VideoSize(*map(int, arguments.size.split("x")))
    videos = arguments.videos or VIDEOS
    return Protocol(size=size, videos=videos, seeds=tuple(range(seeds)), steps=arguments.steps)


def chosen_grids(arguments: argparse.Namespace) -> dict[str, list[Configuration]]:
    """The configurations that were asked for, by grid; a method that is not built in is a grid of its own.

    Raises:
        SparseAttentionError: there is no grid of a given name.
    """
    default = [] if arguments.method else ["quick" if arguments.quick else "pareto"]
    chosen = {name: grids.grid_named(name) for name in arguments.grid or default}
    if arguments.method:
        chosen["plug-in"] = grids.of_plug_in(arguments.method)
    if not arguments.warm_up:
        return chosen
    return {name: [each.at_warm_up(share) for share in arguments.warm_up for each in chosen[name]] for name in chosen}


def _check(protocol: Protocol, configurations: Sequence[Configuration]) -> None:
    """Refuse what would fail only after hours: a wrong option, an unknown method, steps that the run does not have.

    Raises:
        SparseAttentionError: a configuration cannot run; the message names it.
    """
    for each in configurations:
        config = checked(each, each.options)
        try:
            load_strategy(config.method).phase(Moment(0, protocol.steps), None, config)
        except SparseAttentionError as error:
            raise refused(each, error) from error


def _rows(protocol: Protocol, chosen: Mapping[str, Sequence[Configuration]], results: ResultsFile) -> list[Row]:
    """The rows of what was chosen, each once, in the order of the grids."""
    keys = [key_of_configuration(protocol, each) for configurations in chosen.values() for each in configurations]
    by_key = results.by_key()
    return [by_key[key] for key in dict.fromkeys(keys)]


class _Steps:
    """A progress bar of the configuration that is being measured; those before it stay as lines."""

    def __init__(self, console: Console, protocol: Protocol) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)
        self.steps = protocol.steps

    def __enter__(self) -> _Steps:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def started(self, label: str, generations: int) -> OnStep:
        """Begin a bar; what is returned moves it by one step."""
        task = self.progress.add_task(label, total=generations * self.steps)
        return lambda _: self.progress.advance(task)
