"""Every family, whole and block by block: its sites are those of the table, its output that of the model as it is."""

from __future__ import annotations

from typing import Any

import pytest
from families.case import Case
from families.generation import TOLERANCE, generation_of, nothing_skipped
from families.table import CASES, GROUPS

SLOW = pytest.mark.slow
SKIPPING = {"density": 0.25, "min_kept": 0.05, "correction": "none"}


def ways() -> list[Any]:
    """Whole models, and block by block where they have repeated blocks; of a quick case one way is quick."""
    return [
        pytest.param(
            case,
            regional,
            id=f"{'regional' if regional else 'whole'}-{case.name}",
            marks=() if case.quick and regional == (case.regional is not None) else SLOW,
        )
        for case in CASES
        for regional in (False, True)
        if not regional or case.regional is not None
    ]


def one_of_each_group() -> list[Any]:
    """The first case of each group that goes sparse."""
    first = [next((case for case in cases if case.goes_sparse()), None) for cases in GROUPS.values()]
    cases = [case for case in first if case is not None]
    return [pytest.param(case, id=case.name, marks=() if case is cases[0] else SLOW) for case in cases]


@pytest.mark.parametrize(("case", "regional"), ways())
def test_every_site_is_classified_as_in_the_table(case: Case, regional: bool) -> None:
    generation = nothing_skipped(case.name, regional)
    assert dict(generation.sites) == case.rows(regional)
    assert generation.graphs == (case.regional.graphs if regional and case.regional else case.graphs)


@pytest.mark.parametrize(("case", "regional"), ways())
def test_nothing_skipped_equals_the_model_as_it_is(case: Case, regional: bool) -> None:
    generation = nothing_skipped(case.name, regional)
    assert max(generation.errors.values()) <= TOLERANCE, generation.errors
    sparse = any(site.decision == "sparse" for site in generation.report.sites)
    assert sparse == case.goes_sparse(regional)
    if sparse:
        assert generation.report.density == 1.0
        assert {step.phase for step in generation.report.generations[0].steps} == {"search", "sparse"}


@pytest.mark.parametrize("case", one_of_each_group())
def test_skipped_keys_show_in_the_output(case: Case) -> None:
    """The control: weights and tolerance are such that a wrong attention is seen."""
    generation = generation_of(case, regional=False, **SKIPPING)
    assert min(generation.errors.values()) > 5 * TOLERANCE, generation.errors
    assert generation.report.density is not None and generation.report.density < 0.7
