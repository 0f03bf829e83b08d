"""Compiled toy models, and whole generations of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from toy_models import EAGER, Stack, tokens

from sparse_compile.runtime.clock import Clock
from sparse_compile.runtime.region import Region
from sparse_compile.runtime.registry import REGISTRY
from sparse_compile.runtime.state import Layer

QUICK = {**EAGER, "dense_steps": 1, "top_p": 0.5, "q_clusters": 4, "k_clusters": 8}
"""The first step dense, the second a search, the others sparse enough to differ from dense."""
BRANCHES = ("cond", "uncond")
SEEDS = {"cond": 100, "uncond": 200}

Call = Callable[[Tensor], Tensor]


def whole(layers: int = 2, **options: object) -> tuple[Stack, Call]:
    """A stack compiled as one graph."""
    model = Stack(layers)
    return model, torch.compile(model, backend="sparse_attn", options={**QUICK, **options}, fullgraph=True)


def regional(layers: int = 2, **options: object) -> tuple[Stack, Call]:
    """A stack compiled block by block."""
    model = Stack(layers)
    for block in model.blocks:
        block.compile(backend="sparse_attn", options={**QUICK, **options}, fullgraph=True)
    return model, model


WAYS = {"whole": whole, "regional": regional}


def generate(
    call: Call, clock: Clock, branches: Sequence[str] = BRANCHES, named: bool = True
) -> dict[str, list[Tensor]]:
    """Run all steps of the clock's generation; the outputs of each branch."""
    outputs: dict[str, list[Tensor]] = {branch: [] for branch in branches}
    for step in range(clock.moment.step, clock.steps):
        for branch in branches:
            x = tokens(seed=SEEDS[branch] + step)
            if named:
                with clock.branch(branch):
                    outputs[branch].append(call(x))
            else:
                outputs[branch].append(call(x))
        clock.step()
    return outputs


def assert_same(first: dict[str, list[Tensor]], second: dict[str, list[Tensor]]) -> None:
    """Fail unless both runs gave the same bits."""
    assert first.keys() == second.keys()
    for branch, outputs in first.items():
        for step, (one, two) in enumerate(zip(outputs, second[branch], strict=True)):
            assert torch.equal(one, two), f"{branch} differs in step {step}"


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a model, in the order of its Parameters."""
    return [layer for parameter in model.parameters() for layer in REGISTRY.layers_of(parameter)]


def regions_of(model: nn.Module) -> list[Region]:
    """The Regions that have run a model."""
    return list(dict.fromkeys(region for layer in layers_of(model) for region in layer.groups))  # type: ignore[misc]


def state_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor of state of a model, logs included."""
    for layer in layers_of(model):
        for state in layer.branches.values():
            for tensors in state.tensors.values():
                yield from tensors
            yield from state.logs.values()


def phases(model: nn.Module) -> list[list[str]]:
    """For each layer, the phases of the calls it can look back on."""
    return [[str(call.phase) for call in layer.history] for layer in layers_of(model)]


def options_with(**options: Any) -> dict[str, Any]:
    """QUICK with changes."""
    return {**QUICK, **options}


def generate_wan(
    call: Callable[..., Any], kwargs: dict[str, Any], clock: Clock, branches: Sequence[str] = BRANCHES
) -> dict[str, Tensor]:
    """Run a tiny Wan; the last output of each branch. The latents do not depend on which branches run.

    Args:
        call: the model, compiled.
        kwargs: its arguments, from the families.
        clock: tells the number of steps.
        branches: which of them run.
    """
    text = {
        "cond": kwargs["encoder_hidden_states"],
        "uncond": torch.zeros_like(kwargs["encoder_hidden_states"]),
    }
    noise = torch.Generator().manual_seed(7)
    x = kwargs["hidden_states"]
    outputs: dict[str, Tensor] = {}
    for _ in range(clock.steps):
        for branch in branches:
            with clock.branch(branch):
                inputs = {**kwargs, "hidden_states": x, "encoder_hidden_states": text[branch]}
                outputs[branch] = call(**inputs, return_dict=False)[0]
        x = x + 0.05 * torch.randn(x.shape, generator=noise)
        clock.step()
    return outputs
