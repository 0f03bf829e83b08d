"""The rows of a run: to a file after each group of them, under a header that says which machine it was."""

from __future__ import annotations

import gc
import json
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_compile.compiler.lowering import source_hash
from sparse_compile.kernels.cpp import build, isa

Row = dict[str, Any]


def describe_machine(arguments: Sequence[str]) -> Row:
    """The header."""
    return {
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": isa.detected().name,
        "without_cpp": build.why_not(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sources": source_hash(),
        "command": shlex.join(["python", "-m", "benchmarks.cpu_attention", *arguments]),
    }


def cpu_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """As the system names it."""
    with_model = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in with_model if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load() -> float | None:
    """How many processes wanted a core in the last minute, where the system tells: times on the wall depend on it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


class Records:
    """The rows so far; the file is whole at any time, so a run that is killed keeps the groups that were done.

    Args:
        path: where they go; None: rows are only printed.
        machine: the header.
    """

    def __init__(self, path: Path | None, machine: Row) -> None:
        self.machine = machine
        self.rows: list[Row] = []
        self.summary: list[str] = []
        self.failed = 0
        self._path = path

    def attempt(self, common: Row, measure: Callable[[], list[Row]], describe: Callable[[Row], str]) -> None:
        """Add a group of rows; if it fails, one row that says why, and the next group has its turn.

        Args:
            common: what all rows of the group have.
            measure: gives the rest of each row.
            describe: a row as one line.
        """
        common = common | {"load": load()}
        try:
            rows = [{**common, **row} for row in measure()]
        except Exception as error:  # noqa: BLE001 - a group that fails must not cost the groups behind it
            self.failed += 1
            traceback.print_exc(limit=-6, file=sys.stdout)
            rows = [{**common, "error": f"{type(error).__name__}: {str(error)[:2000]}"}]
        for row in rows:
            print(f"{row['part']:10s} FAILED  {row['error'][:300]}" if "error" in row else describe(row), flush=True)
        self.rows += rows
        self.write()
        gc.collect()  # compiled models lie in circles

    def write(self) -> None:
        """Write the file anew."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(self._path.name + ".partial")
        document = {"machine": self.machine, "rows": self.rows, "summary": self.summary}
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(self._path)


def common_of(part: str, threads: int, dtype: str, isa_name: str) -> Row:
    """What every row says."""
    return {"part": part, "isa": isa_name, "threads": threads, "dtype": dtype}


def threads_of(row: Row) -> str:
    """How many threads a row has, in words."""
    return "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
