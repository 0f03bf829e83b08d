"""On a device: every op keeps the promises of its schema and its fake."""

from __future__ import annotations

import pytest
import torch
from gpu_sites import PHASES, recorded_calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize(("method", "phase"), [(m, phase) for m, phases in PHASES.items() for phase in phases])
def test_every_op_of_a_call_passes_opcheck(method: str, phase: str, kernel: str) -> None:
    calls = recorded_calls(method, phase, "cuda", kernel)
    assert calls
    for op, arguments in calls:
        results = torch.library.opcheck(op, arguments)
        assert set(results.values()) == {"SUCCESS"}, (op, results)
