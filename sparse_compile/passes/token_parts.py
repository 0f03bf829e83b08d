"""The algebra of token axes: an axis is a list of parts from some graph inputs; views cut and merge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod

from torch import fx

from sparse_compile.passes.graph_facts import Length, static_length

Axis = tuple[fx.Node, int]
"""A dimension of a graph input."""


class Note(StrEnum):
    """What happened to a part on its way from the inputs."""

    NONE = ""
    GENERATED = "generated"
    """Padding, constants and broadcasts: no token of an input."""
    THINNED = "thinned"
    """Every n-th token, still in order."""
    GATHERED = "gathered"
    """Chosen or placed by a tensor of indices."""
    INTERLEAVED = "interleaved"
    """Several inputs took turns along the axis, or the view could not be followed."""
    UNKNOWN_OP = "unknown operation"


REORDERING = frozenset({Note.GATHERED, Note.INTERLEAVED, Note.UNKNOWN_OP})
"""Notes after which the tokens may lie in another order than in their input."""


@dataclass(frozen=True)
class Cut:
    """Which range of a whole part a part is."""

    whole: Part
    start: Length
    stop: Length


@dataclass(frozen=True)
class Part:
    """Consecutive positions of an axis that come from the same graph inputs."""

    size: Length
    origins: frozenset[fx.Node] = frozenset()
    factors: tuple[int, ...] = ()
    """Sizes of the axes that were flattened into this one; three are a (frames, height, width) grid."""
    axes: tuple[Axis | None, ...] = ()
    """The input axis behind each factor, where it is known."""
    note: Note = Note.NONE
    cut: Cut | None = None

    @property
    def length(self) -> int:
        """Number of positions (hint)."""
        return self.size.hint

    @property
    def reordered(self) -> bool:
        """Whether the order may differ from that of the input."""
        return self.note in REORDERING


Parts = list[Part]


def part(size: Length, origins: frozenset[fx.Node] = frozenset(), note: Note = Note.NONE) -> Part:
    """A part of one factor."""
    return Part(size, origins, (size.hint,), note=note)


def all_origins(parts: Sequence[Part]) -> frozenset[fx.Node]:
    """Every input that any of the parts comes from."""
    return frozenset().union(*(p.origins for p in parts))


def total(parts: Sequence[Part]) -> Length:
    """The length of all parts together."""
    return sum((p.size for p in parts), static_length(0))


def take(parts: Sequence[Part], start: Length, stop: Length) -> Parts:
    """The parts of positions [start, stop).

    Which part a bound falls into is decided by hints. Where that need not be so for other sizes (a fixed
    512 in a symbolic length that happens to be 512), what is taken has no exact size.
    """
    certain = _falls_into_place(parts, start) and _falls_into_place(parts, stop)
    taken, at = [], static_length(0)
    for p in parts:
        end = at + p.size
        first = start if start.hint > at.hint else at
        last = stop if stop.hint < end.hint else end
        if last.hint > first.hint:
            piece = p if last.hint - first.hint == p.length else _slice(p, first - at, last - at)
            taken.append(piece if certain else replace(piece, size=piece.size.inexact))
        at = end
    return taken


def _falls_into_place(parts: Sequence[Part], bound: Length) -> bool:
    """Whether a bound lies at the same place among the parts for all sizes."""
    at = static_length(0)
    if bound.always_equals(at):
        return True
    for p in parts:
        before, at = at, at + p.size
        if bound.always_equals(at):
            return True
        if before.hint < bound.hint < at.hint:
            return before.static and bound.static and at.static
    return False


def _slice(p: Part, start: Length, stop: Length) -> Part:
    whole, base = (p.cut.whole, p.cut.start) if p.cut else (p, static_length(0))
    size = stop - start
    return replace(p, size=size, factors=(size.hint,), cut=Cut(whole, base + start, base + stop))


def tidy(parts: Sequence[Part]) -> Parts:
    """Drop empty parts, and join neighbours that were cut from one part."""
    joined: Parts = []
    for p in parts:
        if not p.length:
            continue
        rejoined = _join(joined[-1], p) if joined else None
        if rejoined is None:
            joined.append(p)
        else:
            joined[-1] = rejoined
    return joined


def _join(left: Part, right: Part) -> Part | None:
    """The range that two cuts of one part make together, or None where they are no neighbours."""
    if left.cut is None or right.cut is None or left.cut.whole != right.cut.whole:
        return None
    if left.cut.stop.hint != right.cut.start.hint:
        return None
    whole, start, stop = left.cut.whole, left.cut.start, right.cut.stop
    adjoin = left.cut.stop.always_equals(right.cut.start)
    if start.hint == 0 and stop.hint == whole.length:
        complete = adjoin and start.always_equals(static_length(0)) and stop.always_equals(whole.size)
        return whole if complete else replace(whole, size=whole.size.inexact)
    size = stop - start if adjoin else (stop - start).inexact
    return replace(left, size=size, factors=(size.hint,), cut=Cut(whole, start, stop))


def merge_axes(axes: Sequence[Parts]) -> Parts:
    """Several axes flattened into one, outermost first; only the outermost can keep several parts."""
    outer, *inner = axes
    if not inner:
        return outer
    merged = [axis[0] if len(axis) == 1 else _blend(axis) for axis in inner]
    size = static_length(1)
    for m in merged:
        size = size * m.size
    note = Note.INTERLEAVED if any(len(axis) > 1 for axis in inner) else Note.NONE
    return [
        Part(
            size=p.size * size,
            origins=p.origins | all_origins(merged),
            factors=p.factors + tuple(f for m in merged for f in m.factors),
            axes=p.axes + tuple(a for m in merged for a in m.axes),
            note=p.note or note,
        )
        for p in outer
    ]


def _blend(parts: Sequence[Part]) -> Part:
    return part(total(parts), all_origins(parts), Note.INTERLEAVED)


def split_axis(parts: Sequence[Part], view: Sequence[int], index: int) -> Parts:
    """One axis viewed as several of sizes ``view``; the parts of the one at ``index``."""
    if len(parts) == 1:
        return [_factor(parts[0], view, index)]
    inner = prod(view[index + 1 :])
    if index == 0 and all(p.length % inner == 0 for p in parts):
        return [Part(Length(p.length // inner, None), p.origins, (p.length // inner,), p.axes, p.note) for p in parts]
    return [part(Length(view[index], None), all_origins(parts), Note.INTERLEAVED)]


def _factor(p: Part, view: Sequence[int], index: int) -> Part:
    """The factors of a part that make up one axis of the view, where they fit."""
    size = Length(view[index], None)
    before, behind = prod(view[:index]), prod(view[: index + 1])
    ends = [prod(p.factors[: k + 1]) for k in range(len(p.factors))]
    starts = [1, *ends[:-1]]
    chosen = [k for k, (start, end) in enumerate(zip(starts, ends, strict=True)) if start >= before and end <= behind]
    if not chosen or prod(p.factors[k] for k in chosen) != size.hint:
        return Part(size, p.origins, (size.hint,), p.axes, p.note)
    axes = tuple(p.axes[k] for k in chosen) if len(p.axes) == len(p.factors) else ()
    return Part(size, p.origins, tuple(p.factors[k] for k in chosen), axes, p.note)
