from __future__ import annotations

import json
import math
import re
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
from sparse_compile.runtime.figures import GenerationReport, HeadReport, StepReport
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
STEP_KEYS = ["step", "branch", "phase", "density", "kept_mass", "non_finite", "density_run", "sparse_calls"]
STEP_KEYS += ["planned_mass", "at_floor", "at_ceiling", "note"]
HEAD_KEYS = ["layer", "ordinal", "branch", "density", "kept_mass"]


def report_of(way: str = "whole", steps: int = 4, **options: object) -> Report:
    model, call = WAYS[way](**options)
    with sparse_compile.denoising(model, steps=steps) as clock:
        generate(call, clock)
    return sparse_compile.explain(model)


def test_the_report_as_data_has_this_schema() -> None:
    data = report_of().to_dict()
    counts, means = ["compilations", "other_compilations"], ["density", "density_run", "kept_mass"]
    assert list(data) == ["sites", *counts, *means, "generations", "heads", "warnings", "compiled"]
    assert [list(site) for site in data["sites"]] == [SITE_KEYS] * 2
    assert [list(generation) for generation in data["generations"]] == [["steps", *means, "at_floor", "at_ceiling"]]
    assert [list(step) for step in data["generations"][0]["steps"]] == [STEP_KEYS] * 8
    assert type(data["compilations"]) is int
    assert [list(heads) for heads in data["heads"]] == [HEAD_KEYS] * 4
    read = json.loads(json.dumps(data, allow_nan=False))
    assert (read["generations"], read["heads"]) == (data["generations"], data["heads"])


@pytest.mark.parametrize("way", WAYS)
def test_the_report_tells_sites_and_steps(way: str) -> None:
    data = report_of(way, probe_rows=0).to_dict()
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
    assert all(heads["kept_mass"] is None for heads in data["heads"])
    assert (generation["kept_mass"], data["kept_mass"]) == (None, None)
    assert data["warnings"] == []


@pytest.mark.parametrize("way", WAYS)
def test_kept_mass_is_measured_in_sparse_calls_and_for_each_head(way: str) -> None:
    report = report_of(way)
    (generation,) = report.generations
    masses = [step.kept_mass for step in generation.steps]
    assert [mass is None for mass in masses] == [step.phase == "dense" for step in generation.steps]
    measured = [mass for mass in masses if mass is not None]
    assert all(0.3 < mass < 1 for mass in measured)
    assert report.kept_mass == generation.kept_mass == pytest.approx(sum(measured) / 6)
    assert [(heads.layer, heads.branch) for heads in report.heads] == [
        (f"blocks.{layer}", branch) for layer in (0, 1) for branch in BRANCHES
    ]
    for branch, step in zip(BRANCHES, generation.steps[-2:], strict=True):
        own = [heads for heads in report.heads if heads.branch == branch]
        assert len({density for heads in own for density in heads.density}) > 1  # heads have plans of their own
        assert sum(sum(heads.density) for heads in own) / 4 == pytest.approx(step.density)
        assert sum(sum(heads.kept_mass or []) for heads in own) / 4 == pytest.approx(step.kept_mass)


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
    assert {heads.layer for heads in report.heads} == {"blocks.1"}


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
    report = report_of(dense_layers=1)
    text = str(report)
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "role", "layout", "decision", "reason"]
    assert lines[2].split()[:4] == ["blocks.0", "self", "video:128", "dense"]
    assert lines[3].split()[:4] == ["blocks.1", "self", "video:128", "sparse"]
    assert "1 of 2 sites sparse, 3 compilations" in lines
    assert any(line.startswith("generation 1: density 0.") for line in lines)
    assert f", kept mass {report.kept_mass:.3f}" in text
    start = next(number for number, line in enumerate(lines) if line.startswith("steps  branch"))
    rows = [line.split()[:3] for line in lines[start + 2 : start + 8]]
    assert rows == [
        [steps, branch, phase]
        for steps, phase in (("0", "dense"), ("1", "search"), ("2-3", "sparse"))
        for branch in BRANCHES
    ]
    assert all(line == line.rstrip() for line in lines)


def heads(density: list[float], kept_mass: list[float] | None, ordinal: int = 0) -> HeadReport:
    return HeadReport("blocks.3.attn1", ordinal, "cond", density, kept_mass)


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (heads([0.25, 0.125, 0.375, 0.25], [0.5, 0.25, 0.625, 0.5]), ["0.25 0.12 0.38 0.25", "0.50 0.25 0.62 0.50"]),
        (heads([0.25] * 4, [0.7311, 0.7309, 0.731, 0.731]), ["0.250", "0.731"]),
        (heads([0.25] * 24, [0.5] * 24), ["0.250", "0.500"]),
        (heads([0.25, 0.5] * 6, None), ["0.250-0.500, mean 0.375", "-"]),
        (heads([0.25, 0.5] * 4, [0.75] * 8), ["0.25 0.50 0.25 0.50 0.25 0.50 0.25 0.50", "0.750"]),
    ],
    ids=["four", "equal", "many equal", "many", "eight"],
)
def test_the_heads_are_printed_one_by_one_or_as_a_range(row: HeadReport, cells: list[str]) -> None:
    lines = str(Report(heads=[row])).splitlines()
    start = lines.index("newest sparse call, per head")
    assert re.split("  +", lines[start + 1]) == ["layer", "branch", "density", "kept mass"]
    assert re.split("  +", lines[start + 3]) == ["blocks.3.attn1", "cond", *cells]


def test_a_second_attention_of_a_layer_is_told_apart() -> None:
    text = str(Report(heads=[heads([0.5], None), heads([0.25], None, ordinal=1)]))
    assert "\nblocks.3.attn1 " in text
    assert "\nblocks.3.attn1, attention 2 " in text


def test_without_sparse_calls_no_heads_are_printed() -> None:
    assert "per head" not in str(report_of(dense_steps=4))


def test_a_generation_is_summed_up_with_its_kept_mass_where_that_was_measured() -> None:
    step = StepReport(0, "cond", "sparse", 0.25, 0.75, 0, 0.4, 1)
    for kept_mass, end in ((0.731, "over all, kept mass 0.731"), (None, "over all")):
        report = Report(generations=[GenerationReport([step], 0.25, 0.4, kept_mass)])
        assert f"generation 1: density 0.250 in sparse calls, density_run 0.400 {end}" in str(report).splitlines()


def test_an_all_dense_generation_is_printed_as_such() -> None:
    report = report_of(dense_steps=4)
    assert "generation 1: 8 calls, all dense" in str(report)
    assert (report.density, report.density_run) == (None, 1.0)


def test_layers_without_a_clock_have_no_history() -> None:
    model, call = whole()
    call(tokens())
    assert [len(layer.history) for layer in layers_of(model)] == [0, 0]
