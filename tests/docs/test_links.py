"""What README.md and the pages point at is there: links, headings, and files and folders of the repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"(?<!`)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
PLACE = re.compile(
    r"`(?P<place>(?:sparse_compile|docs|tests|benchmarks|examples|training|kernels|passes|compiler|runtime|strategies)"
    r"/[\w./*-]*)(?:::(?P<name>\w+))?"
)
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def text_of(path: Path) -> str:
    """A document without its code blocks."""
    return FENCE.sub("", path.read_text())


def headings(path: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs makes them."""
    titles = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    broken = []
    for found in LINK.finditer(text_of(document)):
        file, _, anchor = found["target"].partition("#")
        if "://" in file:
            continue
        target = document.parent / file if file else document
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in headings(target)):
            broken.append(found["target"])
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document):
    missing = []
    for found in PLACE.finditer(text_of(document)):
        file, name = found["place"], found["name"]
        paths = [*ROOT.glob(file), *(ROOT / "sparse_compile").glob(file)]
        if not paths or (name and name not in paths[0].read_text()):
            missing.append(found.group().strip("`"))
    assert not missing


def test_what_pages_include_is_included():
    named = []
    for document in DOCUMENTS:
        lines = [line for line in document.read_text().splitlines() if line.startswith("--8")]
        found = [re.fullmatch(r'--8<-- "(.+)"', line) for line in lines]
        assert all(found), f"{document.name}: {lines}"
        named += [match[1] for match in found]
    assert {"CHANGELOG.md", "examples/quickstart.py", "examples/custom_strategy.py"} == set(named)


def test_readme_leads_to_the_documentation():
    targets = [found["target"] for found in LINK.finditer(text_of(ROOT / "README.md"))]
    assert [target for target in targets if target.startswith("docs/")]
