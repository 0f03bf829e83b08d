"""Which of a kernel's configurations to use: what `sparse-attn tune` measured on this GPU, or the first of the table.

Nothing is measured while a model runs. A measurement holds for one GPU model, one version of Triton and one state of
the kernel's sources; anything else makes it void.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_compile.kernels.launching import is_compiling_ahead

Config = TypeVar("Config", bound=tuple[Any, ...])
FILE = "sparse_compile_tuned.json"


def chosen(kernel: str, problem: str, candidates: Sequence[Config], x: Tensor) -> Config:
    """The measured configuration if there is one and it is among the candidates, else the first of them.

    Args:
        kernel: the folder of the kernel.
        problem: what the configuration depends on, such as dtype and head size.
        candidates: best first.
        x: a tensor on the device that the kernel will run on.
    """
    if x.device.type != "cuda" or is_compiling_ahead():
        return candidates[0]
    measured = measurements(gpu_name(x.device.index)).get(entry(kernel, problem))
    return next((row for row in candidates if list(row) == measured), candidates[0])


def problem(dtype: torch.dtype, size: int) -> str:
    """What a measurement holds for where only the dtype and the head size matter."""
    return f"{dtype}, {size}"


def entry(kernel: str, problem: str) -> str:
    """The key of a measurement."""
    return f"{kernel}/{sources_of(kernel)}/{problem}"


@functools.cache
def measurements(gpu: str) -> Mapping[str, list[Any]]:
    """What was measured on a GPU model, by `entry`; read once in a process."""
    found = _everything().get(identity(gpu))
    return found if isinstance(found, dict) else {}


def save(gpu: str, choices: Mapping[str, Sequence[Any]]) -> Path:
    """Add measurements to the file, whole or not at all; give its path."""
    file, known = path(), _everything()
    known[identity(gpu)] = {**measurements(gpu), **{key: list(row) for key, row in choices.items()}}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(known, indent=1))
    temporary.replace(file)
    measurements.cache_clear()
    return file


def _everything() -> dict[str, Any]:
    """The file; empty if it is not there or not ours."""
    try:
        found = json.loads(path().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def path() -> Path:
    """The file, in Triton's cache."""
    from triton import knobs

    return Path(knobs.cache.dir) / FILE


def identity(gpu: str) -> str:
    """What a measurement holds for."""
    import triton

    return f"{gpu}, triton {triton.__version__}"


@functools.cache
def gpu_name(index: int) -> str:
    """The model of a GPU."""
    return str(torch.cuda.get_device_name(index))


@functools.cache
def sources_of(kernel: str) -> str:
    """Hash of the sources of a kernel and of what its work lists are made by."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for folder in (here / kernel, here / "work_lists"):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
