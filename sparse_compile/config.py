"""Options: each declared once, with its environment variable, type, range, default and one line of doc.

Order of precedence: `options=` of torch.compile, then the environment (``SPARSE_ATTN_`` + upper case), then the
preset, then the default. Nothing else in the package reads the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from sparse_compile import option_values as accept
from sparse_compile.budgets import BUDGETS, DEFAULT_DENSITY, DEFAULT_SPARSITY, overlaid
from sparse_compile.errors import SparseAttentionError
from sparse_compile.presets import PRESET_NAMES, PRESETS

log = logging.getLogger(__name__)

ENV_PREFIX = "SPARSE_ATTN_"
FOREIGN_VARIABLES = frozenset({"SPARSE_ATTN_BACKEND"})
"""Variables with our prefix that belong to other projects (microsoft/TRELLIS reads this one)."""

BUILT_IN_METHODS = ("svg2", "adaspa")


@dataclass(frozen=True)
class Option:
    """How one option is read (from Python or from a string) and shown.

    ``method`` is the built-in method that alone reads it, None where all do. A plug-in may read any.
    """

    parse: accept.Parse
    accepts: str
    doc: str
    method: str | None = None


def _fail(name: str, accepts: str, value: object) -> SparseAttentionError:
    return SparseAttentionError(f"option {name!r} must be {accepts}", value, "See the options table in README.md.")


def _method(value: object) -> str:
    if not isinstance(value, str) or not all(word.isidentifier() for word in re.split("[.:]", value)):
        raise ValueError
    return value


def _option(default: Any, parse: accept.Parse, accepts: str, doc: str, method: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"option": Option(parse, accepts, doc, method)})


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of one compilation, checked. Equal options give equal Configs."""

    method: str = _option(
        "svg2", _method, "svg2, adaspa, dense, an installed plug-in, or 'module:Strategy'", "which sparse attention"
    )
    preset: str | None = _option(
        None,
        accept.one_word_or("none", None, accept.one_of(*PRESET_NAMES)),
        f"none, {', '.join(PRESET_NAMES[:-1])} or {PRESET_NAMES[-1]}",
        "settings by measurement, for what is not given (docs/quality.md)",
    )
    target_recall: float | None = _option(
        None,
        accept.one_word_or("none", None, accept.within(0, 1, open_low=True, open_high=True)),
        "none or a number in (0, 1)",
        "attention mass to keep in each head, as a budget: density follows the content",
    )
    min_density: float = _option(
        0.02, accept.within(0, 1), "a number in [0, 1]", "least share of keys of a query row under target_recall"
    )
    max_density: float = _option(
        1.0,
        accept.within(0, 1, open_low=True),
        "a number in (0, 1]",
        "largest share of keys of a query row under target_recall; a head most of whose rows need more stays dense",
    )
    correction: str = _option(
        "auto",
        accept.one_of("auto", "none", "pooled", "coupled"),
        "auto, none, pooled or coupled",
        "what stands for skipped keys: nothing, their means, or these with a coupling term; auto: coupled",
    )
    density: float | None = _option(
        None,
        accept.one_word_or("none", None, accept.within(0, 1, open_low=True)),
        "none or a number in (0, 1]",
        f"share of keys kept in each query row; {DEFAULT_DENSITY} where no other budget is given",
        "svg2",
    )
    top_p: float | None = _option(
        None,
        accept.one_word_or("none", None, accept.within(0, 1, open_low=True)),
        "none or a number in (0, 1]",
        "attention mass kept per query cluster, by its estimate: the paper's budget",
        "svg2",
    )
    min_kept: float = _option(
        0.1, accept.within(0, 1), "a number in [0, 1]", "least share of key clusters kept under top_p", "svg2"
    )
    rank_by: str = _option(
        "mass",
        accept.one_of("mass", "mass_per_key", "random"),
        "mass, mass_per_key or random",
        "order in which key groups are kept; random is a control for quality tables",
    )
    q_clusters: int | None = _option(
        None,
        accept.one_word_or("auto", None, accept.at_least(1)),
        "auto or an integer >= 1",
        "query clusters; auto: tokens / 256 in [32, 400]",
        "svg2",
    )
    k_clusters: int | None = _option(
        None,
        accept.one_word_or("auto", None, accept.at_least(1)),
        "auto or an integer >= 1",
        "key clusters; auto: tokens / 76 in [64, 1000]",
        "svg2",
    )
    kmeans_iters_init: int = _option(
        50, accept.at_least(1), "an integer >= 1", "k-means iterations of a search", "svg2"
    )
    kmeans_iters: int = _option(2, accept.at_least(1), "an integer >= 1", "k-means iterations of a sparse call", "svg2")
    sparsity: float | None = _option(
        None,
        accept.one_word_or("none", None, accept.within(0, 1, open_high=True)),
        "none or a number in [0, 1)",
        f"share of the video key blocks that a query row leaves out; {DEFAULT_SPARSITY} where no other budget is given",
        "adaspa",
    )
    min_recall: float | None = _option(
        None,
        accept.one_word_or("none", None, accept.within(0, 1, open_low=True)),
        "none or a number in (0, 1]",
        "a head whose plan keeps less of its attention mass attends to everything until the next search",
        "adaspa",
    )
    monitor: bool = _option(
        True,
        accept.boolean,
        "true or false",
        "watch held plans on the probe rows: search again when one has gone stale, skip a search when all still hold",
        "adaspa",
    )
    block_size: int = _option(64, accept.at_least(1), "an integer >= 1", "most tokens of a block", "adaspa")
    search_steps: tuple[float | int, ...] = _option(
        (0.2, 0.6),
        accept.search_steps,
        "rising shares in [0.0, 1.0] or counts >= 0, such as '0.2,0.6' or '10,30'",
        "how many steps are done when a search ends; the last dense step always searches, shares name further searches"
        " from 20 steps on",
        "adaspa",
    )
    head_adaptive: str = _option(
        "guarded",
        accept.one_of("paper", "guarded", "off"),
        "paper, guarded or off",
        "how heads trade budgets; the mean stays",
        "adaspa",
    )
    search_row_stride: int = _option(
        1, accept.at_least(1), "an integer >= 1", "a search looks at every so manyth query row of a block", "adaspa"
    )
    probe_rows: int = _option(
        64, accept.at_least(0), "an integer >= 0", "rows a head that measure kept mass in each sparse call; 0: none"
    )
    dense_steps: float | int = _option(
        0.2, accept.share_or_count, "a share in [0.0, 1.0] or a count >= 0", "first denoising steps that stay dense"
    )
    dense_layers: float | int | str = _option(
        0.03,
        accept.layers,
        "a share in [0.0, 1.0], a count >= 0 or a list such as '0-2,-1'",
        "layers that stay dense, from the first",
    )
    min_tokens: int | None = _option(
        None,
        accept.one_word_or("auto", None, accept.at_least(1)),
        "auto or an integer >= 1",
        "fewest video tokens to go sparse; auto: the method's floor (svg2: 4 x k_clusters; adaspa: 4096 tokens and 16"
        " blocks), and on a CPU what an estimate says is faster than dense",
    )
    text_tokens: int | None = _option(
        None,
        accept.one_word_or("auto", None, accept.at_least(0)),
        "auto or an integer >= 0",
        "text tokens, where the graph does not tell",
    )
    text_position: str = _option(
        "auto",
        accept.one_of("auto", "first", "last"),
        "auto, first or last",
        "where those text tokens lie; auto: last",
    )
    kernel: str = _option(
        "auto",
        accept.one_of("auto", "triton", "cpu", "reference"),
        "auto, triton, cpu or reference",
        "which implementation of the ops; auto: triton on NVIDIA GPUs, cpu (C++) on CPUs, else reference (plain torch)",
    )
    strict: bool = _option(
        False, accept.boolean, "true or false", "raise for unsupported sites, and when nothing became sparse"
    )
    compile_mode: str = _option(
        "default",
        accept.one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        "default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs",
        "Inductor's mode",
    )
    lowering: str = _option("inductor", accept.one_of("inductor", "eager"), "inductor or eager", "eager: for tests")
    seed: int = _option(0, accept.at_least(0), "an integer >= 0", "for k-means, probe rows and random ranks")
    verbose: bool = _option(False, accept.boolean, "true or false", "log one line a site")

    def __post_init__(self) -> None:
        for name, option in declared_options().items():
            object.__setattr__(self, name, _parsed(name, option, getattr(self, name)))
        self._check_methods()
        self._check_budgets()

    def _check_methods(self) -> None:
        """An option of the other method would have no effect, so it is an error."""
        for name, value in self.changed().items():
            if not belongs(name, self.method):
                owner = declared_options()[name].method
                raise SparseAttentionError(
                    f"option {name!r} belongs to method {owner!r}, and method is {self.method!r}",
                    value,
                    f"Leave it out, or choose method={owner!r}.",
                )

    def _check_budgets(self) -> None:
        """Two budgets would contradict each other, and so would a floor above the ceiling."""
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1 and self.method in BUILT_IN_METHODS:  # what others mean by them is theirs
            raise SparseAttentionError(
                f"a method goes by one budget of {', '.join(BUDGETS)}",
                ", ".join(f"{name}={getattr(self, name)}" for name in given),
                "Leave out all but one.",
            )
        if self.target_recall is not None and self.min_density > self.max_density:
            raise SparseAttentionError(
                "min_density must not be above max_density",
                f"{self.min_density} and {self.max_density}",
                "Lower min_density, or raise max_density.",
            )

    @classmethod
    def from_options(cls, options: Mapping[str, object] | None, environ: Mapping[str, str] | None = None) -> Self:
        """Check and merge options, environment and the settings of a preset, in this order of precedence.

        Args:
            options: what the user gave to torch.compile.
            environ: the variables to read; the process's own by default.

        Raises:
            SparseAttentionError: an option is unknown or out of range, or two of them contradict each other.
        """
        given = dict(options or {})
        for name in given:
            _check_known(name)
        merged = overlaid(_from_environment(environ, given), given)
        return cls(**overlaid(_from_preset(merged), merged))

    @property
    def correction_at_work(self) -> str:
        """The correction with ``auto`` resolved."""
        return "coupled" if self.correction == "auto" else self.correction

    @property
    def watches_plans(self) -> bool:
        """Whether held plans are watched on the probe rows."""
        return self.monitor and self.probe_rows > 0

    @property
    def density_at_work(self) -> float | None:
        """The share of keys that a query row of svg2 keeps; None where another budget decides."""
        others = (self.top_p, self.target_recall)
        return DEFAULT_DENSITY if self.density is None and others == (None, None) else self.density

    @property
    def sparsity_at_work(self) -> float:
        """The share of blocks that adaspa leaves out; under target_recall without effect."""
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    def changed(self) -> dict[str, object]:
        """The options that differ from their defaults."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}


def declared_options() -> dict[str, Option]:
    """Every option by name, in the order of the table."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(Config)}


