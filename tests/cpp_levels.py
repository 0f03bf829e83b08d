"""The instruction sets that tests of the C++ kernels run on."""

from __future__ import annotations

import pytest

from sparse_compile.kernels.cpp.isa import LEVELS, Isa, detected, runnable

TILES = Isa("emulated_tiles", (*LEVELS["avx512_bf16"].flags, "-DSPARSE_COMPILE_EMULATED_TILES"))
"""The AMX path with its tile instructions as functions."""


def levels() -> list[object]:
    """The level that users get here, and, as slow cases since each is a build, all others that run here."""
    best = detected()
    others = [level for level in runnable() if level != best]
    if LEVELS["avx512_bf16"] in runnable():
        others.append(TILES)
    slow = [pytest.param(level, id=level.name, marks=pytest.mark.slow) for level in others]
    return [pytest.param(best, id=best.name), *slow]


each_level = pytest.mark.parametrize("level", levels())
