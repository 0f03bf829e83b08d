"""Warns of pages that would load something from another place: the built site is to work without a network.

Links that a reader may follow are no such thing. Under ``mkdocs build --strict`` a warning ends the build.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.self_contained")

LOADED = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
"""What a browser loads by itself, by element: the attributes that name it."""
NOT_LOADED = frozenset({"alternate", "canonical", "next", "prev"})
"""Relations of a ``link`` that a browser does not follow."""
ELSEWHERE = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"""url\(\s*['"]?((?:[a-z]+:)?//[^'")]+)|@import\s+['"]((?:[a-z]+:)?//[^'"]+)""", re.IGNORECASE)
LOADS_BY_CLASS = frozenset({"mermaid"})
"""The theme loads a script from elsewhere for an element of such a class."""


class _Page(HTMLParser):
    """Gathers what a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at the attributes of an element."""
        values = {name: value or "" for name, value in attrs}
        self._in_style = tag == "style"
        self.found += loaded_by_style(values.get("style", ""))
        self.found += [f"class {name}" for name in LOADS_BY_CLASS.intersection(values.get("class", "").split())]
        if tag == "link" and NOT_LOADED.intersection(values.get("rel", "").split()):
            return
        for name in LOADED.get(tag, ()):
            self.found += [part for part in re.split(r"[\s,]+", values.get(name, "")) if ELSEWHERE.match(part)]

    def handle_data(self, data: str) -> None:
        """Look at an embedded style sheet."""
        if self._in_style:
            self.found += loaded_by_style(data)


def loaded_by_page(html: str) -> list[str]:
    """The addresses elsewhere from which a page would load something."""
    page = _Page()
    page.feed(html)
    return page.found


def loaded_by_style(css: str) -> list[str]:
    """The same of a style sheet."""
    return [first or second for first, second in IN_STYLE.findall(css)]


def on_post_page(output: str, *, page: Any, **_: Any) -> None:
    """Called by MkDocs for each page that it has made."""
    _warn(page.file.src_uri, loaded_by_page(output))


def on_post_build(*, config: Any, **_: Any) -> None:
    """Called by MkDocs at the end: style sheets and pictures are files of their own."""
    site = Path(config["site_dir"])
    for path in _files(site, ".css"):
        _warn(str(path.relative_to(site)), loaded_by_style(path.read_text()))
    for path in _files(site, ".svg"):
        _warn(str(path.relative_to(site)), loaded_by_page(path.read_text()))


def _files(site: Path, suffix: str) -> Iterator[Path]:
    yield from sorted(site.rglob(f"*{suffix}"))


def _warn(where: str, addresses: list[str]) -> None:
    for address in addresses:
        log.warning("%s would load from elsewhere: %s", where, address)
