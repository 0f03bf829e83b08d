"""What a sparse-attention method is to the compiler.

A method is one class that satisfies `Strategy`. It says which phases it has, which phase a call is in, which tensors it
keeps between calls, and which ops stand in for the attention; it touches neither FX nor kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch.fx import Node

    from sparse_compile.config import Config
    from sparse_compile.phases import Moment, Phase
    from sparse_compile.plan import TensorSpec
    from sparse_compile.sites import Reason, Site

Side = Literal["query", "key"]


class GraphBuilder(Protocol):
    """Writes one site: gives its tensors by name and adds ops of ``torch.ops.sparse_compile``."""

    @property
    def query(self) -> Node:
        """The node of the query, [B, H, Sq, D]."""

    @property
    def key(self) -> Node:
        """The node of the key, [B, Hkv, Sk, D]."""

    @property
    def value(self) -> Node:
        """The node of the value, [B, Hkv, Sk, Dv]."""

    @property
    def config(self) -> Config:
        """The options of the compilation."""

    @property
    def scale(self) -> float:
        """The softmax scale: 1 / sqrt(D) where the call gave none."""

    def state(self, name: str) -> Node:
        """The state tensor that `Strategy.state` declared under this name."""

    def log(self) -> Node:
        """The call log of this layer and branch, the argument ``log`` of each sparse attention op."""

    def video_spans(self, side: Side) -> list[Any]:
        """Bounds [start, stop, start, stop, …] of the visual tokens: ints, or nodes where sizes are symbolic."""

    def valid(self, side: Side) -> Node | None:
        """Bool [B or 1, S]: False where the token is padding; None where no mask was given."""

    def padded_queries_attend(self) -> bool:
        """Whether padding queries attend to the valid keys (key-padding mask) or give 0 (outer product)."""

    def token_major(self) -> bool:
        """Whether the dense attention laid its output out as [B, S, H, D] in memory; the ops do the same."""

    def call(self, op: str, *arguments: Any) -> Node:
        """Add ``torch.ops.sparse_compile.<op>``, with the kernel choice as last argument.

        ``namespace::op`` adds an op of a plug-in's own, with the arguments as they are.
        """

    def attention(self) -> Node:
        """Add the attention as it was."""

    def item(self, result: Node, index: int) -> Node:
        """Output ``index`` of an op with several outputs."""


@runtime_checkable
class Strategy(Protocol):
    """A sparse-attention method. Instances hold no state: one serves all models of the process."""

    @property
    def name(self) -> str:
        """The value of the option ``method`` that selects it."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases its layers can be in."""

    def phase(self, moment: Moment, searched: int | None, config: Config) -> Phase:
        """The phase of a layer's call.

        Args:
            moment: the step of the call, and of how many.
            searched: the step of this layer and branch's last search that returned; None: never, so it must not
                be sparse.
            config: the options of the compilation.
        """

    def state(self, site: Site, config: Config) -> Mapping[str, TensorSpec]:
        """The tensors one layer keeps per branch. They start as zeros, and are zeroed for each generation.

        Sizes may be built from the symbolic sizes in ``site.query.meta["example_value"].shape``.
        """

    def unsupported_reason(self, site: Site, config: Config) -> Reason | None:
        """Why this method leaves the site dense, or None."""

    def write(self, build: GraphBuilder, site: Site, phase: Phase) -> Node:
        """Write the ops of ``phase`` (never `Phase.DENSE`) and return the node of the attention output."""


class Effort(NamedTuple):
    """What a sparse call of a method is expected to compute for one site, for a cost model.

    density: share of the pairs of query and key that are attended to.
    compared: pairs of a token and a group mean that are multiplied to make the plan, in one head.
    key_groups: key groups of a head; pooled keys stand for most of them.
    """

    density: float
    compared: int
    key_groups: int


@runtime_checkable
class ExpectsEffort(Protocol):
    """A Strategy that says beforehand what its sparse calls compute. One that does not is never found too slow."""

    def effort(self, site: Site, config: Config) -> Effort:
        """Of the site's sparse calls, from sizes and options alone; ``site`` has its layouts."""


@runtime_checkable
class NeedsTokens(Protocol):
    """A Strategy that gains nothing below some number of video tokens. One that does not say so takes any.

    Its `unsupported_reason` refuses such a site. The number is what a graph of symbolic sizes is tied to, so that a
    video on the other side of it is decided anew.
    """

    def fewest_tokens(self, config: Config) -> int:
        """Video tokens of a site below which it stays dense: ``min_tokens`` where that is a number, or more."""


@dataclass(frozen=True, eq=False)
class Planner:
    """A strategy with the options of a compilation. One per distinct Config, so it is compared by identity."""

    strategy: Strategy
    config: Config

    @property
    def fewest_tokens(self) -> int:
        """Video tokens below which a site stays dense, by ``min_tokens`` and the method."""
        if isinstance(self.strategy, NeedsTokens):
            return self.strategy.fewest_tokens(self.config)
        return self.config.min_tokens or 0

    def phase(self, moment: Moment, searched: int | None) -> Phase:
        """`Strategy.phase` under these options."""
        return self.strategy.phase(moment, searched, self.config)
