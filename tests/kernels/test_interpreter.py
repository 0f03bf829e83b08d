"""The Triton kernels on a machine without a GPU: each file of tests/triton_kernels in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tests" / "triton_kernels").glob("test_*.py"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("speed", ["quick", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_kernels_are_right_in_the_interpreter(file: Path, speed: str) -> None:
    wanted = "interpreter and slow" if speed == "slow" else "interpreter and not slow"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", wanted, "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    nothing_slow = speed == "slow" and done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert done.returncode == 0 or nothing_slow, done.stdout[-6000:] + done.stderr[-2000:]
