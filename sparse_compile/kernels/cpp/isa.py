"""The instruction sets that the C++ kernels are built for, and which of them this CPU has."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from sparse_compile.kernels.cpp.torch_internals import amx_is_permitted

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")


class Isa(NamedTuple):
    """One level of instructions: a library of its own.

    name: what the library is called after.
    flags: what the compiler is told, beyond the least that the architecture has.
    """

    name: str
    flags: tuple[str, ...]


LEVELS = {
    level.name: level
    for level in (
        Isa("portable", ()),
        Isa("avx2", _AVX2),
        Isa("avx512", _AVX512),
        Isa("avx512_bf16", (*_AVX512, "-mavx512bf16")),
        Isa("amx", (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16")),
    )
}
"""From the least to the best; each contains those before it."""

_NEEDS = {
    "avx2": ("avx2", "fma3", "f16c"),
    "avx512": ("avx512_f", "avx512_dq", "avx512_bw", "avx512_vl"),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_bf16"),
}
"""What a level needs of the CPU beyond the level before it, as `torch.cpu.get_capabilities` names it."""

_BEST_ALLOWED = {"AVX512": "amx", "AVX2": "avx2"}
"""The best level under each answer of `torch.backends.cpu.get_cpu_capability`; portable under any other."""


@functools.cache
def detected() -> Isa:
    """The best level that this CPU has and torch is allowed to use.

    ``ATEN_CPU_CAPABILITY=avx2`` (or ``avx512``, ``default``), which lowers the level of torch's own kernels, lowers
    this one too.
    """
    allowed = list(LEVELS).index(_BEST_ALLOWED.get(torch.backends.cpu.get_cpu_capability(), "portable"))
    return [level for place, level in enumerate(LEVELS.values()) if place <= allowed and level in runnable()][-1]


@functools.cache
def runnable() -> tuple[Isa, ...]:
    """All levels that this CPU can execute, from the least to the best."""
    has = torch.cpu.get_capabilities()
    levels = [LEVELS["portable"]]
    for name, needs in _NEEDS.items():
        if not all(has.get(need, False) for need in needs) or (name == "amx" and not amx_is_permitted()):
            break
        levels.append(LEVELS[name])
    return tuple(levels)
