"""Layers of one graph that are not alike: some kept dense, some skipped, some called twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import EAGER, Block, Stack, tokens

import sparse_compile
from sparse_compile.runtime.registry import REGISTRY

OPTIONS = {**EAGER, "dense_steps": 1, "top_p": 0.5, "q_clusters": 4, "k_clusters": 8}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield


class TwoInOne(nn.Module):
    """A block with two self-attentions, so two layers in one shared graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.second(self.first(hidden_states))


def phases(model: nn.Module) -> dict[str, str]:
    """The phases of each layer's calls, by their first letters (s: search, S: sparse, d: dense)."""
    letters = {"dense": "d", "search": "s", "sparse": "S"}
    found = {}
    for name, parameter in model.named_parameters():
        for layer in REGISTRY.layers_of(parameter):
            found[name.removesuffix(".to_q.weight")] = "".join(letters[call.phase] for call in layer.history)
    return found


@pytest.mark.parametrize("dense_steps", [0, 1])
def test_a_layer_kept_dense_does_not_keep_the_same_place_of_other_blocks_dense(dense_steps: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(TwoInOne(), TwoInOne(), TwoInOne()).eval().requires_grad_(False)
    for block in model:
        block.compile(backend="sparse_attn", options={**OPTIONS, "dense_layers": 1, "dense_steps": dense_steps})
    with sparse_compile.denoising(model, steps=5) as clock, clock.branch("cond"):
        for seed in range(5):
            model(tokens(seed=seed))
            clock.step()
    sparse = "d" * dense_steps + "s" + "S" * (4 - dense_steps)
    assert phases(model) == {
        "0.first": "ddddd",
        **dict.fromkeys(("0.second", "1.first", "1.second", "2.first", "2.second"), sparse),
    }
    dense = [site.layer for site in sparse_compile.explain(model).sites if site.decision == "dense"]
    assert dense == ["0.first"]


class Skipping(Stack):
    """Runs only its first block where a step cache would."""

    skip = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.blocks[0](hidden_states)
        return hidden_states if self.skip else self.blocks[1](hidden_states)


def test_a_layer_that_missed_the_search_is_searched_for_in_every_generation() -> None:
    model = Skipping(2)
    call = torch.compile(model, backend="sparse_attn", options=OPTIONS)
    outputs = []
    with sparse_compile.denoising(model, steps=6) as clock:
        for _ in range(3):
            clock.start(6)
            for step in range(6):
                model.skip = step < 2  # so the search of step 1 sees the first block alone
                with clock.branch("cond"):
                    out = call(tokens(seed=step))
                clock.step()
            outputs.append(out)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    generations = sparse_compile.explain(model).generations
    assert [step.phase for step in generations[1].steps] == [step.phase for step in generations[2].steps]
    assert generations[2].steps[-1].density < 0.9


def test_a_branch_that_comes_twice_in_a_step_attends_to_everything_the_second_time() -> None:
    model = Stack(2)
    call = torch.compile(model, backend="sparse_attn", options={**OPTIONS, "dense_steps": 0})
    with sparse_compile.denoising(model, steps=3) as clock, clock.branch("cond"):
        call(tokens())
        clock.step()
        first = call(tokens())
        torch.testing.assert_close(call(tokens()), model(tokens()), rtol=1e-4, atol=1e-5)
        clock.step()
        after = call(tokens())
    torch.compiler.reset()
    call = torch.compile(model, backend="sparse_attn", options={**OPTIONS, "dense_steps": 0})
    with sparse_compile.denoising(model, steps=3) as clock, clock.branch("cond"):
        outputs = []
        for _ in range(3):
            outputs.append(call(tokens()))
            clock.step()
    assert torch.equal(first, outputs[1])
    assert torch.equal(after, outputs[2])


def test_a_branch_that_comes_twice_is_a_warning_in_the_report() -> None:
    model = Stack(1)
    call = torch.compile(model, backend="sparse_attn", options={**OPTIONS, "dense_steps": 0})
    with sparse_compile.denoising(model, steps=3) as clock, clock.branch("cond"):
        call(tokens())
        call(tokens())
        assert any("same step and branch" in warning for warning in sparse_compile.explain(model).warnings)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("given", "phases"),
    [
        ({"top_p": 1.0}, ["dense", "search", "sparse"]),
        ({"method": "adaspa", "sparsity": 0, "block_size": 16}, ["search", "sparse", "sparse"]),
    ],
    ids=["svg2", "adaspa"],
)
def test_under_autocast_every_phase_has_the_dtype_of_dense_attention(
    given: dict[str, Any], phases: list[str], lowering: str
) -> None:
    model = Stack(1)
    options = {"min_tokens": 1, "dense_layers": 0, "dense_steps": 1, "lowering": lowering, **given}
    call = torch.compile(model.blocks[0], backend="sparse_attn", options=options)
    with torch.autocast("cpu", torch.bfloat16), sparse_compile.denoising(model, steps=3) as clock:
        for _ in range(3):
            out, want = call(tokens()), model.blocks[0](tokens())
            assert out.dtype is want.dtype
            torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
            clock.step()
    (layer,) = REGISTRY.layers_of(model.blocks[0].to_q.weight)
    assert [str(call.phase) for call in layer.history] == phases


def test_state_of_other_resolutions_is_given_back() -> None:
    import gc
    import weakref

    model = Stack(1)
    call = torch.compile(model, backend="sparse_attn", options={**EAGER, "dense_steps": 0}, dynamic=False)
    dead: list[Any] = []
    with sparse_compile.denoising(model, steps=2) as clock, clock.branch("cond"):
        for count in (5000, 7000, 9000):
            clock.start(2)
            for _ in range(2):
                call(tokens(count))
                clock.step()
            (layer,) = REGISTRY.layers_of(model.blocks[0].to_q.weight)
            gc.collect()
            assert [reference() is None for reference in dead] == [True] * len(dead)
            dead = [weakref.ref(tensor) for tensor in layer.branches["cond"].tensors[0][:2]]
    gc.collect()
    assert all(reference() is None for reference in dead), "leaving the block gives everything back"


def test_what_runs_is_what_the_report_shows() -> None:
    """A short video, or a call with gradients, compiles a graph of its own in between."""
    model = Stack(1)
    call = torch.compile(model, backend="sparse_attn", options={**OPTIONS, "min_tokens": 100}, dynamic=False)
    for count in (128, 32, 128):
        with sparse_compile.denoising(model, steps=3) as clock:
            for _ in range(3):
                call(tokens(count))
                clock.step()
        (site,) = sparse_compile.explain(model).sites
        assert (site.decision, site.layout) == (("sparse", "video:128") if count == 128 else ("dense", "video:32"))
