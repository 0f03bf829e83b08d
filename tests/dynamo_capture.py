"""The graphs of one call of a model, whole or block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from families.case import Case, Row
from families.table import case_of
from torch import fx

from sparse_compile.compiler.torch_internals import graph_inputs
from sparse_compile.config import Config
from sparse_compile.passes.classify_sites import classify_sites
from sparse_compile.passes.match_attention import match_attention
from sparse_compile.sites import Site
from sparse_compile.testing import Captured

SMALL = Config(min_tokens=64)
"""Options under which the tiny models are long enough."""


def capture_model(name: str, *, regional: bool = False, dynamic: bool | None = None) -> list[Captured]:
    """The graphs of a family of the table."""
    return capture_case(case_of(name), regional=regional, dynamic=dynamic)


def capture_case(case: Case, *, regional: bool = False, dynamic: bool | None = None) -> list[Captured]:
    model, kwargs = case.build()
    seen: list[Captured] = []

    def record(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(Captured(graph_module, example_inputs, graph_inputs(graph_module)))
        return graph_module.forward

    torch.compiler.reset()
    options: dict[str, Any] = {"backend": record, "fullgraph": case.fullgraph, "dynamic": dynamic}
    with torch.no_grad():
        if regional:
            model.compile_repeated_blocks(**options)
            model(**kwargs)
        else:
            torch.compile(model, **options)(**kwargs)
    torch.compiler.reset()
    return seen


def classified(captured: Captured, config: Config = SMALL) -> list[Site]:
    """The sites of a graph under a strategy that takes every one."""
    sites = match_attention(captured.graph_module, captured.inputs)
    return classify_sites(sites, config, captured.inputs, lambda site: None)


def census(graphs: Sequence[Captured]) -> Counter[Row]:
    """How many sites there are of each kind."""
    return Counter(row(site) for captured in graphs for site in classified(captured))


def row(site: Site) -> Row:
    assert site.layout is not None and site.decision is not None
    reason = site.decision.reason
    grid = "x".join(map(str, site.layout.grid))
    verdict = "sparse" if reason is None else reason.code
    return Row(site.role, str(site.layout), site.key_sizes[-2], str(site.mask_form), grid, verdict)
