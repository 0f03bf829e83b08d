"""From one Dynamo graph to a callable, stage by stage. This file is the table of contents of the compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import sparse_compile.ops  # noqa: F401 - registers the ops that the strategies write
from sparse_compile.compiler import torch_internals
from sparse_compile.compiler.cpu_cost import estimate
from sparse_compile.compiler.guards import add_phase_guard
from sparse_compile.compiler.kernel_choice import KernelChoice, choose_kernel, ready_to_run
from sparse_compile.compiler.lowering import lower
from sparse_compile.config import Config
from sparse_compile.errors import StrictModeError
from sparse_compile.kernels.cpp.isa import detected
from sparse_compile.passes.classify_sites import classify_sites
from sparse_compile.passes.insert_sparse_attention import StateInput, insert_sparse_attention
from sparse_compile.passes.match_attention import match_attention
from sparse_compile.phases import Phase
from sparse_compile.plan import TensorSpec
from sparse_compile.runtime.region import OwnedRecord, Region, Slot, Witness
from sparse_compile.runtime.registry import Registry
from sparse_compile.runtime.report import GraphRecord, SiteRecord
from sparse_compile.sites import GraphInput, Reason, Site
from sparse_compile.strategies.base import ExpectsEffort, Planner
from sparse_compile.strategies.catalogue import load_strategy

log = logging.getLogger(__name__)

OF_LENGTH = (Reason.TOO_SHORT, Reason.ONE_BLOCK)
"""Reasons that a longer video would not have."""
LIMIT_MARGIN = 3
"""Entries before Dynamo's recompile limit at which the report warns."""


def compile_graph(
    graph_module: fx.GraphModule, inputs: Sequence[Any], config: Config, registry: Registry
) -> Callable[..., Any]:
    """Compile one Dynamo graph; what comes back takes the arguments of the graph.

    Args:
        graph_module: Dynamo's graph, which is left as it is.
        inputs: its example inputs.
        config: the options.
        registry: where layers, clocks and records live.

    Raises:
        StrictModeError: under ``strict``, a site is unsupported.
    """
    planner = registry.planner(config, load_strategy(config.method))
    sites = find_sites(graph_module, inputs, torch_internals.graph_inputs(graph_module), planner)
    check_strict(sites, config)
    guard_lengths(sites, planner)
    kernel = choose_kernel(config, inputs)
    sites = [_if_it_gains(site, planner, kernel.name) for site in sites]
    if any(site.sparse for site in sites):
        kernel = ready_to_run(kernel, config)
    layers = _layers_of(sites)
    phase = _phase_of(layers, planner, registry)
    _record(graph_module, sites, phase, kernel, planner, registry)
    if not layers:
        return _witnessed(
            graph_module, lower(graph_module, inputs, config), _records(graph_module, sites, kernel), planner, registry
        )
    kept_dense = registry.kept_dense([layer.parameter for layer in layers], planner)
    add_phase_guard([layer.owner for layer in layers], phase, kept_dense, planner, registry)
    if phase is Phase.DENSE:
        compiled, slots = lower(graph_module, inputs, config), []
    else:
        rewritten, states = rewrite(graph_module, _awake(layers, kept_dense), planner, phase, kernel.name)
        examples = [example for state in states for example in state.examples]
        compiled = lower(rewritten, [*inputs, *examples], config)
        slots = _slots(states, layers)
    return _region(graph_module, compiled, phase, sites, layers, slots, kernel, planner, registry)


def find_sites(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    graph_inputs: Mapping[fx.Node, GraphInput],
    planner: Planner,
) -> list[Site]:
    """Match and classify every attention of a graph. Whatever the graph holds, the user's model must still compile."""
    try:
        sites = match_attention(graph_module, graph_inputs)
    except Exception:
        log.exception("reading a graph failed; all of its attention stays dense")
        return []
    whole_graph = _reason_for_all(inputs)
    if whole_graph is not None:
        return [site.decided(whole_graph) for site in sites]
    config = planner.config

    def unsupported_reason(site: Site) -> Reason | None:
        return planner.strategy.unsupported_reason(site, config)

    known = frozenset(torch_internals.symbolic_inputs(graph_module).values())
    classified = classify_sites(sites, config, graph_inputs, unsupported_reason)
    return [_with_known_state(site, planner, known) for site in classified]


