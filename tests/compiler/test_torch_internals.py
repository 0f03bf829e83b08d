"""The private facts of torch that the package stands on. Run on each supported torch by `make torch-versions`."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import fx
from toy_models import Stack, tokens

from sparse_compile.compiler import torch_internals

NAMES = [
    "torch._subclasses.fake_tensor:FakeTensorMode",
    "torch._subclasses.fake_tensor:DataDependentOutputException",
    "torch._subclasses.fake_tensor:DynamicOutputShapeException",
    "torch.fx.experimental.symbolic_shapes:GuardOnDataDependentSymNode",
    "torch._dynamo.config:capture_dynamic_output_shape_ops",
    "torch._dynamo.config:capture_scalar_outputs",
    "torch._guards:Guard",
    "torch._guards:TracingContext.get",
    "torch._guards:detect_fake_mode",
    "torch._guards:GuardsContext",
    "torch._dynamo.guards:GuardBuilder",
    "torch._C._dynamo.guards:RootGuardManager.add_lambda_guard",
    "torch._inductor.compile_fx:compile_fx",
    "torch._inductor:list_mode_options",
    "torch.compiler.config:cache_key_tag",
    "torch._dynamo.config:recompile_limit",
    "torch.utils.weak:WeakIdKeyDictionary",
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("name", NAMES)
def test_every_private_name_is_there(name: str) -> None:
    module, path = name.split(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)


def captured_by(backend: Any, model: torch.nn.Module, x: torch.Tensor, **how: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.compile(model, backend=backend, **how)(x)


def test_a_dynamo_graph_tells_what_we_rely_on() -> None:
    facts: dict[str, bool] = {}
    model = Stack(1)

    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        weight = next(
            n for n in graph_module.graph.find_nodes(op="placeholder") if "to_q" in n.name and "weight" in n.name
        )
        attention = graph_module.graph.find_nodes(
            op="call_function", target=torch.nn.functional.scaled_dot_product_attention
        )
        facts.update(
            parameter=torch_internals.parameter_of(weight) is model.blocks[0].to_q.weight,
            source=eval(torch_internals.source_name(weight), {"L": {"self": model}}) is model.blocks[0].to_q.weight,
            one_attention_node=len(attention) == 1,
            fake_value=attention[0].meta["example_value"].shape == (1, 2, 128, 16),
            dynamo_source=hasattr(weight, "_dynamo_source"),
            compile_id="dynamo_compile_id" in graph_module.meta,
            names_of_parameters=hasattr(graph_module, "_param_name_to_source"),
            fake_mode=torch_internals.fake_mode_of(graph_module) is not None,
            nothing_of_ours=torch_internals.entry_number(graph_module) == 0,
        )
        inputs_by_name = {i.name: i for i in torch_internals.graph_inputs(graph_module).values()}
        facts["dotted"] = inputs_by_name["blocks.0.to_q.weight"].is_parameter
        facts["argument"] = not inputs_by_name["hidden_states"].owned
        return graph_module.forward

    captured_by(backend, model, tokens())
    assert all(facts.values()), facts


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['blocks']._modules['0']._parameters['weight']", "blocks.0.weight"),
        ("L['self'].__dict__['_modules']['blocks']._modules['0']._parameters['weight']", "blocks.0.weight"),
        ("L['self'].blocks[0].attn1.to_q.weight", "blocks.0.attn1.to_q.weight"),
        ("L['hidden_states']", "hidden_states"),
        ("L['kwargs']['hidden_states']", "hidden_states"),
        ("L['args'][2]", "args_2"),
    ],
)
def test_sources_become_dotted_names(source: str, name: str) -> None:
    assert torch_internals.dotted_name(source, "default") == name


def test_a_copy_can_be_lowered_and_leaves_dynamos_graph_alone() -> None:
    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        before = str(graph_module.graph)
        copied, old_to_new = torch_internals.copy_graph(graph_module)
        copied.graph.erase_node(copied.graph.find_nodes(op="output")[0])
        copied.graph.output((old_to_new[graph_module.graph.find_nodes(op="output")[0].args[0][0]],))
        copied.recompile()
        assert str(graph_module.graph) == before
        return torch_internals.compile_with_inductor(copied, inputs, "default", "test")

    model, x = Stack(1), tokens()
    torch.testing.assert_close(captured_by(backend, model, x), model(x))


@pytest.mark.parametrize("recursive_tags", [False, True])
def test_a_root_guard_is_seen_although_module_subtrees_may_be_skipped(recursive_tags: bool) -> None:
    """With recursive dict tags (the default of torch 2.11) a guard on the Parameter's source would be skipped."""
    phase, compiled = ["dense"], []

    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        now = phase[0]
        compiled.append(now)
        owner = next(n for n in graph_module.graph.find_nodes(op="placeholder") if "weight" in n.name)
        torch_internals.add_root_guard(owner, lambda f_locals, f_globals: phase[0] == now, f"phase == {now!r}")
        return graph_module.forward

    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=recursive_tags), torch.no_grad():
        call = torch.compile(Stack(), backend=backend)
        for phase[0] in ("dense", "search", "sparse"):
            for _ in range(3):
                call(tokens())
    assert compiled == ["dense", "search", "sparse"]


