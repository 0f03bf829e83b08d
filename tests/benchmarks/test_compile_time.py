"""The benchmark of compile time: its clock, its figures, and the claim of its results."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import compile_time
from benchmarks.compile_time import BUDGET, PHASES, SUBJECTS, Figures, Pair, Seconds, Subject, measure, summary
from sparse_compile.compiler import pipeline

RESULTS = Path(compile_time.__file__).parent / "results" / "compile_time.json"


def small() -> Subject:
    from toy_models import Stack, tokens

    return Subject(Stack(2), {"hidden_states": tokens()})


def test_every_phase_is_compiled_once_and_its_stages_are_timed():
    figures = measure(small, 2, plain="eager")
    assert len(figures.pairs) == len(figures.phases) == 2
    for phases in figures.phases:
        assert tuple(phases) == tuple(map(str, PHASES))
        assert all(0 < seconds.stages < seconds.python for seconds in phases.values())
    assert all(pair.plain.stages == 0 < pair.dense.stages for pair in figures.pairs)


def test_lowering_is_no_part_of_the_stages(monkeypatch):
    def slow(graph_module, inputs, config):
        end = time.process_time() + 1.0
        while time.process_time() < end:
            pass
        return graph_module.forward

    monkeypatch.setattr(pipeline, "lower", slow)
    with torch.no_grad():
        found = compile_time.compile_phases(small(), "eager", PHASES[:1])["dense"]
    assert found.python > 1.0 > found.stages


def test_figures_are_medians_over_what_inductor_takes():
    pairs = [Pair(Seconds(6.0, 4.0), Seconds(7.0, 4.0)), Pair(Seconds(6.0, 4.0), Seconds(6.0, 3.5))]
    phases = [dict.fromkeys(map(str, PHASES), Seconds(1.0, 0.0, stages)) for stages in (0.2, 0.4)]
    found = summary(Figures(pairs, phases))
    assert found["inductor_seconds"] == 10
    assert found["added"] == pytest.approx(0.025)  # between +10 % and -5 %
    assert found["share"]["search"] == pytest.approx(0.03)


def test_the_results_are_below_the_budget():
    results = json.loads(RESULTS.read_text())
    assert set(results["models"]) <= set(SUBJECTS) and results["budget"] == BUDGET
    for figures in results["models"].values():
        assert figures["added"] <= BUDGET
        assert max(figures["share"].values()) <= BUDGET
