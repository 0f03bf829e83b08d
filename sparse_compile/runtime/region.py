"""The Region: what Dynamo calls in place of the traced frame.

It holds positions, specifications and the compiled function; never a Parameter, a model or a state tensor.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_compile.errors import SparseAttentionError
from sparse_compile.phases import Phase
from sparse_compile.plan import TensorSpec
from sparse_compile.runtime.clock import Claim, Clock, one_at_a_time
from sparse_compile.runtime.registry import Registry
from sparse_compile.runtime.report import SiteRecord
from sparse_compile.runtime.state import MOST_UNNAMED_CALLS, Branch, Call, Gathered, LayerGroup, allocate
from sparse_compile.strategies.base import Planner

log = logging.getLogger(__name__)


OwnedRecord = tuple[int, SiteRecord]
"""What the report is told of a site, and the position of its owner among the arguments."""


@dataclass(frozen=True)
class Slot:
    """The state inputs of one rewritten site: whose they are, and their specs (sizes are ints or sympy expressions)."""

    owner: int
    """Position of its layer among the Region's layers."""
    ordinal: int
    specs: tuple[TensorSpec, ...]
    """In the order of the graph's inputs; the last one is the call log's."""
    logged: bool
    """Whether each call writes a row of the call log."""


class Region:
    """Finds each layer's state for the branch at hand, appends it to the arguments, runs, and tells the layers.

    Args:
        compiled: the lowered graph.
        phase: what the graph was written for.
        planner: whose layers.
        registry: where layers are found.
        owners: positions, among the arguments, of the Parameters that name the layers.
        slots: the rewritten sites, in the order of the graph's state inputs.
        symbols: positions of symbolic sizes among the arguments, and their sympy symbols.
        records: what the report says of each site, with the position of its Parameter.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        phase: Phase,
        planner: Planner,
        registry: Registry,
        owners: Sequence[int],
        slots: Sequence[Slot],
        symbols: Mapping[int, Any],
        records: Sequence[OwnedRecord],
    ) -> None:
        self._compiled = compiled
        self._phase = phase
        self._planner = planner
        self._registry = registry
        # An itemgetter of one position would give the item alone.
        self._take_owners = operator.itemgetter(*owners, owners[0])
        self._slots = tuple(slots)
        self._symbols = dict(symbols)
        self._records = tuple(records)
        self._sparse_owners = tuple(dict.fromkeys(slot.owner for slot in slots))
        self._needs_search = Phase.SEARCH in planner.strategy.phases and bool(slots)
        self._logged = any(slot.logged for slot in slots)
        self._dense_owners = tuple(owner for owner in range(len(owners)) if owner not in self._sparse_owners)
        self._resolved: dict[tuple[int, ...], list[list[TensorSpec]]] = {}

    def __call__(self, *args: Any) -> Any:
        """Run the graph on Dynamo's arguments."""
        group = self._group(args)
        known = group.layers[0].claim
        if known is not None:
            foreign = known.is_foreign(group.layers[0])
            if (foreign or known.clock.over) and self._registry.find_clock():
                known = None  # another pipeline has taken the model over
        claim = known or group.layers[0].claim or self._seek_clock(group)
        if claim is None:
            return self._compiled(*args, *self._empty_state(args))
        if not claim.clock.running.acquire(blocking=False):
            raise one_at_a_time("two calls at the same time")
        try:
            if known is not None and group.phase() is not self._phase:  # a clock found just now came after the guard
                claim.mismatches += 1
            if claim.foreign:
                claim.foreign_calls += 0 if claim.clock.over else len(group.layers)
                return self._compiled(*args, *self._empty_state(args))
            branch = group.layers[0].branch()
            gathered = self._gather(group, claim, branch, args)
            if self._repeats(gathered, claim.clock):
                claim.repeated_calls += 1
                return self._compiled(*args, *self._empty_state(args))
            out = self._compiled(*args, *gathered.tensors)
        except BaseException:
            self._recount_rows(group)
            raise
        finally:
            claim.clock.running.release()
        self._returned(group, claim, branch, gathered)
        return out

    # ------------------------------------------------------------------ layers

    def _group(self, args: Sequence[Any]) -> LayerGroup:
        parameters = self._take_owners(args)[:-1]
        lead = self._registry.layer(parameters[0], self._planner)
        group = lead.groups.get(self)
        if group is None or not group.holds(parameters):
            layers = tuple(self._registry.layer(parameter, self._planner) for parameter in parameters)
            group = lead.groups[self] = LayerGroup(parameters, layers)
            self._record_sites(args)
        return group

    def _record_sites(self, args: Sequence[Any]) -> None:
        """Let the report show what runs, where another graph of the same layers was compiled since."""
        for position, record in self._records:
            self._registry.record_site(args[position], record)

    def _seek_clock(self, group: LayerGroup) -> Claim | None:
        """A pipeline on the call stack, else nobody tells the time: dense, and one warning."""
        if self._registry.find_clock() and group.layers[0].claim is not None:
            return group.layers[0].claim
        if self._planner.config.strict:
            raise SparseAttentionError(
                "under strict, a model needs a clock",
                "none attached",
                "Call it inside `with sparse_compile.denoising(model, steps=...)`, or attach its pipeline.",
            )
        self._registry.warn_no_clock()
        return None

    def _repeats(self, gathered: Gathered, clock: Clock) -> bool:
        """Whether this branch of the layers was called before in this step: two calls that cannot be told apart.

        The first has the state; another one attends to everything.
        """
        now = (clock.generation, clock.moment.step)
        return clock.branch_name is not None and bool(gathered.states) and gathered.states[0].called == now

    def _returned(self, group: LayerGroup, claim: Claim, branch: Branch, gathered: Gathered) -> None:
        """Tell the layers. This runs once a call for all of them, so it makes as few objects as it can."""
        clock = claim.clock
        step = clock.moment.step
        searched = self._phase in (Phase.SEARCH, Phase.REFINE)
        # A sparse call without a search before it attended to everything; the next call searches.
        lost = not (searched or gathered.searched) and self._needs_search
        claim.planners.add(self._planner)
        if self._logged or self._phase not in (Phase.DENSE, Phase.SEARCH):  # a search that logs nothing was dense
            claim.sparse_calls += 1
        if gathered.states:
            gathered.states[0].called = (clock.generation, step)
        call = Call(clock.generation, step, branch, Phase.DENSE, None)
        for layer in map(group.layers.__getitem__, self._dense_owners):
            layer.history.append(call)
        call = call._replace(phase=self._phase)
        for note, state in zip(gathered.notes, gathered.states, strict=True):
            if self._logged:
                if call.row != state.rows:
                    call = call._replace(row=state.rows)
                state.rows += 1
            note(call)
        if searched or lost:
            claim.changes += 1
            for state in gathered.states:
                state.searched = step if searched else None
        unnamed = clock.branch_name is None
        if group.layers[0].calls == MOST_UNNAMED_CALLS - 1 and unnamed:
            log.warning(
                "%d calls in one step without the name of a branch: attention stays dense until the clock moves;"
                " is a clock.step() missing?",
                MOST_UNNAMED_CALLS,
            )
        if searched or lost or unnamed:
            for layer in group.layers:
                layer.calls += unnamed
                layer.refresh()

    def _recount_rows(self, group: LayerGroup) -> None:
        """After a failed call: some layers may have written their row, so ask the device how many there are."""
        with contextlib.suppress(Exception):  # the device itself may be what failed
            for position in self._sparse_owners:
                group.layers[position].recount_rows()

    # ------------------------------------------------------------------ state

    def _gather(self, group: LayerGroup, claim: Claim, branch: Branch, args: Sequence[Any]) -> Gathered:
        """The state inputs of the graph, found or made."""
        generation = claim.clock.generation
        known = group.gathered.get(branch)
        if known is not None and not self._symbols and known[:2] == (generation, claim.changes):
            return known
        self._record_sites(args)
        states = tuple(group.layers[owner].state(branch, generation) for owner in self._sparse_owners)
        of_owner = dict(zip(self._sparse_owners, states, strict=True))
        tensors, fresh = [], False
        for slot, specs in zip(self._slots, self._specs(args), strict=True):
            found, new = group.layers[slot.owner].tensors(of_owner[slot.owner], slot.ordinal, specs[:-1], specs[-1])
            tensors += found
            fresh = fresh or new
        if fresh:  # tensors of another size were replaced: no other graph of these layers may hold on to them
            for other in group.layers[0].groups.values():
                other.gathered.clear()
        notes = tuple(group.layers[owner].history.append for owner in self._sparse_owners)
        searched = not fresh and all(state.searched is not None for state in states)
        gathered = Gathered(generation, claim.changes, tensors, states, notes, searched)
        group.gathered[branch] = gathered
        return gathered

    def _specs(self, args: Sequence[Any]) -> list[list[TensorSpec]]:
        values = tuple(args[position] for position in self._symbols)
        if values not in self._resolved:
            known = dict(zip(self._symbols.values(), values, strict=True))
            self._resolved[values] = [[_resolve(spec, known) for spec in slot.specs] for slot in self._slots]
        return self._resolved[values]

    def _empty_state(self, args: Sequence[Any]) -> list[Tensor]:
        """State that nobody keeps, for a graph that runs without its guard: a sparse call attends to everything."""
        return [allocate(spec) for specs in self._specs(args) for spec in specs]


