"""The hooks of the documentation's build: help of the commands, reasons, pages that load nothing from elsewhere."""

import argparse
import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from sparse_compile.cli.main import build_parser
from sparse_compile.sites import Reason

DOCS = Path(__file__).parents[2] / "docs"


def hook(name: str) -> ModuleType:
    """A hook, as MkDocs loads it: by its file."""
    spec = importlib.util.spec_from_file_location(f"hook_{name}", DOCS / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def commands() -> ModuleType:
    return hook("commands")


@pytest.fixture
def self_contained() -> ModuleType:
    return hook("self_contained")


def commands_below(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[str]:
    """The words of every command that takes no further command."""
    choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not choices:
        yield " ".join(words)
    for word, below in (item for each in choices for item in each.items()):
        yield from commands_below(below, (*words, word))


def test_the_page_has_the_help_of_every_command(commands):
    named = [found["words"].strip() for found in commands.MARKER.finditer((DOCS / "commands.md").read_text())]
    assert sorted(filter(None, named)) == sorted(commands_below(build_parser()))


def test_a_marker_becomes_what_the_command_prints(commands):
    text = commands.with_help("before\n\n<!-- help: bench quality -->\n\nafter")
    assert re.fullmatch(r"before\n\n```text\nusage: sparse-attn bench quality .*```\n\nafter", text, re.DOTALL)
    assert "--warm-up SHARE" in text


@pytest.mark.parametrize("words", ["nonsense", "bench nonsense", "explain nonsense"])
def test_the_help_of_no_command_ends_the_build(commands, words):
    with pytest.raises(ValueError, match=r"no command of sparse-attn|asks for the help of"):
        commands.with_help(f"<!-- help: {words} -->")


def test_every_reason_is_on_the_page_once():
    text = hook("reasons").on_page_markdown((DOCS / "reasons.md").read_text())
    by_design, unsupported = text.split("## Unsupported")
    for reason in Reason:
        row = f"| `{reason.code}` | {reason.sentence} |"
        assert (by_design.count(row), unsupported.count(row)) == (reason.by_design, not reason.by_design)


@pytest.mark.parametrize(
    ("html", "address"),
    [
        ('<script src="https://x.example/a.js"></script>', "https://x.example/a.js"),
        ('<img src="//x.example/a.png">', "//x.example/a.png"),
        ('<img srcset="a.png 1x, https://x.example/a.png 2x">', "https://x.example/a.png"),
        ('<link rel="stylesheet" href="https://x.example/a.css">', "https://x.example/a.css"),
        ('<link rel="preconnect" href="https://x.example">', "https://x.example"),
        ("<style>a { background: url('https://x.example/a.png') }</style>", "https://x.example/a.png"),
        ('<p style="background: url(https://x.example/a.png)">', "https://x.example/a.png"),
        ('<style>@import "https://x.example/a.css";</style>', "https://x.example/a.css"),
        ('<pre class="mermaid">graph</pre>', "class mermaid"),
    ],
)
def test_what_a_browser_would_load_from_elsewhere_is_found(self_contained, html, address):
    assert self_contained.loaded_by_page(f"<body><p>text</p>{html}<p>more</p></body>") == [address]


@pytest.mark.parametrize(
    "html",
    [
        '<a href="https://arxiv.org/abs/2505.18875">a paper</a>',
        '<link rel="canonical" href="https://x.example/">',
        '<img src="pictures/a.png">',
        '<script src="assets/a.js"></script>',
        "<code>url(https://x.example/a.png)</code>",
        '<svg xmlns="http://www.w3.org/2000/svg"><use href="#a"/></svg>',
        '<img src="data:image/png;base64,iVBO//Rw">',
    ],
)
def test_links_and_what_is_here_are_not(self_contained, html):
    assert self_contained.loaded_by_page(html) == []


def test_a_page_and_a_file_that_load_from_elsewhere_are_warned_of(self_contained, tmp_path, caplog):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    (tmp_path / "a.css").write_text("@import url(https://x.example/b.css);")
    (tmp_path / "a.svg").write_text('<svg><image href="https://x.example/c.png"/></svg>')
    with caplog.at_level(logging.WARNING):
        self_contained.on_post_page('<img src="https://x.example/a.png">', page=page)
        self_contained.on_post_build(config={"site_dir": str(tmp_path)})
    assert [record.getMessage() for record in caplog.records] == [
        "page.md would load from elsewhere: https://x.example/a.png",
        "a.css would load from elsewhere: https://x.example/b.css",
        "a.svg would load from elsewhere: https://x.example/c.png",
    ]
