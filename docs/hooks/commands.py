"""Puts the help of the commands where a page names them.

A page holds ``<!-- help: bench quality -->``; the build writes in its place what ``sparse-attn bench quality --help``
prints, so that no page can tell of arguments that are not there.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from typing import Any
from unittest import mock

from sparse_compile.cli.main import build_parser

MARKER = re.compile(r"<!-- help:(?P<words>[^>]*?)-->")
WIDTH = "88"
"""Columns of the help: what a page shows without a scroll bar."""


def help_of(words: list[str]) -> str:
    """What ``sparse-attn WORDS --help`` prints.

    Raises:
        ValueError: there is no such command.
    """
    printed = io.StringIO()
    quiet = (contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()))
    with mock.patch.dict(os.environ, COLUMNS=WIDTH), quiet[0], quiet[1], contextlib.suppress(SystemExit):
        build_parser().parse_args([*words, "--help"])
    if not printed.getvalue().startswith(" ".join(["usage: sparse-attn", *words])):
        raise ValueError(f"a page asks for the help of {' '.join(words)!r}, which is no command of sparse-attn")
    return printed.getvalue()


def with_help(markdown: str) -> str:
    """The text of a page, with the help of each command that it names."""
    return MARKER.sub(lambda found: f"```text\n{help_of(found['words'].split())}```", markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for each page."""
    return with_help(markdown)
