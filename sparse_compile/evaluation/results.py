"""Rows of a sweep as lines of JSON: each has a key, so that a sweep goes on where it was interrupted."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch

from sparse_compile.config import BUILT_IN_METHODS, Config, belongs, declared_options
from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation.demo_model import CHECKPOINT
from sparse_compile.evaluation.protocol import Protocol

Row: TypeAlias = Mapping[str, Any]

WITHOUT_EFFECT = ("strict", "verbose")
"""Options that do not touch the videos."""
KEY_LENGTH = 16


def options_at_work(config: Config) -> dict[str, object]:
    """The options as the backend reads them: those that its method has and that can touch the videos.

    What is None is off, and left out: a later version may add options that are off by default, and keys stay.
    """
    resolved = {
        name: getattr(config, name)
        for name in declared_options()
        if name not in WITHOUT_EFFECT and belongs(name, config.method) and getattr(config, name) is not None
    }
    if config.method in BUILT_IN_METHODS:
        resolved["correction"] = config.correction_at_work
    return resolved


def key_of(protocol: Protocol, options: Mapping[str, object] | None = None) -> str:
    """What a result depends on, as a digest: protocol, options and the checkpoint. Without options: dense."""
    depends_on = {"protocol": protocol.to_dict(), "options": options, "checkpoint": checkpoint_digest()}
    text = json.dumps(depends_on, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


@functools.cache
def checkpoint_digest() -> str:
    """The digest of the weights and of the model's configuration."""
    contents = [(CHECKPOINT / name).read_bytes() for name in ("config.json", "diffusion_pytorch_model.safetensors")]
    return hashlib.sha256(b"".join(contents)).hexdigest()[:KEY_LENGTH]


class ResultsFile:
    """A file of rows. A last line that was only half written, when a sweep was stopped, does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """All rows, oldest first.

        Raises:
            SparseAttentionError: a line other than the last is no JSON object.
        """
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows: list[Row] = []
        for number, line in enumerate(lines, start=1):
            row = _parsed(line)
            if row is not None:
                rows.append(row)
            elif number < len(lines):
                raise SparseAttentionError(
                    "results are lines of JSON", f"line {number} of {self.path}", "Delete the line, or the file."
                )
        return rows

    def by_key(self) -> dict[str, Row]:
        """The rows that have a key, the newest of each."""
        return {row["key"]: row for row in self.rows() if "key" in row}

    def append(self, row: Row) -> None:
        """Write one row behind the others, in place of a half-written one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._end_the_last_line()
        with self.path.open("a") as file:
            file.write(json.dumps(row, default=str) + "\n")

    def _end_the_last_line(self) -> None:
        text = self.path.read_text() if self.path.exists() else ""
        whole, _, tail = text.rpartition("\n")
        if not tail:
            return
        if _parsed(tail) is not None:
            whole = text
        self.path.write_text(whole + "\n" if whole else "")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def provenance() -> dict[str, object]:
    """Versions, threads, and the git revision where the package lies in a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        revision = git.stdout.strip() or None
    except OSError:
        revision = None
    return {
        "sparse_compile": version("sparse_compile"),
        "revision": revision,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
    }
