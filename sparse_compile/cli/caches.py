"""The folders that compiled code is kept in: where they are, whose, how large, and whether they can be written to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sparse_compile.kernels.cpp.torch_internals import inductor_cache

MEBIBYTE = 2**20


class Folder(NamedTuple):
    """A cache folder."""

    path: Path
    exists: bool
    mebibytes: float
    owner: str
    """Empty where it does not exist, or the system knows no owners."""
    problem: str
    """What is wrong with it and what to do; empty for nothing."""

    def __str__(self) -> str:
        if not self.exists:
            return f"{self.path}, not there yet"
        owner = f" of {self.owner}" if self.owner else ""
        return f"{self.path}{owner}, {self.mebibytes:,.0f} MiB"


def triton_cache() -> Path:
    """Where Triton keeps its kernels, and `sparse-attn tune` its measurements."""
    from triton import knobs

    return Path(knobs.cache.dir)


def examine_cache(locate: Callable[[], Path], variable: str) -> Folder:
    """Look at a cache folder without writing to it.

    Args:
        locate: finds it; Inductor's creates it, and raises where it must not.
        variable: the environment variable that puts it elsewhere.
    """
    remedy = f"Set {variable} to a folder of your own."
    try:
        path = locate()
    except OSError as error:
        return Folder(Path(error.filename or "?"), False, 0.0, "", f"It cannot be made: {error.strerror}. {remedy}")
    nearest = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    if not path.exists():
        problem = "" if _writable(nearest) else f"{nearest} cannot be written to. {remedy}"
        return Folder(path, False, 0.0, "", problem)
    owner, ours = _owner(path)
    problem = ""
    if not path.is_dir():
        problem = f"It is no folder. {remedy}"
    elif not _writable(path):
        problem = f"It cannot be written to. {remedy}"
    elif not ours:
        problem = f"It belongs to another user, who may replace what you run. {remedy}"
    return Folder(path, True, _size(path) / MEBIBYTE, owner, problem)


def inductor_folder() -> Folder:
    """Inductor's, in which our C++ kernels lie too."""
    return examine_cache(inductor_cache, "TORCHINDUCTOR_CACHE_DIR")


def triton_folder() -> Folder:
    """Triton's; it must be installed."""
    return examine_cache(triton_cache, "TRITON_CACHE_DIR")


def _writable(path: Path) -> bool:
    return os.access(path, os.W_OK | os.X_OK)


def _owner(path: Path) -> tuple[str, bool]:
    """The name or number of the owner, and whether it is the user of this process."""
    if not hasattr(os, "getuid"):
        return "", True
    import pwd

    number = path.stat().st_uid
    try:
        name = pwd.getpwuid(number).pw_name
    except KeyError:  # a user of another machine
        name = f"user {number}"
    return name, number == os.getuid()


def _size(path: Path) -> int:
    """Bytes of all files below; what vanishes or cannot be read meanwhile counts nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return total