class Witness:
    """Runs a graph in which nothing became sparse, and lets others know that it ran.

    The report then shows its sites, where another graph of the same layers ran before (for a longer video, say); under
    strict the clock counts the call.

    Args:
        compiled: the lowered graph.
        anchor: position of one of the model's Parameters among the arguments.
        records: its sites, by the positions of their owners.
        planner: under which options.
        registry: where the model's clock is found.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        anchor: int,
        records: Sequence[OwnedRecord],
        planner: Planner,
        registry: Registry,
    ) -> None:
        self._compiled = compiled
        self._anchor = anchor
        self._records = tuple(records)
        self._planner = planner
        self._registry = registry

    def __call__(self, *args: Any) -> Any:
        """Run the graph on Dynamo's arguments."""
        for position, record in self._records:
            if self._registry.records_of(args[position]).sites.get(record.ordinal) is record:
                break  # this graph ran last, so all of its sites are shown
            self._registry.record_site(args[position], record)
        claim = self._registry.claim_of(args[self._anchor]) if self._planner.config.strict else None
        if claim is not None:
            claim.planners.add(self._planner)
        return self._compiled(*args)


def _resolve(spec: TensorSpec, values: Mapping[Any, int]) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else int(size.xreplace(values)) for size in spec.shape)  # type: ignore[attr-defined]  # a sympy expression
    return TensorSpec(shape, spec.dtype, spec.device)
