"""Small C++ libraries that the builder of the kernels builds: a second each, since they include nothing of torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch._inductor import config

from sparse_compile.kernels.cpp.build import Source

ANSWER = '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'

BUILD_IN_ITS_OWN_PROCESS = """
import ctypes, sys
from pathlib import Path
from sparse_compile.kernels.cpp.build import Source, load
from sparse_compile.kernels.cpp.isa import LEVELS
source = Path(sys.argv[1])
print("answer", ctypes.CDLL(str(load(Source(source, source.parent), LEVELS["portable"]))).answer())
"""


def answer(library: Path) -> int:
    """What the function of such a library returns."""
    return int(ctypes.CDLL(str(library)).answer())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the libraries, in a cache of this test's own. It is not there yet."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / f"sparse_compile_{os.getuid()}"


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A source with a header, whose function returns 42."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "small.cpp").write_text(ANSWER)
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    return Source(folder / "small.cpp", folder)


@pytest.fixture
def use_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Name the compiler, as ``CXX`` would have before torch was imported; for processes started here too."""
    with contextlib.ExitStack() as stack:

        def use(name: str) -> None:
            monkeypatch.setenv("CXX", name)
            stack.enter_context(config.patch({"cpp.cxx": (None, name)}))

        yield use


@pytest.fixture
def compile_with(tmp_path: Path, use_compiler: Callable[[str], None]) -> Callable[[str], Path]:
    """Make a shell script the compiler. It is called with g++'s arguments, and need not care for ``--version``."""

    def use(script: str) -> Path:
        path = tmp_path / "scripted-g++"
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\n{script}\n')
        path.chmod(0o700)
        use_compiler(str(path))
        return path

    return use


def start_build(source: Source) -> subprocess.Popen[str]:
    """A process of its own that builds and loads a source."""
    return subprocess.Popen(
        [sys.executable, "-c", BUILD_IN_ITS_OWN_PROCESS, str(source.file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
