"""docs/support.md holds what the table of families says."""

from __future__ import annotations

from pathlib import Path

from families.support_matrix import columns_of, remarks_on, support_matrix, with_matrix
from families.table import CASES, case_of

PAGE = Path(__file__).parents[2] / "docs" / "support.md"


def test_the_page_holds_the_current_matrix() -> None:
    text = PAGE.read_text()
    assert with_matrix(text) == text, "run `make support-matrix`"


def test_every_family_has_a_row() -> None:
    rows = support_matrix().splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[: len(CASES)]] == [case.title for case in CASES]


def test_a_row_says_what_becomes_sparse_and_what_does_not() -> None:
    assert columns_of(case_of("hunyuan_video"))[1:] == [
        "`HunyuanVideoTransformer3DModel`",
        "joint",
        "video, text",
        "key padding",
        "yes",
        "text-self: `text_only`",
        "1 graph, 3 of 4 sites",
        "5 graphs, 3 of 4 sites",
    ]


def test_a_family_that_stays_dense_says_why() -> None:
    (remark,) = remarks_on(case_of("latte"))
    assert remark.startswith("nothing becomes sparse: frames or space lie in the batch")
    assert columns_of(case_of("latte"))[2] == "-"
