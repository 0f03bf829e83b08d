"""Which level of instructions the C++ kernels get: never more than the CPU has, or than torch may use."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

from sparse_compile.kernels.cpp import isa
from sparse_compile.kernels.cpp.isa import LEVELS, runnable

ZEN_2 = {"avx2": True, "fma3": True, "f16c": True}
SKYLAKE = {**ZEN_2, "avx512_f": True, "avx512_dq": True, "avx512_bw": True, "avx512_vl": True}
ZEN_4 = {**SKYLAKE, "avx512_bf16": True}
SAPPHIRE_RAPIDS = {**ZEN_4, "amx_tile": True, "amx_bf16": True, "amx_int8": True}


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch):
    """Make torch report a CPU, and what of it torch uses."""
    monkeypatch.setattr(isa, "runnable", runnable.__wrapped__)
    monkeypatch.setattr(isa, "amx_is_permitted", lambda: True)

    def use(has: dict[str, bool], torch_uses: str) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torch_uses)

    return use


@pytest.mark.parametrize(
    ("has", "torch_uses", "level"),
    [
        ({}, "NO AVX", "portable"),
        ({"architecture": "aarch64", "bf16": True, "sve": True}, "SVE256", "portable"),
        (ZEN_2, "AVX2", "avx2"),
        ({**ZEN_2, "f16c": False}, "AVX2", "portable"),
        (SKYLAKE, "AVX512", "avx512"),
        ({**SKYLAKE, "avx512_vl": False}, "AVX512", "avx2"),
        ({**ZEN_2, "avx512_bf16": True}, "AVX512", "avx2"),
        (ZEN_4, "AVX512", "avx512_bf16"),
        (ZEN_4, "AVX2", "avx2"),
        (ZEN_4, "DEFAULT", "portable"),
        (SAPPHIRE_RAPIDS, "AVX512", "amx"),
        (SAPPHIRE_RAPIDS, "AVX2", "avx2"),
    ],
)
def test_the_best_level_that_the_cpu_has_and_torch_uses(cpu, has, torch_uses, level):
    cpu(has, torch_uses)
    assert isa.detected.__wrapped__() == LEVELS[level]


def test_what_can_run_does_not_depend_on_what_torch_uses(cpu):
    cpu(SAPPHIRE_RAPIDS, "DEFAULT")
    assert list(isa.runnable()) == list(LEVELS.values())


def test_amx_needs_the_permission_of_the_operating_system(cpu, monkeypatch):
    cpu(SAPPHIRE_RAPIDS, "AVX512")
    monkeypatch.setattr(isa, "amx_is_permitted", lambda: False)
    assert isa.detected.__wrapped__() == LEVELS["avx512_bf16"]


def test_permission_is_asked_for_amx_alone(cpu, monkeypatch):
    cpu(ZEN_4, "AVX512")
    monkeypatch.setattr(isa, "amx_is_permitted", lambda: pytest.fail("there is no AMX here"))
    assert isa.detected.__wrapped__() == LEVELS["avx512_bf16"]


def test_each_level_has_the_flags_of_those_before_it():
    flags = [set(level.flags) for level in LEVELS.values()]
    assert all(lower < higher for lower, higher in itertools.pairwise(flags))
    assert not [flag for level in LEVELS.values() for flag in level.flags if "native" in flag or "fast" in flag]


@pytest.mark.parametrize(("switch", "most"), [("default", "portable"), ("avx2", "avx2")])
def test_the_switch_of_torch_lowers_the_level(switch, most):
    code = "from sparse_compile.kernels.cpp.isa import detected, runnable; print(detected().name, len(runnable()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": switch},
        capture_output=True,
        text=True,
        check=True,
    )
    possible = [level.name for level in runnable()]
    lowered = most if most in possible else "portable"
    assert done.stdout.split() == [lowered, str(len(possible))]
