"""The state of an interrupted run, from which it goes on as if it had not stopped."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparse_compile.errors import SparseAttentionError
from training.checkpoint import check_version

STATE = "resume.pt"
NEEDED = ("version", "run", "trainer")


def save_state(folder: Path, run: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    """Write a trainer's state, and the options of its run, in place of the last one.

    ``run`` is what the command line said, ``trainer`` is `training.trainer.Trainer.state_dict`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{STATE}.unfinished"
    torch.save({"version": 1, "run": dict(run), "trainer": dict(trainer)}, unfinished)
    os.replace(unfinished, folder / STATE)


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the run and the state of the trainer.

    Raises:
        SparseAttentionError: there is none, it is damaged, holds objects that could run code, or is of another version.
    """
    path = folder / STATE
    if not path.exists():
        raise SparseAttentionError(f"a run to resume holds {STATE}", str(folder), "Start it without --resume.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SparseAttentionError(
            f"{STATE} holds tensors and numbers only, because a pickle can run code",
            str(path),
            "Use a file that this program has written.",
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise SparseAttentionError(
            f"{STATE} is a whole file", f"{path}: {error}", "It is damaged or cut short; continue with --init instead."
        ) from error
    if not isinstance(content, dict) or any(name not in content for name in NEEDED):
        raise SparseAttentionError(
            f"{STATE} is the state of a run", str(path), "Use a file that this program has written."
        )
    check_version(content, path)
    return content["run"], content["trainer"]
