"""Run a strategy on tensors: its `write` with ops that compute at once, where the compiler's add nodes to a graph.

Every option a method has is so honoured, without a word about it here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import sparse_compile.ops  # noqa: F401  # registers torch.ops.sparse_compile
from sparse_compile.call_log import log_spec
from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.phases import Phase
from sparse_compile.plan import Plan, TensorSpec
from sparse_compile.sites import Site, TokenLayout, TokenPart
from sparse_compile.strategies.base import Side, Strategy

ATTENTION = "block_sparse_attention"
PLAN_ARGUMENTS = slice(3, 8)
"""Where the op takes the fields of the Plan, behind q, k and v."""


@dataclass(frozen=True)
class SparseCall:
    """One sparse attention call: the Plan it attended by, and its output [B, H, S, Dv]."""

    plan: Plan
    output: Tensor


class EagerAttention:
    """One layer under one method: q, k and v of one call after another, and the state in between.

    All tokens are video; there is no mask.

    Args:
        strategy: the method.
        config: its options.
        kernel: which implementation the ops use.
    """

    def __init__(self, strategy: Strategy, config: Config, kernel: str = "reference") -> None:
        self._strategy = strategy
        self._config = config
        self._kernel = kernel
        self._state: dict[str, Tensor] = {}

    def searched(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> SparseCall:
        """Forget the state, make a Plan from these tensors, and attend by it.

        Raises:
            SparseAttentionError: the method attends by no Plan of ours.
        """
        self._state = {}
        call = self.call(Phase.SEARCH, q, k, v, scale) if Phase.SEARCH in self._strategy.phases else None
        call = call or self.call(Phase.SPARSE, q, k, v, scale)  # AdaSpa's search attends densely
        if call is None:
            raise SparseAttentionError(
                f"a method must call {ATTENTION} in its sparse calls",
                self._strategy.name,
                "Figures of single calls exist for such methods only.",
            )
        return call

    def call(self, phase: Phase, q: Tensor, k: Tensor, v: Tensor, scale: float) -> SparseCall | None:
        """One call in some phase; None where it attended densely."""
        site = _site(q, k, v, scale)
        specs = dict(self._strategy.state(site, self._config))
        specs["log"] = log_spec(q.device, q.shape[1])
        for name, spec in specs.items():
            if name not in self._state:
                self._state[name] = _zeros(spec)
        build = _EagerBuilder(q, k, v, scale, self._config, self._state, self._kernel)
        with torch.no_grad():
            output: Any = self._strategy.write(build, site, phase)
        return None if build.plan is None else SparseCall(build.plan, output)


@dataclass
class _EagerBuilder:
    """A `GraphBuilder` whose nodes are tensors."""

    query: Any
    key: Any
    value: Any
    scale: float
    config: Config
    tensors: dict[str, Tensor]
    kernel: str
    plan: Plan | None = field(default=None, init=False)

    def state(self, name: str) -> Any:
        return self.tensors[name]

    def log(self) -> Any:
        return self.tensors["log"]

    def video_spans(self, side: Side) -> list[Any]:
        return [0, (self.query if side == "query" else self.key).shape[2]]

    def valid(self, side: Side) -> Any:
        return None

    def padded_queries_attend(self) -> bool:
        return True

    def token_major(self) -> bool:
        return False

    def call(self, op: str, *arguments: Any) -> Any:
        namespace, separator, name = op.partition("::")
        if separator:
            return getattr(getattr(torch.ops, namespace), name).default(*arguments)
        if op == ATTENTION:
            fields: list[Any] = [None if x is None else x.clone() for x in arguments[PLAN_ARGUMENTS]]
            self.plan = Plan(*fields)
        return getattr(torch.ops.sparse_compile, op).default(*arguments, self.kernel)

    def attention(self) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(self.query, self.key, self.value, scale=self.scale)

    def item(self, result: Any, index: int) -> Any:
        return result[index]


def _site(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Site:
    """An attention over video tokens alone, as the compiler would describe it."""
    graph = fx.Graph()
    nodes = []
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        node = graph.placeholder(name)
        node.meta["example_value"] = tensor
        nodes.append(node)
    attention = graph.call_function(torch.nn.functional.scaled_dot_product_attention, tuple(nodes))
    attention.meta["example_value"] = v.new_empty((*q.shape[:3], v.shape[3]))
    layouts = [TokenLayout((TokenPart("video", x.shape[2], x.shape[2]),)) for x in (q, k)]
    return Site(
        node=attention,
        query=nodes[0],
        key=nodes[1],
        value=nodes[2],
        scale=scale,
        query_sizes=tuple(q.shape),
        key_sizes=tuple(k.shape),
        value_sizes=tuple(v.shape),
        layout=layouts[0],
        key_layout=layouts[1],
        role="video",
    )


def _zeros(spec: TensorSpec) -> Tensor:
    return torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device)
