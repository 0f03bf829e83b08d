"""diffusers pipelines as the source of time.

`scheduler.set_timesteps` starts a generation, `scheduler.step` moves to the next step, and the transformer's
`cache_context` names the CFG branch. All three are wrapped on the instances that a pipeline holds, and unwrapped again
by `detach`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from sparse_compile.errors import SparseAttentionError
from sparse_compile.runtime.clock import Clock
from sparse_compile.runtime.registry import REGISTRY

log = logging.getLogger(__name__)

DENOISERS = ("transformer", "unet", "controlnet", "prior")
"""Names, or beginnings of names, of the components that a pipeline calls in each step."""


def attach_pipeline(pipe: object) -> Clock:
    """Let a pipeline drive the clock of its transformers; once more changes nothing.

    Raises:
        SparseAttentionError: it is no diffusers pipeline, has no scheduler or no transformer.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise SparseAttentionError(
            "attach needs a diffusers pipeline",
            type(pipe).__name__,
            "For a bare model use `with sparse_compile.denoising(model, steps=...)`.",
        )
    known = clock_of(pipe)
    if known is not None:
        return known
    models = denoisers(pipe)
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not models:
        raise SparseAttentionError(
            "attach needs a pipeline with a scheduler and a transformer",
            type(pipe).__name__,
            "Drive the model by hand with `sparse_compile.denoising(model, steps=...)`.",
        )
    clock = Clock()
    for model in models.values():
        REGISTRY.claim(model, clock)
    driver = PipelineDriver(pipe, clock)
    REGISTRY.on_detach(clock, driver.detach)
    driver.attach(scheduler, list(models.values()))
    return clock


def clock_of(pipe: DiffusionPipeline) -> Clock | None:
    """The clock that a pipeline drives, if any."""
    for model in denoisers(pipe).values():
        parameter = next(model.parameters(), None)
        claim = None if parameter is None else REGISTRY.claim_of(parameter)
        if claim is not None and claim.clock in REGISTRY.clocks():
            return claim.clock
    return None


def denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The models that a pipeline calls in each step, by component name; compiled ones as their originals."""
    found = {}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module) and name.startswith(DENOISERS):
            found[name] = getattr(component, "_orig_mod", component)
    return found


def find_on_stack() -> bool:
    """Attach the pipeline whose call we are in; whether there is one."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, DiffusionPipeline):
            if clock_of(owner) is not None or getattr(owner, "scheduler", None) is None or not denoisers(owner):
                return False
            attach_pipeline(owner)
            log.info("attached %s, found on the call stack", type(owner).__name__)
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


class PipelineDriver:
    """Moves a Clock when a pipeline's scheduler is called. Holds the pipeline weakly."""

    def __init__(self, pipe: DiffusionPipeline, clock: Clock) -> None:
        self._pipe = weakref.ref(pipe)
        self._clock = clock
        self._hooks: list[MethodHook] = []
        self._steps_done = 0

    def attach(self, scheduler: Any, models: list[nn.Module]) -> None:
        """Hook the scheduler and the models; a generation that is under way is joined."""
        self._hook_scheduler(scheduler)
        for model in models:
            if hasattr(model, "cache_context"):
                self._hooks.append(MethodHook(model, "cache_context", around=self._context))
        if _has_timesteps(scheduler):
            self._started(scheduler)

    def detach(self) -> None:
        """Give all methods back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook_scheduler(self, scheduler: Any) -> None:
        self._hooks.append(MethodHook(scheduler, "set_timesteps", after=self._started))
        self._hooks.append(MethodHook(scheduler, "step", after=self._stepped))

    def _started(self, scheduler: Any) -> None:
        first = getattr(scheduler, "step_index", None)
        if first is None:
            first = getattr(scheduler, "begin_index", None) or 0
        self._steps_done = int(first)
        self._clock.start(len(scheduler.timesteps), self._steps_done)

    def _stepped(self, scheduler: Any) -> None:
        self._steps_done += 1
        index = getattr(scheduler, "step_index", None)
        self._clock.step(self._steps_done if index is None else int(index))

    @contextlib.contextmanager
    def _context(self, name: str) -> Iterator[None]:
        self._follow_scheduler()
        with self._clock.branch(name):
            yield

    def _follow_scheduler(self) -> None:
        """Users replace `pipe.scheduler`; the new one is hooked at the next call."""
        pipe = self._pipe()
        scheduler = None if pipe is None else getattr(pipe, "scheduler", None)
        if scheduler is None or any(hook.owner() is scheduler for hook in self._hooks):
            return
        self._hook_scheduler(scheduler)
        if _has_timesteps(scheduler):
            self._started(scheduler)


def _has_timesteps(scheduler: Any) -> bool:
    """Whether a generation is under way, or was."""
    timesteps = getattr(scheduler, "timesteps", None)
    return timesteps is not None and len(timesteps) > 0


class MethodHook:
    """Stands for one bound method of one instance; calls it, and tells the driver.

    A deep copy of the instance gets the plain method (pipelines copy their scheduler for a second stream).
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        after: Callable[[Any], None] | None = None,
        around: Callable[[str], contextlib.AbstractContextManager[None]] | None = None,
    ) -> None:
        self.owner = weakref.ref(owner)
        self._name = name
        self._after = after
        self._around = around
        self._before = vars(owner).get(name)
        functools.update_wrapper(self, getattr(type(owner), name))
        self.__signature__ = inspect.signature(getattr(owner, name))
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method, then the news of it."""
        owner = self.owner()
        method = self._before or getattr(type(owner), self._name).__get__(owner)
        if self._around is not None:
            return self._both(str(args[0] if args else kwargs.get("name")), method(*args, **kwargs))
        result = method(*args, **kwargs)
        if self._after is not None:
            self._after(owner)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self.owner()))
        return copy.copy(self) if twin is None else getattr(type(twin), self._name).__get__(twin)

    def remove(self) -> None:
        """Give the method back, unless somebody else has wrapped it since."""
        owner = self.owner()
        if owner is None or vars(owner).get(self._name) is not self:
            return
        if self._before is None:
            delattr(owner, self._name)
        else:
            setattr(owner, self._name, self._before)

    @contextlib.contextmanager
    def _both(self, name: str, inner: contextlib.AbstractContextManager[Any]) -> Iterator[Any]:
        assert self._around is not None, "called for context managers only"
        with self._around(name), inner as value:
            yield value
