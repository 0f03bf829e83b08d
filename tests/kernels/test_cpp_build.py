"""The library of C++ kernels: built once, by one process, and either whole or not there; each failure is a reason."""

from __future__ import annotations

import functools
import logging
import os
import platform
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpp_sources import answer, cache, compile_with, source, start_build, use_compiler

from sparse_compile.kernels.cpp import build
from sparse_compile.kernels.cpp.build import BuildError, Source, library, load, using, why_not
from sparse_compile.kernels.cpp.isa import LEVELS, detected

__all__ = ["cache", "compile_with", "source", "use_compiler"]

PORTABLE = LEVELS["portable"]
COUNTED = 'echo compiled >> "{log}"; exec g++ "$@"'


@pytest.fixture
def nothing_loaded(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not asked for a library; the kernels are the small source."""
    monkeypatch.setattr(build, "failure", functools.cache(build.failure.__wrapped__))
    monkeypatch.setattr(build, "KERNELS", source)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


# ---------------------------------------------------------------------- built once


def test_a_library_is_built_once_with_one_line_of_log(
    cache: Path, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sparse_compile"):
        first = load(source, PORTABLE)
        second = load(source, PORTABLE)
    assert first == second and first.parent == cache
    assert answer(first) == 42
    assert [record.getMessage() for record in caplog.records if record.name == "sparse_compile"] == [
        f"Building the CPU kernels for portable into {cache}: half a minute, once for this machine"
    ]


def test_nobody_else_can_read_or_write_what_is_built(cache: Path, source: Source) -> None:
    cache.mkdir(parents=True, mode=0o755)
    load(source, PORTABLE)
    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in [cache, *cache.iterdir()]}
    assert modes.pop(".so") == 0o700 and modes.pop(".sha256") == 0o600
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert not [path for path in cache.iterdir() if stat.S_IMODE(path.stat().st_mode) & 0o077]


def test_a_changed_header_flag_or_compiler_gives_another_library(
    cache: Path, source: Source, compile_with: Callable[[str], Path]
) -> None:
    paths = [load(source, PORTABLE), load(source, PORTABLE._replace(flags=("-DOTHER",)))]
    source.file.with_name("answer.h").write_text("#define ANSWER 43\n")
    paths.append(load(source, PORTABLE))
    compile_with('exec g++ "$@"')
    paths.append(load(source, PORTABLE))
    assert len(set(paths)) == 4
    assert [answer(path) for path in paths] == [42, 42, 43, 43]


def test_two_processes_at_once_compile_once_and_both_load(
    cache: Path, source: Source, compile_with: Callable[[str], Path], tmp_path: Path
) -> None:
    compile_with(f'echo compiled >> "{tmp_path}/log"; sleep 1; exec g++ "$@"')
    processes = [start_build(source) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [printed for printed, _ in outputs] == ["answer 42\n", "answer 42\n"], outputs
    assert lines(tmp_path / "log") == 1


def test_a_process_killed_while_it_builds_leaves_nothing_that_is_loaded(
    cache: Path, source: Source, compile_with: Callable[[str], Path], tmp_path: Path
) -> None:
    half = 'for last; do [ "$before" = -o ] && echo half > "$last"; before=$last; done'
    compile_with(f'if mkdir "{tmp_path}/first"; then {half}; touch "{tmp_path}/begun"; sleep 60; fi; exec g++ "$@"')
    process = start_build(source)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert [path.read_text() for path in cache.glob(f"{build.UNFINISHED}*/*.so")] == ["half\n"]
    assert not list(cache.glob("*.so"))
    assert answer(load(source, PORTABLE)) == 42
    assert not list(cache.glob(f"{build.UNFINISHED}*"))


@pytest.mark.parametrize("keep", [0, 0.3, 0.9], ids=["empty", "a third", "nearly all"])
def test_a_truncated_library_is_built_again(cache: Path, source: Source, keep: float) -> None:
    path, is_new = build.find_or_build(source, PORTABLE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    assert is_new and build.find_or_build(source, PORTABLE) == (path, True)
    assert answer(path) == 42


def test_a_library_that_does_not_load_is_built_again(cache: Path, source: Source) -> None:
    path, _ = build.find_or_build(source, PORTABLE)
    path.write_bytes(b"of another machine")
    path.with_suffix(".sha256").write_text(build._digest(path))
    assert build.find_or_build(source, PORTABLE) == (path, False)
    assert answer(load(source, PORTABLE)) == 42


# ---------------------------------------------------------------------- what goes wrong is a reason


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("false", r"No working C\+\+ compiler found .* 'false'"),
        ("/no/such/g++", r"No working C\+\+ compiler found .*/no/such/g\+\+"),
    ],
    ids=["broken", "missing"],
)
def test_without_a_compiler_the_reason_says_so(
    cache: Path, source: Source, use_compiler: Callable[[str], None], compiler: str, reason: str
) -> None:
    use_compiler(compiler)
    with pytest.raises(BuildError, match=rf"^{reason}.*: set CXX to a C\+\+20 compiler such as GCC 12 or newer$"):
        load(source, PORTABLE)


def test_a_compiler_that_fails_is_named_with_its_first_error(
    cache: Path, source: Source, compile_with: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = compile_with("echo In file x; echo 'x.h:1: error: no such thing'; echo much more; exit 1")
    with caplog.at_level(logging.DEBUG, "sparse_compile"), pytest.raises(BuildError) as caught:
        load(source, PORTABLE)
    assert str(caught.value) == f"{path} failed, x.h:1: error: no such thing: {build.OTHER_COMPILER}"
    assert "In file x\nx.h:1: error: no such thing\nmuch more" in caplog.text
    assert not [path for path in cache.iterdir() if path.name != "lock"]


def test_a_source_that_does_not_compile_is_a_reason(cache: Path, source: Source) -> None:
    source.file.write_text("int answer( {")
    with pytest.raises(BuildError, match=r"g\+\+ failed, .*small.cpp:1:.* error: .*: set CXX"):
        load(source, PORTABLE)


def test_a_library_that_never_loads_is_a_reason_and_compiled_once(
    cache: Path, source: Source, compile_with: Callable[[str], Path], tmp_path: Path
) -> None:
    compile_with(COUNTED.format(log=tmp_path / "log"))
    source.file.write_text("int nowhere(); int here = nowhere();")
    with pytest.raises(
        BuildError, match=r"cannot be loaded, .*undefined symbol: .*nowhere.*: set CXX .*, or set TORCH"
    ):
        load(source, PORTABLE)
    assert lines(tmp_path / "log") == 1


@pytest.mark.parametrize("blocked", ["above the cache folder", "the cache folder", "our folder"])
def test_a_folder_that_cannot_be_written_is_a_reason(
    cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    place = cache if blocked == "our folder" else cache.parent
    place.parent.mkdir(exist_ok=True)
    place.write_text("a file in its place")
    if blocked == "above the cache folder":
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place / "below"))
    with pytest.raises(BuildError, match=r"cannot be built, .*: set TORCHINDUCTOR_CACHE_DIR to a folder that you can"):
        load(source, PORTABLE)


def test_a_folder_that_others_write_to_is_refused(cache: Path, source: Source) -> None:
    load(source, PORTABLE)
    cache.chmod(0o777)
    with pytest.raises(BuildError, match="others may write to it: remove it"):
        load(source, PORTABLE)


def test_the_folder_of_another_user_is_refused(cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    load(source, PORTABLE)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(BuildError, match="belongs to another user"):
        load(source, PORTABLE)


def test_a_link_in_place_of_the_folder_is_refused(cache: Path, source: Source, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match="remove it"):
        load(source, PORTABLE)


def test_a_library_that_others_could_write_is_built_again(cache: Path, source: Source) -> None:
    path, _ = build.find_or_build(source, PORTABLE)
    path.chmod(0o722)
    assert build.find_or_build(source, PORTABLE) == (path, True)


def test_on_windows_the_reason_says_so(cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.sys, "platform", "win32")
    with pytest.raises(BuildError, match="for Linux and macOS alone"):
        load(source, PORTABLE)


@pytest.mark.usefixtures("nothing_loaded")
def test_a_failure_is_remembered(cache: Path, compile_with: Callable[[str], Path], tmp_path: Path) -> None:
    compile_with(f'echo compiled >> "{tmp_path}/log"; echo error: out of order; exit 1')
    reasons = {why_not() for _ in range(3)}
    assert len(reasons) == 1 and "out of order" in reasons.pop()
    with pytest.raises(BuildError, match="out of order"):
        library()
    assert lines(tmp_path / "log") == 1


# ---------------------------------------------------------------------- levels


@pytest.mark.usefixtures("nothing_loaded")
def test_inside_using_the_library_is_that_of_the_level(cache: Path) -> None:
    level = PORTABLE._replace(name="some_level")
    with using(level):
        assert library() is torch.ops.sparse_compile_some_level
        assert library(detected()) is getattr(torch.ops, f"sparse_compile_{detected().name}")
    assert library() is getattr(torch.ops, f"sparse_compile_{detected().name}")


X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="levels other than portable are for x86")
SUMS = """
extern "C" __attribute__((visibility("default"))) void answer(float* to, const float* a, const float* b) {
  for (int i = 0; i < 4096; ++i) to[i] += a[i] * b[i];
}
"""


@X86
@pytest.mark.parametrize(
    ("level", "widest", "fused"), [("portable", "xmm", False), ("avx2", "ymm", True), ("avx512", "zmm", True)]
)
def test_a_level_has_its_own_instructions_and_no_higher_ones(
    cache: Path, source: Source, level: str, widest: str, fused: bool
) -> None:
    source.file.write_text(SUMS)
    isa = LEVELS[level]._replace(flags=(*LEVELS[level].flags, "-mprefer-vector-width=512"))
    path, _ = build.find_or_build(source, isa)
    code = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
    registers = ("xmm", "ymm", "zmm")
    assert [name for name in registers if f"%{name}" in code][-1] == widest
    assert ("vfmadd" in code) == fused


def test_sums_are_not_reordered_and_infinities_are_kept(cache: Path, source: Source) -> None:
    source.file.write_text("""
    static float sum(const volatile float* x) {
      float total = 0;
      for (int i = 0; i < 4; ++i) total += x[i];
      return total;
    }
    extern "C" __attribute__((visibility("default"))) int answer() {
      const volatile float x[] = {1e30f, 1.f, -1e30f, 1.f}, zero = 0.f, one = 1.f, tiny = 1e-40f;
      const float nan = zero / zero;
      return (sum(x) == 1.f) + 2 * (nan != nan) + 4 * (one / -zero < 0) + 8 * (tiny * one > 0.f);
    }
    """)
    assert answer(load(source, detected())) == 15


def test_the_kernels_are_built_for_the_level_of_this_cpu() -> None:
    assert why_not() == ""
    assert library().isa() == build.namespace(detected())


# ---------------------------------------------------------------------- make sanitize


def test_the_sanitizing_compiler_finds_a_read_behind_the_end(
    cache: Path, source: Source, use_compiler: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(str(Path(__file__).parents[1] / "sanitizing-g++"))
    source.file.write_text(
        '#include <vector>\nextern "C" __attribute__((visibility("default"))) int answer() {\n'
        "  std::vector<int> x(4, 1);\n  volatile int place = 4;\n  return x.data()[place];\n}\n"
    )
    preload = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    monkeypatch.setenv("LD_PRELOAD", " ".join(preload))
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")
    process = start_build(source)
    printed, said = process.communicate(timeout=120)
    assert process.returncode != 0 and "answer" not in printed
    assert "AddressSanitizer: heap-buffer-overflow" in said and "small.cpp:5" in said
