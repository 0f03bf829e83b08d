"""Named lists of configurations to measure, in sizes that suit some 600 tokens.

Equal options have equal labels in all grids, so a row counts for each grid that has its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from sparse_compile.config import BUILT_IN_METHODS, Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.evaluation.comparison import DEMO_OPTIONS, PLUG_IN_OPTIONS

CORRECTIONS = ("none", "pooled", "coupled")
DENSITIES = (0.10, 0.15, 0.20, 0.25, 0.35, 0.50)
FRONT_DENSITIES = (0.15, 0.25)
OTHER_WARM_UPS = (0.1, 0.3)
UNCORRECTED_DENSITIES = (0.15, 0.25, 0.50)
TOP_P = (0.7, 0.9)
QUARTER = 0.25
TWO_DENSITIES = (QUARTER, 0.15)
TARGETS = (0.7, 0.9)
PRESETS = ("quality", "balanced", "fast")
ERROR_BUDGET = "sparse_compile.evaluation.error_budget:ErrorBudget"

OWN_BUDGET = {"svg2": "density", "adaspa": "sparsity"}
"""The option with which a method keeps a fixed share, which `DEMO_OPTIONS` sets too."""
BASE: Mapping[str, Mapping[str, object]] = {
    method: {name: value for name, value in DEMO_OPTIONS[method].items() if name != budget}
    for method, budget in OWN_BUDGET.items()
}
SVG2_BASE = {**BASE["svg2"], "kmeans_iters_init": 10}
"""Ten iterations are enough for so few clusters; the default, 50, would only take longer."""


@dataclass(frozen=True)
class Configuration:
    """What one row measures."""

    label: str
    options: Mapping[str, object]
    series: str
    """The label without how much is kept: rows of one series lie on one curve."""
    matched_density: float | None = None
    """The density whose ``density_run`` is to be met by a ``top_p`` that has to be found; None: options say all."""

    def at_warm_up(self, share: float) -> Configuration:
        """The same with another share of dense steps."""
        options = {name: value for name, value in self.options.items() if name != "dense_steps"}
        old = f" dense_steps={self.options['dense_steps']:g}" if "dense_steps" in self.options else ""
        new = ""
        if share != Config.dense_steps or "preset" in options:
            options["dense_steps"], new = share, f" dense_steps={share:g}"
        label, series = (text.removesuffix(old) + new for text in (self.label, self.series))
        return replace(self, label=label, series=series, options=options)


def configuration(
    method: str,
    budget: Mapping[str, object],
    *,
    correction: str = "coupled",
    changes: Mapping[str, object] = MappingProxyType({}),
    matched_density: float | None = None,
) -> Configuration:
    """One configuration with its label.

    Args:
        method: of the backend.
        budget: the option that says how much is kept, and its value.
        correction: of the backend.
        changes: more options; the label tells those that differ from what a small video has anyway.
        matched_density: find the top_p that has the ``density_run`` of this density.
    """
    base = SVG2_BASE if method in ("svg2", ERROR_BUDGET) else BASE.get(method, PLUG_IN_OPTIONS)
    name = method.rpartition(":")[2]
    usual = {option: base.get(option, getattr(Config, option, None)) for option in changes}
    variant = [f"{option}={value}" for option, value in changes.items() if value != usual[option]]
    amount = [f"{option}={_shown(value)}" for option, value in budget.items()]
    kind = list(budget)
    if matched_density is not None:
        amount, kind = [f"top_p for density={_shown(matched_density)}"], ["top_p for density"]
    return Configuration(
        label=" ".join([name, correction, *amount, *variant]),
        options={"method": method, **base, **budget, "correction": correction, **changes},
        series=" ".join([name, correction, *kind, *variant]),
        matched_density=matched_density,
    )


def at_density(method: str, density: float, *, correction: str = "coupled", **changes: object) -> Configuration:
    """A method that keeps a fixed share of the pairs."""
    budget = {"sparsity": round(1 - density, 4)} if method == "adaspa" else {"density": density}
    return configuration(method, budget, correction=correction, changes=changes)


def controls(corrections: Iterable[str]) -> list[Configuration]:
    """What every table contains: everything kept, which must be dense again, and plans drawn at random."""
    everything = [at_density(method, 1.0) for method in BUILT_IN_METHODS]
    at_random = [
        at_density(method, QUARTER, correction=correction, rank_by="random")
        for method in BUILT_IN_METHODS
        for correction in corrections
    ]
    return [*everything, *at_random]


def control(options: Mapping[str, object]) -> str | None:
    """Which control some options are: "everything" kept, a "random" plan, or none."""
    if options.get("density") == 1.0 or options.get("sparsity") == 0.0:
        return "everything"
    return "random" if options.get("rank_by") == "random" else None


def corrections() -> list[Configuration]:
    """Both methods with each correction at a quarter of the pairs."""
    measured = [
        at_density(method, QUARTER, correction=correction) for method in BUILT_IN_METHODS for correction in CORRECTIONS
    ]
    return [*measured, *controls(CORRECTIONS)]


def quick() -> list[Configuration]:
    """The corrections, with the controls of the default one alone."""
    return [*corrections()[: len(BUILT_IN_METHODS) * len(CORRECTIONS)], *controls(["coupled"])]


def pareto() -> list[Configuration]:
    """Quality over density: both methods, corrected and not, and the budget of SVG2's paper."""
    fixed = [
        at_density(method, density, correction=correction)
        for correction, densities in (("coupled", DENSITIES), ("none", UNCORRECTED_DENSITIES))
        for density in densities
        for method in BUILT_IN_METHODS
    ]
    native = [configuration("svg2", {"top_p": top_p}, correction="none") for top_p in TOP_P]
    return [*controls(["coupled", "none"]), *fixed, *native]


