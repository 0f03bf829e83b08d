"""The entry point of ``torch.compile(model, backend="sparse_attn")``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from sparse_compile.compiler.pipeline import compile_graph
from sparse_compile.config import Config
from sparse_compile.runtime.registry import REGISTRY


def sparse_attn(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with sparse attention.

    Args:
        graph_module: the graph.
        example_inputs: its example inputs.
        options: see `sparse_compile.Config`.
        mode: Inductor's mode, the same as the option ``compile_mode`` (torch refuses ``mode=`` next to ``options=``).

    Raises:
        SparseAttentionError: an option is unknown or out of range; under ``strict``, a site is unsupported. Torch wraps
            it in ``BackendCompilerFailed``, whose text contains ours.
    """
    given = dict(options or {})
    if mode is not None:
        given["compile_mode"] = mode
    return compile_graph(graph_module, example_inputs, Config.from_options(given), REGISTRY)


sparse_attn.reset = REGISTRY.reset  # type: ignore[attr-defined]  # torch._dynamo.reset() calls it
