"""The Clock: the one place where time enters.

A Clock knows the generation, the step of how many, and the CFG branch. It claims models; whenever it moves, it sets the
phase of each of their layers. Guards and graphs only ever read that phase.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import nn

from sparse_compile.errors import SparseAttentionError, StrictModeError
from sparse_compile.option_values import layer_ranges
from sparse_compile.phases import Moment, Phase
from sparse_compile.runtime.monitor import Monitor

if TYPE_CHECKING:
    from sparse_compile.runtime.state import Layer
    from sparse_compile.strategies.base import Planner

_generations = itertools.count(1)  # numbers are never reused, so state of another clock is never taken for this one's


class Claim:
    """One model under one Clock: the order of its layers, per Planner, and how many there are."""

    def __init__(self, clock: Clock, model: nn.Module) -> None:
        self.clock = clock
        self.model = weakref.ref(model)
        self.changes = 0
        """Grows whenever a layer makes new state tensors or has searched, so that what was gathered can be checked."""
        self.moves = 0
        """Grows whenever the clock moves or a layer is added, which may change what is kept dense."""
        self.mismatches = 0
        """Calls whose graph was not the one of the layers' phase (a guard_filter_fn dropped the guard)."""
        self.repeated_calls = 0
        """Calls of a named branch that came again within a step, and so had to attend to everything."""
        self.planners: set[Planner] = set()
        """Planners under which a graph of this model ran in this generation."""
        self.foreign = False
        """Whether the call under way is none of those whose time the clock tells."""
        self.foreign_calls = 0
        """Calls of layers that were foreign, and so attended to everything."""
        self.sparse_calls = 0
        """Calls of this generation that were not dense."""
        self._layers: dict[Planner, list[weakref.ref[Layer]]] = {}
        self._counts: dict[Planner, int] = {}

    def add(self, layer: Layer) -> None:
        """Take a layer that is called for the first time."""
        known = self._layers.setdefault(layer.planner, [])
        layer.claim = self
        layer.index = self._next_places(layer.planner)[0]
        known[layer.index : layer.index + 1] = [weakref.ref(layer)]
        layer.calls = 0
        layer.kept_dense = self._keeps_dense(layer.index, layer.planner)
        layer.refresh()
        self.moves += 1

    def layers(self) -> Iterator[Layer]:
        """The living layers, in the order of their first calls."""
        for references in self._layers.values():
            yield from (layer for reference in references if (layer := reference()) is not None)

    def forget_layers(self) -> None:
        """Start anew, as if nothing of the model had been compiled."""
        self._layers.clear()
        self._counts.clear()
        self.planners.clear()

    def phase_of_new_layer(self, planner: Planner, ahead: int) -> Phase:
        """The phase of a layer never called, with ``ahead`` other new ones before it."""
        return Phase.DENSE if self.keeps_new_layer_dense(planner, ahead) else self.clock.phase(planner, None)

    def keeps_new_layer_dense(self, planner: Planner, ahead: int) -> bool:
        """Whether ``dense_layers`` will keep such a layer dense."""
        free = self._next_places(planner)
        index = free[ahead] if ahead < len(free) else free[-1] + 1 + ahead - len(free)
        return self._keeps_dense(index, planner)

    def is_foreign(self, layer: Layer) -> bool:
        """Whether a call of this layer belongs to somebody else than the loop that moves the clock.

        Each call of the model asks once, for its first layer.
        """
        if layer.index == 0 and self.clock.recognises is not None:
            self.foreign = not self.clock.recognises()
        return self.foreign

    def restart(self) -> None:
        """A generation starts: layers are counted anew, so that each generation decides as the first one did."""
        self._counts.clear()
        self.planners.clear()
        self.foreign = False
        self.sparse_calls = 0
        self._move(count=False)

    def step(self) -> None:
        """The clock has moved to another step."""
        self._move(count=True)

    def refresh(self) -> None:
        """The clock has entered or left a branch."""
        for layer in self.layers():
            layer.refresh()

    def check_strict(self) -> None:
        """Raise where a generation that has ended without any sparse call was strict.

        Raises:
            StrictModeError: it was.
        """
        strict = [p for p in self.planners if p.config.strict and p.config.method != "dense"]
        if strict:
            raise StrictModeError(
                "under strict, some attention must become sparse in each generation",
                f"{self.clock.steps} steps of {type(self.model()).__name__}, all dense",
                "See sparse_compile.explain(model) for the reason of each site; set min_tokens to a (lower) number, or"
                " lower dense_steps.",
            )

    def _move(self, count: bool) -> None:
        if count:
            self._counts = {planner: len(known) for planner, known in self._layers.items()}
        self.moves += 1
        for layer in self.layers():
            layer.calls = 0
            layer.kept_dense = self._keeps_dense(layer.index, layer.planner)
            layer.refresh()

    def _next_places(self, planner: Planner) -> list[int]:
        """Where the next layers go: the places of those whose Parameters were replaced, then the end."""
        known = self._layers.get(planner, [])
        return [*(place for place, layer in enumerate(known) if layer() is None), len(known)]

    def _keeps_dense(self, index: int, planner: Planner) -> bool:
        return keeps_dense(index, self._counts.get(planner), planner.config.dense_layers)


