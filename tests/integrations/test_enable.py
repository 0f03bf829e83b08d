"""`enable` and `disable`: what is compiled, that it is said, and that everything is given back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from generations import QUICK
from tiny_pipelines import FOUR, OPTIONS, cog_pipeline, expected, run, steps_of, wan_pipeline
from torch import nn
from toy_models import Stack
from toy_pipeline import ToyBlock, ToyPipeline, ToyTransformer, toy_pipeline

import sparse_compile
from sparse_compile.compiler.in_place import CompiledForward
from sparse_compile.errors import SparseAttentionError
from sparse_compile.integrations.repeated_blocks import parts_to_compile
from sparse_compile.runtime.registry import REGISTRY

BLOCKS = "the repeated blocks (2 ToyBlock)"


class WithAnother(ToyTransformer):
    """Attention of a class that is not among the repeated ones."""

    def __init__(self) -> None:
        super().__init__()

        class AnotherBlock(ToyBlock):
            pass

        self.first = AnotherBlock().eval().requires_grad_(False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(self.first(hidden_states))


class WithoutBlocks(ToyTransformer):
    _repeated_blocks = ()


def compiled_modules(model: nn.Module) -> list[str]:
    found = [name for name, module in model.named_modules() if isinstance(module.forward, CompiledForward)]
    return found + [name for name, module in model.named_modules() if module._compiled_call_impl is not None]


def snapshot(pipe: ToyPipeline) -> tuple[dict[tuple[str, str], Any], list[Any]]:
    """Every instance attribute by the identity of its value, dictionaries by their content; and the values, kept."""
    models = {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}
    things: dict[str, Any] = {"pipe": pipe, "scheduler": pipe.scheduler}
    for key, model in models.items():
        things |= {f"{key}.{name}": module for name, module in (model.named_modules() if model is not None else ())}
    found, kept = {}, []
    for name, thing in things.items():
        for attribute, value in vars(thing).items():
            kept.append(value)
            is_dict = isinstance(value, dict)
            found[name, attribute] = {key: id(item) for key, item in value.items()} if is_dict else id(value)
    return found, kept


# ---------------------------------------------------------------------- what is compiled


@pytest.mark.parametrize(
    ("model", "modules", "choice"),
    [
        (ToyTransformer, ["blocks.0", "blocks.1"], f"{BLOCKS}, which hold all attention"),
        (WithoutBlocks, [""], "the whole model, since it names no repeated blocks"),
        (WithAnother, [""], "the whole model, since attention lies outside its repeated blocks: first"),
    ],
)
def test_the_blocks_are_compiled_where_all_attention_lies_in_them(
    model: Callable[[], nn.Module], modules: list[str], choice: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = toy_pipeline(model())
    with caplog.at_level(logging.INFO, "sparse_compile"):
        sparse_compile.enable(pipe, **QUICK)
    assert compiled_modules(pipe.transformer) == modules
    assert sparse_compile.explain(pipe).compiled == [f"{model.__name__}: {choice}"]
    assert f"compiled: {model.__name__}: {choice}" in str(sparse_compile.explain(pipe))
    assert f"transformer ({model.__name__}): compiled is {choice}" in [r.getMessage() for r in caplog.records]
    pipe()
    report = sparse_compile.explain(pipe)
    assert {site.decision for site in report.sites} == {"sparse"}
    assert len(report.sites) == (3 if model is WithAnother else 2)


def test_a_model_whose_attention_nobody_knows_is_compiled_whole() -> None:
    model = Stack(1)
    model._repeated_blocks = ["Block"]  # type: ignore[assignment]
    assert parts_to_compile(model, None).choice == "the whole model, since none of its modules is known to attend"
    model._repeated_blocks = ["Other"]  # type: ignore[assignment]
    assert "none of its blocks is of a class" in parts_to_compile(model, None).choice


def test_either_way_may_be_asked_for() -> None:
    model = ToyTransformer()
    assert parts_to_compile(model, False).modules == (model,)
    assert parts_to_compile(model, False).choice == "the whole model, as asked"
    assert parts_to_compile(model, True).modules == tuple(model.blocks)
    assert parts_to_compile(model, True).choice == f"{BLOCKS}, as asked"


def test_attention_that_the_blocks_miss_is_a_warning_and_in_the_report(caplog: pytest.LogCaptureFixture) -> None:
    pipe = toy_pipeline(WithAnother())
    with caplog.at_level(logging.WARNING, "sparse_compile"):
        sparse_compile.enable(pipe, regional=True, **QUICK)
    missed = "attention outside the repeated blocks is not compiled and stays as it is: first; "
    assert [missed in record.getMessage() for record in caplog.records] == [True]
    assert [missed in warning for warning in sparse_compile.explain(pipe).warnings] == [True]
    pipe()
    assert len(sparse_compile.explain(pipe).sites) == 2


def test_blocks_that_a_model_does_not_name_are_an_error_that_leaves_nothing_behind() -> None:
    pipe = cog_pipeline()
    before = {key: dict(vars(thing)) for key, thing in pipe.components.items() if thing is not None}
    with pytest.raises(SparseAttentionError, match=r"names its repeated blocks; got 'CogVideoX.*Leave regional out"):
        sparse_compile.enable(pipe, regional=True)
    assert {key: dict(vars(thing)) for key, thing in pipe.components.items() if thing is not None} == before
    assert REGISTRY.attached_clock(pipe.transformer) is None


def test_arguments_of_torch_compile_are_passed_on() -> None:
    class Broken(ToyTransformer):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return super().forward(hidden_states)

    pipe = toy_pipeline(Broken())
    sparse_compile.enable(pipe, regional=False, fullgraph=True, **QUICK)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        pipe()
    torch.compiler.reset()
    pipe = toy_pipeline()
    sparse_compile.enable(pipe, dynamic=True, **QUICK)
    for size in (128, 160, 192):
        pipe(size=size)
    assert sparse_compile.explain(pipe).compilations == 3


def test_two_transformers_are_both_enabled_and_the_second_may_be_missing() -> None:
    pipe = toy_pipeline(second=WithAnother())
    sparse_compile.enable(pipe, **QUICK)
    assert [line.split(":")[0] for line in sparse_compile.explain(pipe).compiled] == ["transformer", "transformer_2"]
    assert compiled_modules(pipe.transformer_2) == [""]
    sparse_compile.disable(pipe)
    assert not compiled_modules(pipe.transformer) + compiled_modules(pipe.transformer_2)


# ---------------------------------------------------------------------- once more


def test_enabling_twice_changes_nothing() -> None:
    pipe = toy_pipeline()
    clock = sparse_compile.enable(pipe, **QUICK)
    before = snapshot(pipe)
    assert sparse_compile.enable(pipe, **QUICK) is clock
    assert snapshot(pipe)[0] == before[0]


def test_enabling_with_other_options_replaces_what_was_enabled() -> None:
    pipe = toy_pipeline()
    original = snapshot(pipe)
    sparse_compile.enable(pipe, **QUICK)
    first = pipe()
    sparse_compile.enable(pipe, regional=False, **{**QUICK, "top_p": 0.2})
    assert compiled_modules(pipe.transformer) == [""]
    second = pipe()
    assert not torch.allclose(first, second, atol=1e-3)
    sparse_compile.enable(pipe, **QUICK)
    assert torch.equal(pipe(), first)
    sparse_compile.disable(pipe)
    assert {key for key in snapshot(pipe)[0] if "transformer" in key[0]} == {
        key for key in original[0] if "transformer" in key[0]
    }


def test_a_replacement_that_is_refused_leaves_what_was_enabled() -> None:
    pipe = toy_pipeline(WithoutBlocks())
    clock = sparse_compile.enable(pipe, **QUICK)
    with pytest.raises(SparseAttentionError, match="names its repeated blocks"):
        sparse_compile.enable(pipe, regional=True, **QUICK)
    assert REGISTRY.attached_clock(pipe.transformer) is clock
    assert compiled_modules(pipe.transformer) == [""]


def test_pipelines_that_share_a_transformer_share_how_it_is_enabled() -> None:
    first = toy_pipeline()
    second = toy_pipeline(first.transformer)
    clock = sparse_compile.enable(first, **QUICK)
    with pytest.raises(SparseAttentionError, match="share a transformer are enabled with the same options"):
        sparse_compile.enable(second, regional=False, **QUICK)
    assert "step" not in vars(second.scheduler)
    assert sparse_compile.enable(second, **QUICK) is clock
    assert torch.equal(first(), second())
    sparse_compile.disable(first)
    assert not compiled_modules(second.transformer)
    assert "step" not in vars(second.scheduler)


@pytest.mark.parametrize("part", ["wrapper", "model", "block", "forward"])
def test_a_model_that_somebody_else_compiled_is_refused_and_left_as_it_is(part: str) -> None:
    pipe = toy_pipeline()
    if part == "wrapper":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    elif part == "forward":
        pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend="eager")
    else:
        (pipe.transformer if part == "model" else pipe.transformer.blocks[1]).compile(backend="eager")
    before = snapshot(pipe)
    with pytest.raises(SparseAttentionError, match=r"transformer.*, compiled already.*`attach` the pipeline"):
        sparse_compile.enable(pipe, **QUICK)
    assert snapshot(pipe)[0] == before[0]


def test_a_pipeline_without_a_transformer_is_refused() -> None:
    class UNetPipeline(ToyPipeline):
        def __init__(self, unet: nn.Module, scheduler: Any) -> None:
            super(ToyPipeline, self).__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

    pipe = UNetPipeline(Stack(1), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(SparseAttentionError, match="pipeline with a transformer; got 'UNetPipeline with unet'"):
        sparse_compile.enable(pipe)
    assert "step" not in vars(pipe.scheduler)


# ---------------------------------------------------------------------- given back


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_disabling_gives_back_every_attribute(regional: bool) -> None:
    pipe = toy_pipeline(second=WithoutBlocks() if not regional else ToyTransformer())
    before = snapshot(pipe)
    sparse_compile.enable(pipe, regional=regional, **QUICK)
    assert snapshot(pipe)[0] != before[0]
    sparse_compile.disable(pipe)
    assert snapshot(pipe)[0] == before[0]


def replace_transformer(pipe: ToyPipeline) -> None:
    pipe.transformer = ToyTransformer()
    pipe()


def replace_scheduler(pipe: ToyPipeline) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe()


def fail(pipe: ToyPipeline) -> None:
    def after(pipe: ToyPipeline, step: int) -> None:
        if step == 2:
            raise KeyError

    with pytest.raises(KeyError):
        pipe(after=after)


def move(pipe: ToyPipeline) -> None:
    pipe.to(torch.bfloat16)
    pipe()


@pytest.mark.parametrize("meanwhile", [ToyPipeline.__call__, fail, replace_transformer, replace_scheduler, move])
def test_disabling_gives_everything_back_whatever_happened_meanwhile(meanwhile: Callable[[ToyPipeline], Any]) -> None:
    pipe, twin = toy_pipeline(), toy_pipeline()
    transformer, scheduler = pipe.transformer, pipe.scheduler
    plain = [set(vars(module)) for module in transformer.modules()]
    sparse_compile.enable(pipe, **QUICK)
    meanwhile(pipe)
    sparse_compile.disable(pipe)
    meanwhile(twin)
    assert set(snapshot(pipe)[0]) == set(snapshot(twin)[0])
    assert [set(vars(module)) for module in transformer.modules()] == plain
    assert not {"step", "set_timesteps", "set_begin_index"} & set(vars(scheduler))
    assert torch.equal(pipe(), twin())
    assert not REGISTRY.clocks()


def test_disabling_leaves_what_somebody_compiled_since() -> None:
    pipe = toy_pipeline()
    sparse_compile.enable(pipe, **QUICK)
    block = pipe.transformer.blocks[0]
    block.compile(backend="eager")
    theirs = block._compiled_call_impl
    sparse_compile.disable(pipe)
    assert compiled_modules(pipe.transformer) == ["blocks.0"]
    assert block._compiled_call_impl is theirs


def test_an_enable_that_fails_in_the_middle_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = toy_pipeline(second=ToyTransformer())
    before = snapshot(pipe)
    last = pipe.transformer_2.blocks[1]

    def refuse(forward: Any, **how: Any) -> Any:
        if forward.__self__ is last:
            raise RuntimeError
        return original(forward, **how)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(RuntimeError):
        sparse_compile.enable(pipe, **QUICK)
    assert snapshot(pipe)[0] == before[0]
    assert REGISTRY.attached_clock(pipe.transformer) is None


def test_a_failing_enable_leaves_the_pipeline_attached_that_was() -> None:
    pipe = toy_pipeline(WithoutBlocks())
    clock = sparse_compile.attach(pipe)
    with pytest.raises(SparseAttentionError, match="names its repeated blocks"):
        sparse_compile.enable(pipe, regional=True, **QUICK)
    assert REGISTRY.attached_clock(pipe.transformer) is clock


def test_an_enable_that_fails_leaves_what_was_attached_and_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = toy_pipeline(second=ToyTransformer())
    clock = sparse_compile.attach(pipe)
    last = pipe.transformer_2.blocks[1]
    original = torch.compile

    def refuse(forward: Any, **how: Any) -> Any:
        if forward.__self__ is last:
            raise RuntimeError
        return original(forward, **how)

    monkeypatch.setattr(torch, "compile", refuse)
    before = snapshot(pipe)[0]
    with pytest.raises(RuntimeError):
        sparse_compile.enable(pipe, **QUICK)
    assert snapshot(pipe)[0] == before
    assert pipe.transformer not in REGISTRY.enabled
    assert REGISTRY.attached_clock(pipe.transformer) is clock


def test_an_enable_that_cannot_attach_compiles_nothing() -> None:
    pipe = toy_pipeline(second=ToyTransformer())
    before = snapshot(pipe)[0]
    with (
        sparse_compile.denoising(pipe.transformer_2, steps=4),
        pytest.raises(SparseAttentionError, match="one clock at a time"),
    ):
        sparse_compile.enable(pipe, **QUICK)
    assert snapshot(pipe)[0] == before
    assert not any(model in REGISTRY.enabled for model in (pipe.transformer, pipe.transformer_2))


# ---------------------------------------------------------------------- a real model


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_a_pipeline_of_diffusers_is_switched_over_and_back(regional: bool) -> None:
    pipe = wan_pipeline()
    dense = run(pipe)
    sparse_compile.enable(pipe, regional=regional, **OPTIONS)
    sparse = run(pipe)
    assert not torch.allclose(sparse, dense, atol=1e-3)
    assert steps_of(pipe) == expected(*FOUR)
    sparse_compile.disable(pipe)
    assert torch.equal(run(pipe), dense)
    assert len(sparse_compile.explain(pipe).generations) == 1
    sparse_compile.enable(pipe, regional=regional, **OPTIONS)
    assert torch.equal(run(pipe), sparse)
