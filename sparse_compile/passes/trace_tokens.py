"""Find whose tokens lie where on a token axis, by walking it backwards through the graph."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import replace

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
    tensor_inputs,
)
from sparse_compile.passes.match_attention import ATTENTION
from sparse_compile.passes.token_parts import Note, Part, Parts, all_origins, part, tidy, total
from sparse_compile.passes.token_roles import VECTOR, Inputs, role_of_input, role_of_part
from sparse_compile.passes.token_views import VIEW_RULES, Rule, Walk, source_of
from sparse_compile.sites import VISUAL_ROLES, TokenLayout, TokenPart

Memo = MutableMapping[tuple[fx.Node, int], Parts]
"""The parts of every axis visited so far. Share it between the sites of one graph."""

MAX_DEPTH = 40
"""Nodes on the way before a walk is taken up again from its far end; each takes some frames of the stack."""


def trace_tokens(node: fx.Node, dim: int, inputs: Inputs, memo: Memo) -> Parts:
    """Which graph inputs the positions along one axis come from, in order.

    Before:
        x = cat([text, video.flatten(2).transpose(1, 2)], dim=1)
        q = linear(x).unflatten(2, (H, D)).transpose(1, 2)
    After:
        trace_tokens(q, -2, …) is [226: text, 17550: video with factors (13, 30, 45)]

    Left alone: what cannot be followed (a gather on the axis, an operation that changes its size) is one part
    with a note and with every input that the node depends on.

    Args:
        node: a node whose value is a tensor.
        dim: its axis; may be negative.
        inputs: what the placeholders are. Those that belong to the module are weights and leave no origin.
        memo: what earlier walks through this graph found.
    """
    return _TokenWalk(inputs, memo).start(node, dim)


def layout_of(node: fx.Node, inputs: Inputs, memo: Memo) -> TokenLayout:
    """The layout of the token axis (the last but one) of a query or key."""
    return TokenLayout(tuple(_token_part(p, inputs) for p in trace_tokens(node, -2, inputs, memo)))


def _token_part(p: Part, inputs: Inputs) -> TokenPart:
    role = role_of_part(p, inputs)
    grid = p.factors if role in VISUAL_ROLES and len(p.factors) > 1 else ()
    return TokenPart(role, p.length, _graph_size(p, inputs), grid)


def _graph_size(p: Part, inputs: Inputs) -> int | tuple[fx.Node, int] | None:
    """How a graph computes the length of a part: a number, or the size of an input that always equals it."""
    if p.size.static:
        return p.length
    own = sorted(p.origins, key=lambda node: node.name)
    for node in (*own, *(node for node in inputs if node not in p.origins)):
        for dim in range(rank(node)) if is_tensor(node) else ():
            if length(node, dim).always_equals(p.size):
                return node, dim
    return None


class _TooDeepError(Exception):
    """The walk has to be taken up again from this axis."""

    def __init__(self, node: fx.Node, dim: int) -> None:
        super().__init__(node.name, dim)
        self.axis = (node, dim)


class _TokenWalk:
    """One walk. Every axis is visited once, and no chain of nodes is too long for Python's stack."""

    def __init__(self, inputs: Inputs, memo: Memo) -> None:
        self._inputs = inputs
        self._memo = memo
        self._depth = 0

    def start(self, node: fx.Node, dim: int) -> Parts:
        """The parts of the axis that was asked for; where the walk gets too deep, its far end comes first."""
        waiting = [(node, dim)]
        while True:
            try:
                parts = self.parts(*waiting[-1])
            except _TooDeepError as too_deep:
                waiting.append(too_deep.axis)
                continue
            waiting.pop()
            if not waiting:
                return parts

    def parts(self, node: fx.Node, dim: int) -> Parts:
        """The parts of an axis on the way."""
        dim %= max(rank(node), 1)
        key = (node, dim)
        if key not in self._memo:
            if self._depth >= MAX_DEPTH:
                raise _TooDeepError(node, dim)
            self._depth += 1
            try:
                self._memo[key] = self._checked(node, dim)
            finally:
                self._depth -= 1
        return self._memo[key]

    def opaque(self, node: fx.Node, dim: int, note: Note) -> Parts:
        """One part that may hold anything the node depends on."""
        return [part(length(node, dim), self._ancestors(node), note)]

    def _checked(self, node: fx.Node, dim: int) -> Parts:
        """The parts, if they add up to the size of the axis."""
        parts = tidy(self._step(node, dim))
        size = length(node, dim)
        if total(parts).hint != size.hint:
            return self.opaque(node, dim, Note.UNKNOWN_OP)
        if len(parts) == 1 and not parts[0].size.static:
            return [_resized(parts[0], size)]
        return parts

    def _step(self, node: fx.Node, dim: int) -> Parts:
        if node.op == "placeholder":
            return self._input(node, dim)
        if node.op == "get_attr":
            return [part(length(node, dim))]
        rule = ATTENTION_RULE if node.target is ATTENTION else RULES.get(op_name(node))
        if rule is not None:
            return rule(self, node, dim)
        written = _written_values(node)
        if written and op_name(node) in BLANK_TENSORS:
            origins = frozenset().union(*(self._ancestors(value) for value in written))
            return [part(length(node, dim), origins, Note.GATHERED)]
        if op_name(node) in BLANK_TENSORS or not tensor_inputs(node):
            return [part(length(node, dim), note=Note.GENERATED)]
        return self._element_wise(node, dim)

    def _input(self, node: fx.Node, dim: int) -> Parts:
        known = self._inputs.get(node)
        if known is not None and known.owned:
            return [part(length(node, dim))]
        size = length(node, dim)
        return [Part(size, frozenset([node]), (size.hint,), ((node, dim),))]

    def _element_wise(self, node: fx.Node, dim: int) -> Parts:
        """Operations on equal or broadcast shapes, and every operation without a rule of its own."""
        shape, found = sizes(node), []
        for operand in tensor_inputs(node):
            axis = dim - (len(shape) - rank(operand))
            if axis >= 0 and sizes(operand)[axis] == shape[dim] and _broadcasts(sizes(operand), shape):
                found.append(self.parts(operand, axis))
        return self.most_telling(found) if found else self.opaque(node, dim, Note.UNKNOWN_OP)

    def most_telling(self, candidates: Sequence[Parts]) -> Parts:
        """Of several descriptions of one axis the one that says most; the first of equals."""

        def rank_of(parts: Parts) -> tuple[bool, bool, bool, bool, int, int]:
            roles = {role_of_input(origin, self._inputs) for origin in all_origins(parts)}
            return (
                bool(roles),
                bool(roles - {VECTOR}),
                all(p.note is not Note.UNKNOWN_OP for p in parts),
                bool(roles & VISUAL_ROLES),
                len(parts),
                sum(len(p.factors) for p in parts),
            )

        return max(candidates, key=rank_of)

    def _ancestors(self, node: fx.Node) -> frozenset[fx.Node]:
        """The tensors among the graph's arguments that a node depends on."""
        seen, found, waiting = {node}, set(), [node]
        while waiting:
            current = waiting.pop()
            known = self._inputs.get(current)
            if current.op == "placeholder" and is_tensor(current) and not (known is not None and known.owned):
                found.add(current)
            fresh = [source for source in current.all_input_nodes if source not in seen]
            seen.update(fresh)
            waiting.extend(fresh)
        return frozenset(found)


