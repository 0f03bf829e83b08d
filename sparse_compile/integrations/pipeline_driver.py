"""Moves a Clock as the denoising loops of diffusers pipelines go on.

`scheduler.set_timesteps` starts a generation (`set_begin_index` in the middle of it), `scheduler.step` moves to the
next step, and the transformer's `cache_context` names the CFG branch. Where a pipeline steps copies of its scheduler
(SkyReels' diffusion forcing), its progress bar tells instead. The bar's end is the end of the generation, whether the
loop came to its last step or was left by an exception.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from sparse_compile.integrations.method_hook import MethodHook, has_method
from sparse_compile.integrations.pipeline_frames import nearest_pipeline
from sparse_compile.runtime.clock import Clock, one_at_a_time
from sparse_compile.runtime.registry import REGISTRY


class PipelineDriver:
    """The pipelines around the models of one Clock, which take turns in moving it. Holds all of them weakly.

    Methods are wrapped on the instances that a pipeline holds, and unwrapped again by `detach`.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pipes: list[weakref.ref[Any]] = []
        self._hooks: list[MethodHook] = []
        self._scheduler_hooks: list[MethodHook] = []
        self._progress = Progress()
        self._scheduler: weakref.ref[Any] | None = None
        """Whose generation it is."""
        self._caller: weakref.ref[Any] | None = None
        """The pipeline that started the generation; None where somebody's own loop did."""
        self._thread: int | None = None
        """In which it runs; None where no loop was seen yet."""
        self._steps_done = 0
        clock.recognises = self._recognises

    def add(self, pipe: Any, models: list[nn.Module]) -> None:
        """Follow a pipeline, and hear of the branches of these models; what is under way is joined.

        Once more hooks only what is new: another scheduler, another model.
        """
        if not self.belongs_to(pipe):
            self._pipes.append(weakref.ref(pipe, self._pipe_died))
        self._hook(pipe, "progress_bar", after=self._loop_begins)
        for model in models:
            self._hook(model, "cache_context", around=self._context)
        self._follow_schedulers()

    def _hook(self, owner: Any, name: str, **how: Any) -> None:
        """Hook a method that an object may have, once."""
        if has_method(owner, name) and not any(hook.owner() is owner for hook in self._hooks):
            self._hooks.append(MethodHook(owner, name, **how))

    def join(self, bar: Any) -> None:
        """Follow the progress bar of a loop that had begun before its pipeline was found, if that has one."""
        if _is_updated(bar):
            self._progress.open(bar, self._bar_moved, self._loop_ends)

    def belongs_to(self, pipe: object) -> bool:
        """Whether this is one of the pipelines."""
        return any(ref() is pipe for ref in self._pipes)

    def follows(self, pipe: Any) -> bool:
        """Whether this pipeline, with the scheduler it has now, moves the clock."""
        return self.belongs_to(pipe) and any(hook.owner() is pipe.scheduler for hook in self._scheduler_hooks)

    def detach(self) -> None:
        """Give all methods back."""
        self._clock.recognises = None
        self._progress.close()
        for hook in (*self._hooks, *self._scheduler_hooks):
            hook.remove()
        self._hooks.clear()
        self._scheduler_hooks.clear()
        self._pipes.clear()

    # ------------------------------------------------------------------ whom to follow

    def _follow_schedulers(self) -> None:
        """Hook the schedulers that the pipelines have now (users replace them), and only those."""
        pipes = [pipe for ref in self._pipes if (pipe := ref()) is not None]
        wanted = {id(pipe.scheduler): pipe.scheduler for pipe in pipes if pipe.scheduler is not None}
        hooked = {id(hook.owner()) for hook in self._scheduler_hooks}
        if hooked == wanted.keys():
            return
        for hook in self._scheduler_hooks:
            if id(hook.owner()) not in wanted:
                hook.remove()
        self._scheduler_hooks = [hook for hook in self._scheduler_hooks if id(hook.owner()) in wanted]
        for scheduler in (scheduler for key, scheduler in wanted.items() if key not in hooked):
            self._scheduler_hooks.append(MethodHook(scheduler, "set_timesteps", after=self._started))
            self._scheduler_hooks.append(MethodHook(scheduler, "step", after=self._stepped))
            if has_method(scheduler, "set_begin_index"):
                self._scheduler_hooks.append(MethodHook(scheduler, "set_begin_index", after=self._started))
            if _has_timesteps(scheduler):
                self._started(scheduler)
                if self._caller is None:  # perhaps nobody's loop: schedulers are made with timesteps
                    self._thread = None

    def _pipe_died(self, _: object) -> None:
        """Leave the clock to the other pipelines of the same transformer, or stop it."""
        self._pipes = [ref for ref in self._pipes if ref() is not None]
        if self._pipes:
            self._follow_schedulers()
        else:
            REGISTRY.detach(self._clock)

    def _recognises(self) -> bool:
        """Whether the call under way comes from the loop whose generation it is.

        Raises:
            SparseAttentionError: that loop still runs, and this is one of its kind (a pipeline's or somebody's own) in
                another thread.
        """
        self._follow_schedulers()
        found = nearest_pipeline()
        pipe = None if found is None else found[0]
        caller = None if self._caller is None else self._caller()
        same_kind = (pipe is None) == (caller is None)
        if same_kind and not self._clock.over and self._thread not in (None, threading.get_ident()):
            raise one_at_a_time("a call from another thread than the loop's that began last")
        return pipe is caller

    # ------------------------------------------------------------------ what is heard

    def _started(self, scheduler: Any, _: object = None) -> None:
        first = getattr(scheduler, "step_index", None)
        if first is None:
            first = getattr(scheduler, "begin_index", None) or 0
        self._progress.heard, self._progress.timed = True, False
        self._start(scheduler, len(scheduler.timesteps), int(first))

    def _start(self, scheduler: Any, steps: int, first: int) -> None:
        found = nearest_pipeline()
        self._caller = None if found is None else weakref.ref(found[0])
        self._thread = threading.get_ident()
        self._scheduler = weakref.ref(scheduler)
        self._steps_done = first
        self._clock.start(steps, first)

    def _stepped(self, scheduler: Any, _: object) -> None:
        self._progress.heard = True
        if self._scheduler is None or self._scheduler() is not scheduler:
            self._resume(scheduler)
            return
        self._steps_done += 1
        index = getattr(scheduler, "step_index", None)
        self._clock.step(self._steps_done if index is None else int(index))

    def _resume(self, scheduler: Any) -> None:
        """Another pipeline ran in between, and what was kept is of its generation: go on as a generation anew."""
        index = getattr(scheduler, "step_index", None)
        if index is not None and int(index) < len(scheduler.timesteps):
            self._start(scheduler, len(scheduler.timesteps), int(index))

    @contextlib.contextmanager
    def _context(self, name: str) -> Iterator[None]:
        self._follow_schedulers()
        with self._clock.branch(name):
            yield

    def _loop_begins(self, pipe: Any, bar: Any) -> None:
        self._follow_schedulers()
        if not _is_updated(bar):
            return
        again = self._progress.timed
        self._progress.open(bar, self._bar_moved, self._loop_ends)
        scheduler = pipe.scheduler
        skipped = len(scheduler.timesteps) - bar.total if _has_timesteps(scheduler) else 0
        if again:  # one more loop of a pipeline whose steps only the bar tells
            self._start(scheduler, bar.total, 0)
        elif skipped > 0 and _counted(scheduler) and self._steps_done == 0:  # video to video begins in the middle
            self._start(scheduler, len(scheduler.timesteps), skipped)

    def _bar_moved(self, bar: Any, _: object) -> None:
        progress = self._progress
        progress.updates += 1
        if not progress.heard:
            progress.timed = True
            self._clock.step(progress.updates, of=bar.total)
        progress.heard = False

    def _loop_ends(self, _bar: Any, _: object) -> None:
        self._progress.close()
        self._clock.end()


