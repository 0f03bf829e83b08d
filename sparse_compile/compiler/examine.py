"""What compiling a model would find, without compiling it: the graphs of one call, classified and run as they are.

An eager call beforehand counts every attention, so that what no graph shows (behind graph breaks, outside of what is
compiled) is known by name. Fake tensors are enough for both, see `torch_internals.fake_mode`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from sparse_compile.compiler import torch_internals
from sparse_compile.compiler.in_place import CompiledInPlace
from sparse_compile.compiler.pipeline import find_sites, input_positions
from sparse_compile.config import Config
from sparse_compile.runtime.report import SiteRecord, layer_name
from sparse_compile.sites import Site
from sparse_compile.strategies.base import ExpectsEffort, Planner
from sparse_compile.strategies.catalogue import load_strategy

log = logging.getLogger(__name__)

Call = Mapping[str, Any]
"""The keyword arguments of one call of a model."""


@dataclass(frozen=True)
class ExaminedSite:
    """One attention of one call, as a report shows it, and what the strategy would spend on it."""

    record: SiteRecord
    key_groups: int | None
    """Groups of keys in each head; None where it stays dense, or the strategy does not tell."""
    state_bytes: int
    """What it keeps for each branch; 0 where it stays dense."""


@dataclass
class Piece:
    """One graph of the call."""

    sites: int
    """Attentions in it."""
    ended: str
    """Why Dynamo ended the graph before the model's own end; empty where it did not."""
    runs: int = 0
    """How often the call ran it: the blocks of a model may share one."""


@dataclass
class Examination:
    """What one call of a model showed."""

    pieces: list[Piece] = field(default_factory=list)
    sites: list[ExaminedSite] = field(default_factory=list)
    """In the order in which the call ran them, one for each attention of each block."""
    eager: Counter[str] = field(default_factory=Counter)
    """Attentions of an eager call, by the module that computes them."""
    failure: str = ""
    """Why the call ended early; empty where it did not."""

    @property
    def hidden(self) -> dict[str, int]:
        """Attentions that no graph shows, by module."""
        shown = Counter(site.record.layer for site in self.sites)
        missing = {}
        for module, calls in self.eager.items():
            # The layer of a site is named after its projection, which may lie one module above or below the call.
            seen = sum(count for layer, count in shown.items() if _same_place(layer, module))
            if seen < calls:
                missing[module] = calls - seen
        return missing if len(self.sites) < self.eager.total() else {}


def _same_place(layer: str, module: str) -> bool:
    return layer == module or layer.startswith(f"{module}.") or module.startswith(f"{layer}.")


def examine(
    model: nn.Module,
    call: Call,
    config: Config,
    eager: Counter[str],
    *,
    parts: Sequence[nn.Module] = (),
    fullgraph: bool = False,
) -> Examination:
    """Capture and classify the graphs of one call. A model that does not get through it is told in `failure`.

    Args:
        model: the module; nothing of it is changed, but all that was compiled in this process is forgotten
            (`torch.compiler.reset`).
        call: its keyword arguments.
        config: the options.
        eager: what `attention_calls` counted of the same call.
        parts: what is compiled one by one, of the model; none: the whole.
        fullgraph: for the whole model: a graph break is an error, and shapes that depend on data stay in the graph,
            which is not run.
    """
    found = Examination(eager=eager)
    planner = Planner(load_strategy(config.method), config)
    recorder = _Recorder(found, planner, _names(model), run=not fullgraph)
    torch.compiler.reset()
    try:
        with torch.no_grad(), torch_internals.data_dependent_shapes(fullgraph):
            if parts:
                compiled = CompiledInPlace(parts, backend=recorder)
                try:
                    model(**call)
                finally:
                    compiled.undo()
            else:
                torch.compile(model, backend=recorder, fullgraph=fullgraph)(**call)
    except _SeenError:
        log.debug("the graph is not run")
    except Exception as error:  # the user's model and arguments: the report tells
        log.debug("the call under examination failed", exc_info=True)
        found.failure = first_line(error)
    finally:
        torch.compiler.reset()
    return found


def _names(model: nn.Module) -> dict[int, str]:
    """The module around the projection of each Parameter, by the Parameter's identity."""
    return {id(parameter): layer_name("", name) for name, parameter in model.named_parameters()}


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# ---------------------------------------------------------------------- what an eager call computes


def attention_calls(model: nn.Module, call: Call) -> Counter[str]:
    """Calls of ``scaled_dot_product_attention`` in one call of a model, by the innermost module that makes them."""
    names = {module: name for name, module in model.named_modules()}
    inside: list[str] = []
    found: Counter[str] = Counter()

    class Count(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention:
                found[inside[-1] if inside else ""] += 1
            return func(*args, **(kwargs or {}))

    def enter(module: nn.Module, _: Any) -> None:
        inside.append(names[module])

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        inside.pop()

    hooks = [module.register_forward_pre_hook(enter) for module in names]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in names]
    try:
        with torch.no_grad(), Count():
            model(**call)
    finally:
        for hook in hooks:
            hook.remove()
    return found


# ---------------------------------------------------------------------- what the graphs show


class _SeenError(Exception):
    """Ends a call whose graph is classified, and not to be run."""


class _Recorder:
    """A backend that classifies each graph, runs it as it is, and notes the layers of each run.

    Args:
        found: where to write.
        planner: the strategy and its options.
        names: of the modules, by the identity of their Parameters.
        run: whether graphs are run; without, the first one is all that is seen.
    """

    def __init__(self, found: Examination, planner: Planner, names: Mapping[int, str], *, run: bool) -> None:
        self._found = found
        self._planner = planner
        self._names = names
        self._run = run

    def __call__(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Classify a graph; what comes back runs it."""
        sites = find_sites(graph_module, inputs, torch_internals.graph_inputs(graph_module), self._planner)
        positions = input_positions(graph_module)
        examined = [(None if s.owner is None else positions[s.owner], self._examined(s)) for s in sites]
        piece = Piece(len(sites), torch_internals.break_reason(graph_module))
        self._found.pieces.append(piece)
        forward = graph_module.forward

        def run(*args: Any) -> Any:
            piece.runs += 1
            for place, site in examined:
                layer = None if place is None else self._names.get(id(args[place]))
                record = site.record if layer is None else replace(site.record, layer=layer)
                self._found.sites.append(replace(site, record=record))
            if not self._run:
                raise _SeenError
            return forward(*args)

        return run

    def _examined(self, site: Site) -> ExaminedSite:
        record = replace(SiteRecord.of(site, ""), kernel=None)
        if not site.sparse:
            return ExaminedSite(record, None, 0)
        strategy, config = self._planner.strategy, self._planner.config
        groups = strategy.effort(site, config).key_groups if isinstance(strategy, ExpectsEffort) else None
        specs = strategy.state(site, config).values()
        return ExaminedSite(record, groups, sum(_bytes(spec.shape, spec.dtype) for spec in specs))


def _bytes(shape: Sequence[int | torch.SymInt], dtype: torch.dtype) -> int:
    sizes = [size for size in shape if isinstance(size, int)]
    return torch.Size(sizes).numel() * dtype.itemsize if len(sizes) == len(shape) else 0
