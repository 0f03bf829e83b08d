"""Put a strategy's ops in the place of attention. The only pass that edits a graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparse_compile.call_log import log_spec
from sparse_compile.config import Config
from sparse_compile.phases import Phase
from sparse_compile.plan import TensorSpec
from sparse_compile.sites import MaskForm, Site, TokenLayout
from sparse_compile.strategies.base import Planner, Side

LOG = "log"

MarkState = Callable[[fx.Node, torch.Tensor], None]
"""Makes a new placeholder acceptable to the code generator, given its example value."""


@dataclass(frozen=True)
class StateInput:
    """The state inputs of one rewritten site, in the order of their placeholders; the log comes last."""

    site: Site
    specs: tuple[TensorSpec, ...]
    examples: tuple[torch.Tensor, ...]
    logged: bool
    """Whether its ops write a row of the call log."""


@dataclass(frozen=True)
class PassResult:
    """What the pass did: how many sites it rewrote, why it left others, and the inputs it added."""

    changed: int
    notes: tuple[str, ...] = ()
    states: tuple[StateInput, ...] = ()


def insert_sparse_attention(
    graph_module: fx.GraphModule,
    sites: Sequence[Site],
    planner: Planner,
    phase: Phase,
    kernel: str,
    fake_mode: AbstractContextManager[Any],
    mark_state: MarkState,
) -> PassResult:
    """Replace each sparse site by the ops of its phase, fed by new placeholders for its state.

    Before:
        out = scaled_dot_product_attention(query, key, value)
    After (SVG2, sparse):
        q_centroids, k_centroids, ready, log: new placeholders behind the others
        order, offsets, means, … = sparse_compile.kmeans(query, key, …, q_centroids, k_centroids, ready, …)
        keep = sparse_compile.plan_top_p(means, …)
        out, lse = sparse_compile.block_sparse_attention(query, key, value, order, offsets, …, keep, log, …)

    Left alone: sites decided dense, and sites whose node is no longer in the graph (a second run changes nothing).
    The ops stand where the attention stood, never earlier: a rotary embedding may write to q and k in place.

    Args:
        graph_module: a graph that may be edited (a copy of Dynamo's).
        sites: its classified sites.
        planner: the strategy and options.
        phase: which of the strategy's graphs to write; never `Phase.DENSE`.
        kernel: which implementation the ops use.
        fake_mode: where to make the example values of the new placeholders.
        mark_state: see `MarkState`.
    """
    graph = graph_module.graph
    present = set(graph.nodes)
    states, notes = [], []
    for site in sites:
        if site.node not in present:
            notes.append(f"{site.name}: rewritten before")
            continue
        if not site.sparse:
            notes.append(f"{site.name}: dense")
            continue
        specs = dict(planner.strategy.state(site, planner.config))
        specs[LOG] = log_spec(site.device, site.query.meta["example_value"].shape[1])
        inputs, examples = _add_placeholders(graph, specs, fake_mode, mark_state)
        builder = SiteBuilder(graph, site, inputs, planner.config, kernel)
        with graph.inserting_before(site.node):
            out = planner.strategy.write(builder, site, phase)
        out.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(out)
        graph.erase_node(site.node)
        states.append(StateInput(site, tuple(specs.values()), examples, bool(inputs[LOG].users)))
    if states:
        graph.lint()
        graph_module.recompile()
    return PassResult(len(states), tuple(notes), tuple(states))


def _add_placeholders(
    graph: fx.Graph, specs: Mapping[str, TensorSpec], fake_mode: AbstractContextManager[Any], mark_state: MarkState
) -> tuple[dict[str, fx.Node], tuple[torch.Tensor, ...]]:
    """One placeholder per state tensor, behind all others."""
    inputs, examples = {}, []
    last = graph.find_nodes(op="placeholder")[-1]
    number = len(graph.find_nodes(op="placeholder"))
    for name, spec in specs.items():
        with graph.inserting_after(last):
            last = graph.placeholder(f"sparse_attn_{number}_{name}")  # a target must be unique
        with fake_mode:
            example = torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
        mark_state(last, example)
        inputs[name] = last
        examples.append(example)
    return inputs, tuple(examples)


@dataclass
class SiteBuilder:
    """The `GraphBuilder` of one site: adds nodes in front of the attention it replaces."""

    graph: fx.Graph
    site: Site
    inputs: Mapping[str, fx.Node]
    config: Config
    kernel: str
    _valid: fx.Node | None = field(default=None, init=False)

    @functools.cached_property
    def query(self) -> fx.Node:
        """The node of the query, [B, H, Sq, D]."""
        return self._in_site_dtype(self.site.query)

    @functools.cached_property
    def key(self) -> fx.Node:
        """The node of the key, [B, Hkv, Sk, D]."""
        return self._in_site_dtype(self.site.key)

    @functools.cached_property
    def value(self) -> fx.Node:
        """The node of the value, [B, Hkv, Sk, Dv]."""
        return self._in_site_dtype(self.site.value)

    @property
    def scale(self) -> float:
        """The softmax scale."""
        given = self.site.scale
        return float(self.site.query_sizes[-1] ** -0.5) if given is None else given

    def state(self, name: str) -> fx.Node:
        """The placeholder of a state tensor."""
        return self.inputs[name]

    def log(self) -> fx.Node:
        """The placeholder of the call log."""
        return self.inputs[LOG]

    def valid(self, side: Side) -> fx.Node | None:
        """Which tokens are no padding. A mask speaks of keys; queries that are other tokens than those have none."""
        if self.site.mask is None or (side == "query" and not self._same_tokens()):
            return None
        if self._valid is None:
            mask = self.site.mask
            if self.site.mask_form is MaskForm.OUTER:
                mask = self._with_meta(self.graph.call_method("diagonal", (mask, 0, -2, -1)))
                mask = self._with_meta(self.graph.call_method("unsqueeze", (mask, -2)))
            else:
                mask = self._one_row(mask)
            self._valid = self._with_meta(self.graph.call_method("flatten", (mask, 0, -2)))
        return self._valid

    def _one_row(self, mask: fx.Node) -> fx.Node:
        """A mask of keys as [B or 1, 1, 1, Sk] or [1, Sk]: expanded or not, with or without a batch."""
        shape = mask.meta["example_value"].shape
        if len(shape) == 1:
            return self._with_meta(self.graph.call_method("unsqueeze", (mask, 0)))
        for dim in (-2, -3)[: len(shape) - 1]:
            if isinstance(shape[dim], torch.SymInt) or shape[dim] != 1:
                mask = self._with_meta(self.graph.call_method("narrow", (mask, dim, 0, 1)))
        return mask

    def _same_tokens(self) -> bool:
        """Whether the queries are the tokens of the keys, and no part of them."""
        return self.site.query_sizes[-2] == self.site.key_sizes[-2]

    def padded_queries_attend(self) -> bool:
        """A key-padding mask hides keys only; an outer-product mask hides the queries too."""
        return self.site.mask_form is not MaskForm.OUTER

    def token_major(self) -> bool:
        """Whether SDPA's own result has the tokens outside of the heads in memory."""
        layout = self.site.output_strides
        return len(layout) == 4 and layout[1] < layout[2]

    def video_spans(self, side: Side) -> list[Any]:
        """Bounds of the visual tokens, as ints or as nodes that compute them."""
        layout = self.site.layout if side == "query" else self.site.key_layout
        node = self.site.query if side == "query" else self.site.key
        assert layout is not None, "classify_sites fills the layout"
        bounds: list[Any] = []
        for start, stop in layout.visual_runs():
            bounds += [self._bound(layout, start, node), self._bound(layout, stop, node)]
        return bounds

    def call(self, op: str, *arguments: Any) -> fx.Node:
        """Add an op: of ours, which learns the kernel choice, or of a plug-in's own namespace."""
        namespace, separator, name = op.partition("::")
        if separator:
            target = getattr(getattr(torch.ops, namespace), name).default
        else:
            target = getattr(torch.ops.sparse_compile, op).default
            arguments = (*arguments, self.kernel)
        return self._with_meta(self.graph.call_function(target, arguments))

    def attention(self) -> fx.Node:
        """Add the attention as it was."""
        return self._with_meta(self.graph.node_copy(self.site.node))

    def item(self, result: fx.Node, index: int) -> fx.Node:
        """Take one of several outputs."""
        return self._with_meta(self.graph.call_function(operator.getitem, (result, index)))

    def _in_site_dtype(self, operand: fx.Node) -> fx.Node:
        """What autocast does to the operands of SDPA and would not do to those of our ops."""
        if operand.meta["example_value"].dtype == self.site.dtype:
            return operand
        return self._with_meta(self.graph.call_method("to", (operand, self.site.dtype)))

    def _with_meta(self, node: fx.Node) -> fx.Node:
        old = self.site.node.meta
        node.meta.update({name: old[name] for name in ("stack_trace", "nn_module_stack") if name in old})
        return node

    def _bound(self, layout: TokenLayout, at: int, axis: fx.Node) -> Any:
        """The border in front of part ``at``: summed from the left, or taken from the axis' length at the right."""
        parts = layout.parts
        length = axis.meta["example_value"].shape[-2]
        if isinstance(length, int):
            return sum(part.length for part in parts[:at])
        left, right = [part.size for part in parts[:at]], [part.size for part in parts[at:]]
        if all(size is not None for size in left):
            return self._sum(left)
        return self._add(self._with_meta(self.graph.call_method("size", (axis, -2))), self._sum(right), operator.sub)

    def _sum(self, sizes: Sequence[int | tuple[fx.Node, int] | None]) -> Any:
        total: Any = sum(size for size in sizes if isinstance(size, int))
        for node, dim in (size for size in sizes if isinstance(size, tuple)):
            total = self._add(self._with_meta(self.graph.call_method("size", (node, dim))), total, operator.add)
        return total

    def _add(self, left: Any, right: Any, operation: Callable[[Any, Any], Any]) -> Any:
        if isinstance(right, int) and right == 0:
            return left
        return self._with_meta(self.graph.call_function(operation, (left, right)))
