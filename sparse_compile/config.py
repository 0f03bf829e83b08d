"""Options: each declared once, with its environment variable, type, range, default and one line of doc.

Order of precedence: `options=` of torch.compile, then the environment (``SPARSE_ATTN_`` + upper case), then the
default. Nothing else in the package reads the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from sparse_compile.errors import SparseAttentionError

log = logging.getLogger(__name__)

ENV_PREFIX = "SPARSE_ATTN_"
FOREIGN_VARIABLES = frozenset({"SPARSE_ATTN_BACKEND"})
"""Variables with our prefix that belong to other projects (microsoft/TRELLIS reads this one)."""

LATER_OPTIONS: Mapping[str, str] = {
    "preset": "presets, which are set by measurement",
    "sparsity": "the method adaspa",
    "block_size": "the method adaspa",
    "search_steps": "the method adaspa",
    "head_adaptive": "the method adaspa",
    "target_recall": "recall targets",
    "correction": "the correction for skipped keys",
    "probe_rows": "the probe rows that measure kept mass",
}
"""Options of the design that this version refuses by name, and what they belong to."""
LATER_METHODS = frozenset({"adaspa"})

Parse = Callable[[object], Any]


@dataclass(frozen=True)
class Option:
    """How one option is read (from Python or from a string) and shown."""

    parse: Parse
    accepts: str
    doc: str


def _fail(name: str, accepts: str, value: object) -> SparseAttentionError:
    return SparseAttentionError(f"option {name!r} must be {accepts}", value, "See the options table in README.md.")


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _whole(value: object) -> int:
    number = _number(value)
    if number != int(number) or (isinstance(value, float) and not float(value).is_integer()):
        raise ValueError
    return int(number)


def _within(low: float, high: float, *, open_low: bool = False) -> Parse:
    def parse(value: object) -> float:
        number = _number(value)
        if not (low < number if open_low else low <= number) or number > high:
            raise ValueError
        return number

    return parse


def _at_least(least: int) -> Parse:
    def parse(value: object) -> int:
        number = _whole(value)
        if number < least:
            raise ValueError
        return number

    return parse


def _or(word: str, replacement: Any, parse: Parse) -> Parse:
    def parse_either(value: object) -> Any:
        return replacement if value == word or value is None else parse(value)

    return parse_either


def _one_of(*words: str) -> Parse:
    def parse(value: object) -> str:
        if value not in words:
            raise ValueError
        return str(value)

    return parse


def _boolean(value: object) -> bool:
    known = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in known:
        return known[value.lower()]
    raise ValueError


def _share_or_count(value: object) -> float | int:
    """A float (or a string with a point) is a share in [0, 1]; an int is a count."""
    if isinstance(value, float) or (isinstance(value, str) and "." in value):
        return float(_within(0.0, 1.0)(value))
    return int(_at_least(0)(value))


def _layers(value: object) -> float | int | str:
    """A share, a count, or a list such as ``0-2,-1``."""
    if not isinstance(value, str):
        return _share_or_count(value)
    try:
        return _share_or_count(value)
    except ValueError:
        layer_ranges(value)
        return value.replace(" ", "")


def layer_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """The (first, last) pairs of a list of layers such as ``0-2,-1``; negative numbers count from the end.

    Raises:
        ValueError: the text is no such list.
    """
    ranges = []
    for item in text.replace(" ", "").split(","):
        sign, digits = (-1, item[1:]) if item.startswith("-") else (1, item)
        first, dash, last = digits.partition("-")
        if not first.isdigit() or (dash and (sign < 0 or not last.isdigit() or int(last) < int(first))):
            raise ValueError
        ranges.append((sign * int(first), int(last) if dash else sign * int(first)))
    return tuple(ranges)


def _method(value: object) -> str:
    if not isinstance(value, str) or not all(word.isidentifier() for word in re.split("[.:]", value)):
        raise ValueError
    if value in LATER_METHODS:
        raise SparseAttentionError(
            "option 'method' must name an available method", value, "It comes in a later version; use 'svg2'."
        )
    return value


def _kernel(value: object) -> str:
    if value == "triton":
        raise SparseAttentionError(
            "option 'kernel' must name an available implementation",
            value,
            "Triton kernels come in a later version; use 'auto'.",
        )
    return str(_one_of("auto", "cpu", "reference")(value))


def _option(default: Any, parse: Parse, accepts: str, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"option": Option(parse, accepts, doc)})


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of one compilation, checked. Equal options give equal Configs."""

    method: str = _option(
        "svg2", _method, "svg2, dense, an installed plug-in, or 'module:Strategy'", "which sparse attention"
    )
    top_p: float = _option(
        0.9, _within(0, 1, open_low=True), "a number in (0, 1]", "SVG2: attention mass kept per query cluster"
    )
    min_kept: float = _option(0.1, _within(0, 1), "a number in [0, 1]", "SVG2: least share of key clusters kept")
    density: float | None = _option(
        None,
        _or("none", None, _within(0, 1, open_low=True)),
        "none or a number in (0, 1]",
        "SVG2: fixed share of keys per query row; replaces top_p",
    )
    rank_by: str = _option(
        "mass",
        _one_of("mass", "mass_per_key", "random"),
        "mass, mass_per_key or random",
        "order in which key clusters are kept; random is a control for quality tables",
    )
    q_clusters: int | None = _option(
        None,
        _or("auto", None, _at_least(1)),
        "auto or an integer >= 1",
        "query clusters; auto: tokens / 256 in [32, 400]",
    )
    k_clusters: int | None = _option(
        None,
        _or("auto", None, _at_least(1)),
        "auto or an integer >= 1",
        "key clusters; auto: tokens / 76 in [64, 1000]",
    )
    kmeans_iters_init: int = _option(50, _at_least(1), "an integer >= 1", "k-means iterations of a search")
    kmeans_iters: int = _option(2, _at_least(1), "an integer >= 1", "k-means iterations of a sparse call")
    dense_steps: float | int = _option(
        0.2, _share_or_count, "a share in [0.0, 1.0] or a count >= 0", "first denoising steps that stay dense"
    )
    dense_layers: float | int | str = _option(
        0.03,
        _layers,
        "a share in [0.0, 1.0], a count >= 0 or a list such as '0-2,-1'",
        "layers that stay dense, from the first",
    )
    min_tokens: int | None = _option(
        None,
        _or("auto", None, _at_least(1)),
        "auto or an integer >= 1",
        "fewest video tokens to go sparse; auto: the method's floor (SVG2: 4 x k_clusters)",
    )
    text_tokens: int | None = _option(
        None,
        _or("auto", None, _at_least(0)),
        "auto or an integer >= 0",
        "text tokens, where the graph does not tell",
    )
    text_position: str = _option(
        "auto",
        _one_of("auto", "first", "last"),
        "auto, first or last",
        "where those text tokens lie; auto: last",
    )
    kernel: str = _option("auto", _kernel, "auto, cpu or reference", "which implementation of the ops")
    strict: bool = _option(
        False, _boolean, "true or false", "raise for unsupported sites, and when nothing became sparse"
    )
    compile_mode: str = _option(
        "default",
        _one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        "default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs",
        "Inductor's mode",
    )
    lowering: str = _option("inductor", _one_of("inductor", "eager"), "inductor or eager", "eager: for tests")
    seed: int = _option(0, _at_least(0), "an integer >= 0", "start of k-means")
    verbose: bool = _option(False, _boolean, "true or false", "log one line a site")

    def __post_init__(self) -> None:
        for name, option in declared_options().items():
            object.__setattr__(self, name, _parsed(name, option, getattr(self, name)))

    @classmethod
    def from_options(cls, options: Mapping[str, object] | None, environ: Mapping[str, str] | None = None) -> Self:
        """Check and merge options and environment.

        Args:
            options: what the user gave to torch.compile.
            environ: the variables to read; the process's own by default.

        Raises:
            SparseAttentionError: an option is unknown, out of range, or belongs to a later version.
        """
        chosen: dict[str, Any] = _from_environment(os.environ if environ is None else environ)
        for name, value in (options or {}).items():
            _check_known(name)
            chosen[name] = value
        return cls(**chosen)

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
    if name in LATER_OPTIONS:
        remedy = f"It belongs to {LATER_OPTIONS[name]}, which comes in a later version; leave it out."
        raise SparseAttentionError("options must name settings of this version", name, remedy)
    near = difflib.get_close_matches(str(name), known, n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
    raise SparseAttentionError("options must name known settings", name, remedy)


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    known = list(declared_options())
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in FOREIGN_VARIABLES:
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name in known:
            chosen[name] = value
        elif name in LATER_OPTIONS:
            _check_known(name)
        else:
            _warn_unknown(variable)
    return chosen


@functools.cache
def _warn_unknown(variable: str) -> None:
    """Once in a process: options are read for every graph."""
    known = list(declared_options())
    near = difflib.get_close_matches(variable.removeprefix(ENV_PREFIX).lower(), known, n=1)
    hint = f"; did you mean {ENV_PREFIX}{near[0].upper()}?" if near else ""
    log.warning("unknown environment variable %s is ignored%s", variable, hint)