def _with_known_state(site: Site, planner: Planner, known: frozenset[Any]) -> Site:
    """A site whose state would be shaped by data (a count of valid tokens, say) stays dense."""
    if not site.sparse:
        return site
    try:
        specs = planner.strategy.state(site, planner.config).values()
    except Exception as error:  # a strategy of a plug-in, on a graph it did not expect
        log.exception("%s cannot shape its state for %s; it stays dense", planner.strategy.name, site.name)
        return site.decided(Reason.ANALYSIS_FAILED, f"{type(error).__name__}: {error}")
    needed = frozenset().union(*(torch_internals.symbols_of(size) for spec in specs for size in spec.shape))
    return site if needed <= known else site.decided(Reason.DYNAMIC_SPLIT, "its state would be shaped by data")


def _if_it_gains(site: Site, planner: Planner, kernel: str) -> Site:
    """A site whose sparse calls cannot win on this CPU stays dense, unless ``min_tokens`` is a number.

    One of symbolic length is not judged: the graph is for all lengths, and the estimate would be for the first.
    """
    strategy = planner.strategy
    if not site.sparse or kernel != "cpu" or planner.config.min_tokens is not None:
        return site
    lengths = (node.meta["example_value"].shape[2] for node in (site.query, site.key))
    if not isinstance(strategy, ExpectsEffort) or any(isinstance(length, torch.SymInt) for length in lengths):
        return site
    try:
        expected = estimate(site, strategy.effort(site, planner.config), detected().name, torch.get_num_threads())
    except Exception:  # a strategy of a plug-in, on a graph it did not expect
        log.exception("%s cannot say what %s costs; it is not judged", strategy, site.name)
        return site
    return site.decided(Reason.NO_GAIN, str(expected)) if expected.sparse >= expected.dense else site


def guard_lengths(sites: Iterable[Site], planner: Planner) -> None:
    """Tie a graph of symbolic sizes to the side of the floor on which each of its sites lies.

    A video of another length otherwise runs what was decided for the first one: dense for ever because the first was
    short, or sparse although it is shorter than asked.
    """
    for site in sites:
        if site.layout is not None and (site.sparse or site.reason in OF_LENGTH):
            tokens = site.query.meta["example_value"].shape[-2]
            torch_internals.guard_least(site.layout.video_size(tokens), planner.fewest_tokens)


def rewrite(
    graph_module: fx.GraphModule, sites: Sequence[Site], planner: Planner, phase: Phase, kernel: str
) -> tuple[fx.GraphModule, tuple[StateInput, ...]]:
    """A copy of the graph with the strategy's ops in place of its sparse sites, and the state inputs they read."""
    copied, old_to_new = torch_internals.copy_graph(graph_module)
    result = insert_sparse_attention(
        copied,
        [site.moved(old_to_new) for site in sites],
        planner,
        phase,
        kernel,
        torch_internals.fake_mode_of(graph_module),
        torch_internals.mark_state_input,
    )
    log.debug("insert_sparse_attention: %d sites, phase %s%s", result.changed, phase, _lines(result.notes))
    log.debug("rewritten graph:\n%s", copied.graph)
    return copied, result.states


def check_strict(sites: Iterable[Site], config: Config) -> None:
    """Raise for an unsupported site under ``strict``.

    Raises:
        StrictModeError: names the first such site, its reason and the remedy.
    """
    if not config.strict:
        return
    for site in sites:
        reason = site.reason
        if reason is not None and not reason.by_design:
            remedy = reason.remedy or "Leave strict=True out to run it dense."
            raise StrictModeError(
                "under strict, every attention must be supported", f"{site.name}: {reason.sentence}", remedy
            )


# ---------------------------------------------------------------------- layers of the graph


@dataclass(frozen=True)
class _Layer:
    """The sparse sites of one owner Parameter."""

    owner: fx.Node
    parameter: torch.nn.Parameter
    sites: tuple[Site, ...]


def _layers_of(sites: Iterable[Site]) -> list[_Layer]:
    grouped: dict[fx.Node, list[Site]] = {}
    for site in sites:
        if site.sparse and site.owner is not None:
            grouped.setdefault(site.owner, []).append(site)
    layers = []
    for owner, own in grouped.items():
        parameter = torch_internals.parameter_of(owner)
        assert parameter is not None, "classify_sites leaves sites without a Parameter dense"
        layers.append(_Layer(owner, parameter, tuple(own)))
    return layers


def _phase_of(layers: Sequence[_Layer], planner: Planner, registry: Registry) -> Phase:
    """The phase to compile for; a pipeline on the call stack is attached first."""
    if not layers:
        return Phase.DENSE
    if registry.claim_of(layers[0].parameter) is None:
        registry.find_clock()
    return registry.phase_of([layer.parameter for layer in layers], planner)


