"""How the option `method` finds a strategy."""

from __future__ import annotations

import importlib.metadata

import pytest

from sparse_compile.errors import SparseAttentionError
from sparse_compile.strategies import catalogue
from sparse_compile.strategies.svg2 import Svg2


class OwnMethod(Svg2):
    name = "own"


def test_our_own_entry_point_leads_to_svg2() -> None:
    (entry,) = importlib.metadata.entry_points(group=catalogue.GROUP, name="svg2")
    assert entry.load() is Svg2
    assert isinstance(catalogue.load_strategy("svg2"), Svg2)


def test_a_class_goes_by_module_and_name() -> None:
    assert isinstance(catalogue.load_strategy(f"{__name__}:OwnMethod"), OwnMethod)


def test_a_plug_in_goes_by_the_name_of_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint("own", f"{__name__}:OwnMethod", catalogue.GROUP)

    def entry_points(**wanted: str) -> importlib.metadata.EntryPoints:
        return importlib.metadata.EntryPoints([entry]).select(**wanted)

    monkeypatch.setattr(catalogue, "entry_points", entry_points)
    assert isinstance(catalogue.load_strategy("own"), OwnMethod)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("nothing", "must name an installed strategy; got 'nothing'. Known: adaspa, dense, svg2"),
        ("no_module:Method", "must be importable"),
        ("builtins:no_class", "must be importable"),
        ("builtins:dict", "must give a Strategy; got 'dict'"),
    ],
)
def test_what_is_no_strategy_is_refused(method: str, message: str) -> None:
    with pytest.raises(SparseAttentionError, match=message.replace(".", r"\.")):
        catalogue.load_strategy(method)
