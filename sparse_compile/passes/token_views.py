"""How reshapes, permutations and indexing map one axis of their result to their source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import fx

from sparse_compile.passes.graph_facts import (
    Length,
    argument,
    is_tensor,
    length,
    length_of,
    op_name,
    rank,
    sizes,
    static_length,
    value_of,
)
from sparse_compile.passes.token_parts import Note, Parts, merge_axes, part, split_axis, take

SPLITS = frozenset({"split", "chunk", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"})


class Walk(Protocol):
    """The walk through a graph, as a rule sees it."""

    def parts(self, node: fx.Node, dim: int) -> Parts:
        """The parts of another node's axis."""

    def opaque(self, node: fx.Node, dim: int, note: Note) -> Parts:
        """One part that may hold anything the node depends on."""

    def most_telling(self, candidates: Sequence[Parts]) -> Parts:
        """Of several descriptions of one axis the one that says most."""


Rule = Callable[[Walk, fx.Node, int], Parts]
"""The parts of axis ``dim`` (not negative) of a node, in terms of the nodes it reads."""


def source_of(node: fx.Node) -> fx.Node:
    """The first operand."""
    source = argument(node, 0, "input")
    assert isinstance(source, fx.Node), f"{op_name(node)} has no tensor as first operand"
    return source


# ---------------------------------------------------------------------- reshapes


