"""Find a strategy by the value of the option ``method``.

Other packages add one through the entry-point group ``sparse_compile.strategies``: the entry's name is the method, its
value a class that satisfies `Strategy`.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from sparse_compile.errors import SparseAttentionError
from sparse_compile.strategies.base import Strategy
from sparse_compile.strategies.svg2 import Svg2

GROUP = "sparse_compile.strategies"


def load_strategy(method: str) -> Strategy:
    """An instance of the strategy with this name. ``dense`` needs none and gets SVG2's, which then is never asked.

    Raises:
        SparseAttentionError: no installed package has a strategy of this name, or it is none.
    """
    if method in (Svg2.name, "dense"):
        return Svg2()
    found = entry_points(group=GROUP, name=method)
    if not found:
        names = sorted({Svg2.name, "dense", *entry_points(group=GROUP).names})
        raise SparseAttentionError(
            "option 'method' must name an installed strategy", method, f"Known: {', '.join(names)}."
        )
    strategy = next(iter(found)).load()()
    if not isinstance(strategy, Strategy) or strategy.name != method:
        raise SparseAttentionError(
            f"the entry point {method!r} of {GROUP!r} must give a Strategy of that name",
            type(strategy).__name__,
            "See sparse_compile.Strategy for what it must have.",
        )
    return strategy
