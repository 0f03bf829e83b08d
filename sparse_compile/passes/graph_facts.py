"""Facts about FX nodes of a Dynamo graph, read without adding a guard.

Comparing symbolic sizes, or asking a fake tensor whether it is contiguous, would tie the graph to the answer.
Everything here reads expressions and the numbers that are already known for them.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]  # has no stubs
import torch
from torch import fx

FIRST_STAND_IN = 168
"""Sizes that depend on data get primes from the 168th (997) on."""


@dataclass(frozen=True)
class Length:
    """A size: a number to reason with, and the expression that holds for other sizes too (None: unknown)."""

    hint: int
    exact: sympy.Expr | None

    def __add__(self, other: Length) -> Length:
        return self._combined(other, operator.add)

    def __sub__(self, other: Length) -> Length:
        return self._combined(other, operator.sub)

    def __mul__(self, other: Length) -> Length:
        return self._combined(other, operator.mul)

    def _combined(self, other: Length, operation: Callable[[Any, Any], Any]) -> Length:
        exact = None
        if self.exact is not None and other.exact is not None:
            exact = operation(self.exact, other.exact)
        return Length(operation(self.hint, other.hint), exact)

    @property
    def static(self) -> bool:
        """Whether it is the same number in every call of the graph."""
        return self.exact is not None and bool(self.exact.is_Integer)

    @property
    def inexact(self) -> Length:
        """The same number with nothing said about other sizes."""
        return Length(self.hint, None)

    def always_equals(self, other: Length) -> bool:
        """Whether both are the same for all sizes, as far as algebra shows."""
        if self.hint != other.hint or self.exact is None or other.exact is None:
            return False
        return self.exact == other.exact or bool(sympy.expand(self.exact - other.exact) == 0)


def static_length(size: int) -> Length:
    """The Length of a number."""
    return Length(size, sympy.Integer(size))


def length_of(size: Any) -> Length:
    """The Length of an int, a SymInt, or a node that computes one."""
    size = value_of(size)
    if isinstance(size, int):
        return static_length(size)
    return Length(hint(size), size.node.expr)


def hint(size: int | torch.SymInt) -> int:
    """A number for a size, never a guard.

    A symbol whose value depends on data has no number yet. It gets a prime of its own, so that sums and
    products of sizes can still be told apart.
    """
    if isinstance(size, int):
        return size
    expression, shape_env = size.node.expr, size.node.shape_env
    renamed = hasattr(shape_env, "backed_var_to_val")  # torch 2.12 and later
    known = shape_env.backed_var_to_val if renamed else shape_env.var_to_val
    numbers = {symbol: known.get(symbol, _stand_in(symbol)) for symbol in expression.free_symbols}
    return int(expression.xreplace(numbers))


def _stand_in(symbol: sympy.Symbol) -> sympy.Integer:
    digits = re.sub(r"\D", "", str(symbol))
    return sympy.Integer(sympy.prime(FIRST_STAND_IN + int(digits or 0)))


def value_of(node: Any) -> Any:
    """The example value of a node; anything else is its own value."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def constant(argument: Any) -> Any:
    """A setting of a call as a plain value, or None where it can differ from call to call.

    With ``dynamic=True`` a number may be a node. Where tracing needed its value, its
    expression has become a constant.
    """
    value = value_of(argument)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        expression = value.node.expr
        return float(expression) if getattr(expression, "is_number", False) else None
    return value


def is_tensor(node: Any) -> bool:
    """Whether this is a node that computes one tensor."""
    return isinstance(node, fx.Node) and isinstance(value_of(node), torch.Tensor)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors a node reads, in the order of its arguments."""
    return [source for source in node.all_input_nodes if is_tensor(source)]


def sizes(node: fx.Node) -> tuple[int, ...]:
    """The sizes of a tensor node, as hints."""
    return tuple(hint(size) for size in value_of(node).shape)


def strides(node: fx.Node) -> tuple[int, ...]:
    """The strides of a tensor node, as hints."""
    return tuple(hint(stride) for stride in value_of(node).stride())


def length(node: fx.Node, dim: int) -> Length:
    """One size of a tensor node."""
    return length_of(value_of(node).shape[dim])


def rank(node: fx.Node) -> int:
    """The number of dimensions of a tensor node."""
    return len(value_of(node).shape)


def op_name(node: fx.Node) -> str:
    """What a node calls (``cat``, ``view``), or its kind where it calls nothing."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return node.op


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call, whether it was given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
