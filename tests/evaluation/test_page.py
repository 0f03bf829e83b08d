"""The page holds everything itself, says what its pictures show, and shows text as it is."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

from PIL import Image

from sparse_compile.evaluation.page import DataTable, Part, Picture, Section, drawn, from_file, render
from sparse_compile.evaluation.plots import DARK, LIGHT, new_figure

LOADING = {"src", "srcset", "href", "data", "action", "poster"}
VOID = {"meta", "img", "source", "br", "link", "hr", "input"}


class Reader(HTMLParser):
    """Tags with their attributes, the text, and whether every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


PICTURE = Picture('a "map" of <heads>', "caption & more", "data:image/png;base64,AAAA", None, 10, 20)
DARK_PICTURE = PICTURE._replace(dark="data:image/png;base64,BBBB")
TABLE = DataTable("numbers", ("layer", "density"), [("blocks.0", "0.25"), ("blocks.1", "0.30")])


def a_page(*parts: Part) -> str:
    return render("Title", "what & how", [Section("First", ["one <b>", "two"], parts), Section("Second", (), ())])


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = Reader(a_page(Part(pictures=[PICTURE, DARK_PICTURE], tables=[TABLE])))
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in LOADING]
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert not page.all("script")
    assert not page.all("link")
    assert "url(" not in "".join(page.text)
    assert "@import" not in "".join(page.text)


def test_text_is_shown_as_it_is() -> None:
    page = Reader(a_page(Part(title="<i>", text=["a < b"], facts=[("x<y", "&")], warnings=["<script>"])))
    assert {"one <b>", "<i>", "a < b", "x<y", "&", "<script>", "what & how"} <= set(page.text)
    assert not page.all("b")
    assert not page.all("script")


def test_pictures_say_what_they_show_and_have_a_dark_form() -> None:
    page = Reader(a_page(Part(pictures=[PICTURE, DARK_PICTURE])))
    assert [image["alt"] for image in page.all("img")] == [PICTURE.alt] * 2
    (source,) = page.all("source")
    assert (source["media"], source["srcset"]) == ("(prefers-color-scheme: dark)", DARK_PICTURE.dark)
    assert [image["width"] for image in page.all("img")] == ["10", "10"]


def test_tables_name_their_rows_and_columns() -> None:
    page = Reader(a_page(Part(tables=[TABLE], details=[TABLE])))
    scopes = [cell["scope"] for cell in page.all("th")]
    assert scopes == ["col", "col", "row", "row"] * 2
    assert len(page.all("caption")) == 2
    assert len(page.all("details")) == 1


def test_headings_are_in_order_and_linked() -> None:
    page = Reader(a_page(Part(title="part")))
    assert [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3")] == ["h1", "h2", "h3", "h2"]
    assert [link["href"] for link in page.all("a")] == ["#section-1", "#section-2"]
    assert [heading["id"] for heading in page.all("h2")] == ["section-1", "section-2"]
    assert page.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_a_drawing_is_made_for_light_and_for_dark_pages() -> None:
    themes = []

    def draw(theme):
        themes.append(theme)
        return new_figure(2.0, theme, 3.0)

    picture = drawn(draw, "nothing")
    assert themes == [LIGHT, DARK]
    assert picture.light != picture.dark
    assert (picture.width, picture.height) == (300, 200)


def test_a_file_is_embedded_as_it_is(tmp_path) -> None:
    path = tmp_path / "clip.gif"
    Image.new("RGB", (8, 4)).save(path)
    picture = from_file(path, "a clip", scale=2)
    assert (picture.width, picture.height, picture.dark) == (16, 8, None)
    kind, content = picture.light.split(",")
    assert kind == "data:image/gif;base64"
    assert base64.b64decode(content) == path.read_bytes()
