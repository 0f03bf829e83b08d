"""diffusers pipelines as the source of time.

`scheduler.set_timesteps` starts a generation (`set_begin_index` in the middle of it), `scheduler.step` moves to the
next step, and the transformer's `cache_context` names the CFG branch. They are wrapped on the instances that a pipeline
holds, and unwrapped again by `detach`; so is `progress_bar`, by which a pipeline shows that it runs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from types import GeneratorType
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

    A second pipeline with the same transformer drives the same clock, by its own scheduler.

    Raises:
        SparseAttentionError: it is no diffusers pipeline, has no scheduler or no transformer; or another clock drives a
            transformer of it.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise SparseAttentionError(
            "attach needs a diffusers pipeline",
            type(pipe).__name__,
            "For a bare model use `with sparse_compile.denoising(model, steps=...)`.",
        )
    models = denoisers(pipe)
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not models:
        raise SparseAttentionError(
            "attach needs a pipeline with a scheduler and a transformer",
            type(pipe).__name__,
            "Drive the model by hand with `sparse_compile.denoising(model, steps=...)`.",
        )
    known = clock_of(pipe)
    if known is not None and _drives(known, scheduler):
        return known
    clock = known or _clock_for(list(models.values()))
    driver = PipelineDriver(pipe, clock)
    REGISTRY.attach(clock, driver)
    driver.attach(scheduler, [] if known else list(models.values()))
    return clock


def _clock_for(models: list[nn.Module]) -> Clock:
    """A clock that has claimed all of these models, or none."""
    clock = Clock()
    try:
        for model in models:
            REGISTRY.claim(model, clock)
    except SparseAttentionError:
        REGISTRY.release(clock)
        raise
    return clock


def _drives(clock: Clock, scheduler: Any) -> bool:
    drivers = [source for source in REGISTRY.sources(clock) if isinstance(source, PipelineDriver)]
    return any(driver.drives(scheduler) for driver in drivers)


def clock_of(pipe: DiffusionPipeline) -> Clock | None:
    """The clock that a pipeline drives, if any."""
    clocks = map(REGISTRY.attached_clock, denoisers(pipe).values())
    return next((clock for clock in clocks if clock is not None), None)


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
            scheduler, known = getattr(owner, "scheduler", None), clock_of(owner)
            if scheduler is None or not denoisers(owner) or (known is not None and _drives(known, scheduler)):
                return False
            return _attach_found(owner)
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _attach_found(pipe: DiffusionPipeline) -> bool:
    """Attach a pipeline that nobody asked to attach: what stands in the way is a log line, not an error."""
    try:
        clock = attach_pipeline(pipe)
    except SparseAttentionError as error:
        log.warning("%s is not attached: %s", type(pipe).__name__, error)
        return False
    name = _open_branch(list(denoisers(pipe).values()))
    if name is not None:
        clock.join(name)
    log.info("attached %s, found on the call stack", type(pipe).__name__)
    return True


def _open_branch(models: list[nn.Module]) -> str | None:
    """The name that an open `cache_context` of one of the models was given, before there was a clock to hear of it.

    diffusers passes it on to hooks and keeps it nowhere; what still holds it is the generator of the context itself.
    """
    # `type`, since isinstance asks a weak proxy for its class, and raises where its object is gone.
    for generator in (item for item in gc.get_objects() if type(item) is GeneratorType):
        frame = generator.gi_frame
        if frame is None or generator.gi_code.co_name != "cache_context":
            continue
        if any(frame.f_locals.get("self") is model for model in models):
            name = frame.f_locals.get("name")
            return name if isinstance(name, str) else None
    return None


class PipelineDriver:
    """Moves a Clock when a pipeline's scheduler is called. Holds the pipeline weakly."""

    def __init__(self, pipe: DiffusionPipeline, clock: Clock) -> None:
        self._pipe = weakref.ref(pipe, self._pipe_died)
        self._clock = clock
        self._hooks: list[MethodHook] = []
        self._scheduler_hooks: list[MethodHook] = []
        self._steps_done = 0

    def attach(self, scheduler: Any, models: list[nn.Module]) -> None:
        """Hook the scheduler and the models; a generation that is under way is joined."""
        self._drive_by(scheduler)
        self._hooks.append(MethodHook(self._pipe(), "progress_bar", after=self._follow_scheduler))
        for model in models:
            if hasattr(model, "cache_context"):
                self._hooks.append(MethodHook(model, "cache_context", around=self._context))

    def detach(self) -> None:
        """Give all methods back."""
        for hook in (*self._hooks, *self._scheduler_hooks):
            hook.remove()
        self._hooks.clear()
        self._scheduler_hooks.clear()

    def belongs_to(self, pipe: object) -> bool:
        """Whether it is the driver of this pipeline."""
        return self._pipe() is pipe

    def drives(self, scheduler: Any) -> bool:
        """Whether the clock is moved when this scheduler is."""
        return any(hook.owner() is scheduler for hook in self._scheduler_hooks)

    def _drive_by(self, scheduler: Any) -> None:
        for hook in self._scheduler_hooks:
            hook.remove()
        self._scheduler_hooks = [
            MethodHook(scheduler, "set_timesteps", after=self._started),
            MethodHook(scheduler, "step", after=self._stepped),
        ]
        if hasattr(scheduler, "set_begin_index"):
            self._scheduler_hooks.append(MethodHook(scheduler, "set_begin_index", after=self._started))
        if _has_timesteps(scheduler):
            self._started(scheduler)

    def _pipe_died(self, _: object) -> None:
        """Leave the clock to the other pipelines of the same transformer, or stop it."""
        drivers = [source for source in REGISTRY.sources(self._clock) if isinstance(source, PipelineDriver)]
        if all(driver._pipe() is None for driver in drivers):
            REGISTRY.detach(self._clock)
            return
        for hook in self._scheduler_hooks:
            hook.remove()
        self._scheduler_hooks.clear()

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
        self._follow_scheduler(self._pipe())
        with self._clock.branch(name):
            yield

    def _follow_scheduler(self, pipe: DiffusionPipeline | None) -> None:
        """Users replace `pipe.scheduler`: the new one is hooked when the pipeline runs (it shows its progress)."""
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is not None and not self.drives(scheduler):
            self._drive_by(scheduler)


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
        return self if twin is None else getattr(type(twin), self._name).__get__(twin)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner(), self._name)

    def remove(self) -> None:
        """Give the method back; where somebody else has wrapped it since, just pass calls on."""
        self._after = self._around = None
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
