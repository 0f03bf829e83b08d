"""Layers: one attention of one model instance, its phase, and what it keeps for each CFG branch."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparse_compile.call_log import carry_over, read_rows
from sparse_compile.phases import Phase
from sparse_compile.plan import TensorSpec
from sparse_compile.strategies.base import Planner

if TYPE_CHECKING:
    from sparse_compile.runtime.clock import Claim
    from sparse_compile.runtime.monitor import Verdict

HISTORY = 1024
"""Calls per layer that the report can look back on."""

Branch = Hashable
"""The name that a pipeline gives to a CFG branch, or the ordinal of the layer's call within the step."""

MOST_UNNAMED_CALLS = 16
"""Calls within a step that get a state each; more of them mean that nobody moves the clock."""

_allocation = threading.Lock()
_made = itertools.count()


class Call(NamedTuple):
    """One returned call of a layer, as the host saw it."""

    generation: int
    step: int
    branch: Branch
    phase: Phase
    row: int | None
    """Its row in the branch's call log; None for a call that wrote none."""


@dataclass(slots=True)
class BranchState:
    """What one layer keeps for one branch. Tensors stay at their address from generation to generation."""

    generation: int
    searched: int | None = None
    """Step of the last search that returned; None: not ready."""
    tensors: dict[int, list[Tensor]] = field(default_factory=dict)
    """State tensors by the ordinal of the site among those of this layer."""
    logs: dict[int, Tensor] = field(default_factory=dict)
    rows: int = 0
    """Rows written to each log so far."""
    rows_at_start: int = 0
    """Rows that were there when this generation started."""
    called: tuple[int, int] | None = None
    """Generation and step of the last call."""


class Layer:
    """One attention of one model instance under one Planner. It dies with its Parameter."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.phase = Phase.DENSE
        """The phase of the next call; the guard compares only this."""
        self.claim: Claim | None = None
        self.index = next(_made)
        """Its place in the order of first calls of its model; before it has a clock, among all layers."""
        self.kept_dense = False
        """Whether `dense_layers` keeps it dense for the whole generation."""
        self.calls = 0
        """Calls without a named branch that returned in the current step."""
        self.branches: dict[Branch, BranchState] = {}
        self.history: deque[Call] = deque(maxlen=HISTORY)
        self.verdicts: deque[Verdict] = deque(maxlen=HISTORY)
        """What the monitor decided because of this layer."""
        self.groups: dict[object, LayerGroup] = {}
        """The layers that each Region runs together with this one as the first."""

    def branch(self) -> Branch:
        """The branch of the next call."""
        named = self.claim.clock.branch_name if self.claim is not None else None
        return self.calls if named is None else named

    def searched(self) -> int | None:
        """Step of the last search of the next call's branch in this generation."""
        state = self.branches.get(self.branch())
        if state is None or self.claim is None or state.generation != self.claim.clock.generation:
            return None
        return state.searched

    def refresh(self) -> None:
        """Set the phase of the next call from the clock."""
        if self.claim is None or self.kept_dense or self.calls >= MOST_UNNAMED_CALLS:
            self.phase = Phase.DENSE
        else:
            self.phase = self.claim.clock.phase(self.planner, self.searched())

    def let_go(self) -> None:
        """Nobody tells the time any more: dense, and state is given back. The logs stay, for the report."""
        self.claim = None
        for state in self.branches.values():
            state.tensors.clear()
        for group in self.groups.values():
            group.gathered.clear()
        self.refresh()

    def state(self, branch: Branch, generation: int) -> BranchState:
        """The branch's state in this generation; what an earlier generation left is zeroed in place."""
        state = self.branches.get(branch)
        if state is None:
            state = self.branches[branch] = BranchState(generation)
        elif state.generation != generation:
            with torch.inference_mode(False), torch.no_grad():
                for tensor in (tensor for tensors in state.tensors.values() for tensor in tensors):
                    tensor.zero_()
            state.generation, state.searched, state.rows_at_start = generation, None, state.rows
        return state

    def recount_rows(self) -> None:
        """Take the number of rows in each log from the device."""
        for state in self.branches.values():
            state.rows = max((read_rows(log)[0] for log in state.logs.values()), default=0)

    def tensors(
        self, state: BranchState, ordinal: int, specs: Sequence[TensorSpec], log_spec: TensorSpec
    ) -> tuple[list[Tensor], bool]:
        """The state tensors of one site, followed by its log; and whether the state had to be made anew.

        A log of another device or number of heads is replaced too, but keeps its rows: the history counts them.
        """
        found = state.tensors.get(ordinal)
        fresh = found is None or [TensorSpec(tuple(t.shape), t.dtype, t.device) for t in found] != list(specs)
        if found is None or fresh:
            found = state.tensors[ordinal] = [allocate(spec) for spec in specs]
        log = state.logs.get(ordinal)
        stays = log is not None and log.device == log_spec.device and log.shape == log_spec.shape
        if log is None or not stays:
            log = state.logs[ordinal] = allocate(log_spec) if log is None else renewed(log, log_spec)
        if self.claim is not None and (fresh or not stays):
            self.claim.changes += 1
        return [*found, log], fresh


def allocate(spec: TensorSpec) -> Tensor:
    """Zeros that may be mutated inside and outside of inference mode."""
    with _allocation, torch.inference_mode(False), torch.no_grad():
        return torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device)


def renewed(log: Tensor, spec: TensorSpec) -> Tensor:
    """A call log of other heads, or on the device that its model has moved to, with the rows of the old one."""
    new = allocate(spec)
    with _allocation, torch.inference_mode(False), torch.no_grad():
        carry_over(log, new)
    return new


class Gathered(NamedTuple):
    """The state inputs of a graph for one branch, and for what they hold."""

    generation: int
    changes: int
    """The claim's count when they were gathered: it grows whenever a layer makes new tensors or has searched."""
    tensors: list[Tensor]
    states: tuple[BranchState, ...]
    """Of the layers that run sparsely, in the Region's order."""
    notes: tuple[Callable[[Call], None], ...]
    """Appends to the histories of the same layers."""
    searched: bool
    """Whether a search has filled all of these states."""


class LayerGroup:
    """The layers one Region runs together, and their state tensors in the order of the graph's inputs.

    Args:
        owners: the Parameters that name the layers; held weakly.
        layers: the layers.
    """

    def __init__(self, owners: Sequence[torch.nn.Parameter], layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.gathered: dict[Branch, Gathered] = {}
        self._pattern: tuple[bool, ...] = ()
        self._moves = -1
        self._ids = [*map(id, owners)]
        self._owners = [weakref.ref(owner, self._owner_died) for owner in owners]

    def kept_dense(self) -> tuple[bool, ...]:
        """Which of the layers ``dense_layers`` keeps dense; looked up anew when the clock has moved."""
        claim = self.layers[0].claim
        moves = -1 if claim is None else claim.moves
        if moves != self._moves or moves < 0:
            self._pattern, self._moves = tuple([layer.kept_dense for layer in self.layers]), moves
        return self._pattern

    def phase(self) -> Phase:
        """The phase of the group: that of the first layer which is not kept dense."""
        kept_dense = self.kept_dense()
        return self.layers[kept_dense.index(False) if False in kept_dense else 0].phase

    def holds(self, parameters: Sequence[object]) -> bool:
        """Whether it was made for exactly these Parameter objects: ids tell, as long as all owners live."""
        return [*map(id, parameters)] == self._ids

    def _owner_died(self, _: object) -> None:
        self._ids, self.layers = [], ()
        self.gathered.clear()
