"""Watches held plans on the probe rows: one gone stale brings a search, and where all still hold a search is saved.

Source: docs/adaspa.md, section 13. A sparse call logs the mass that its plan keeps now and kept when it was made. When
the clock moves, the newest rows of all logs are copied to the host; at the next move they are judged. The host then
waits at most for a step that was launched a whole step before, and phases never depend on how fast a device is.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparse_compile.call_log import KEPT_MASS, PLANNED_MASS, newest_row
from sparse_compile.phases import Moment, Phase

if TYPE_CHECKING:
    from sparse_compile.runtime.state import Branch, Layer

STALE_DROP = 0.05
"""A plan that keeps this much less of the mass than when it was made may have gone stale…"""
PROBES_IN_A_ROW = 2
"""…and has, if so many probes in a row say so."""
SOUND_DROP = 0.01
"""Up to this drop a plan is as good as new."""
LEAST_STEPS_APART, MOST_SEARCHES = 5, 3
"""Of the searches that the monitor asks for in one generation."""
LONGEST_MEMORY = 5
"""Steps after which a probe says nothing any more: its layer or branch may not be called again, or may have moved."""


class Verdict(NamedTuple):
    """What the monitor decided at a step, kept by the layers that it was about."""

    generation: int
    step: int
    branch: Branch
    stale: bool
    """Whether a search was asked for; else one that was due was saved."""
    drop: float
    """How much less mass the plan keeps than when it was made, mean over the heads."""


class _Site(NamedTuple):
    layer: weakref.ref[Layer]
    branch: Branch
    ordinal: int


@dataclass
class _Probe:
    """What is known of the plan of one site and branch."""

    rows: int
    """Rows of its log when it was looked at last: a call that was skipped is not looked at twice."""
    searched: int | None = None
    """The step at which the plan was made: what was known of an older one does not count."""
    seen: int = 0
    """The step at whose beginning its newest row was copied."""
    drop: float = math.inf
    """Not known yet."""
    low: int = 0
    """Probes in a row that were low."""


class _Copy(NamedTuple):
    """Rows on their way to the host, [sites, columns]; and what tells that they have arrived."""

    sites: list[_Site]
    rows: Tensor
    arrival: torch.cuda.Event | None

    def read(self) -> list[list[float]]:
        if self.arrival is not None:
            self.arrival.synchronize()  # a whole step was launched since it was recorded
        values: list[list[float]] = self.rows.tolist()
        return values


class Monitor:
    """The probes of one Clock's generation. Layers whose methods hold no plan are never looked at."""

    def __init__(self) -> None:
        self._probes: dict[_Site, _Probe] = {}
        self._copies: list[_Copy] = []
        self._searches: list[int] = []

    def start(self) -> None:
        """A generation starts."""
        self._probes.clear()
        self._copies.clear()
        self._searches.clear()

    def moved(self, moment: Moment, layers: Iterable[Layer]) -> Moment:
        """The moment that a clock moves to, with what the probes say of the plans that are held.

        Args:
            moment: the step that begins, with earlier verdicts.
            layers: of all models of the clock.
        """
        watched = [layer for layer in layers if _holds_plans(layer)]
        if not watched or moment.step >= moment.steps:
            return moment
        self._judge()
        self._copies = list(self._look_at(watched, moment.step))
        recent = {site: probe for site, probe in self._probes.items() if moment.step - probe.seen <= LONGEST_MEMORY}
        stale = [site for site, probe in recent.items() if probe.low >= PROBES_IN_A_ROW and site.layer() is not None]
        if stale and self._may_search(moment.step):
            self._searches.append(moment.step)
            self._tell(moment, stale, stale=True)
            return moment._replace(stale=(*moment.stale, moment.step))
        if recent and all(probe.drop <= SOUND_DROP for probe in recent.values()):
            sound = moment._replace(sound=(*moment.sound, moment.step))
            saved = [site for site in recent if _refines(site, moment) and not _refines(site, sound)]
            if saved:
                self._tell(moment, saved, stale=False)
                return sound
        return moment

    def _judge(self) -> None:
        """Take in the rows that were copied at the move before."""
        for copy in self._copies:
            for site, row in zip(copy.sites, copy.read(), strict=True):
                drop = row[PLANNED_MASS] - row[KEPT_MASS]
                if math.isfinite(drop):
                    probe = self._probes[site]
                    probe.drop, probe.low = drop, probe.low + 1 if drop > STALE_DROP else 0

    def _look_at(self, layers: Sequence[Layer], step: int) -> Iterator[_Copy]:
        """Start copying what the calls since the last move have logged: one copy a device."""
        found: dict[torch.device, list[tuple[_Site, Tensor]]] = {}
        for layer in layers:
            generation = layer.claim.clock.generation if layer.claim is not None else None
            for branch, state in layer.branches.items():
                if state.generation != generation or state.searched is None:
                    continue
                for ordinal, log in state.logs.items():
                    site = _Site(weakref.ref(layer), branch, ordinal)
                    probe = self._probes.setdefault(site, _Probe(state.rows_at_start))
                    if probe.searched != state.searched:
                        probe.searched, probe.drop, probe.low = state.searched, math.inf, 0
                    if probe.rows != state.rows:
                        probe.rows, probe.seen = state.rows, step
                        found.setdefault(log.device, []).append((site, newest_row(log, state.rows)))
        for rows in found.values():
            yield _copy([site for site, _ in rows], torch.stack([row for _, row in rows]))

    def _may_search(self, step: int) -> bool:
        rested = not self._searches or step - self._searches[-1] >= LEAST_STEPS_APART
        return rested and len(self._searches) < MOST_SEARCHES

    def _tell(self, moment: Moment, sites: Iterable[_Site], *, stale: bool) -> None:
        for site in sites:
            probe, layer = self._probes[site], site.layer()
            probe.low = 0
            if layer is not None and layer.claim is not None:
                generation = layer.claim.clock.generation
                layer.verdicts.append(Verdict(generation, moment.step, site.branch, stale, probe.drop))


def _holds_plans(layer: Layer) -> bool:
    planner = layer.planner
    return planner.config.watches_plans and Phase.REFINE in planner.strategy.phases and not layer.kept_dense


def _refines(site: _Site, moment: Moment) -> bool:
    """Whether the site's next call would search again."""
    layer = site.layer()
    if layer is None:
        return False
    return layer.planner.phase(moment, layer.branches[site.branch].searched) is Phase.REFINE


def _copy(sites: list[_Site], rows: Tensor) -> _Copy:
    if rows.device.type != "cuda":
        return _Copy(sites, rows.cpu(), None)
    there = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    there.copy_(rows, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record(torch.cuda.current_stream(rows.device))  # not that of the current device
    return _Copy(sites, there, arrival)
