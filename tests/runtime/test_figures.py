"""The host's history joined with the device's log, on layers that were filled by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from toy_models import Stack

from sparse_compile import call_log
from sparse_compile.call_log import append_row, log_spec
from sparse_compile.config import Config
from sparse_compile.phases import Phase
from sparse_compile.runtime.call_figures import CallReport, calls_of
from sparse_compile.runtime.figures import GenerationReport, HeadReport, generations_of, heads_of, uniformity_warning
from sparse_compile.runtime.registry import Registry
from sparse_compile.runtime.report import build_report
from sparse_compile.runtime.state import Call, Layer, allocate
from sparse_compile.strategies.base import Planner
from sparse_compile.strategies.svg2 import Svg2

CPU = torch.device("cpu")
PLANNER = Planner(Svg2(), Config())


class Made(NamedTuple):
    """One call: its phase, and what its op wrote to the log for each head."""

    phase: Phase
    density: Sequence[float] = ()
    kept_mass: Sequence[float] = ()


DENSE, SEARCH = Made(Phase.DENSE), Made(Phase.SEARCH)


def sparse(*density: float, kept_mass: Sequence[float] = (), phase: Phase = Phase.SPARSE) -> Made:
    return Made(phase, density, kept_mass)


def make(layer: Layer, calls: Sequence[Made], *, generation: int = 1, branch: str = "cond", ordinals: int = 1) -> Layer:
    """Note calls as a Region does, one a step, and write the log as the ops do."""
    for step, made in enumerate(calls):
        state = layer.state(branch, generation)
        if made.density:
            for ordinal in range(ordinals):
                if ordinal not in state.logs:
                    state.logs[ordinal] = allocate(log_spec(CPU, len(made.density)))
                scale = 2.0**-ordinal
                append_row(state.logs[ordinal], row(made.density) * scale, row(made.kept_mass), None)
        layer.history.append(Call(generation, step, branch, made.phase, state.rows if made.density else None))
        state.rows += bool(made.density)
    return layer


def row(figures: Sequence[float]) -> Tensor:
    """[1, H], or a mass that nobody measured."""
    return torch.tensor([figures]) if figures else torch.full((1, 1), math.nan)


def a_layer(*calls: Made, **where: object) -> Layer:
    return make(Layer(PLANNER), calls, **where)  # type: ignore[arg-type]


def generations(layers: Sequence[Layer]) -> list[GenerationReport]:
    return generations_of(calls_of([("a", layer) for layer in layers]))


# ---------------------------------------------------------------------- steps and generations


def test_a_search_without_a_row_counts_as_dense_and_the_rows_stay_with_their_calls() -> None:
    layer = a_layer(
        DENSE,
        SEARCH,
        sparse(0.125, 0.375, kept_mass=[0.5, 0.75]),
        sparse(0.5, 0.5, kept_mass=[1.0, 1.0], phase=Phase.REFINE),
    )
    (generation,) = generations([layer])
    assert [(step.step, step.phase) for step in generation.steps] == [
        (0, "dense"),
        (1, "search"),
        (2, "sparse"),
        (3, "refine"),
    ]
    assert [step.density for step in generation.steps] == [1.0, 1.0, 0.25, 0.5]
    assert [step.density_run for step in generation.steps] == [1.0, 1.0, 0.25, 0.5]
    assert [step.kept_mass for step in generation.steps] == [None, None, 0.625, 1.0]
    assert [step.sparse_calls for step in generation.steps] == [0, 0, 1, 1]
    assert (generation.density, generation.density_run) == (0.375, 2.75 / 4)
    assert generation.kept_mass == (0.625 + 1.0) / 2


def test_searches_between_sparse_calls_shift_no_row() -> None:
    layer = a_layer(SEARCH, sparse(0.25), SEARCH, sparse(0.5), sparse(0.75))
    (generation,) = generations([layer])
    assert [step.density for step in generation.steps] == [1.0, 0.25, 1.0, 0.5, 0.75]
    assert generation.density == 0.5


def test_rows_stay_with_their_calls_over_generations_with_searches() -> None:
    layer = a_layer(SEARCH, sparse(0.25), sparse(0.5))
    make(layer, [SEARCH, sparse(0.75)], generation=2)
    densities = [[step.density for step in generation.steps] for generation in generations([layer])]
    assert densities == [[1.0, 0.25, 0.5], [1.0, 0.75]]


def test_rows_that_the_ring_lost_leave_searches_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_log, "ROWS", 2)
    layer = a_layer(SEARCH, sparse(0.25), sparse(0.5), SEARCH, sparse(0.75))
    (generation,) = generations([layer])
    assert [(step.step, step.density) for step in generation.steps] == [(0, 1.0), (2, 0.5), (3, 1.0), (4, 0.75)]


def test_a_generation_of_dense_calls_and_searches_has_no_density() -> None:
    (generation,) = generations([a_layer(DENSE, SEARCH)])
    assert (generation.density, generation.density_run, generation.kept_mass) == (None, 1.0, None)


def test_a_step_is_the_mean_over_the_layers_that_ran_sparsely() -> None:
    layers = [
        a_layer(sparse(0.25, kept_mass=[0.5])),
        a_layer(DENSE),
        a_layer(sparse(0.5, kept_mass=[1.0])),
        a_layer(sparse(0.75)),
    ]
    ((step,),) = (generation.steps for generation in generations(layers))
    assert (step.density, step.sparse_calls) == (0.5, 3)
    assert step.density_run == (0.25 + 1 + 0.5 + 0.75) / 4
    assert step.kept_mass == 0.75  # of the two that measured it


def test_each_attention_of_a_layer_counts() -> None:
    ((step,),) = (generation.steps for generation in generations([a_layer(sparse(0.5), ordinals=2)]))
    assert (step.density, step.sparse_calls) == (0.375, 2)


# ---------------------------------------------------------------------- calls


def test_every_call_has_its_layer_step_branch_and_figures() -> None:
    layer = a_layer(DENSE, SEARCH, sparse(0.25, 0.75, kept_mass=[0.5, 1.0]))
    make(layer, [sparse(0.125)], branch="uncond", generation=2)
    assert calls_of([("blocks.0", layer)]) == [
        CallReport("blocks.0", None, 1, 0, "cond", "dense", 1.0, None, 0),
        CallReport("blocks.0", None, 1, 1, "cond", "search", 1.0, None, 0),
        CallReport("blocks.0", 0, 1, 2, "cond", "sparse", 0.5, 0.75, 0),
        CallReport("blocks.0", 0, 2, 0, "uncond", "sparse", 0.125, None, 0),
    ]


def test_each_attention_of_a_layer_has_its_own_calls() -> None:
    calls = calls_of([("a", a_layer(DENSE, sparse(0.5), ordinals=2))])
    assert [(call.step, call.ordinal, call.density, call.sparse) for call in calls] == [
        (0, None, 1.0, False),
        (1, 0, 0.5, True),
        (1, 1, 0.25, True),
    ]


def test_calls_whose_rows_the_ring_lost_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_log, "ROWS", 1)
    calls = calls_of([("a", a_layer(SEARCH, sparse(0.25), sparse(0.5)))])
    assert [(call.step, call.density) for call in calls] == [(0, 1.0), (2, 0.5)]


# ---------------------------------------------------------------------- heads


def test_heads_are_those_of_the_newest_sparse_call_of_each_branch() -> None:
    layer = a_layer(sparse(0.25, 0.5), sparse(0.125, 0.375, kept_mass=[0.5, 0.75]), SEARCH)
    make(layer, [sparse(0.5, 0.75)], branch="uncond")
    assert heads_of([("blocks.0", layer)]) == [
        HeadReport("blocks.0", 0, "cond", [0.125, 0.375], [0.5, 0.75]),
        HeadReport("blocks.0", 0, "uncond", [0.5, 0.75], None),
    ]


def test_layers_keep_their_order_and_attentions_come_in_theirs() -> None:
    layers = [("second", a_layer(sparse(0.5))), ("first", a_layer(sparse(0.25), ordinals=2))]
    seen = [(heads.layer, heads.ordinal, heads.density) for heads in heads_of(layers)]
    assert seen == [("second", 0, [0.5]), ("first", 0, [0.25]), ("first", 1, [0.125])]


def test_only_layers_that_ran_sparsely_in_the_newest_generation_have_heads() -> None:
    stayed, became_dense = a_layer(sparse(0.25)), a_layer(sparse(0.25))
    make(stayed, [SEARCH, sparse(0.5)], generation=2)
    make(became_dense, [DENSE, DENSE], generation=2)
    layers = [("a", stayed), ("b", became_dense), ("c", a_layer(DENSE, generation=2)), ("d", Layer(PLANNER))]
    assert [(heads.layer, heads.density) for heads in heads_of(layers)] == [("a", [0.5])]


def test_a_generation_that_only_searched_has_no_heads() -> None:
    layer = a_layer(sparse(0.25))
    make(layer, [SEARCH], generation=2)
    assert heads_of([("a", layer)]) == []


def test_a_mass_that_one_head_lacks_is_not_told() -> None:
    (heads,) = heads_of([("a", a_layer(sparse(0.25, 0.5, kept_mass=[0.5, math.nan])))])
    assert heads.kept_mass is None


# ---------------------------------------------------------------------- nearly uniform attention


def heads(density: Sequence[float], kept_mass: Sequence[float] | None, layer: str = "a") -> HeadReport:
    return HeadReport(layer, 0, "cond", list(density), None if kept_mass is None else list(kept_mass))


@pytest.mark.parametrize(
    ("density", "kept_mass", "flagged"),
    [
        ([0.2, 0.2], [0.22, 0.279], True),
        ([0.2, 0.2], [0.22, 0.281], False),
        ([0.2, 0.5], [0.281, 0.281], False),
        ([0.5, 0.5], [0.549, 0.3], True),
        ([0.5, 0.5], [0.551, 0.551], False),
        ([0.89], [0.9], True),
        ([0.91], [0.91], False),
        ([1.0, 1.0], [1.0, 1.0], False),
        ([0.2, 0.2], None, False),
    ],
)
def test_attention_is_nearly_uniform_where_no_head_keeps_much_more_than_chance(
    density: list[float], kept_mass: list[float] | None, flagged: bool
) -> None:
    assert heads(density, kept_mass).nearly_uniform is flagged


def test_one_warning_names_each_such_layer_once() -> None:
    found = [heads([0.25], [0.27], "blocks.0"), heads([0.25], [0.9], "blocks.1"), heads([0.25], [0.27], "blocks.3")]
    warning = uniformity_warning([*found, *found])
    assert warning == (
        "attention is nearly uniform in blocks.0, blocks.3: a density of 0.25 keeps only 0.27 of the mass; what is"
        " skipped matters as much as what is kept; keep these layers dense (dense_layers), or compute more of them"
    )


def test_the_warning_counts_the_layers_beyond_the_first_ones() -> None:
    warning = uniformity_warning([heads([0.25], [0.25], f"blocks.{number}") for number in range(40)])
    assert warning is not None
    assert "in blocks.0, blocks.1, blocks.2, blocks.3, blocks.4, blocks.5 and 34 more: a" in warning


def test_attention_with_structure_gives_no_warning() -> None:
    assert uniformity_warning([heads([0.25], [0.6]), heads([0.25], None)]) is None
    assert uniformity_warning([]) is None


# ---------------------------------------------------------------------- in the report


def test_the_report_holds_heads_and_the_warning_under_the_names_of_the_layers() -> None:
    registry, model = Registry(), Stack(2)
    for block, mass in zip(model.blocks, (0.3, 0.8), strict=True):
        make(registry.layer(block.to_q.weight, PLANNER), [SEARCH, sparse(0.25, 0.25, kept_mass=[0.3, mass])])
    report = build_report({"transformer": model}, registry)
    assert [heads.layer for heads in report.heads] == ["transformer.blocks.0", "transformer.blocks.1"]
    assert (report.density, report.density_run) == (0.25, 0.625)
    assert report.kept_mass == pytest.approx((0.3 + 0.55) / 2)
    (warning,) = report.warnings
    assert "nearly uniform in transformer.blocks.0: a density of 0.25 keeps only 0.30 of" in warning
    assert f"warning: {warning}" in str(report)
    assert report.to_dict()["heads"][0]["density"] == [0.25, 0.25]


def test_the_report_holds_every_call_but_does_not_print_them() -> None:
    registry, model = Registry(), Stack(2)
    for block in model.blocks:
        make(registry.layer(block.to_q.weight, PLANNER), [SEARCH, sparse(0.25)])
    report = build_report({"transformer": model}, registry)
    assert [(call.layer, call.step, call.density) for call in report.calls] == [
        ("transformer.blocks.0", 0, 1.0),
        ("transformer.blocks.0", 1, 0.25),
        ("transformer.blocks.1", 0, 1.0),
        ("transformer.blocks.1", 1, 0.25),
    ]
    assert "calls" not in report.to_dict()
