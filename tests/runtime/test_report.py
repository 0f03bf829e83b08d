from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generations import BRANCHES, QUICK, WAYS, generate, layers_of, regional, whole
from torch import nn
from toy_models import Stack, tokens

import sparse_compile
from sparse_compile import call_log
from sparse_compile.errors import SparseAttentionError
from sparse_compile.plan import Plan
from sparse_compile.runtime import state
from sparse_compile.runtime.report import Report

SITE_KEYS = [
    "layer",
    "role",
    "layout",
    "decision",
    "reason",
    "detail",
    "by_design",
    "mask",
    "grid",
    "query_tokens",
    "key_tokens",
    "heads",
    "head_dim",
    "kernel",
    "ordinal",
]
STEP_KEYS = ["step", "branch", "phase", "density", "kept_mass", "non_finite", "density_run"]


def report_of(way: str = "whole", steps: int = 4, **options: object) -> Report:
    model, call = WAYS[way](**options)
    with sparse_compile.denoising(model, steps=steps) as clock:
        generate(call, clock)
    return sparse_compile.explain(model)


def test_the_report_as_data_has_this_schema() -> None:
    data = report_of().to_dict()
    keys = ["sites", "compilations", "other_compilations", "density", "density_run", "generations", "warnings"]
    assert list(data) == keys
    assert [list(site) for site in data["sites"]] == [SITE_KEYS] * 2
    assert [list(generation) for generation in data["generations"]] == [["steps", "density", "density_run"]]
    assert [list(step) for step in data["generations"][0]["steps"]] == [STEP_KEYS] * 8
    assert type(data["compilations"]) is int
    assert json.loads(json.dumps(data))["generations"] == data["generations"]


@pytest.mark.parametrize("way", WAYS)
def test_the_report_tells_sites_and_steps(way: str) -> None:
    data = report_of(way).to_dict()
    assert [(s["layer"], s["decision"], s["reason"]) for s in data["sites"]] == [
        ("blocks.0", "sparse", None),
        ("blocks.1", "sparse", None),
    ]
    assert {(s["query_tokens"], s["key_tokens"], s["heads"], s["head_dim"]) for s in data["sites"]} == {
        (128, 128, 2, 16)
    }
    assert data["compilations"] == 3
    (generation,) = data["generations"]
    seen = [(step["step"], step["branch"], step["phase"]) for step in generation["steps"]]
    names = ["dense", "search", "sparse", "sparse"]
    assert seen == [(step, branch, names[step]) for step in range(4) for branch in BRANCHES]
    assert all(step["kept_mass"] is None for step in generation["steps"])
    assert data["warnings"] == []


@pytest.mark.parametrize("way", WAYS)
def test_density_equals_a_count_of_the_pairs(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[float] = []
    plain = Plan.density

    def count(plan: Plan) -> torch.Tensor:
        heads, attended, valid = plan.keep.shape[1], 0, 0
        q_sizes, k_sizes = plan.q_offsets[0].diff().tolist(), plan.k_offsets[0].diff().tolist()
        kept = plan.kept()[0].tolist()
        for head in range(heads):
            for row, queries in enumerate(q_sizes[head][:-1]):
                for column, keys in enumerate(k_sizes[head][:-1]):
                    valid += queries * keys
                    attended += queries * keys * kept[head][row][column]
        counted.append(attended / valid)
        return plain(plan)

    monkeypatch.setattr(Plan, "density", count)
    report = report_of(way)
    sparse = [step for step in report.generations[0].steps if step.phase != "dense"]
    want = [(one + two) / 2 for one, two in zip(counted[::2], counted[1::2], strict=True)]
    assert [step.density for step in sparse] == pytest.approx(want, rel=1e-6)
    assert max(want) < 0.9
    assert report.density == pytest.approx(sum(want) / len(want), rel=1e-6)


def test_density_run_counts_dense_calls_as_one() -> None:
    report = report_of(dense_layers=1)
    steps = report.generations[0].steps
    dense = [step for step in steps if step.phase == "dense"]
    assert {(step.density, step.density_run) for step in dense} == {(1.0, 1.0)}
    for step in steps[2:]:
        assert step.density_run == pytest.approx((1 + step.density) / 2)
    assert report.density == pytest.approx(sum(step.density for step in steps[2:]) / 6)
    assert report.density_run == pytest.approx(sum(step.density_run for step in steps) / 8)


def test_each_generation_has_its_own_rows() -> None:
    model, call = whole(dense_steps=0)
    with sparse_compile.denoising(model, steps=2) as clock:
        generate(call, clock, ["cond"])
        clock.start(3)
        generate(call, clock, ["cond"])
    report = sparse_compile.explain(model)
    first, second = report.generations
    assert [step.phase for step in first.steps] == ["search", "sparse"]
    assert [step.phase for step in second.steps] == ["search", "sparse", "sparse"]
    assert [step.density for step in second.steps[:2]] == [step.density for step in first.steps]
    assert report.density == second.density


def test_rows_that_the_ring_lost_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    want = report_of(steps=8, dense_steps=2).generations[0].steps
    torch.compiler.reset()
    monkeypatch.setattr(call_log, "ROWS", 4)
    steps = report_of(steps=8, dense_steps=2).generations[0].steps
    assert [(step.step, step.branch) for step in steps if step.phase != "dense"] == [
        (step, branch) for step in (4, 5, 6, 7) for branch in BRANCHES
    ]
    assert [step for step in steps if step.phase != "dense"] == want[-8:]
    assert [step.step for step in steps if step.phase == "dense"] == [0, 0, 1, 1]


def test_calls_beyond_the_history_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "HISTORY", 3)
    steps = report_of(steps=6).generations[0].steps
    assert [step.step for step in steps] == [4, 5, 5]
    assert all(step.density < 1 for step in steps)


