"""The body of `enable` and `disable`: compile a pipeline's transformers in place, attach its clock, and undo both."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from sparse_compile.compiler.in_place import CompiledInPlace, compiled_part
from sparse_compile.errors import SparseAttentionError
from sparse_compile.integrations.hooked_forward import forward_slots
from sparse_compile.integrations.repeated_blocks import Parts, parts_to_compile
from sparse_compile.runtime.clock import Clock
from sparse_compile.runtime.enabled import Compilation, Enabled
from sparse_compile.runtime.registry import Registry

log = logging.getLogger(__name__)

BACKEND = "sparse_attn"
TRANSFORMER = "transformer"
"""How the names of the components begin without which there is nothing to enable."""


def enable_pipeline(pipe: Any, compilation: Compilation, options: Mapping[str, object], registry: Registry) -> Clock:
    """Compile a pipeline's transformers and attach it; on an error, nothing of it stays.

    What it replaces, the same transformers enabled with other options, is undone first, and lost on a later error.

    Args:
        pipe: a diffusers pipeline.
        compilation: how.
        options: what `compilation.config` was made of, for the backend.
        registry: where it is noted.

    Raises:
        SparseAttentionError: see `sparse_compile.enable`.
    """
    from sparse_compile.integrations.diffusers import attach_pipeline, check_pipeline

    check_pipeline(pipe)
    models = _transformers(pipe)
    _check_untouched(models, registry)
    parts = {name: parts_to_compile(model, compilation.regional) for name, model in models.items()}
    if _is_enabled_otherwise(pipe, models.values(), compilation, registry):
        disable_models(pipe, models.values(), registry)
    new = {name: model for name, model in models.items() if model not in registry.enabled}
    try:
        for name, model in new.items():
            registry.enabled[model] = _compiled(name, model, parts[name], compilation, options)
        clock = attach_pipeline(pipe)
    except Exception:
        for model in new.values():
            if model in registry.enabled:
                registry.enabled.pop(model).undo()
        raise
    for model in models.values():
        registry.enabled[model].pipelines.add(pipe)
    return clock


def disable_models(pipe: Any, models: Iterable[nn.Module], registry: Registry) -> None:
    """Undo `enable_pipeline` and every other way in which a pipeline drives a clock.

    Args:
        pipe: a diffusers pipeline.
        models: those that it calls now; others that it was enabled with are found.
        registry: what is known of them.
    """
    had = [model for model, enabled in registry.enabled.items() if pipe in enabled.pipelines]
    for clock in registry.clocks_moved_for(pipe):
        registry.detach(clock)
    for model in dict.fromkeys([*models, *had]):
        clock_of_another = registry.attached_clock(model)  # it shares the model
        if clock_of_another is not None:
            registry.detach(clock_of_another)
        enabled = registry.enabled.pop(model, None)
        if enabled is not None:
            enabled.undo()


def _transformers(pipe: Any) -> dict[str, nn.Module]:
    """The models to compile, by component name."""
    from sparse_compile.integrations.diffusers import denoisers

    models = denoisers(pipe)
    if not any(name.startswith(TRANSFORMER) for name in models):
        raise SparseAttentionError(
            "enable needs a pipeline with a transformer",
            f"{type(pipe).__name__} with {', '.join(models)}",
            "For another model, compile it with backend='sparse_attn' and attach the pipeline.",
        )
    for name, model in models.items():
        if getattr(pipe, name) is not model:
            raise _compiled_already(name)
    return models


def _check_untouched(models: Mapping[str, nn.Module], registry: Registry) -> None:
    """Refuse a model of which somebody else has compiled a part."""
    for name, model in models.items():
        part = None if model in registry.enabled else compiled_part(model)
        if part is not None:
            raise _compiled_already(f"{name}.{part}" if part else name)


def _is_enabled_otherwise(pipe: Any, models: Iterable[nn.Module], compilation: Compilation, registry: Registry) -> bool:
    """Whether a model of this pipeline was enabled in another way, so that this is to be undone."""
    known = [enabled for model in models if (enabled := registry.enabled.get(model)) is not None]
    others = [enabled for enabled in known if enabled.compilation != compilation]
    if any(owner is not pipe for enabled in others for owner in enabled.pipelines):
        raise SparseAttentionError(
            "pipelines that share a transformer are enabled with the same options",
            type(pipe).__name__,
            "Use those of the other pipeline, or `disable` it first.",
        )
    return bool(others)


def _compiled(
    name: str, model: nn.Module, parts: Parts, compilation: Compilation, options: Mapping[str, object]
) -> Enabled:
    """Compile the chosen parts of a model, and say which these are."""
    how = {"options": dict(options), "fullgraph": compilation.fullgraph, "dynamic": compilation.dynamic}
    compiled = CompiledInPlace(parts.modules, forward_slots, backend=BACKEND, **how)
    log.info("%s (%s): compiled is %s", name, type(model).__name__, parts.choice)
    if parts.warning:
        log.warning("%s: %s", name, parts.warning)
    return Enabled(compilation, parts.choice, parts.warning, compiled.undo)


def _compiled_already(name: str) -> SparseAttentionError:
    return SparseAttentionError(
        "enable compiles a pipeline's models itself",
        f"{name}, compiled already",
        "Give it the model as it was, or keep your own torch.compile with backend='sparse_attn' and `attach` the"
        " pipeline.",
    )
