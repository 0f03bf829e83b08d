"""A page of HTML that holds everything itself: sections of text, tables and pictures; no scripts, nothing to load."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from PIL import Image

from sparse_compile.evaluation.plots import DARK, LIGHT, SCREEN_DPI, Theme, png_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "page.html.j2"


class Picture(NamedTuple):
    """One picture. ``light`` and ``dark`` are data URIs; without ``dark`` the light one serves both."""

    alt: str
    caption: str
    light: str
    dark: str | None
    width: int
    height: int


class DataTable(NamedTuple):
    """Rows of text; the first cell names its row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a section, in the order in which it is shown."""

    title: str = ""
    text: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    tables: Sequence[DataTable] = ()
    pictures: Sequence[Picture] = ()
    columns: Literal[1, 2, 3] = 2
    """How many pictures stand in a row where there is room."""
    details: Sequence[DataTable] = ()
    """Tables that are folded away."""


class Section(NamedTuple):
    """A heading, paragraphs, parts."""

    title: str
    text: Sequence[str]
    parts: Sequence[Part]


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page. All text is escaped."""
    from jinja2 import Environment

    source = files("sparse_compile.evaluation").joinpath(TEMPLATE).read_text(encoding="utf-8")
    template = Environment(autoescape=True).from_string(source)
    return template.render(title=title, subtitle=subtitle, sections=sections)


def drawn(draw: Callable[[Theme], Figure], alt: str, caption: str = "") -> Picture:
    """A picture drawn once for light and once for dark pages."""
    figures = [draw(theme) for theme in (LIGHT, DARK)]
    light, dark = (_uri(png_of(figure), "image/png") for figure in figures)
    width, height = (round(inches * SCREEN_DPI) for inches in figures[0].get_size_inches())
    return Picture(alt, caption, light, dark, width, height)


def from_file(path: Path, alt: str, caption: str = "", *, scale: float = 1.0) -> Picture:
    """A picture in a file that Pillow reads, such as GIF or PNG.

    Args:
        path: of the file.
        alt: what it shows, for who cannot see it.
        caption: below the picture.
        scale: pixels on the page for one pixel of the file.
    """
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        width, height = (round(pixels * scale) for pixels in image.size)
        kind = Image.MIME[image.format or "PNG"]
    return Picture(alt, caption, _uri(content, kind), None, width, height)


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