def test_a_guard_receives_the_locals_of_the_frame() -> None:
    seen: list[bool] = []
    model = Stack(1)

    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        owner = next(n for n in graph_module.graph.find_nodes(op="placeholder") if "to_q" in n.name)
        name, parameter = torch_internals.source_name(owner), torch_internals.parameter_of(owner)
        assert parameter is not None

        def check(f_locals: Any, f_globals: Any) -> bool:
            seen.append(eval(name, {"L": f_locals, "G": f_globals}) is parameter)
            return True

        torch_internals.add_root_guard(owner, check, "True")
        return graph_module.forward

    captured_by(backend, model, tokens())
    assert seen and all(seen)


def test_marked_state_is_a_static_input_of_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs accept mutation of static inputs only."""
    import torch._inductor.compile_fx as compile_fx

    seen: list[tuple[list[str], list[str]]] = []
    inner = compile_fx.compile_fx_inner

    def spy(graph_module: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        names = [n.name for n in graph_module.graph.find_nodes(op="placeholder")]
        seen.append((names, [names[i] for i in kwargs["static_input_idxs"]]))
        return inner(graph_module, inputs, **kwargs)

    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        copied, _ = torch_internals.copy_graph(graph_module)
        last = copied.graph.find_nodes(op="placeholder")[-1]
        with copied.graph.inserting_after(last):
            state = copied.graph.placeholder("state")
        with torch_internals.fake_mode_of(graph_module):
            example = torch.empty(4)
        torch_internals.mark_state_input(state, example)
        output = copied.graph.find_nodes(op="output")[0]
        with copied.graph.inserting_before(output):
            copied.graph.call_method("add_", (state, 1))
        copied.recompile()
        compiled = compile_fx.compile_fx(copied, [*inputs, example], inner_compile=spy)
        own = torch.zeros(4)
        return lambda *args: compiled(*args, own)

    with torch.compiler.config.patch(force_disable_caches=True):
        captured_by(backend, Stack(1), tokens())
    names, static = seen[0]
    assert names[-1] in static


def test_caches_know_our_tag(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hits = []
    for tag in ("a", "a", "b"):
        torch.compiler.reset()
        counters.clear()

        def backend(graph_module: fx.GraphModule, inputs: list[Any], tag: str = tag) -> Any:
            return torch_internals.compile_with_inductor(graph_module, inputs, "default", tag)

        captured_by(backend, Stack(1), tokens())
        hits.append(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
    assert hits[0] == 0
    assert hits[1] > 0
    assert hits[2] == 0


def test_the_recompile_limit_is_raised_and_never_lowered() -> None:
    with torch._dynamo.config.patch(recompile_limit=8):
        assert torch_internals.raise_recompile_limit() == torch_internals.RECOMPILE_LIMIT
    with torch._dynamo.config.patch(recompile_limit=500):
        assert torch_internals.raise_recompile_limit() == 500


def test_symbolic_sizes_are_found_by_position() -> None:
    found: list[dict[int, Any]] = []

    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(torch_internals.symbolic_inputs(graph_module))
        places = list(found[0])
        assert all(isinstance(inputs[place], torch.SymInt | int) for place in places)
        return graph_module.forward

    x = tokens()
    torch._dynamo.mark_dynamic(x, 1)
    captured_by(backend, Stack(1), x)
    assert len(found[0]) == 1


def test_entries_are_numbered_per_code() -> None:
    numbers = []

    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        numbers.append(torch_internals.entry_number(graph_module))
        return graph_module.forward

    call = torch.compile(Stack(1), backend=backend, dynamic=False)
    with torch.no_grad():
        for count in (16, 32, 48):
            call(tokens(count))
    assert numbers == [0, 1, 2]
