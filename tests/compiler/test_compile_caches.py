"""Torch's portable cache: another process takes over the compiled code, and makes phases and guards itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GENERATION = """
import json, sys
import torch
from torch._dynamo.utils import counters
from toy_models import EAGER, Stack, tokens
import sparse_compile

def generate():
    model = Stack(1)
    options = {**EAGER, "lowering": "inductor", "kernel": "reference", "dense_steps": 1, "k_clusters": 8}
    call = torch.compile(model, backend="sparse_attn", options=options)
    with torch.no_grad(), sparse_compile.denoising(model, steps=3) as clock:
        outputs = []
        for step in range(3):
            outputs.append(call(tokens(seed=step)))
            clock.step()
        report = sparse_compile.explain(model)
    phases = [step.phase for step in report.generations[-1].steps]
    hits = {key: counters["inductor"][f"fxgraph_cache_{key}"] for key in ("hit", "miss")}
    return torch.stack(outputs), {"phases": phases, "compilations": report.compilations, **hits}
"""
SAVE = """
outputs, facts = generate()
artifacts, info = torch.compiler.save_cache_artifacts()
open(sys.argv[1] + "/artifacts", "wb").write(artifacts)
torch.save(outputs, sys.argv[1] + "/outputs")
print(json.dumps(facts))
"""
LOAD = """
torch.compiler.load_cache_artifacts(open(sys.argv[1] + "/artifacts", "rb").read())
outputs, facts = generate()
facts["equal"] = torch.equal(outputs, torch.load(sys.argv[1] + "/outputs"))
print(json.dumps(facts))
"""


def facts_of(program: str, folder: Path, cache: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / cache),
    }
    command = [sys.executable, "-c", GENERATION + program, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


@pytest.mark.slow
def test_a_process_that_loads_saved_caches_compiles_nothing_and_has_all_phases(tmp_path: Path) -> None:
    common = {"phases": ["dense", "search", "sparse"], "compilations": 3}
    assert facts_of(SAVE, tmp_path, "first") == {**common, "hit": 0, "miss": 3}
    assert facts_of(LOAD, tmp_path, "second") == {**common, "hit": 3, "miss": 0, "equal": True}
