"""Every row of video_pipeline_cases.py, run as its users do."""

from __future__ import annotations

import pytest
import torch
from generations import QUICK
from tiny_pipelines import steps_of
from video_pipeline_cases import CASES, PipelineCase

import sparse_compile

SPARSE = {**QUICK, "min_tokens": 64}
NOTHING_SKIPPED = {**SPARSE, "top_p": 1.0, "dense_steps": 0}
rows = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=() if case.quick else pytest.mark.slow) for name, case in CASES.items()]
)


def compiled(case: PipelineCase, options: dict[str, object]):  # type: ignore[no-untyped-def]
    pipe = case.pipe()
    for model in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        if model is not None:
            model.compile(backend="sparse_attn", options=options, fullgraph=case.fullgraph)
    sparse_compile.attach(pipe)
    return pipe


@rows
def test_a_pipeline_tells_each_call_its_step_and_branch_and_repeats_bit_for_bit(case: PipelineCase) -> None:
    pipe = compiled(case, SPARSE)
    first = case.run(pipe)
    count = len(case.steps)
    assert [steps_of(pipe, at) for at in range(count)] == case.expected_phases()
    assert torch.equal(case.run(pipe), first)
    assert [steps_of(pipe, at) for at in range(count, 2 * count)] == case.expected_phases()
    report = sparse_compile.explain(pipe)
    assert len(report.generations) == 2 * count
    assert [warning for warning in report.warnings if "calls" in warning] == []
    assert (first - case.run(case.pipe())).abs().max() > 1e-3


@rows
def test_a_pipeline_that_skips_nothing_equals_eager(case: PipelineCase) -> None:
    pipe = compiled(case, NOTHING_SKIPPED)
    eager = case.run(case.pipe())
    scale = eager.abs().max()
    torch.testing.assert_close(case.run(pipe) / scale, eager / scale, rtol=0, atol=2e-4)
    assert sparse_compile.explain(pipe).density == 1.0
