"""The monitor's rules, on layers whose logs are written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from sparse_compile.call_log import append_row, log_spec
from sparse_compile.config import Config
from sparse_compile.phases import Moment, Phase
from sparse_compile.runtime.budget_notes import verdict_notes
from sparse_compile.runtime.clock import Clock
from sparse_compile.runtime.state import BranchState, Layer, allocate
from sparse_compile.strategies.adaspa import AdaSpa
from sparse_compile.strategies.base import Planner, Strategy
from sparse_compile.strategies.svg2 import Svg2

STEPS = 50
PLANNED = 0.8


def a_layer(clock: Clock, strategy: Strategy | None = None, **options: object) -> tuple[Layer, BranchState]:
    """A layer of a model of the clock that has searched in step 9, as the schedule of 50 steps says."""
    method = strategy or AdaSpa()
    layer = Layer(Planner(method, Config(method=method.name, dense_layers=0, **options)))  # type: ignore[arg-type]
    claim = clock.claim(nn.Linear(1, 1))
    claim.add(layer)
    state = layer.state("cond", clock.generation)
    state.searched = 9
    state.logs[0] = allocate(log_spec(torch.device("cpu"), 2))
    return layer, state


def called(state: BranchState, kept: float, planned: float = PLANNED) -> None:
    """One sparse call that keeps ``kept`` of the mass, mean over two heads."""
    mass, plan = torch.tensor([[kept - 0.1, kept + 0.1]]), torch.full((1, 2), planned)
    append_row(state.logs[0], torch.full((1, 2), 0.25), mass, None, plan)
    state.rows += 1


def started() -> Clock:
    clock = Clock()
    clock.start(STEPS)
    clock.step(to=10)
    return clock


def run(drops: Sequence[float], clock: Clock | None = None, **options: object) -> tuple[list[int], Layer]:
    """The steps at which the layer refines, when its calls from step 10 on keep so much less than planned."""
    clock = clock or started()
    layer, state = a_layer(clock, **options)
    refined = []
    for drop in drops:
        layer.refresh()
        if clock.phase(layer.planner, state.searched) is Phase.REFINE:
            refined.append(clock.moment.step)
            state.searched = clock.moment.step
        called(state, PLANNED - drop)
        clock.step()
    return refined, layer


def test_two_low_probes_in_a_row_bring_a_search_one_step_after_the_second_was_copied() -> None:
    refined, layer = run([0.02, 0.06, 0.06, 0.06, 0.0, 0.0])
    assert refined == [14]  # low in 11 and 12; the probe of 12 arrives at the host when the clock moves to 14
    (verdict,) = layer.verdicts
    assert (verdict.step, verdict.branch, verdict.stale, round(verdict.drop, 3)) == (14, "cond", True, 0.06)


@pytest.mark.parametrize("drops", [[0.06, 0.04] * 5, [0.049] * 10, [-0.2] * 10], ids=["alternating", "below", "rising"])
def test_single_low_probes_and_rising_mass_bring_none(drops: list[float]) -> None:
    refined, layer = run(drops)
    assert not refined
    assert not layer.verdicts


def test_searches_keep_their_distance_and_their_number() -> None:
    refined, _ = run([0.3] * 35, search_steps="10")
    assert refined == [13, 18, 23]


def test_a_generation_starts_with_all_of_its_searches() -> None:
    clock = started()
    assert run([0.3] * 15, clock, search_steps="10")[0] == [13, 18, 23]
    clock.start(STEPS)
    assert clock.moment == Moment(0, STEPS)
    clock.step(to=10)
    assert run([0.3] * 8, clock, search_steps="10")[0] == [13]


def test_a_due_search_is_saved_where_all_plans_hold() -> None:
    refined, layer = run([0.02] * 10 + [0.009] * 15)
    assert not refined  # due in 29
    (verdict,) = layer.verdicts
    assert (verdict.step, verdict.stale) == (29, False)
    assert run([0.011] * 25)[0] == [29]


def test_one_layer_whose_plan_has_moved_lets_the_due_search_be() -> None:
    clock = started()
    layers = [a_layer(clock), a_layer(clock)]
    for _ in range(20):
        for (_, state), drop in zip(layers, (0.0, 0.02), strict=True):
            called(state, PLANNED - drop)
        clock.step()
    assert not clock.moment.sound
    assert clock.phase(layers[0][0].planner, 9) is Phase.REFINE


def test_the_search_is_for_all_layers_and_the_report_names_the_worst() -> None:
    clock = started()
    (one, _), (two, _) = layers = [a_layer(clock), a_layer(clock)]
    for _ in range(3):
        for (_, state), drop in zip(layers, (0.0, 0.25), strict=True):
            called(state, PLANNED - drop)
        clock.step()
    assert clock.moment.stale == (13,)
    assert clock.phase(one.planner, 9) is clock.phase(two.planner, 9) is Phase.REFINE
    notes = verdict_notes([("blocks.0", one), ("blocks.1", two)])
    assert list(notes) == [(clock.generation, 13)]
    assert (
        "1 layer and branch had gone stale, most in blocks.1 (cond), which kept 0.250 less"
        in notes[clock.generation, 13]
    )


def test_a_call_that_was_skipped_is_not_looked_at_twice() -> None:
    clock = started()
    layer, state = a_layer(clock)
    called(state, PLANNED - 0.3)
    for _ in range(10):
        clock.step()
    assert not clock.moment.stale
    called(state, PLANNED - 0.3)
    clock.step()
    clock.step()
    assert clock.moment.stale == (22,)
    assert len(layer.verdicts) == 1


@pytest.mark.parametrize(
    ("strategy", "options"),
    [(AdaSpa(), {"monitor": False}), (AdaSpa(), {"probe_rows": 0}), (Svg2(), {})],
    ids=["switched off", "no probes", "plans of one call"],
)
def test_what_is_not_watched_decides_nothing(strategy: Strategy, options: dict[str, object]) -> None:
    clock = started()
    layer, state = a_layer(clock, strategy, **options)
    for _ in range(5):
        called(state, 0.1)
        clock.step()
    assert not clock.moment.stale
    assert not layer.verdicts


def test_mass_that_could_not_be_measured_is_no_drop() -> None:
    refined, _ = run([float("nan")] * 6 + [0.0] * 14)
    assert not refined


def test_a_layer_that_is_gone_decides_nothing_more_for_those_that_live() -> None:
    clock = started()
    gone, state = a_layer(clock)
    kept, own = a_layer(clock)
    for _ in range(2):
        called(state, 0.1)
        called(own, PLANNED)
        clock.step()
    del gone, state
    clock.step()
    clock.step()
    assert not clock.moment.stale
    assert not kept.verdicts


def test_rows_of_a_plan_that_was_replaced_do_not_count_against_the_new_one() -> None:
    """The cut comes two steps before a search that is due: one search is enough."""
    refined, layer = run([0.02] * 17 + [0.3, 0.3] + [0.0] * 6)
    assert refined == [29]
    assert not layer.verdicts


def test_a_search_that_is_due_before_anything_was_judged_is_not_saved() -> None:
    assert run([0.3, 0.3], search_steps="10,11,12")[0] == [10, 11]


def test_a_branch_that_is_no_longer_called_does_not_hinder_the_others() -> None:
    clock = started()
    layer, state = a_layer(clock)
    idle = layer.state("uncond", clock.generation)
    idle.searched, idle.logs[0] = 9, allocate(log_spec(torch.device("cpu"), 2))
    called(idle, PLANNED - 0.04)
    for _ in range(19):
        called(state, PLANNED)
        clock.step()
    assert clock.moment.sound == (29,)
    assert [verdict.branch for verdict in layer.verdicts] == ["cond"]


def test_verdicts_about_one_model_do_not_move_another_that_is_not_watched() -> None:
    clock = started()
    watched, state = a_layer(clock)
    other, _ = a_layer(clock, monitor=False)
    for _ in range(3):
        called(state, 0.1)
        clock.step()
    assert clock.phase(watched.planner, 9) is Phase.REFINE
    assert clock.phase(other.planner, 9) is Phase.SPARSE


def test_a_log_that_has_gone_round_is_read_at_its_newest_row() -> None:
    clock = started()
    layer, state = a_layer(clock)
    for _ in range(600):
        called(state, PLANNED)
    state.rows_at_start = state.rows
    for _ in range(2):
        called(state, 0.1)
        clock.step()
    clock.step()
    assert clock.moment.stale == (13,)
    assert len(layer.verdicts) == 1


def test_a_head_that_cannot_be_measured_does_not_look_like_a_drop() -> None:
    clock = started()
    _, state = a_layer(clock)
    for _ in range(4):
        mass, plan = torch.tensor([[0.6, float("nan")]]), torch.tensor([[0.6, 1.0]])
        append_row(state.logs[0], torch.full((1, 2), 0.25), mass, None, plan)
        state.rows += 1
        clock.step()
    assert not clock.moment.stale
