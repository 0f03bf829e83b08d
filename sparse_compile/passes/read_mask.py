"""Tell what an attention mask is from its node and shape; its values are never read."""

from __future__ import annotations

import re
from math import prod

import torch
from torch import fx

from sparse_compile.passes.graph_facts import is_tensor, op_name, rank, sizes, strides, tensor_inputs, value_of
from sparse_compile.passes.token_parts import Note
from sparse_compile.passes.token_roles import Inputs
from sparse_compile.passes.token_views import VIEW_RULES
from sparse_compile.passes.trace_tokens import Memo, trace_tokens
from sparse_compile.sites import MaskForm, Site

CASTS = frozenset({"to", "bool", "contiguous", "type_as", "clone"})
SHAPE_ONLY = CASTS | {
    *("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"),
    *("expand", "expand_as", "repeat", "transpose", "permute", "t", "getitem", "__getitem__"),
}
PRODUCTS = frozenset({"and_", "__and__", "bitwise_and", "logical_and", "mul", "__mul__"})
WRITES = frozenset({"setitem", "__setitem__", "iand", "ior", "ixor", "iadd", "isub", "imul"})
IN_PLACE = re.compile(r"(?!(and|or|not|is)_$).*[^_]_")
"""Names of operations that write into their first operand: ``masked_fill_``, but not ``operator.and_``."""
DIMS, HEADS, QUERIES = 4, -3, -2


def mask_form(site: Site, inputs: Inputs, memo: Memo) -> MaskForm:
    """The form of a site's mask (docs/attention_sites.md, section 5).

    Key padding:
        bool [B or 1, 1, 1, Sk]
        bool [B or 1, H, Sq, Sk] that is the same for all heads and queries, because `expand` made it so
    Outer product:
        m: bool [B, S]; mask = m[:, None, None, :] & m[:, None, :, None]
    Left alone (`MaskForm.GENERAL`): all others, also a square mask that the graph does not prove a product, and a copy
    that is written to behind what its nodes say.
    """
    mask = site.mask
    if mask is None:
        return MaskForm.NONE
    shape = (1,) * (DIMS - rank(mask)) + sizes(mask)
    if len(shape) != DIMS or shape[-1] != site.key_sizes[-2]:
        return MaskForm.GENERAL
    batch, heads, queries, _ = shape
    if value_of(mask).dtype != torch.bool:
        return MaskForm.KEY_BIAS if queries == 1 else MaskForm.GENERAL
    if batch not in (1, site.query_sizes[0]):
        return MaskForm.GENERAL
    if all(shape[dim] == 1 or _is_repeated(mask, dim) for dim in (HEADS, QUERIES)):
        return MaskForm.KEY_PADDING
    if heads != 1:
        return MaskForm.GENERAL
    square = queries == shape[-1] == site.query_sizes[-2]
    return MaskForm.OUTER if square and _is_outer_product(mask, inputs, memo) else MaskForm.GENERAL


def _is_repeated(mask: fx.Node, dim: int) -> bool:
    """Whether a mask is one row that `expand` shows several times: the step along such an axis is 0."""
    *_, shown = _chain(mask, CASTS)
    return rank(shown) == rank(mask) >= -dim and strides(shown)[dim] == 0


def _is_outer_product(mask: fx.Node, inputs: Inputs, memo: Memo) -> bool:
    """Whether ``mask[b, 0, i, j]`` is ``m[b, i] and m[b, j]``: one tensor, along the rows and the columns."""
    *_, product = _chain(mask, CASTS)
    operands = tensor_inputs(product)
    if op_name(product) not in PRODUCTS or len(operands) != 2 or _writers(product):
        return False
    (*rows, base), (*columns, other) = (_chain(operand, SHAPE_ONLY) for operand in operands)
    tokens, batch = sizes(mask)[-1], prod(sizes(mask)[:-2])
    if other is not base or prod(sizes(base)) not in (tokens, tokens * batch):
        return False
    first_use = min([product, *rows, *columns])
    if any(writer > first_use for writer in _writers(base)):
        return False
    along = {tuple(_varies(operand, dim, inputs, memo) for dim in (-2, -1)) for operand in operands}
    return along == {(True, False), (False, True)}


def _chain(node: fx.Node, names: frozenset[str]) -> list[fx.Node]:
    """A tensor, and what lies below its casts, views and broadcasts that keep all elements; the lowest is last.

    One that is written in place holds other values than what lies below it.
    """
    chain = [node]
    while op_name(chain[-1]) in names and tensor_inputs(chain[-1]):
        if not _keeps_elements(chain[-1]) or _writers(chain[-1]):
            break
        chain.append(tensor_inputs(chain[-1])[0])
    return chain


def _writers(node: fx.Node) -> list[fx.Node]:
    """What writes into a tensor in place, or into a view of it."""
    writers = []
    for user in node.users:
        if user.kwargs.get("out") is node:
            writers.append(user)
        elif not user.args or user.args[0] is not node:
            continue
        elif op_name(user) in WRITES or IN_PLACE.fullmatch(op_name(user)):
            writers.append(user)
        elif op_name(user) in VIEW_RULES:
            writers += _writers(user)
    return writers


def _keeps_elements(node: fx.Node) -> bool:
    if op_name(node) not in ("getitem", "__getitem__"):
        return True
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(entry is None or entry is Ellipsis or entry == slice(None) for entry in index)


def _varies(operand: fx.Node, dim: int, inputs: Inputs, memo: Memo) -> bool:
    """Whether a mask differs along an axis, rather than being broadcast."""
    if rank(operand) < -dim or sizes(operand)[dim] == 1 or not is_tensor(operand):
        return False
    return any(p.note is not Note.GENERATED for p in trace_tokens(operand, dim, inputs, memo))
