"""Find a strategy by the value of the option ``method``.

Other packages add one through the entry-point group ``sparse_compile.strategies``: the entry's name is the method, its
value a class that satisfies `Strategy`. A class that is in no package yet goes by ``module:Class``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points

from sparse_compile.errors import SparseAttentionError
from sparse_compile.strategies.adaspa import AdaSpa
from sparse_compile.strategies.base import Strategy
from sparse_compile.strategies.svg2 import Svg2

GROUP = "sparse_compile.strategies"
BUILT_IN: Mapping[str, Callable[[], Strategy]] = {Svg2.name: Svg2, AdaSpa.name: AdaSpa, "dense": Svg2}


def load_strategy(method: str) -> Strategy:
    """An instance of the strategy with this name. ``dense`` needs none and gets SVG2's, which then is never asked.

    Raises:
        SparseAttentionError: no installed package has a strategy of this name, or it is none.
    """
    if method in BUILT_IN:
        return BUILT_IN[method]()
    strategy = _load_class(method)()
    if not isinstance(strategy, Strategy):
        raise SparseAttentionError(
            f"method {method!r} must give a Strategy",
            type(strategy).__name__,
            "See sparse_compile.Strategy for what it must have.",
        )
    return strategy


def _load_class(method: str) -> Callable[[], object]:
    """The class behind an entry point, or behind ``module:Class``."""
    module, colon, name = method.partition(":")
    if colon:
        try:
            found: Callable[[], object] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise SparseAttentionError(
                "a method of the form 'module:Class' must be importable",
                method,
                f"Importing it gave: {error}.",
            ) from error
        return found
    entries = entry_points(group=GROUP, name=method)
    if not entries:
        names = sorted({*BUILT_IN, *entry_points(group=GROUP).names})
        raise SparseAttentionError(
            "option 'method' must name an installed strategy",
            method,
            f"Known: {', '.join(names)}; or 'module:Class'.",
        )
    loaded: Callable[[], object] = next(iter(entries)).load()
    return loaded
