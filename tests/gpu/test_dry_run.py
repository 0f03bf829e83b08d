"""What the tests for a GPU call, run once on a CPU: their mistakes show here and not on a machine that is rented."""

from __future__ import annotations

import pytest
import torch
from gpu_generations import (
    assert_keeping_everything_is_dense,
    assert_repeats_without_recompiling,
    outputs_of_steps,
)
from gpu_sites import PHASES, assert_same_call, recorded_calls, searched_site

each_method = pytest.mark.parametrize("method", PHASES)
each_phase = pytest.mark.parametrize(
    ("method", "phase"), [(m, phase) for m, phases in PHASES.items() for phase in phases]
)


@each_phase
@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_a_call_repeats_itself_from_the_same_state(method: str, phase: str, kernel: str) -> None:
    site = searched_site(method, "cpu", kernel)
    site.draw(1)
    out = assert_same_call(site, lambda: site.call(method, phase), lambda: site.call(method, phase))
    site.draw(2)
    assert not torch.equal(out, site.call(method, phase))


def test_another_state_is_noticed() -> None:
    site = searched_site("svg2", "cpu", "cpu")
    with pytest.raises(AssertionError):
        assert_same_call(site, lambda: site.svg2(restart=False), lambda: site.svg2(restart=True))


@each_phase
def test_the_ops_of_a_call_are_recorded_with_arguments_to_check_them_by(method: str, phase: str) -> None:
    calls = recorded_calls(method, phase, "cpu", "cpu")
    names = [op.name() for op, _ in calls]
    assert ("sparse_compile::block_sparse_attention" in names) == ((method, phase) != ("adaspa", "search"))
    for op, arguments in calls:
        assert set(torch.library.opcheck(op, arguments, test_utils="test_faketensor").values()) == {"SUCCESS"}


@each_method
def test_a_generation_repeats_itself(method: str) -> None:
    assert_repeats_without_recompiling(method, "cpu", steps=6, tokens=160, lowering="eager")


@each_method
def test_a_generation_that_keeps_everything_is_the_dense_one(method: str) -> None:
    assert_keeping_everything_is_dense(method, "cpu", steps=6, tokens=160, lowering="eager")


@each_method
def test_a_generation_of_six_steps_has_three_sparse_ones(method: str) -> None:
    _, phases = outputs_of_steps(method, "cpu", steps=6, tokens=160, lowering="eager", dense_steps=1)
    assert phases.count("sparse") >= 3 and phases.count("search") == 1
