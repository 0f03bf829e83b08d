"""README.md and docs/options.md hold the options of `Config`, as the command writes them."""

from pathlib import Path

import pytest

from sparse_compile.cli.options_table import BEGIN, END, main, options_table, with_table
from sparse_compile.config import declared_options
from sparse_compile.errors import SparseAttentionError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("document", ["README.md", "docs/options.md"])
def test_the_documents_hold_the_current_table(document):
    text = (ROOT / document).read_text()
    assert with_table(text) == text, "run `make options-table`"


def test_every_option_has_a_row_with_its_default():
    rows = options_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(declared_options())
    assert "| `top_p` | none | none or a number in (0, 1] |" in options_table()
    assert "| `density` | none |" in options_table()
    assert "| `q_clusters` | auto |" in options_table()
    assert "| `strict` | false |" in options_table()


def test_only_what_lies_between_the_markers_is_replaced():
    assert with_table(f"before\n{BEGIN}\nold\n{END}\nafter\n") == (
        f"before\n{BEGIN}\n{options_table()}\n{END}\nafter\n"
    )


def test_a_text_without_markers_is_refused():
    with pytest.raises(SparseAttentionError, match="both markers"):
        with_table("no table here")


def test_the_command_prints_or_writes(tmp_path, capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == options_table() + "\n"
    targets = [tmp_path / "page.md", tmp_path / "other.md"]
    for target in targets:
        target.write_text(f"{BEGIN}\n{END}\n")
    assert main(["--write", *map(str, targets)]) == 0
    assert [options_table() in target.read_text() for target in targets] == [True, True]