def _resized(p: Part, size: Length) -> Part:
    """A part that is the whole axis has the size of the axis."""
    return Part(size, p.origins, p.factors, p.axes, p.note, p.cut)


def _broadcasts(operand: Sequence[int], result: Sequence[int]) -> bool:
    return all(size in (1, full) for size, full in zip(reversed(operand), reversed(result), strict=False))


def _written_values(node: fx.Node) -> list[fx.Node]:
    """What is written into a tensor by ``x[…] = value``."""
    written = [user.args[2] for user in node.users if op_name(user) in WRITES and user.args[0] is node]
    return [value for value in written if isinstance(value, fx.Node)]


# ---------------------------------------------------------------------- rules


def _attention(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """The tokens of the query, the channels of the value: so a split travels along the residual stream."""
    channels = dim == rank(node) - 1
    source = argument(node, 2, "value") if channels else argument(node, 0, "query")
    return walk.parts(source, dim)


def _cat(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Operands one after the other, or side by side."""
    tensors = [t for t in argument(node, 0, "tensors") if rank(t) == rank(node)]
    along = argument(node, 1, "dim", node.kwargs.get("axis", 0)) % rank(node)
    lists = [walk.parts(t, dim) for t in tensors]
    return [p for parts in lists for p in parts] if along == dim else walk.most_telling(lists)


def _stack(walk: Walk, node: fx.Node, dim: int) -> Parts:
    along = argument(node, 1, "dim", 0) % rank(node)
    if along == dim:
        return walk.opaque(node, dim, Note.INTERLEAVED)
    return walk.most_telling([walk.parts(t, dim - (dim > along)) for t in argument(node, 0, "tensors")])


def _same_axis(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Norms, activations, casts, copies: each position comes from the same one of the first operand."""
    source = argument(node, 0, "input")
    if not is_tensor(source) or sizes(source) != sizes(node):
        return walk.opaque(node, dim, Note.UNKNOWN_OP)
    return walk.parts(source, dim)


def _as_complex(walk: Walk, node: fx.Node, dim: int) -> Parts:
    return walk.parts(source_of(node), dim)


def _as_real(walk: Walk, node: fx.Node, dim: int) -> Parts:
    return [part(static_length(2))] if dim == rank(node) - 1 else walk.parts(source_of(node), dim)


def _linear(walk: Walk, node: fx.Node, dim: int) -> Parts:
    return [part(length(node, dim))] if dim == rank(node) - 1 else walk.parts(source_of(node), dim)


def _matmul(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Columns from the right operand, everything else from the left."""
    left, right = tensor_inputs(node)[-2:] if len(tensor_inputs(node)) > 1 else tensor_inputs(node) * 2
    source = right if dim == rank(node) - 1 else left
    axis = dim - (rank(node) - rank(source))
    return walk.parts(source, axis) if axis >= 0 else walk.opaque(node, dim, Note.UNKNOWN_OP)


def _einsum(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Each axis of the result comes from those of the operands that have its letter."""
    operands = tensor_inputs(node)
    read, _, written = str(node.args[0]).replace(" ", "").partition("->")
    terms = read.split(",")
    if not written or "." in read or len(terms) != len(operands):
        return walk.opaque(node, dim, Note.UNKNOWN_OP)
    letter = written[dim]
    found = [walk.parts(x, term.index(letter)) for x, term in zip(operands, terms, strict=True) if letter in term]
    return walk.most_telling(found)


def _convolution(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """The batch as it was, new channels, and spatial axes that keep what they came from at their new size."""
    if dim == 1:
        return [part(length(node, dim))]
    parts = walk.parts(source_of(node), dim)
    if dim == 0:
        return parts
    old, new = total(parts).hint, length(node, dim).hint
    if len(parts) > 1 and all(p.length * new % old == 0 for p in parts):
        scaled = [(p, p.length * new // old) for p in parts]
        return [Part(Length(size, None), p.origins, (size,), p.axes, p.note) for p, size in scaled]
    return [Part(length(node, dim), all_origins(parts), (new,), parts[0].axes)]


def _pad(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Generated positions on either side; the amounts come in pairs, last axis first."""
    amounts = argument(node, 1, "pad")
    pair = 2 * (rank(node) - 1 - dim)
    inner = walk.parts(source_of(node), dim)
    if pair >= len(amounts):
        return inner
    before, behind = length_of(amounts[pair]), length_of(amounts[pair + 1])
    if before.hint < 0 or behind.hint < 0:
        return walk.opaque(node, dim, Note.UNKNOWN_OP)
    return [part(before, note=Note.GENERATED), *inner, part(behind, note=Note.GENERATED)]


def _reduction(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Sums and means over other axes."""
    source, over = source_of(node), argument(node, 1, "dim")
    if not isinstance(over, int | tuple | list):
        return walk.opaque(node, dim, Note.UNKNOWN_OP)
    reduced = {axis % rank(source) for axis in ([over] if isinstance(over, int) else over)}
    if rank(node) == rank(source):
        return walk.opaque(node, dim, Note.UNKNOWN_OP) if dim in reduced else walk.parts(source, dim)
    kept = [axis for axis in range(rank(source)) if axis not in reduced]
    return walk.parts(source, kept[dim])


def _pad_sequence(walk: Walk, node: fx.Node, dim: int) -> Parts:
    """Sequences as rows of a batch: their tokens, if all have parts of the same lengths, and padding behind."""
    sequences = argument(node, 0, "sequences")
    along = int(argument(node, 1, "batch_first", False))
    if dim > 1:
        return walk.parts(sequences[0], dim - 1)
    if dim != along:
        return [part(length(node, dim))]
    lists = [walk.parts(sequence, 0) for sequence in sequences]
    alike = len({tuple(p.length for p in parts) for parts in lists}) == 1
    if not alike or argument(node, 3, "padding_side", "right") != "right":
        return walk.opaque(node, dim, Note.GATHERED)
    rest = length(node, dim) - total(lists[0])
    joined = [replace(row[0], origins=all_origins(row), cut=None) for row in zip(*lists, strict=True)]
    return [*joined, part(rest, note=Note.GENERATED)]


def _reordering(walk: Walk, node: fx.Node, dim: int) -> Parts:
    return walk.opaque(node, dim, Note.GATHERED)


ATTENTION_RULE: Rule = _attention
SAME_AXIS = (
    *("layer_norm", "rms_norm", "fused_rms_norm", "group_norm", "instance_norm", "normalize"),
    *("silu", "gelu", "relu", "tanh", "sigmoid", "softmax", "dropout", "exp", "neg", "rsqrt", "cos", "sin"),
    *(
        "contiguous",
        "to",
        "type",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "double",
        "clone",
        "detach",
        "alias",
    ),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "requires_grad_"),
    *("masked_fill", "masked_fill_", "nan_to_num", "clamp", "cumsum"),
)
REORDERINGS = (
    *(
        "masked_scatter",
        "index_copy",
        "index_put",
        "index_add",
        "index_select",
        "scatter",
        "scatter_add",
        "gather",
    ),
    *("sort", "argsort", "roll", "flip"),
)
BLANK_TENSORS = frozenset(
    {"zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
)
"""What makes a tensor without reading another; indexed writes may fill it later."""
WRITES = frozenset({"setitem", "__setitem__"})


def _rules() -> dict[str, Rule]:
    rules: dict[str, Rule] = dict(VIEW_RULES)
    rules.update(dict.fromkeys(SAME_AXIS, _same_axis))
    rules.update(dict.fromkeys(REORDERINGS, _reordering))
    rules.update(dict.fromkeys(("matmul", "bmm", "mm", "baddbmm"), _matmul))
    rules.update(dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution))
    rules.update(dict.fromkeys(("sum", "mean", "amax", "amin", "max", "min"), _reduction))
    rules.update(dict.fromkeys(("cat", "concat", "concatenate"), _cat))
    rules.update(
        stack=_stack,
        linear=_linear,
        einsum=_einsum,
        pad=_pad,
        pad_sequence=_pad_sequence,
        view_as_complex=_as_complex,
        view_as_real=_as_real,
    )
    return rules


RULES = _rules()
