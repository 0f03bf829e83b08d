"""What a run shows while it goes: a bar on a terminal, a line for each row of the log elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

from training.trainer import LogRow, Trainer


class Progress:
    """Shows where a trainer is."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._shown = len(trainer.log)
        console = Console()
        self._on_terminal = console.is_terminal
        self._bar = Bar(
            BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), console=console, transient=False
        )
        self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> Self:
        if self._on_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._on_terminal:
            self._bar.stop()

    def update(self) -> None:
        """Show the state after a step."""
        rows = self._trainer.log[self._shown :]
        self._shown = len(self._trainer.log)
        if self._on_terminal:
            described = as_text(self._trainer.log[-1]) if self._trainer.log else f"step {self._trainer.steps}"
            self._bar.update(self._task, completed=min(1.0, self._trainer.done), description=described)
        else:
            for row in rows:
                sys.stdout.write(as_text(row) + "\n")
                sys.stdout.flush()


def as_text(row: LogRow) -> str:
    """A row in one line."""
    return f"step {row.step}  {row.minutes:.2f} min  loss {row.loss:.4f}  {row.tokens} tokens"