def reshape(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Follow an axis through a view, flatten, squeeze and so on. Axes of size 1 carry no tokens.

    Before:
        x: [2, 3, 8, 8, 64]; y = x.flatten(1, 3)
    After:
        axis 1 of y is one part with the factors (3, 8, 8)
    """
    source = source_of(node)
    before, after = sizes(source), sizes(node)
    if 0 in before:
        return walk.opaque(node, dim, Note.INTERLEAVED)
    if after[dim] == 1:
        return [part(static_length(1))]
    for old, new in paired_axes(before, after):
        if dim not in new:
            continue
        if len(new) == 1:
            return merge_axes([walk.parts(source, axis) for axis in old])
        if len(old) == 1:
            return split_axis(walk.parts(source, old[0]), [after[axis] for axis in new], new.index(dim))
    return walk.opaque(node, dim, Note.INTERLEAVED)


def paired_axes(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The groups of axes of a reshape that hold equally many elements, outermost first, without size 1."""
    old_axes = [axis for axis, size in enumerate(before) if size != 1]
    new_axes = [axis for axis, size in enumerate(after) if size != 1]
    while old_axes and new_axes:
        old, new = [old_axes.pop(0)], [new_axes.pop(0)]
        while (left := prod(before[a] for a in old)) != (right := prod(after[a] for a in new)):
            grown, rest = (old, old_axes) if left < right else (new, new_axes)
            if not rest:
                return
            grown.append(rest.pop(0))
        yield old, new


# ---------------------------------------------------------------------- permutations


def permute(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Follow ``permute``, whose order comes as one list or as separate arguments."""
    order: Any = node.args[1:] if len(node.args) > 2 else argument(node, 1, "dims")
    return walk.parts(source_of(node), order[dim])


def transpose(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Follow a swap of two axes."""
    first, second = argument(node, 1, "dim0") % rank(node), argument(node, 2, "dim1") % rank(node)
    return walk.parts(source_of(node), {first: second, second: first}.get(dim, dim))


def transpose_last(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Follow ``t``, ``mT`` and ``adjoint``, which swap the last two axes."""
    last = rank(node) - 1
    return walk.parts(source_of(node), {last: last - 1, last - 1: last}.get(dim, dim))


def movedim(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Follow ``movedim``, by moving the axes of a tensor whose sizes number them."""
    numbered = torch.empty(*range(1, rank(node) + 1), device="meta")
    moved = torch.movedim(numbered, argument(node, 1, "source"), argument(node, 2, "destination"))
    return walk.parts(source_of(node), moved.shape[dim] - 1)


def attribute(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Follow the attributes that are transposed views: ``T``, ``mT``."""
    name = node.args[1]
    if name == "T":
        return walk.parts(source_of(node), rank(node) - 1 - dim)
    if name in ("mT", "mH"):
        return transpose_last(walk, node, dim)
    return walk.opaque(node, dim, Note.UNKNOWN_OP)


# ---------------------------------------------------------------------- indexing


def getitem(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Follow ``x[…]``: an output of a split, or an index into a tensor."""
    base, index = node.args
    if not is_tensor(base):
        return _output_of(walk, node, dim)
    return _index(walk, node, dim, index if isinstance(index, tuple) else (index,))


def _output_of(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """One output of ``split``, ``chunk`` or ``unbind``; of anything else nothing is known."""
    splitter, index = node.args
    if not isinstance(splitter, fx.Node) or not isinstance(index, int):
        return walk.opaque(node, dim, Note.UNKNOWN_OP)
    if op_name(splitter) in SPLITS:
        source = _split_source(splitter)
        parts = walk.parts(source, dim)
        if argument(splitter, 2, "dim", 0) % rank(source) != dim:
            return parts
        outputs = [length_of(output.shape[dim]) for output in value_of(splitter)]
        start = sum(outputs[:index], static_length(0))
        return take(parts, start, start + outputs[index])
    if op_name(splitter) == "unbind":
        source = _split_source(splitter)
        return walk.parts(source, _behind(dim, argument(splitter, 1, "dim", 0) % rank(source)))
    return walk.opaque(node, dim, Note.UNKNOWN_OP)


def _split_source(splitter: fx.Node) -> fx.Node:
    source = argument(splitter, 0, "tensor")
    return source if isinstance(source, fx.Node) else source_of(splitter)


def _behind(dim: int, removed: int) -> int:
    """The axis of the source, where the axis ``removed`` is missing in the result."""
    return dim + (dim >= removed)


def _index(walk: Walk, node: fx.Node, dim: int, index: tuple[Any, ...]) -> Parts:
    base = _indexed(node)
    entries = _without_ellipsis(index, rank(base))
    picked = [place for place, entry in enumerate(entries) if _is_gather(entry)]
    if picked:
        plain_before = all(isinstance(entry, slice) for entry in entries[: dim + 1])
        if dim < picked[0] and plain_before and entries[dim] == slice(None):
            return walk.parts(base, dim)
        return walk.opaque(node, dim, Note.GATHERED)
    in_dim = out_dim = 0
    for entry in entries:
        if entry is None or isinstance(entry, slice):
            if out_dim == dim:
                return [part(static_length(1))] if entry is None else _slice(walk, node, base, in_dim, entry)
            out_dim += 1
        in_dim += entry is not None
    return walk.opaque(node, dim, Note.UNKNOWN_OP)


def _indexed(node: fx.Node) -> fx.Node:
    """The tensor that is indexed."""
    base = node.args[0]
    assert isinstance(base, fx.Node), "the base of a traced index is a node"
    return base


def _is_gather(entry: Any) -> bool:
    return isinstance(entry, list | tuple) or is_tensor(entry)


def _without_ellipsis(index: tuple[Any, ...], dims: int) -> list[Any]:
    """The index with one entry per axis: ``...`` and what is missing at the end written out."""
    used = sum(_consumed(entry) for entry in index if entry is not None and entry is not Ellipsis)
    full = [slice(None)] * (dims - used)
    for place, entry in enumerate(index):
        if entry is Ellipsis:
            return [*index[:place], *full, *index[place + 1 :]]
    return [*index, *full]


def _consumed(entry: Any) -> int:
    """How many axes an entry indexes: a boolean mask as many as it has."""
    boolean = is_tensor(entry) and value_of(entry).dtype in (torch.bool, torch.uint8)
    return rank(entry) if boolean else 1


def _slice(walk: Walk, node: fx.Node, base: fx.Node, dim: int, entry: slice) -> Parts:
    parts = walk.parts(base, dim)
    step = 1 if entry.step is None else length_of(entry.step).hint
    size = length(base, dim)
    start = _bound(entry.start, static_length(0), size)
    stop = _bound(entry.stop, size, size)
    if step == 1:
        return take(parts, start, stop)
    cut = take(parts, start, stop)
    thinned = len(cut) == 1 and not cut[0].reordered
    kept = Length(len(range(start.hint, stop.hint, step)), None)
    return [part(kept, cut[0].origins, Note.THINNED)] if thinned else walk.opaque(node, dim, Note.INTERLEAVED)


def _bound(given: Any, default: Length, size: Length) -> Length:
    """The bound of a slice as a position, clamped as Python does."""
    if given is None:
        return default
    position = length_of(given)
    if position.hint < 0:
        position = position + size
    if position.hint < 0:
        return static_length(0)
    if position.hint > size.hint:
        return size if position.static and size.static else size.inexact
    return position


def narrow(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Follow ``narrow(x, dim, start, length)``."""
    parts = walk.parts(source_of(node), dim)
    if argument(node, 1, "dim") % rank(node) != dim:
        return parts
    start = _bound(argument(node, 2, "start"), static_length(0), length(source_of(node), dim))
    return take(parts, start, start + length(node, dim))


def select(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Follow ``select``, which removes an axis."""
    return walk.parts(source_of(node), _behind(dim, argument(node, 1, "dim") % (rank(node) + 1)))


# ---------------------------------------------------------------------- copies along an axis


def expand(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Follow ``expand``; an axis that grew from 1 repeats one position."""
    source = source_of(node)
    axis = dim - (rank(node) - rank(source))
    if axis < 0 or sizes(source)[axis] != sizes(node)[dim]:
        return [part(length(node, dim), note=Note.GENERATED)]
    return walk.parts(source, axis)


def repeat(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Follow ``repeat``: the list n times, or one generated part where one position is repeated."""
    source = source_of(node)
    axis = dim - (rank(node) - rank(source))
    if axis < 0 or sizes(source)[axis] <= 1 < sizes(node)[dim]:
        return [part(length(node, dim), note=Note.GENERATED)]
    return walk.parts(source, axis) * (sizes(node)[dim] // sizes(source)[axis])


def repeat_interleave(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Follow ``repeat_interleave`` on another axis."""
    along = argument(node, 2, "dim")
    if isinstance(along, int) and along % rank(node) != dim:
        return walk.parts(source_of(node), dim)
    return walk.opaque(node, dim, Note.INTERLEAVED)


VIEW_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"), reshape),
    **dict.fromkeys(("_unsafe_view", "view_as", "reshape_as"), reshape),
    "permute": permute,
    **dict.fromkeys(("transpose", "transpose_", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys(("t", "adjoint"), transpose_last),
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    "getattr": attribute,
    **dict.fromkeys(("getitem", "__getitem__"), getitem),
    "narrow": narrow,
    "select": select,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    **dict.fromkeys(("repeat", "tile"), repeat),
    "repeat_interleave": repeat_interleave,
}
