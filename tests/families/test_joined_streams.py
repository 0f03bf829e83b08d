"""Families whose text and image are joined before a graph begins: the report says so, the options tell the border."""

from __future__ import annotations

from typing import Any

import pytest
from families.generation import NOTHING_SKIPPED, TOLERANCE, generation_of, nothing_skipped
from families.table import case_of

from sparse_compile.passes.classify_sites import NO_TEXT_NOTE
from sparse_compile.runtime.report import Report, SiteRecord

JOINED = [
    pytest.param("z_image", True, {"text_tokens": 32, "text_position": "last"}, "video:96+text:32", id="z_image"),
    pytest.param(
        "lumina2",
        False,
        {"text_tokens": 15, "text_position": "first"},
        "text:15+video:80",
        id="lumina2",
        marks=pytest.mark.slow,
    ),
]
"""Case, whether block by block, the options, and the layout of the longest site under them."""


def longest(report: Report) -> SiteRecord:
    return max(report.sites, key=lambda site: site.query_tokens)


def test_a_block_that_gets_its_streams_joined_is_noted() -> None:
    site = longest(nothing_skipped("z_image", regional=True).report)
    assert (site.layout, site.decision, site.detail) == ("video:128", "sparse", NO_TEXT_NOTE)


@pytest.mark.parametrize(("name", "regional", "options", "layout"), JOINED)
def test_the_options_split_joined_streams(name: str, regional: bool, options: dict[str, Any], layout: str) -> None:
    generation = generation_of(case_of(name), regional, **NOTHING_SKIPPED, **options)
    site = longest(generation.report)
    assert (site.layout, site.role, site.decision) == (layout, "joint", "sparse")
    assert NO_TEXT_NOTE not in site.detail
    assert max(generation.errors.values()) <= TOLERANCE, generation.errors
