"""The Registry: the one place that remembers, and only weakly.

Parameter -> Layers, Parameter -> Claim (and so Clock), Parameter -> what was compiled. Everything dies with the
Parameters; `reset` empties it.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.phases import Phase
from sparse_compile.runtime.by_parameter import ByParameter
from sparse_compile.runtime.clock import Claim, Clock
from sparse_compile.runtime.enabled import Enabled
from sparse_compile.runtime.report import GraphRecord, SiteRecord
from sparse_compile.runtime.state import Layer, LayerGroup
from sparse_compile.strategies.base import Planner, Strategy

log = logging.getLogger(__name__)

UNOWNED = 256


class Source(Protocol):
    """What moves an attached clock."""

    def detach(self) -> None:
        """Stop doing so, and leave nothing behind."""

    def belongs_to(self, pipe: object) -> bool:
        """Whether it stands for this pipeline."""


Finder = Callable[[], bool]
"""Looks for a pipeline on the call stack; attaches it and returns True where there is one."""


@dataclass
class Records:
    """What was compiled for a Parameter: graphs it is the first one of, and sites it owns, by ordinal."""

    graphs: list[GraphRecord] = field(default_factory=list)
    sites: dict[int, SiteRecord] = field(default_factory=dict)


class Registry:
    """Finds layers, clocks and records by Parameter objects."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._layers: ByParameter[dict[Planner, Layer]] = ByParameter()
        self._claims = WeakIdKeyDictionary()
        self._records = WeakIdKeyDictionary()
        self._planners: dict[Config, Planner] = {}
        self._sources: WeakKeyDictionary[Clock, WeakSet[Source]] = WeakKeyDictionary()
        self._finders: dict[str, str] = {}
        self.enabled: WeakKeyDictionary[nn.Module, Enabled] = WeakKeyDictionary()
        """Models that `enable` compiled in place, for `disable` to undo."""
        self.refused: WeakSet[object] = WeakSet()
        """What a finder came upon and could not attach, which is said once."""
        self._warned_no_clock = False
        self.unowned: deque[GraphRecord] = deque(maxlen=UNOWNED)
        """The newest graphs without any Parameter, which belong to no model; every report shows them apart."""

    # ------------------------------------------------------------------ planners and layers

    def planner(self, config: Config, strategy: Strategy) -> Planner:
        """The one Planner of these options."""
        with self._lock:
            return self._planners.setdefault(config, Planner(strategy, config))

    def layer(self, parameter: object, planner: Planner) -> Layer:
        """The layer that this Parameter names; made, and given to its model's clock, at the first call."""
        layer = self._known(parameter, planner)
        if layer is not None and layer.claim is not None:
            return layer
        with self._lock:
            layer = self._layers.setdefault(parameter, {}).setdefault(planner, Layer(planner))
            claim = self.claim_of(parameter)
            if claim is not None and layer.claim is None:
                claim.add(layer)
            return layer

    def layers_of(self, parameter: object) -> list[Layer]:
        """The layers of a Parameter, one per Planner."""
        return list((self._layers.get(parameter) or {}).values())

    def runs(
        self,
        parameters: Iterable[object],
        count: int,
        planner: Planner,
        phase: Phase,
        kept_dense: tuple[bool, ...],
    ) -> bool:
        """Whether a graph written for this phase and these layers kept dense is the one to run. A guard asks.

        Args:
            parameters: the owners of the graph's layers; only the first is looked at where the layers are known.
            count: how many there are.
            planner: whose layers.
            phase: what the graph was written for.
            kept_dense: which of its layers it leaves dense; in the dense phase they all are.
        """
        remaining = iter(parameters)
        first = next(remaining)
        group = self._group_of(first, planner, count)
        if group is not None:
            return group.phase() is phase and (phase is Phase.DENSE or group.kept_dense() == kept_dense)
        known = [first, *remaining]
        if self.phase_of(known, planner) is not phase:
            return False
        return phase is Phase.DENSE or self.kept_dense(known, planner) == kept_dense

    def phase_of(self, parameters: Iterable[object], planner: Planner) -> Phase:
        """The phase of a graph with these owners: that of the first layer which is not kept dense."""
        new = 0
        for parameter in parameters:
            layer = self._known(parameter, planner)
            claim: Claim | None = self._claims.get(parameter) if layer is None else layer.claim
            if layer is not None and (claim is None or not layer.kept_dense):
                return layer.phase
            if layer is None and claim is not None:
                phase = claim.phase_of_new_layer(planner, new)
                new += 1
                if phase is not Phase.DENSE:
                    return phase
        return Phase.DENSE

    def kept_dense(self, parameters: Iterable[object], planner: Planner) -> tuple[bool, ...]:
        """Which of a graph's layers ``dense_layers`` keeps dense, in the order of their calls."""
        new, kept = 0, []
        for parameter in parameters:
            layer = self._known(parameter, planner)
            claim: Claim | None = self._claims.get(parameter)
            if layer is not None or claim is None:
                kept.append(layer is not None and layer.kept_dense)
            else:
                kept.append(claim.keeps_new_layer_dense(planner, new))
                new += 1
        return tuple(kept)

    def _known(self, parameter: object, planner: Planner) -> Layer | None:
        """The layer of this Parameter, if it was ever called."""
        layers = self._layers.get(parameter)
        return layers.get(planner) if layers is not None else None

    def _group_of(self, first: object, planner: Planner, size: int) -> LayerGroup | None:
        lead = self._known(first, planner)
        groups = lead.groups.values() if lead is not None and lead.claim is not None else ()
        return next((group for group in groups if len(group.layers) == size), None)

    # ------------------------------------------------------------------ clocks

    def claim(self, model: nn.Module, clock: Clock) -> Claim:
        """Give a model to a clock.

        Raises:
            SparseAttentionError: another clock has it, or it has no Parameters.
        """
        with self._lock:
            self.check_unclaimed(model)
            claim = clock.claim(model)
            self._file(claim, list(model.parameters()))
            return claim

    def check_unclaimed(self, model: nn.Module) -> None:
        """Refuse a model that no clock can claim now.

        Raises:
            SparseAttentionError: another clock has it, or it has no Parameters.
        """
        parameters = list(model.parameters())
        if not parameters:
            raise SparseAttentionError(
                "a clock needs a model with Parameters", type(model).__name__, "Give the transformer."
            )
        if any(parameter in self._claims for parameter in parameters):
            raise SparseAttentionError(
                "a model is driven by one clock at a time",
                type(model).__name__,
                "Leave the other `denoising` block first, or `disable` the pipeline that has it.",
            )

    def claim_of(self, parameter: object) -> Claim | None:
        """The claim of a Parameter; a Parameter that a claimed model took in later is found too."""
        claim: Claim | None = self._claims.get(parameter)
        if claim is not None:
            return claim
        with self._lock:
            for other in dict.fromkeys(self._claims.values()):
                model = other.model()
                if model is not None and any(own is parameter for own in model.parameters()):
                    self._file(other, list(model.parameters()))
                    found: Claim = other
                    return found
        return None

    def release(self, clock: Clock) -> None:
        """Let all models of a clock go: they run dense until another clock claims them, and keep no state."""
        with self._lock:
            for parameter in [p for p, claim in self._claims.items() if claim.clock is clock]:
                del self._claims[parameter]
                for layer in self.layers_of(parameter):
                    layer.let_go()
            clock.let_go()

    def attach(self, clock: Clock, source: Source) -> None:
        """Note what moves a clock; it is held weakly."""
        self._sources.setdefault(clock, WeakSet()).add(source)

    def detach(self, clock: Clock) -> None:
        """Detach a clock from its sources and release its models."""
        for source in self.sources(clock):
            source.detach()
        self._sources.pop(clock, None)
        self.release(clock)

    def clocks(self) -> list[Clock]:
        """The clocks that were attached to a source of time."""
        return list(self._sources)

    def attached_clock(self, model: nn.Module) -> Clock | None:
        """The clock of this model, if it was attached to a source of time."""
        claims = (self._claims.get(parameter) for parameter in model.parameters())
        return next((claim.clock for claim in claims if claim is not None and claim.clock in self._sources), None)

    def clocks_moved_for(self, pipe: object) -> list[Clock]:
        """The clocks that a pipeline moves, the newest first."""
        moved = (clock for clock in self._sources if any(source.belongs_to(pipe) for source in self.sources(clock)))
        return list(moved)[::-1]

    def sources(self, clock: Clock) -> list[Source]:
        """What moves a clock."""
        return list(self._sources.get(clock, ()))

    def add_finder(self, library: str, module: str) -> None:
        """Ask ``module.find_on_stack`` for a pipeline, once somebody else has imported ``library``."""
        self._finders[library] = module

    def find_clock(self) -> bool:
        """Look for a pipeline on the call stack and attach it; whether one was found."""
        for library, module in self._finders.items():
            if library in sys.modules:
                finder: Finder = import_module(module).find_on_stack
                if finder():
                    return True
        return False

    def warn_no_clock(self) -> None:
        """Say once what a model without a clock needs."""
        if not self._warned_no_clock:
            self._warned_no_clock = True
            log.warning(
                "no clock tells the denoising step, so attention stays dense: call the model inside"
                " `with sparse_compile.denoising(model, steps=...)`, or attach its pipeline with"
                " `sparse_compile.attach(pipe)`"
            )

    def _file(self, claim: Claim, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            self._claims[parameter] = claim
        known = [layer for parameter in parameters for layer in self.layers_of(parameter)]
        for layer in sorted(known, key=lambda layer: layer.index):
            if layer.claim is not claim:
                claim.add(layer)

    # ------------------------------------------------------------------ records

    def record_graph(self, anchor: object | None, record: GraphRecord) -> None:
        """Remember a compilation, under the first Parameter of its graph."""
        if anchor is None:
            self.unowned.append(record)
        else:
            self.records_of(anchor).graphs.append(record)

    def record_site(self, owner: object, record: SiteRecord) -> None:
        """Remember a site, under the Parameter that owns it."""
        self.records_of(owner).sites[record.ordinal] = record

    def records_of(self, parameter: object) -> Records:
        """What was compiled for a Parameter."""
        with self._lock:
            records: Records = self._records.setdefault(parameter, Records())
            return records

    def recorded(self, parameters: Iterable[object]) -> list[tuple[object, Records]]:
        """What was compiled for any of these Parameters, in their order."""
        found = ((parameter, self._records.get(parameter)) for parameter in parameters)
        return [(parameter, records) for parameter, records in found if records is not None]

    def reset(self) -> None:
        """Forget what was compiled and all that hangs on it: layers with their state, records, planners.

        `torch._dynamo.reset()` ends here. Who tells the time to whom is nothing compiled, so attached pipelines and
        open `denoising` blocks stay; their models start anew.
        """
        with self._lock:
            for claim in dict.fromkeys(self._claims.values()):
                claim.forget_layers()
            self._layers.clear()
            self._records.clear()
            self._planners.clear()
            self.unowned.clear()
            self._warned_no_clock = False


REGISTRY = Registry()
REGISTRY.add_finder("diffusers", "sparse_compile.integrations.diffusers")