def test_a_site_with_two_models_of_one_code_is_in_both_reports() -> None:
    (one, call_one), (two, call_two) = regional(), regional()
    for model, call in ((one, call_one), (two, call_two)):
        with sparse_compile.denoising(model, steps=3) as clock:
            generate(call, clock, ["cond"])
    reports = [sparse_compile.explain(model) for model in (one, two)]
    assert [[site.layer for site in report.sites] for report in reports] == [["blocks.0", "blocks.1"]] * 2
    assert reports[0].generations == reports[1].generations


def test_non_finite_tokens_are_counted() -> None:
    model, call = whole(1, dense_steps=0)
    with sparse_compile.denoising(model, steps=2):
        x = tokens()
        x[0, 5] = math.inf
        call(x)
    (step,) = sparse_compile.explain(model).generations[0].steps
    assert step.non_finite > 0


# ---------------------------------------------------------------------- whom to ask


def test_a_model_that_was_never_compiled_has_an_empty_report() -> None:
    report = sparse_compile.explain(Stack())
    assert report.to_dict()["sites"] == []
    assert report.to_dict()["generations"] == []
    assert (report.compilations, report.density, report.density_run) == (0, None, None)
    assert "no attention was compiled yet" in str(report)


def test_a_compiled_wrapper_and_its_model_have_one_report() -> None:
    model, call = whole()
    with sparse_compile.denoising(call, steps=3) as clock:  # type: ignore[arg-type]
        generate(call, clock)
    assert sparse_compile.explain(call).to_dict() == sparse_compile.explain(model).to_dict()
    assert len(sparse_compile.explain(call).sites) == 2


@pytest.mark.parametrize("thing", [None, "transformer", 3, torch.zeros(1), nn.functional.relu], ids=str)
def test_nothing_else_can_be_explained(thing: Any) -> None:
    with pytest.raises(SparseAttentionError, match=r"explain needs a module or a diffusers pipeline.*Give the"):
        sparse_compile.explain(thing)


def test_explaining_changes_nothing() -> None:
    model, call = whole()
    with sparse_compile.denoising(model, steps=4) as clock:
        want = generate(call, clock)
        clock.start(4)
        seen: dict[str, list[torch.Tensor]] = {branch: [] for branch in BRANCHES}
        for step in range(4):
            for branch in BRANCHES:
                with clock.branch(branch):
                    seen[branch].append(call(tokens(seed={"cond": 100, "uncond": 200}[branch] + step)))
                    str(sparse_compile.explain(model))
            clock.step()
    for branch in BRANCHES:
        assert all(torch.equal(*pair) for pair in zip(seen[branch], want[branch], strict=True))


class Masked(Stack):
    """Attention with a mask that is no key padding."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        block = self.blocks[0]
        q = block.to_q(hidden_states).unsqueeze(1)
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, mask).squeeze(1)


def masked() -> Callable[..., Any]:
    return torch.compile(Masked(1), backend="sparse_attn", options=QUICK)


def test_a_dense_site_says_why() -> None:
    call = masked()
    call(tokens())
    (site,) = sparse_compile.explain(call).to_dict()["sites"]
    assert (site["layer"], site["decision"], site["reason"], site["by_design"]) == ("blocks.0", "dense", "mask", False)
    assert "key-padding mask" in str(sparse_compile.explain(call))


# ---------------------------------------------------------------------- printing


def test_the_printed_report_tells_the_same() -> None:
    text = str(report_of(dense_layers=1))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "role", "layout", "decision", "reason"]
    assert lines[2].split()[:4] == ["blocks.0", "self", "video:128", "dense"]
    assert lines[3].split()[:4] == ["blocks.1", "self", "video:128", "sparse"]
    assert "1 of 2 sites sparse, 3 compilations" in lines
    assert any(line.startswith("generation 1: density 0.") for line in lines)
    rows = [line.split()[:3] for line in lines[-6:]]
    assert rows == [
        [steps, branch, phase]
        for steps, phase in (("0", "dense"), ("1", "search"), ("2-3", "sparse"))
        for branch in BRANCHES
    ]
    assert all(line == line.rstrip() for line in lines)


def test_an_all_dense_generation_is_printed_as_such() -> None:
    report = report_of(dense_steps=4)
    assert "generation 1: 8 calls, all dense" in str(report)
    assert (report.density, report.density_run) == (None, 1.0)


def test_layers_without_a_clock_have_no_history() -> None:
    model, call = whole()
    call(tokens())
    assert [len(layer.history) for layer in layers_of(model)] == [0, 0]
