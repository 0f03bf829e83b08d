"""What the table of families says is complete, and holds for a graph of symbolic sizes too."""

from __future__ import annotations

import pytest
from dynamo_capture import capture_case, capture_model, census, classified
from families.case import Case
from families.table import CASES, case_of

from sparse_compile.sites import Reason

SLOW = pytest.mark.slow
CODES = {reason.code for reason in Reason}


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.quick])
def test_every_site_of_a_whole_model_is_classified_as_in_the_table(case: Case) -> None:
    """For a change of the passes, which shows here in seconds; all families are in test_equal_to_eager.py."""
    graphs = capture_case(case)
    assert dict(census(graphs)) == case.whole
    assert len(graphs) == case.graphs


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_a_case_says_what_is_true_of_its_class(case: Case) -> None:
    """Regional or not as the class declares it, a role and a verdict everywhere, dense only where it says why."""
    model, _ = case.build()
    assert bool(getattr(model, "_repeated_blocks", None)) == (case.regional is not None)
    rows = [row for regional in (False, case.regional is not None) for row in case.rows(regional)]
    assert all(row.role != "unknown" and row.verdict in CODES | {"sparse"} for row in rows)
    assert case.goes_sparse() == (not case.dense_only)


def test_names_of_cases_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@SLOW
@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan_video", "flux"])
def test_symbolic_sizes_change_no_verdict(name: str) -> None:
    assert dict(census(capture_model(name, dynamic=True))) == case_of(name).whole


def test_every_sparse_site_of_a_model_has_its_own_layer() -> None:
    (captured,) = capture_model("wan_i2v")
    keys = [(site.owner, site.ordinal) for site in classified(captured)]
    assert len(set(keys)) == len(keys) == 6
