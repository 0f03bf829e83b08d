"""Every private name of torch that the package uses, behind one function each.

Checked on torch 2.11, 2.13 and 2.15 (`make torch-versions`); tests/compiler/test_torch_internals.py asserts each fact
relied on here.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx
from torch._guards import Guard, TracingContext, detect_fake_mode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from sparse_compile.sites import GraphInput

log = logging.getLogger(__name__)

Scope = Mapping[str, Any]
RECOMPILE_LIMIT = 64
"""Entries per code object that phases x resolutions x dtypes need; Dynamo's own default is 8."""

_WORDS = re.compile(r"\w+")
_WRAPPERS = frozenset({"self", "kwargs", "fn", "_orig_mod", "__dict__", "_modules", "_parameters", "_buffers"})
ORIGINAL_CALLABLE = "_torchdynamo_orig_callable"
"""The attribute of a function that `torch.compile` returned."""
_MODULE_PARTS = ("_modules", "_parameters", "_buffers")


def graph_inputs(graph_module: fx.GraphModule) -> dict[fx.Node, GraphInput]:
    """What each placeholder of a Dynamo graph is."""
    inputs = {}
    for node in graph_module.graph.find_nodes(op="placeholder"):
        source = source_name(node)
        owned = source.startswith("L['self']") or any(part in source for part in _MODULE_PARTS)
        inputs[node] = GraphInput(dotted_name(source, node.name), parameter_of(node) is not None, owned)
    return inputs


def parameter_of(placeholder: fx.Node) -> torch.nn.Parameter | None:
    """The real Parameter that Dynamo passes for this placeholder."""
    example = getattr(placeholder.meta.get("grapharg"), "example", None)
    return example if isinstance(example, torch.nn.Parameter) else None


def source_name(placeholder: fx.Node) -> str:
    """Where Dynamo finds the value, as an expression over the frame's locals ``L`` and globals ``G``."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    if source is None:
        return placeholder.name
    name = source.name
    return str(name() if callable(name) else name)


def dotted_name(source: str, default: str) -> str:
    """A source without Dynamo's wrapping.

    ``L['self']._modules['blocks']._modules['0']._parameters['w']`` is ``blocks.0.w``, ``L['args'][2]`` is ``args_2``.

    Args:
        source: where Dynamo finds the value.
        default: the name of a source that has another form.
    """
    if not source.startswith("L["):
        return default
    words = [word for word in _WORDS.findall(source)[1:] if word not in _WRAPPERS]
    if words and words[0] == "args":
        return "_".join(words)
    return ".".join(words) or default


def copy_graph(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy that may be edited and lowered, and the map from the old nodes to the new ones.

    Dynamo still needs its own graph after the backend has returned. AOTAutograd needs the sources of the placeholders,
    the module's meta and ``_param_name_to_source``, without which it would take the graph for an exported one and treat
    no input as static.
    """
    graph = fx.Graph()
    old_to_new: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(graph_module.graph, old_to_new))
    for old, new in old_to_new.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copied = fx.GraphModule(graph_module, graph)
    copied.meta = dict(graph_module.meta)
    if hasattr(graph_module, "_param_name_to_source"):
        copied._param_name_to_source = graph_module._param_name_to_source
    return copied, old_to_new


def mark_state_input(placeholder: fx.Node, example: torch.Tensor) -> None:
    """Make a placeholder of ours acceptable to AOTAutograd: without a source, at a static address."""
    placeholder.meta["example_value"] = example
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    placeholder._dynamo_source = None


def fake_mode_of(graph_module: fx.GraphModule) -> AbstractContextManager[Any]:
    """The fake tensor mode in which a Dynamo graph was traced."""
    values = [node.meta.get("example_value") for node in graph_module.graph.nodes]
    mode = detect_fake_mode(values)
    if mode is None:
        raise RuntimeError("a Dynamo graph without a fake tensor")
    return mode


def add_root_guard(anchor: fx.Node, check: Callable[[Scope, Scope], bool], text: str) -> None:
    """Tie the graph under compilation to ``check(locals, globals)``; ``text`` is what a recompile log prints.

    On the root of the guard tree: a guard on a Parameter's own source may be skipped together with its sub-tree of
    modules (torch 2.11 does so by default).
    """

    def SPARSE_ATTN_PHASE(builder: Any, guard: Guard) -> None:  # noqa: N802 - torch shows this name to guard filters
        global_scope = builder.scope["G"]

        def check_frame(f_locals: Scope) -> bool:
            return check(f_locals, global_scope)

        builder.guard_manager.root.add_lambda_guard(check_frame, [text], None)

    source = anchor.meta["grapharg"].source
    TracingContext.get().guards_context.dynamo_guards.add(Guard(source, SPARSE_ATTN_PHASE))


