"""Finds diffusers pipelines, and gives them the clocks of their transformers."""

from __future__ import annotations

import gc
import logging
from types import GeneratorType
from typing import Any

import diffusers
from torch import nn

from sparse_compile.errors import SparseAttentionError
from sparse_compile.integrations.method_hook import has_method
from sparse_compile.integrations.pipeline_driver import PipelineDriver
from sparse_compile.integrations.pipeline_frames import PIPELINES, local_variable, nearest_pipeline
from sparse_compile.oldest_versions import is_too_old, oldest
from sparse_compile.runtime.clock import Clock
from sparse_compile.runtime.registry import REGISTRY

log = logging.getLogger(__name__)

LEAST_VERSION = oldest("diffusers")
"""Of diffusers: the oldest one whose pipelines the tests drive; the extras of the package ask for the same."""

DENOISERS = ("transformer", "unet", "controlnet", "prior")
"""Names, or beginnings of names, of the components that a pipeline calls in each step."""


def attach_pipeline(pipe: object) -> Clock:
    """Let a pipeline drive the clock of its transformers; once more changes nothing.

    A second pipeline with the same transformer drives the same clock: they take turns.

    Raises:
        SparseAttentionError: it is no diffusers pipeline, or one of a version too old; it has no transformer, or no
            scheduler with `set_timesteps` and `step`; or another clock drives a transformer of it.
    """
    check_pipeline(pipe)
    models = list(denoisers(pipe).values())
    scheduler = getattr(pipe, "scheduler", None)
    if not models or not all(has_method(scheduler, name) for name in ("set_timesteps", "step")):
        raise SparseAttentionError(
            "attach needs a pipeline with a scheduler and a transformer",
            f"{type(pipe).__name__}: scheduler {type(scheduler).__name__}, {len(models)} transformers",
            "Drive the model by hand with `sparse_compile.denoising(model, steps=...)`.",
        )
    clock = _clock_for(models)
    driver = _driver_of(clock) or PipelineDriver(clock)
    REGISTRY.attach(clock, driver)
    driver.add(pipe, models)
    return clock


def check_pipeline(pipe: object) -> None:
    """Refuse what is no pipeline, and one of a diffusers that is too old.

    Raises:
        SparseAttentionError: it is one of these.
    """
    if not isinstance(pipe, PIPELINES):
        raise SparseAttentionError(
            "attach needs a diffusers pipeline",
            type(pipe).__name__,
            "For a bare model use `with sparse_compile.denoising(model, steps=...)`.",
        )
    _check_version(diffusers.__version__)


def _check_version(installed: str) -> None:
    if is_too_old("diffusers", installed):
        raise SparseAttentionError(
            f"pipelines are driven from diffusers {LEAST_VERSION} on",
            installed,
            f"Upgrade it (pip install 'diffusers>={LEAST_VERSION}'), or drive the model by hand with"
            " `sparse_compile.denoising(model, steps=...)`.",
        )


def _clock_for(models: list[nn.Module]) -> Clock:
    """The one clock that has claimed all of these models, made where there is none.

    Raises:
        SparseAttentionError: a model is another clock's; then nothing has changed.
    """
    models = list(dict.fromkeys(models))
    known = list(dict.fromkeys(clock for model in models if (clock := REGISTRY.attached_clock(model)) is not None))
    if len(known) > 1:
        raise SparseAttentionError(
            "the transformers of a pipeline are driven by one clock",
            f"{len(known)} clocks, of other pipelines around them",
            "`sparse_compile.disable` those pipelines, and attach the one that has all of the transformers first.",
        )
    clock = known[0] if known else Clock()
    free = [model for model in models if REGISTRY.attached_clock(model) is None]
    for model in free:
        REGISTRY.check_unclaimed(model)
    for model in free:
        REGISTRY.claim(model, clock)
    return clock


def _driver_of(clock: Clock) -> PipelineDriver | None:
    return next((source for source in REGISTRY.sources(clock) if isinstance(source, PipelineDriver)), None)


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The models that a pipeline calls in each step, by component name; compiled ones as their originals."""
    found = {}
    for name, component in vars(pipe).items():  # not `components`, which fails where one was registered later
        if isinstance(component, nn.Module) and name.startswith(DENOISERS):
            found[name] = getattr(component, "_orig_mod", component)
    return found


def find_on_stack() -> bool:
    """Attach the pipeline whose call we are in; whether there is one that was not attached before."""
    found = nearest_pipeline()
    if found is None:
        return False
    pipe, frame = found
    models = list(denoisers(pipe).values())
    clocks = [clock for model in models if (clock := REGISTRY.attached_clock(model)) is not None]
    if any((driver := _driver_of(clock)) is not None and driver.follows(pipe) for clock in clocks):
        return False
    try:
        clock = attach_pipeline(pipe)
    except SparseAttentionError as error:  # nobody asked to attach it: what stands in the way is a log line
        if pipe not in REGISTRY.refused:
            REGISTRY.refused.add(pipe)
            log.warning("%s is not attached: %s", type(pipe).__name__, error)
        return False
    driver = _driver_of(clock)
    assert driver is not None, "attaching makes one"
    driver.join(local_variable(frame, "progress_bar"))
    name = _open_branch(models)
    if name is not None:
        clock.join(name)
    log.info("attached %s, found on the call stack", type(pipe).__name__)
    return True


def _open_branch(models: list[nn.Module]) -> str | None:
    """The name that an open `cache_context` of one of the models was given, before there was a clock to hear of it.

    diffusers passes it on to hooks and keeps it nowhere; what still holds it is the generator of the context itself.
    """
    for generator in (item for item in gc.get_objects() if type(item) is GeneratorType):
        frame = generator.gi_frame
        if frame is None or generator.gi_code.co_name != "cache_context":
            continue
        if any(local_variable(frame, "self") is model for model in models):
            name = local_variable(frame, "name")
            return name if isinstance(name, str) else None
    return None