def keeps_dense(index: int, count: int | None, dense_layers: float | int | str) -> bool:
    """Whether the option ``dense_layers`` keeps a layer dense.

    Args:
        index: place of the layer in the order of first calls.
        count: number of layers, None while it is not known: then each layer that a share or a negative number could
            name is kept dense.
        dense_layers: a share (rounded down, docs/svg2.md section 10), a count, or ranges such as ``0-2,-1``.
    """
    if isinstance(dense_layers, str):
        ranges = layer_ranges(dense_layers)
        if count is None and any(first < 0 for first, _ in ranges):
            return True
        places = (index,) if count is None or index >= count else (index, index - count)
        return any(first <= place <= last for first, last in ranges for place in places)
    if isinstance(dense_layers, int):
        return index < dense_layers
    if count is None:
        return dense_layers > 0
    return index < math.floor(dense_layers * count + 1e-9)


class Clock:
    """Generation, step of how many, and branch. Steps count from 0."""

    def __init__(self) -> None:
        self.generation = next(_generations)
        self.moment = Moment(0, 0)
        self.monitor = Monitor()
        self.branch_name: str | None = None
        self.recognises: Callable[[], bool] | None = None
        """Whether the call of a model under way is one of the generation's; None: every one is."""
        self.running = threading.Lock()
        """Held while a compiled graph of one of the models runs: one generation at a time."""
        self._claims: list[Claim] = []
        self._branch_thread: int | None = None

    @property
    def steps(self) -> int:
        """Steps of this generation."""
        return self.moment.steps

    @property
    def over(self) -> bool:
        """Whether no generation is under way: none was started, or its last step has ended."""
        return self.moment.step >= self.moment.steps

    def claim(self, model: nn.Module) -> Claim:
        """Take a model; the Registry files its Parameters."""
        claim = Claim(self, model)
        self._claims.append(claim)
        return claim

    def let_go(self) -> None:
        """Give all models back; the Registry forgets their Parameters."""
        self._claims.clear()

    def phase(self, planner: Planner, searched: int | None) -> Phase:
        """The phase of a call now; dense before a generation was started and after its last step.

        Args:
            planner: whose call.
            searched: step of the last search, see `Strategy.phase`.
        """
        return Phase.DENSE if self.over else planner.phase(self.moment, searched)

    def start(self, steps: int, step: int = 0) -> None:
        """Start a generation: everything kept from an earlier one is void.

        Args:
            steps: denoising steps of the generation, at least 1.
            step: the first step; above 0 where a pipeline skips the noisiest ones (image to image).

        Raises:
            SparseAttentionError: fewer than one step.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise SparseAttentionError(
                "a generation needs a whole number of steps, at least 1",
                steps,
                "Give the sampler's number of steps.",
            )
        self.generation = next(_generations)
        self.moment = Moment(step, steps)
        self.monitor.start()
        for claim in self._claims:
            claim.restart()

    def step(self, to: int | None = None, of: int | None = None) -> None:
        """Move to the next step, or to step ``to``; where the clock is there already, nothing happens.

        Args:
            to: the step that begins.
            of: the number of steps, where it has turned out to be another one.

        Raises:
            StrictModeError: the last step has ended and nothing became sparse, under strict.
        """
        moved = self.moment._replace(
            step=self.moment.step + 1 if to is None else to, steps=self.moment.steps if of is None else of
        )
        if moved == self.moment:  # a pipeline that steps its scheduler twice, and puts it back in between
            return
        self.moment = self.monitor.moved(moved, (layer for claim in self._claims for layer in claim.layers()))
        if self._branch_thread is None:
            self.branch_name = None
        for claim in self._claims:
            claim.step()
        if self.moment.step == self.moment.steps and not any(claim.sparse_calls for claim in self._claims):
            for claim in self._claims:
                claim.check_strict()

    def end(self) -> None:
        """The loop was left, wherever it was: nobody tells the time until the next generation starts."""
        if not self.over:
            self.moment = Moment(self.moment.steps, self.moment.steps)
            for claim in self._claims:
                claim.step()

    @contextlib.contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """The calls inside belong to this CFG branch ("cond", "uncond", …).

        Raises:
            SparseAttentionError: another thread is inside a branch of the same clock.
        """
        here = threading.get_ident()
        if self._branch_thread not in (None, here):
            raise one_at_a_time(name)
        outer, self._branch_thread, self.branch_name = (self._branch_thread, self.branch_name), here, name
        self._refresh()
        try:
            yield
        finally:
            self._branch_thread, self.branch_name = outer
            self._refresh()

    def join(self, name: str) -> None:
        """The call under way belongs to this branch: the clock came to know of it in the middle.

        It holds until the next step, since nobody tells when that call ends; other branches are entered as ever.
        """
        self.branch_name = name
        self._refresh()

    def _refresh(self) -> None:
        for claim in self._claims:
            claim.refresh()


def one_at_a_time(value: object) -> SparseAttentionError:
    """The error for two generations of one model at the same time."""
    return SparseAttentionError(
        "a model runs one generation at a time: its attention keeps state from step to step",
        value,
        "Give each thread its own model, or take turns.",
    )
