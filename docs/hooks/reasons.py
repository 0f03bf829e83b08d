"""Writes the reasons why attention stays dense where a page asks for them, so that no page can lack one.

A page holds ``<!-- reasons: by design -->`` or ``<!-- reasons: unsupported -->``.
"""

from __future__ import annotations

import re
from typing import Any

from sparse_compile.sites import Reason

MARKER = re.compile(r"<!-- reasons: (?P<kind>[^>]*?) -->")
BY_DESIGN = {"by design": True, "unsupported": False}


def table(kind: str) -> str:
    """The reasons of one kind, a row each.

    Raises:
        KeyError: there is no such kind.
    """
    lines = ["| reason | what it says | what to do |", "| --- | --- | --- |"]
    for reason in Reason:
        if reason.by_design is BY_DESIGN[kind]:
            lines.append(f"| `{reason.code}` | {reason.sentence} | {reason.remedy or '-'} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for each page."""
    return MARKER.sub(lambda found: table(found["kind"]), markdown)
