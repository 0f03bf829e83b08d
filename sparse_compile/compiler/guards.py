"""Tie a compiled graph to the phase it was written for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from torch import fx

from sparse_compile.compiler import torch_internals
from sparse_compile.compiler.torch_internals import Scope
from sparse_compile.phases import Phase
from sparse_compile.runtime.registry import Registry
from sparse_compile.strategies.base import Planner

log = logging.getLogger(__name__)


def add_phase_guard(
    owners: Sequence[fx.Node], phase: Phase, kept_dense: tuple[bool, ...], planner: Planner, registry: Registry
) -> None:
    """Make Dynamo use the graph under compilation only while its layers are in ``phase``.

    Args:
        owners: the Parameter placeholders of the graph's layers, in order; the first layer that is not kept dense
            speaks for all of them, since they share a clock.
        phase: what the graph was written for.
        kept_dense: which layers it was written to leave dense. Other layers may share the code (two attentions in each
            block, the first block kept dense) and need a graph of their own.
        planner: whose layers.
        registry: where the layers are found, by the Parameters of the frame at hand.
    """
    text = f"sparse_attn.phase == {str(phase)!r}"
    torch_internals.add_root_guard(owners[0], phase_check(owners, phase, kept_dense, planner, registry), text)


def phase_check(
    owners: Sequence[fx.Node], phase: Phase, kept_dense: tuple[bool, ...], planner: Planner, registry: Registry
) -> Callable[[Scope, Scope], bool]:
    """The guard's function of a frame's locals and globals.

    It keeps no frame, no Parameter and no Layer, changes nothing, and never raises: Dynamo would take an exception for
    False and compile without end.
    """
    names = [torch_internals.source_name(owner) for owner in owners]
    expressions = [compile(name, "<sparse_attn guard>", "eval") for name in names]
    failed = False

    def check(f_locals: Scope, f_globals: Scope) -> bool:
        nonlocal failed
        scope = {"L": f_locals, "G": f_globals}

        def parameters() -> Iterator[object]:
            for expression in expressions:
                yield eval(expression, scope)

        try:
            return registry.runs(parameters(), len(expressions), planner, phase, kept_dense)
        except Exception:  # see above: a guard must not raise, whatever the frame holds
            if not failed:
                failed = True
                log.exception("the phase guard could not read the frame; the model is compiled again")
            return False

    return check