def _awake(layers: Sequence[_Layer], kept_dense: Sequence[bool]) -> list[Site]:
    """The sparse sites, less those of layers that ``dense_layers`` keeps dense."""
    return [site for layer, dense in zip(layers, kept_dense, strict=True) if not dense for site in layer.sites]


def _slots(states: Sequence[StateInput], layers: Sequence[_Layer]) -> list[Slot]:
    """Which layer each site's state belongs to, and its specs as the Region can evaluate them."""
    places = {layer.owner.name: place for place, layer in enumerate(layers)}
    slots = []
    for state in states:
        assert state.site.owner is not None, "only sites with an owner are rewritten"
        specs = tuple(
            TensorSpec(tuple(map(torch_internals.expression_of, spec.shape)), spec.dtype, spec.device)
            for spec in state.specs
        )
        slots.append(Slot(places[state.site.owner.name], state.site.ordinal, specs, state.logged))
    return slots


def _region(
    graph_module: fx.GraphModule,
    compiled: Callable[..., Any],
    phase: Phase,
    sites: Sequence[Site],
    layers: Sequence[_Layer],
    slots: Sequence[Slot],
    kernel: KernelChoice,
    planner: Planner,
    registry: Registry,
) -> Region:
    positions = input_positions(graph_module)
    records = _records(graph_module, sites, kernel)
    owners = [positions[layer.owner] for layer in layers]
    symbols = torch_internals.symbolic_inputs(graph_module)
    return Region(compiled, phase, planner, registry, owners, slots, symbols, records)


def _witnessed(
    graph_module: fx.GraphModule,
    compiled: Callable[..., Any],
    records: Sequence[OwnedRecord],
    planner: Planner,
    registry: Registry,
) -> Callable[..., Any]:
    """A graph without sparse sites. Its calls are noted where somebody asks: in the report, and under ``strict``."""
    positions = input_positions(graph_module)
    anchors = [at for node, at in positions.items() if torch_internals.parameter_of(node) is not None]
    if not anchors or not (records or planner.config.strict):
        return compiled
    return Witness(compiled, anchors[0], records, planner, registry)


def input_positions(graph_module: fx.GraphModule) -> dict[fx.Node, int]:
    """Where each placeholder stands among the arguments of a call."""
    return {node: at for at, node in enumerate(graph_module.graph.find_nodes(op="placeholder"))}


def _records(graph_module: fx.GraphModule, sites: Sequence[Site], kernel: KernelChoice) -> list[OwnedRecord]:
    """What the report is told of the sites whose layer can be named."""
    positions = input_positions(graph_module)
    return [(positions[site.owner], SiteRecord.of(site, *kernel)) for site in sites if site.owner is not None]


# ---------------------------------------------------------------------- reasons, records, log


def _reason_for_all(inputs: Iterable[Any]) -> Reason | None:
    """Why a whole graph stays dense."""
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return Reason.GRADIENTS
    return Reason.PRECOMPILE if torch_internals.precompiles() else None


def _record(
    graph_module: fx.GraphModule,
    sites: Sequence[Site],
    phase: Phase,
    kernel: KernelChoice,
    planner: Planner,
    registry: Registry,
) -> None:
    """Tell the report and the log what this compilation found."""
    limit = torch_internals.raise_recompile_limit()
    entries = torch_internals.entry_number(graph_module)
    warning = ""
    if entries >= limit - LIMIT_MARGIN:
        warning = f"{entries + 1} of at most {limit} compilations of one code: at the limit it runs eagerly"
        log.warning(warning)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    parameters = [p for p in map(torch_internals.parameter_of, placeholders) if p is not None]
    anchor = parameters[0] if parameters else None
    unowned = tuple(SiteRecord.of(site, *kernel) for site in sites if site.owner is None)
    registry.record_graph(anchor, GraphRecord(phase, unowned, warning))
    for site in sites:
        record = SiteRecord.of(site, *kernel)
        if site.owner is not None:
            registry.record_site(torch_internals.parameter_of(site.owner), record)
        level = logging.INFO if planner.config.verbose else logging.DEBUG
        log.log(level, "%s: %s, %s %s", record.layer, record.decision, record.layout or record.role, record.detail)
    sparse = sum(site.sparse for site in sites)
    log.info("compiling a graph with %d of %d attentions sparse, phase %s", sparse, len(sites), phase)


def _lines(notes: Sequence[str]) -> str:
    return "".join(f"\n  {note}" for note in notes)
