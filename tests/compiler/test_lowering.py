"""The identity of our code in Inductor's caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_compile.compiler import lowering
from sparse_compile.config import Config


def test_equal_options_give_the_same_tag_and_any_change_another() -> None:
    assert lowering.cache_tag(Config()) == lowering.cache_tag(Config())
    tags = {
        lowering.cache_tag(Config(**change)) for change in ({}, {"top_p": 0.5}, {"seed": 1}, {"kernel": "reference"})
    }
    assert len(tags) == 4


@pytest.mark.parametrize("changed", ["blocks.py", "library.cpp", "vectors.h"])
def test_a_changed_source_gives_another_tag(monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    before = lowering.source_hash.__wrapped__()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path.name == changed else b""))
    assert lowering.source_hash.__wrapped__() != before
