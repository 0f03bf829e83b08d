"""What users call: give a model a clock, switch a pipeline over, ask what happened."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sparse_compile.compiler import torch_internals
from sparse_compile.config import Config
from sparse_compile.errors import SparseAttentionError
from sparse_compile.runtime.clock import Clock
from sparse_compile.runtime.registry import REGISTRY
from sparse_compile.runtime.report import Report, build_report

BACKEND = "sparse_attn"


def attach(pipe: object) -> Clock:
    """Let a diffusers pipeline tell the time to its transformers.

    A pipeline is also found by itself, on the call stack, when its transformer is compiled or first runs; attaching it
    beforehand makes the very first call of the first step part of a named branch too.

    Args:
        pipe: a diffusers pipeline with a scheduler and one or more transformers.

    Raises:
        SparseAttentionError: it is no such pipeline, or another clock drives its transformer.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise SparseAttentionError(
            "attach needs diffusers",
            type(pipe).__name__,
            "Install it (pip install diffusers), or use `sparse_compile.denoising(model, steps=...)`.",
        )
    from sparse_compile.integrations.diffusers import attach_pipeline

    return attach_pipeline(pipe)


@contextlib.contextmanager
def denoising(model: nn.Module, steps: int) -> Iterator[Clock]:
    """Tell the time to a bare model for one generation.

        with sparse_compile.denoising(model, steps=50) as clock:
            for t in timesteps:
                with clock.branch("cond"):
                    noise = model(x, t, text)
                x = …
                clock.step()

    Args:
        model: the module, compiled or not; its Parameters are claimed until the block ends.
        steps: denoising steps.

    Raises:
        SparseAttentionError: another clock drives the model, or fewer than one step.
    """
    if not isinstance(model, nn.Module):
        raise SparseAttentionError("denoising needs a module", type(model).__name__, "Give the transformer itself.")
    clock = Clock()
    REGISTRY.claim(_original(model), clock)
    try:
        clock.start(steps)
        yield clock
    finally:
        REGISTRY.release(clock)


def enable(pipe: Any, *, regional: bool = False, **options: object) -> Clock:
    """Compile a pipeline's transformers in place with this backend, and attach the pipeline.

    Args:
        pipe: a diffusers pipeline.
        regional: compile the repeated blocks only (faster to compile; not every model names them).
        options: see `Config`.

    Raises:
        SparseAttentionError: as `attach`; or an option is unknown or out of range.
    """
    Config.from_options(options)
    clock = attach(pipe)
    modules = [module for model in _models_of(pipe, "enable").values() for module in model.modules()]
    before = [torch_internals.compiled_call(module) for module in modules]
    try:
        for model in _models_of(pipe, "enable").values():
            if regional:
                model.compile_repeated_blocks(backend=BACKEND, options=options)  # type: ignore[operator]  # diffusers' method
            else:
                model.compile(backend=BACKEND, options=options)
    except Exception:
        _note_compiled(modules, before)
        disable(pipe)
        raise
    _note_compiled(modules, before)
    return clock


def _note_compiled(modules: list[nn.Module], before: list[object]) -> None:
    """Remember which modules were compiled since ``before`` was taken."""
    after = map(torch_internals.compiled_call, modules)
    REGISTRY.enabled.update(m for m, old, new in zip(modules, before, after, strict=True) if new is not old)


def disable(pipe: Any) -> None:
    """Undo `enable` and `attach`: what `enable` compiled runs as it was, and nothing drives a clock.

    Raises:
        SparseAttentionError: it is no pipeline.
    """
    for model in _models_of(pipe, "disable").values():
        clock = REGISTRY.attached_clock(model)
        if clock is not None:
            REGISTRY.detach(clock)
        for module in REGISTRY.enabled.intersection(model.modules()):
            torch_internals.undo_compile_in_place(module)
            REGISTRY.enabled.discard(module)


def explain(model_or_pipe: Any) -> Report:
    """What was rewritten, why the rest was not, and what each step of each generation cost and kept.

    Args:
        model_or_pipe: a module (compiled or not) or a diffusers pipeline.

    Raises:
        SparseAttentionError: it is neither.
    """
    return build_report(_models_of(model_or_pipe, "explain"), REGISTRY)


def _models_of(model_or_pipe: Any, caller: str) -> Mapping[str, nn.Module]:
    if isinstance(model_or_pipe, nn.Module):
        return {"": _original(model_or_pipe)}
    components = getattr(model_or_pipe, "components", None)
    if not isinstance(components, dict):
        raise SparseAttentionError(
            f"{caller} needs a module or a diffusers pipeline",
            type(model_or_pipe).__name__,
            "Give the transformer or the pipeline.",
        )
    from sparse_compile.integrations.diffusers import denoisers

    models = denoisers(model_or_pipe)
    return {"": next(iter(models.values()))} if len(models) == 1 else models


def _original(model: nn.Module) -> nn.Module:
    """The module below torch.compile's wrapper."""
    original: nn.Module = getattr(model, "_orig_mod", model)
    return original