def _parsed(name: str, option: Option, value: object) -> Any:
    if value is None and "auto" not in option.accepts and "none" not in option.accepts:
        raise _fail(name, option.accepts, value)
    try:
        return option.parse(value)
    except SparseAttentionError:
        raise
    except ValueError:
        raise _fail(name, option.accepts, value) from None


def _check_known(name: str) -> None:
    known = list(declared_options())
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
    raise SparseAttentionError("options must name known settings", name, remedy)


def belongs(name: str, method: str) -> bool:
    """Whether a method reads an option; one that is not built in may read all. Unknown options belong to every one."""
    option = declared_options().get(name)
    return option is None or option.method in (None, method) or method not in BUILT_IN_METHODS


def set_in_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The options that variables set, also those they set to their defaults, as text.

    Args:
        environ: the variables to read; the process's own by default.
    """
    known = declared_options()
    return {name: value for name, value in _our_variables(environ).items() if name in known}


def _our_variables(environ: Mapping[str, str] | None) -> dict[str, str]:
    """Variables with our prefix, by what follows it in lower case."""
    return {
        variable.removeprefix(ENV_PREFIX).lower(): value
        for variable, value in (os.environ if environ is None else environ).items()
        if variable.startswith(ENV_PREFIX) and variable not in FOREIGN_VARIABLES
    }


def _from_environment(environ: Mapping[str, str] | None, given: Mapping[str, object]) -> dict[str, Any]:
    """What variables set. One for a built-in method that is not at work is left to the models that use that method."""
    chosen: dict[str, Any] = dict(set_in_environment(environ))
    for name in _our_variables(environ).keys() - chosen:
        _warn_unknown(ENV_PREFIX + name.upper())
    method = given.get("method", chosen.get("method", Config.method))
    foreign = [name for name in chosen if not belongs(name, str(method))]
    for name in foreign:
        del chosen[name]
        _warn_foreign(ENV_PREFIX + name.upper(), str(declared_options()[name].method), str(method))
    return chosen


def _from_preset(merged: Mapping[str, Any]) -> dict[str, Any]:
    """What the chosen preset sets; nothing without one, or where its name is wrong, which the Config will say."""
    preset, method = merged.get("preset"), merged.get("method", Config.method)
    if preset not in PRESET_NAMES:
        return {}
    if method not in PRESETS:
        raise SparseAttentionError(
            f"presets exist for {', '.join(PRESETS)}", f"preset={preset!r} with method={method!r}", "Leave preset out."
        )
    return dict(PRESETS[method][preset])


@functools.cache
def _warn_foreign(variable: str, owner: str, method: str) -> None:
    """Once in a process, as `_warn_unknown`."""
    log.warning("environment variable %s is for method %s and has no effect on method %s", variable, owner, method)


@functools.cache
def _warn_unknown(variable: str) -> None:
    """Once in a process: options are read for every graph."""
    known = list(declared_options())
    near = difflib.get_close_matches(variable.removeprefix(ENV_PREFIX).lower(), known, n=1)
    hint = f"; did you mean {ENV_PREFIX}{near[0].upper()}?" if near else ""
    log.warning("unknown environment variable %s is ignored%s", variable, hint)
