"""The options table of README.md and docs/options.md, made from `Config`.

python -m sparse_compile.cli.options_table                       print it
python -m sparse_compile.cli.options_table --write FILE FILE     put it between the markers of each file
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_compile.config import ENV_PREFIX, Config, declared_options
from sparse_compile.errors import SparseAttentionError

BEGIN = "<!-- options: begin (make options-table writes what follows) -->"
END = "<!-- options: end -->"


def options_table() -> str:
    """The table as Markdown: one row an option, in the order of `Config`."""
    defaults = Config()
    lines = ["| option | default | values | meaning |", "| --- | --- | --- | --- |"]
    for name, option in declared_options().items():
        default = _shown(getattr(defaults, name), option.accepts)
        meaning = option.doc if option.method is None else f"{option.method}: {option.doc}"
        lines.append(f"| `{name}` | {default} | {option.accepts} | {meaning} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The text with the table between its two markers replaced.

    Raises:
        SparseAttentionError: the markers are missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SparseAttentionError("the text must hold both markers", f"{BEGIN} … {END}", "Add them.")
    return f"{head}{BEGIN}\n{options_table()}\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or write it into files."""
    parser = argparse.ArgumentParser(description=f"The options table; variables are {ENV_PREFIX} + upper case.")
    parser.add_argument(
        "--write", type=Path, nargs="+", default=[], metavar="FILE", help="write it between the markers of each FILE"
    )
    targets = parser.parse_args(arguments).write
    if not targets:
        print(options_table())
    for target in targets:
        target.write_text(with_table(target.read_text()))
    return 0


def _shown(default: object, accepts: str) -> str:
    if default is None:
        return "auto" if "auto" in accepts else "none"
    if isinstance(default, tuple):
        return ", ".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    sys.exit(main())
