"""Every kernel compiles for every GPU it is shipped for, within its shared memory and without spills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_compile.kernels.launching import ARCHITECTURES, architecture_family, compiled_ahead
from sparse_compile.kernels.shipped import shipped

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_whatever_ships_compiles_and_keeps_the_rules() -> None:
    """Results that the repository holds for these very sources are taken as they are; all others are made here."""
    record = ROOT / "benchmarks" / "results" / "compiled_kernels.json"
    command = [sys.executable, "-m", "benchmarks.compiled_kernels", "--known", str(record)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    ("problem", "architecture"),
    [*(("top k", architecture) for architecture in ARCHITECTURES), ("estimated recall", 80), ("measured recall", 120)],
)
def test_a_call_compiles_what_it_would_launch(problem: str, architecture: int) -> None:
    """Kernels that are quick to compile, whatever the repository holds."""
    calls = {call.problem: call for call in shipped(ARCHITECTURES[architecture], torch.bfloat16, 64)}
    with compiled_ahead(architecture) as compilations:
        calls[problem].run()
    assert compilations
    for made in compilations:
        assert made.compiled.metadata.target.arch == architecture
        assert len(made.compiled.asm["cubin"]) > 0
        assert made.compiled.metadata.shared <= ARCHITECTURES[architecture].shared_memory


def test_pooled_keys_of_wide_float32_heads_fit_the_smallest_shared_memory() -> None:
    """The chunks of pooled keys do not depend on the configuration, so no table could leave them out."""
    device = ARCHITECTURES[89]
    calls = (call for call in shipped(device, torch.float32, 256) if call.problem == "blocks, coupled")
    with compiled_ahead(89) as compilations:
        next(calls).run()
    assert {made.name for made in compilations} >= {"attend_tiles"}
    for made in compilations:
        assert made.compiled.metadata.shared <= device.shared_memory, made.name


def test_other_gpus_are_taken_for_the_nearest_older_one() -> None:
    families = {capability: architecture_family(capability) for capability in (75, 80, 86, 87, 89, 90, 100, 103, 121)}
    assert families == {75: 80, 80: 80, 86: 80, 87: 80, 89: 89, 90: 90, 100: 100, 103: 100, 121: 120}


def test_every_table_has_a_row_for_every_gpu_dtype_and_head_size() -> None:
    for device in ARCHITECTURES.values():
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for size in (8, 40, 64, 72, 96, 128, 160, 256):
                kernels = {call.kernel for call in shipped(device, dtype, size)}
                assert kernels == {
                    "block_sparse_attention", "kmeans", "block_map", "recall_map",
                    "block_mass", "pooled_keys", "kept_mass",
                }  # fmt: skip