def compile_with_inductor(
    graph_module: fx.GraphModule, inputs: Sequence[Any], mode: str, cache_tag: str
) -> Callable[..., Any]:
    """Lower a graph with Inductor; ``cache_tag`` salts its caches, which know nothing of our ops' fakes."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    compiler_config: Any = torch.compiler.config  # a config module: mypy does not see its `patch`
    tag = f"{compiler_config.cache_key_tag};{cache_tag}"
    with compiler_config.patch(cache_key_tag=tag):
        compiled: Any = compile_fx(graph_module, inputs, config_patches=list_mode_options(mode) or None)
    runnable: Callable[..., Any] = compiled
    return runnable


def raise_recompile_limit() -> int:
    """Make room for all phases, log it once, and return the limit in force."""
    import torch._dynamo.config as dynamo_config

    if dynamo_config.recompile_limit < RECOMPILE_LIMIT:
        log.info(
            "raised torch._dynamo.config.recompile_limit from %d to %d: at the limit code runs eagerly",
            dynamo_config.recompile_limit,
            RECOMPILE_LIMIT,
        )
        dynamo_config.recompile_limit = RECOMPILE_LIMIT
    return int(dynamo_config.recompile_limit)


def entry_number(graph_module: fx.GraphModule) -> int:
    """How many entries the code under compilation had before this one; 0 where torch does not tell."""
    compile_id = graph_module.meta.get("dynamo_compile_id")
    return int(getattr(compile_id, "frame_compile_id", None) or 0)


def precompiles() -> bool:
    """Whether torch stores compiled code for other processes, which would load it without our guards."""
    import torch._dynamo.config as dynamo_config

    return bool(getattr(dynamo_config, "caching_precompile", False))


def expression_of(size: int | torch.SymInt) -> Any:
    """A symbolic size as a sympy expression, which unlike the SymInt does not keep the ShapeEnv alive."""
    return size if isinstance(size, int) else size.node.expr


def symbolic_inputs(graph_module: fx.GraphModule) -> dict[int, Any]:
    """Position of each placeholder that is a symbolic int, and its sympy expression."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    values = [node.meta.get("example_value") for node in placeholders]
    return {i: value.node.expr for i, value in enumerate(values) if isinstance(value, torch.SymInt)}


def symbols_of(size: int | torch.SymInt) -> frozenset[Any]:
    """The symbols a size depends on."""
    return frozenset() if isinstance(size, int) else frozenset(size.node.expr.free_symbols)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module is the wrapper that `torch.compile` returns, was compiled in place, or its forward was."""
    forward = vars(module).get("forward")
    in_place = module._compiled_call_impl is not None
    return "_orig_mod" in module._modules or in_place or hasattr(forward, ORIGINAL_CALLABLE)


def guard_least(size: int | torch.SymInt, least: int) -> None:
    """Tie the graph under compilation to whether a symbolic size is at least ``least``, as it is in this call.

    A size that depends on data cannot be guarded on: nobody knows it before the graph runs.
    """
    if isinstance(size, torch.SymInt) and not free_unbacked_symbols(size):
        bool(size >= least)


def fake_mode() -> AbstractContextManager[Any]:
    """A mode in which new tensors have sizes and dtypes but no memory, and real ones may be mixed in."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def break_reason(graph_module: fx.GraphModule) -> str:
    """Why Dynamo ended a graph before the frame's own end, and where; empty where it did not."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    frames = list(reason.user_stack)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{str(reason.reason).strip().splitlines()[0]}{where}"


def data_dependent_shapes(captured: bool) -> AbstractContextManager[Any]:
    """Whether Dynamo keeps operations whose result's shape, or a number, depends on data in its graph."""
    import torch._dynamo.config as dynamo_config

    if not captured:
        return contextlib.nullcontext()
    patch: AbstractContextManager[Any] = dynamo_config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    )
    return patch


def needs_values(error: BaseException) -> bool:
    """Whether an operation failed since fake tensors have sizes but no values."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    kinds = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
    return isinstance(error, kinds)
