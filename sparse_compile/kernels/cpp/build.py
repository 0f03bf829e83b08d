"""Build the library of C++ kernels when it is first needed, keep it in Inductor's cache folder, and load it.

A library that lies in the cache is one that was finished: it is written elsewhere and moved there, its digest beside
it. Whatever goes wrong is a `BuildError`, and the compiler takes plain torch instead.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from filelock import FileLock, Timeout

from sparse_compile.kernels.cpp.isa import Isa, detected
from sparse_compile.kernels.cpp.torch_internals import Toolchain, inductor_cache, toolchain

log = logging.getLogger("sparse_compile")

FLAGS = (
    "-std=c++20",
    "-fvisibility=hidden",  # several levels in one process: none may call the functions of another
    "-ffp-contract=fast",  # a * b + c as one instruction, and rounded once
    "-fno-math-errno",
    "-fno-trapping-math",
)
"""What every level is compiled with beside -O3: floating point by the standard, except that sums are fused."""
LONGEST_WAIT = 15 * 60
"""Seconds for which another process may build."""
UNFINISHED = "unfinished-"
"""How the folders begin that libraries are built in."""

OTHER_COMPILER = "set CXX to a C++20 compiler such as GCC 12 or newer"
OTHER_FOLDER = "set TORCHINDUCTOR_CACHE_DIR to a folder that you can write to"


class BuildError(RuntimeError):
    """Why there is no library, in one line that ends with what to do."""

    @classmethod
    def of(cls, reason: object, remedy: str) -> Self:
        """The line, whatever the length of the reason."""
        return cls(f"{' '.join(str(reason).split())[:300]}: {remedy}")


class Source(NamedTuple):
    """A translation unit, and the folder whose C++ files together decide whether it must be compiled again."""

    file: Path
    folder: Path


KERNELS = Source(Path(__file__).with_name("library.cpp"), Path(__file__).parents[1])

_USED: ContextVar[Isa | None] = ContextVar("using", default=None)


@contextlib.contextmanager
def using(isa: Isa) -> Iterator[None]:
    """Make `library` give that of this level inside; the CPU must be able to run it."""
    token = _USED.set(isa)
    try:
        yield
    finally:
        _USED.reset(token)


def library(isa: Isa | None = None) -> Any:
    """The operators of a level, ``torch.ops.sparse_compile_<level>``: built at first use, kept for later processes.

    Args:
        isa: the level; if not given, that of `using`, or the best that this CPU has.

    Raises:
        BuildError: there is no such library, and why. It is not tried again in this process.
    """
    level = isa or _USED.get() or detected()
    if reason := failure(level):
        raise BuildError(reason)
    return getattr(torch.ops, namespace(level))


def why_not() -> str:
    """Why there is no library for this CPU, in one line; empty if there is one. Builds it if need be."""
    return failure(_USED.get() or detected())


@functools.cache
def failure(isa: Isa) -> str:
    """Load the kernels of a level, once in a process; what comes back is what went wrong, empty if nothing did."""
    try:
        load(KERNELS, isa)
    except BuildError as error:
        log.debug("there are no CPU kernels for %s", isa.name, exc_info=error)
        return str(error)
    except Exception as error:  # a compiler or a torch that is not as we know them: the model must still run
        log.exception("the CPU kernels for %s cannot be built", isa.name)
        return str(BuildError.of(f"the CPU kernels cannot be built, {type(error).__name__}: {error}", OTHER_COMPILER))
    return ""


def namespace(isa: Isa) -> str:
    """Where the operators of a level are registered among ``torch.ops``."""
    return f"sparse_compile_{isa.name}"


def load(source: Source, isa: Isa) -> Path:
    """Load a library into this process, building it if need be.

    Raises:
        BuildError: it can be neither found nor built, or not be loaded.
    """
    try:
        path, is_new = find_or_build(source, isa)
        try:
            torch.ops.load_library(str(path))
        except OSError:
            if is_new:
                raise
            path.unlink(missing_ok=True)  # of another system, perhaps, that shares the folder
            path, _ = find_or_build(source, isa)
            torch.ops.load_library(str(path))
    except OSError as error:  # that it cannot be written is a `BuildError` by now
        why = error.__cause__ or error  # torch puts its own words in front of the dynamic loader's
        raise BuildError.of(
            f"the CPU kernels cannot be loaded, {why}", f"{OTHER_COMPILER}, or {OTHER_FOLDER}"
        ) from error
    return path


def find_or_build(source: Source, isa: Isa) -> tuple[Path, bool]:
    """The library of a source for a level, and whether it was built just now.

    Raises:
        BuildError: there is no compiler here, or it fails, or the folder cannot be written or is not ours alone.
    """
    try:
        return _find_or_build(source, isa)
    except OSError as error:
        raise BuildError.of(f"the CPU kernels cannot be built, {error}", OTHER_FOLDER) from error


def _find_or_build(source: Source, isa: Isa) -> tuple[Path, bool]:
    if sys.platform == "win32":
        raise BuildError.of("there are CPU kernels for Linux and macOS alone", "kernel='reference' runs everywhere")
    try:
        tools = toolchain()
    except (OSError, RuntimeError) as error:
        raise BuildError.of(error, OTHER_COMPILER) from error
    flags = (*FLAGS, *isa.flags, f"-DSPARSE_COMPILE_LIBRARY={namespace(isa)}")
    folder = _own_folder()
    path = folder / f"{isa.name}-{_identity(source, tools, flags)}.so"
    if _is_sound(path):
        return path, False
    with _alone_in(folder):
        if _is_sound(path):
            return path, False
        log.warning("Building the CPU kernels for %s into %s: half a minute, once for this machine", isa.name, folder)
        _build(source, tools, flags, path)
    return path, True


def _build(source: Source, tools: Toolchain, flags: Sequence[str], path: Path) -> None:
    """Compile beside the target and move the finished library there."""
    for unfinished in path.parent.glob(f"{UNFINISHED}*"):  # of processes that were killed: nobody else builds now
        shutil.rmtree(unfinished, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent, ignore_cleanup_errors=True) as scratch:
        builder = tools.builder(source.file, Path(scratch), flags)
        try:
            builder.build()
        except RuntimeError as error:
            output = str(getattr(error, "output", error))
            log.debug("%s\n%s", builder.get_command_line(), output)
            raise BuildError.of(f"{tools.compiler} failed, {_first_error(output)}", OTHER_COMPILER) from error
        built = Path(builder.get_target_file_path())
        digest = built.with_name("digest")
        digest.touch(mode=0o600)
        digest.write_text(_digest(built))
        built.chmod(0o700)
        os.replace(digest, path.with_suffix(".sha256"))
        os.replace(built, path)


def _first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "and says nothing")


def _identity(source: Source, tools: Toolchain, flags: Sequence[str]) -> str:
    """Hash of all that decides what is in a library."""
    command = tools.builder(source.file, Path(), flags).get_command_line()
    compiler = shutil.which(tools.compiler) or tools.compiler
    digest = hashlib.sha256(repr((command, compiler, tools.version, torch.__version__, platform.machine())).encode())
    for path in sorted(path for pattern in ("*.cpp", "*.h") for path in source.folder.rglob(pattern)):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(source.folder).as_posix()} {len(text)} ".encode())
        digest.update(text)
    return digest.hexdigest()[:32]


# ---------------------------------------------------------------------- the folder


def _own_folder() -> Path:
    """The folder of our libraries: the user's own, and closed to others."""
    folder = inductor_cache() / f"sparse_compile_{os.getuid()}"  # the cache may be shared, what is run may not
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_ours_alone(folder):
        raise BuildError.of(
            f"{folder} belongs to another user or others may write to it", f"remove it, or {OTHER_FOLDER}"
        )
    if stat.S_IMODE(folder.lstat().st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def _is_ours_alone(path: Path) -> bool:
    """Whether nobody else could have put there what we would run."""
    status = path.lstat()
    shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.getuid() and not shared and not stat.S_ISLNK(status.st_mode)


def _is_sound(path: Path) -> bool:
    """Whether a finished library of ours lies there, as it was written: loading half of one would kill the process."""
    try:
        return _is_ours_alone(path) and _digest(path) == path.with_suffix(".sha256").read_text()
    except OSError:
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from building in a folder; a process that is killed keeps nobody."""
    lock = FileLock(folder / "lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("Another process builds CPU kernels in %s; waiting for it", folder)
        try:
            lock.acquire(timeout=LONGEST_WAIT)
        except Timeout as error:
            raise BuildError.of(f"another process holds {error.lock_file}", f"end it, or {OTHER_FOLDER}") from error
    try:
        yield
    finally:
        lock.release()