def selection() -> list[Configuration]:
    """What is kept, at equal density: budgets and orders of SVG2; trades, block sizes and the monitor of AdaSpa."""
    measured = []
    for correction in ("coupled", "none"):
        measured += [at_density("svg2", QUARTER, correction=correction), _matched(QUARTER, correction)]
    measured += [
        at_density("svg2", QUARTER, rank_by="mass_per_key"),
        at_density(ERROR_BUDGET, QUARTER),
        *(at_density("adaspa", QUARTER, head_adaptive=way) for way in ("paper", "guarded", "off")),
    ]
    blocks = [
        at_density("adaspa", QUARTER, correction=correction, block_size=size)
        for correction in ("coupled", "none")
        for size in (8, 16, 32)
    ]
    alone = at_density("adaspa", QUARTER, monitor=False)
    return [*measured, *blocks, alone, *controls(["coupled", "none"])]


def recall() -> list[Configuration]:
    """Budgets by the attention mass to keep."""
    measured = [configuration(method, {"target_recall": target}) for method in BUILT_IN_METHODS for target in TARGETS]
    return [*measured, *controls(["coupled"])]


def presets() -> list[Configuration]:
    """What each preset sets."""
    measured = [configuration(method, {"preset": preset}) for method in BUILT_IN_METHODS for preset in PRESETS]
    return [*measured, *controls(["coupled"])]


def paper() -> list[Configuration]:
    """Both methods as their papers have them, beside the defaults, at equal density."""
    measured = []
    for density in TWO_DENSITIES:
        measured += [
            at_density("svg2", density),
            of_paper("svg2", density),
            at_density("adaspa", density),
            of_paper("adaspa", density),
        ]
    return [*measured, *controls(["coupled", "none"])]


def of_paper(method: str, density: float) -> Configuration:
    """A method as its paper has it, at a density: SVG2 by the top_p that leads to it."""
    if method == "svg2":
        return _matched(density, "none", rank_by="mass")
    return at_density("adaspa", density, correction="none", head_adaptive="paper", monitor=False)


def front() -> list[Configuration]:
    """Quality over density_run with fewer dense steps and with more: with pareto, what presets are chosen from."""
    measured = [
        at_density(method, density).at_warm_up(share)
        for method in BUILT_IN_METHODS
        for share in OTHER_WARM_UPS
        for density in FRONT_DENSITIES
    ]
    return [*measured, *controls(["coupled"])]


def of_plug_in(method: str) -> list[Configuration]:
    """A method that is not built in, with what it takes for itself, and the controls."""
    return [configuration(method, {}), *controls(["coupled"])]


def _matched(density: float, correction: str, **changes: object) -> Configuration:
    return configuration("svg2", {}, correction=correction, changes=changes, matched_density=density)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


GRIDS: Mapping[str, Callable[[], list[Configuration]]] = {
    grid.__name__: grid for grid in (quick, corrections, pareto, selection, front, recall, presets, paper)
}


def grid_named(name: str) -> list[Configuration]:
    """The configurations of a grid.

    Raises:
        SparseAttentionError: there is no such grid.
    """
    if name not in GRIDS:
        raise SparseAttentionError("a grid goes by its name", name, f"Known: {', '.join(GRIDS)}.")
    return GRIDS[name]()
