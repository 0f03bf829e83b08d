"""The figures of quality in README.md and docs are those of the committed results."""

import json

import pytest

from benchmarks import quality_tables
from benchmarks.quality_tables import TABLES, Table, documents, figure, main, with_figures
from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation.tables import Column

ROWS = [
    {"label": "svg2 none", "psnr": 22.24, "kept_mass": None},
    {"label": "svg2 coupled", "psnr": 35.94, "kept_mass": 0.551},
]
TABLE = Table("rows", ("svg2 coupled", "svg2 none"), (Column("what", "label"), Column("kept", "kept_mass", ".2f")))
MARKDOWN = "| what | kept |\n| --- | ---: |\n| svg2 coupled | 0.55 |\n| svg2 none | - |"


@pytest.fixture
def results(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setattr(quality_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(quality_tables, "TABLES", {"small": TABLE})


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_a_document_holds_what_the_results_give(path):
    text = path.read_text()
    assert with_figures(text) == text, "run `make quality-tables`"


def test_every_table_is_in_a_document():
    texts = "".join(path.read_text() for path in documents())
    assert not [name for name in TABLES if f"<!-- quality: {name} begin -->" not in texts]


def test_a_table_is_written_between_its_markers(results):
    text = "before\n<!-- quality: small begin -->\nold\n<!-- quality: small end -->\nafter"
    new = with_figures(text)
    assert new == text.replace("old", MARKDOWN)
    assert with_figures(new) == new


def test_a_figure_is_written_into_its_sentence(results):
    text = "It reaches <!-- figure: rows / svg2 coupled / psnr / .1f -->?<!-- end --> dB."
    assert with_figures(text) == text.replace("?", "35.9")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- quality: large begin -->\n<!-- quality: large end -->", "got 'large'. Known: small"),
        ("<!-- quality: small begin -->\n", "every marker must have its end"),
        ("<!-- figure: rows / svg2 none / psnr / .1f -->1.0", "every marker must have its end"),
        ("<!-- figure: rows / svg2 none -->1.0<!-- end -->", "Write all four"),
        ("<!-- figure: rows / svg3 / psnr / .1f -->1.0<!-- end -->", "got 'svg3'. It has: svg2 none, svg2 coupled"),
        ("<!-- figure: none / svg2 / psnr / .1f -->1.0<!-- end -->", "none.jsonl must have the row"),
        ("<!-- figure: rows / svg2 none / snr / .1f -->1.0<!-- end -->", "got 'snr'. It has: label, psnr"),
    ],
    ids=["no table", "no end", "figure without end", "too short a place", "no row", "no file", "no field"],
)
def test_a_wrong_marker_is_named(results, text, message):
    with pytest.raises(SparseAttentionError) as raised:
        with_figures(text)
    assert message in str(raised.value)


def test_a_figure_that_was_not_measured_is_a_dash(results):
    assert figure("rows / svg2 none / kept_mass / .2f") == "-"


def test_the_command_names_what_differs_and_writes_it(results, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- figure: rows / svg2 none / psnr / .1f -->?<!-- end -->")
    monkeypatch.setattr(quality_tables, "ROOT", tmp_path)
    monkeypatch.setattr(quality_tables, "documents", lambda: [page])
    assert main([]) == 1
    assert main(["--write"]) == 0
    assert capsys.readouterr().out == "page.md: differs from the results\npage.md: written\n"
    assert ">22.2<" in page.read_text() and main([]) == 0
