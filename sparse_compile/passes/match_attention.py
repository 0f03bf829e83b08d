"""Find every attention of a graph: its operands, its sizes, and the Parameter that names its layer."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import fx

from sparse_compile.passes.graph_facts import argument, constant, is_tensor, op_name, rank, sizes, strides
from sparse_compile.passes.token_roles import Inputs
from sparse_compile.sites import Reason, Site

ATTENTION = F.scaled_dot_product_attention
ARGUMENTS: Mapping[str, Any] = {
    "query": None,
    "key": None,
    "value": None,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
"""The arguments of the attention in order, with their defaults."""

WEIGHT_ARGUMENT = {"linear": 1, "conv1d": 1, "conv2d": 1, "conv3d": 1, "addmm": 2}
"""Projections, and which of their arguments the weight is."""
WRAPPING = frozenset({"L", "self", "fn", "__dict__", "_modules"})
"""What the path of a module holds besides the names of modules."""
CATS = frozenset({"cat", "concat", "concatenate"})


def match_attention(graph_module: fx.GraphModule, inputs: Inputs) -> list[Site]:
    """Find the calls of ``scaled_dot_product_attention``, sub-graphs included.

    Matched, with any mix of positional and keyword arguments:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=False)
    Found as:
        Site(node=out, query=query, …, owner=<blocks.0.attn1.to_q.weight>, name="blocks.0.attn1")

    Left alone: every other spelling of attention (matmul and softmax, flex attention, methods of that name).

    Args:
        graph_module: Dynamo's graph; it is only read.
        inputs: what its placeholders are.
    """
    sites = [_site(node, inputs) for node in _attention_nodes(graph_module.graph)]
    for child in _sub_graphs(graph_module):
        sites += [replace(_site(node, {}), nested=True) for node in _attention_nodes(child.graph)]
    return _numbered(sites)


def _attention_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target is ATTENTION]


def _sub_graphs(graph_module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    for child in graph_module.children():
        if isinstance(child, fx.GraphModule):
            yield child
            yield from _sub_graphs(child)


def _site(node: fx.Node, inputs: Inputs) -> Site:
    given = {**ARGUMENTS, **dict(zip(ARGUMENTS, node.args, strict=False)), **node.kwargs}
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    owner = find_owner(query, inputs)
    modules = module_stack(node)
    site = Site(
        node=node,
        query=query,
        key=key,
        value=value,
        mask=mask,
        query_sizes=_sizes(query),
        key_sizes=_sizes(key),
        value_sizes=_sizes(value),
        output_strides=strides(node) if is_tensor(node) else (),
        owner=owner,
        name=_name(owner, modules, inputs),
        modules=modules,
    )
    settings = {name: given[name] for name in ("dropout_p", "is_causal", "scale", "enable_gqa")}
    known = {name: constant(setting) for name, setting in settings.items()}
    computed = [name for name in settings if known[name] is None and settings[name] is not None]
    if computed:
        return site.decided(Reason.ANALYSIS_FAILED, f"computed in the graph: {', '.join(computed)}")
    return replace(site, **known)


def _sizes(node: fx.Node) -> tuple[int, ...]:
    return sizes(node) if is_tensor(node) else ()


def _numbered(sites: list[Site]) -> list[Site]:
    """The sites, each with its ordinal among those of its owner."""
    seen: Counter[fx.Node] = Counter()
    numbered = []
    for site in sites:
        numbered.append(replace(site, ordinal=0 if site.owner is None else seen[site.owner]))
        if site.owner is not None:
            seen[site.owner] += 1
    return numbered


# ---------------------------------------------------------------------- owner and name


def find_owner(query: fx.Node, inputs: Inputs) -> fx.Node | None:
    """The Parameter that stands for the layer: the weight of the projection that made the query.

    Without a projection (a graph break before it): the nearest Parameter of two dimensions or more, else the
    nearest.
    """
    vector = matrix = None
    for node in _upstream(query):
        weight = _projection_weight(node, inputs)
        if weight is not None:
            return weight
        if _is_parameter(node, inputs):
            if rank(node) >= 2:
                matrix = matrix or node
            else:
                vector = vector or node
    return matrix or vector


def _upstream(start: fx.Node) -> Iterator[fx.Node]:
    """The nodes above one, breadth first; of joined tensors only the longest: the video, not the text."""
    seen, waiting = {start}, deque([start])
    while waiting:
        node = waiting.popleft()
        yield node
        sources = [_longest_operand(node)] if op_name(node) in CATS else node.all_input_nodes
        fresh = [source for source in sources if source not in seen]
        seen.update(fresh)
        waiting.extend(fresh)


def _longest_operand(cat: fx.Node) -> fx.Node:
    along = argument(cat, 1, "dim", cat.kwargs.get("axis", 0))
    operands = [operand for operand in argument(cat, 0, "tensors") if rank(operand) == rank(cat)]
    longest: fx.Node = max(operands, key=lambda operand: sizes(operand)[along])
    return longest


def _projection_weight(node: fx.Node, inputs: Inputs) -> fx.Node | None:
    """The Parameter behind the weight of a projection, also where it is cast or reshaped on the way."""
    index = WEIGHT_ARGUMENT.get(op_name(node))
    weight = None if index is None else argument(node, index, "mat2" if index == 2 else "weight")
    if not isinstance(weight, fx.Node):
        return None
    return next((above for above in _upstream(weight) if _is_parameter(above, inputs)), None)


def _is_parameter(node: fx.Node, inputs: Inputs) -> bool:
    known = inputs.get(node)
    return known is not None and known.is_parameter and is_tensor(node)


def _name(owner: fx.Node | None, modules: tuple[tuple[str, str], ...], inputs: Inputs) -> str:
    """``blocks.0.attn1`` from ``blocks.0.attn1.to_q.weight``; without an owner, the innermost module."""
    if owner is not None:
        path = inputs[owner].name.split(".")
        return ".".join(path[:-2] or path)
    return modules[-1][0] if modules else ""


def module_stack(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """(path, class name) of the modules whose forward made a node, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    kinds = ((path, kind if isinstance(kind, str) else kind.__name__) for path, kind in stack.values())
    return tuple((_dotted(path), kind.rpartition(".")[2]) for path, kind in kinds)


def _dotted(path: str) -> str:
    """``L['self'].__dict__['_modules']['blocks'].0.attn1`` as ``blocks.0.attn1``."""
    return ".".join(part for part in re.findall(r"\w+", path) if part not in WRAPPING)
