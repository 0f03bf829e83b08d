"""What users call: give a model a clock, switch a pipeline over, ask what happened."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sparse_compile.config import Config
from sparse_compile.enabling import disable_models, enable_pipeline
from sparse_compile.errors import SparseAttentionError
from sparse_compile.runtime.clock import Clock
from sparse_compile.runtime.enabled import Compilation
from sparse_compile.runtime.registry import REGISTRY
from sparse_compile.runtime.report import Report, build_report


def attach(pipe: object) -> Clock:
    """Let a diffusers pipeline tell the time to its transformers.

    A pipeline is also found by itself, on the call stack, when its transformer is compiled or first runs; attaching it
    beforehand makes the very first call of the first step part of a named branch too.

    Args:
        pipe: a diffusers pipeline with a scheduler and one or more transformers.

    Raises:
        SparseAttentionError: it is no such pipeline, or another clock drives its transformer.
    """
    _require_diffusers("attach", pipe)
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


def enable(
    pipe: Any,
    *,
    regional: bool | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **options: object,
) -> Clock:
    """Compile a pipeline's transformers in place with this backend, and attach the pipeline.

    Once more with the same arguments changes nothing; with others, what was enabled is undone first. `explain` says
    what was compiled of each model, and why that.

    Args:
        pipe: a diffusers pipeline.
        regional: compile the repeated blocks one by one, which is faster than the whole model at once. None: where a
            model names them and all of its attention lies in them. Attention outside of them would not be seen.
        fullgraph: as for `torch.compile`: a graph break is an error.
        dynamic: as for `torch.compile`: True compiles once for a range of sizes.
        options: see `Config`.

    Raises:
        SparseAttentionError: as `attach`; an option is unknown or out of range; the pipeline has no transformer;
            ``regional=True`` and a model names no repeated blocks; a model was compiled by somebody else, or enabled
            with other options for another pipeline.
    """
    compilation = Compilation(Config.from_options(options), regional, fullgraph, dynamic)
    _require_diffusers("enable", pipe)
    return enable_pipeline(pipe, compilation, options, REGISTRY)


def disable(pipe: Any) -> None:
    """Undo `enable` and `attach`: everything is as it was, also for other pipelines with the same transformers.

    Models that the pipeline was enabled with and has no more are found too. What somebody else has compiled stays.

    Raises:
        SparseAttentionError: it is no pipeline.
    """
    disable_models(pipe, _models_of(pipe, "disable").values(), REGISTRY)


def explain(model_or_pipe: Any) -> Report:
    """What was rewritten, why the rest was not, and what each step of each generation cost and kept.

    Args:
        model_or_pipe: a module (compiled or not) or a diffusers pipeline.

    Raises:
        SparseAttentionError: it is neither.
    """
    return build_report(_models_of(model_or_pipe, "explain"), REGISTRY)


def _require_diffusers(caller: str, pipe: object) -> None:
    if importlib.util.find_spec("diffusers") is None:
        raise SparseAttentionError(
            f"{caller} needs diffusers",
            type(pipe).__name__,
            "Install it (pip install diffusers), or use `sparse_compile.denoising(model, steps=...)`.",
        )


def _models_of(model_or_pipe: Any, caller: str) -> Mapping[str, nn.Module]:
    if isinstance(model_or_pipe, nn.Module):
        return {"": _original(model_or_pipe)}
    if not hasattr(type(model_or_pipe), "components"):
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