class Progress:
    """The progress bar of the denoising loop under way."""

    def __init__(self) -> None:
        self.updates = 0
        self.heard = False
        """Whether a scheduler was heard of since the bar's last update."""
        self.timed = False
        """Whether it is the bar that has moved the clock, since the schedulers are silent."""
        self._hooks: list[MethodHook] = []

    def open(self, bar: Any, moved: Any, ended: Any) -> None:
        """Hear of a bar instead of the one before."""
        self.close()
        self.updates, self.heard = 0, False
        self._hooks = [MethodHook(bar, "update", after=moved), MethodHook(bar, "close", after=ended)]

    def close(self) -> None:
        """Hear of no bar."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _is_updated(bar: object) -> bool:
    """Whether it is a progress bar that the loop updates itself, not one that it iterates over."""
    told = getattr(bar, "iterable", bar) is None and isinstance(getattr(bar, "total", None), int)
    return told and has_method(bar, "update") and has_method(bar, "close")


def _has_timesteps(scheduler: Any) -> bool:
    """Whether a generation is under way, or was."""
    timesteps = getattr(scheduler, "timesteps", None)
    return timesteps is not None and len(timesteps) > 0


def _counted(scheduler: Any) -> bool:
    """Whether the scheduler does not know its step, so that its calls are counted."""
    return not hasattr(scheduler, "step_index") and scheduler.order == 1
