"""What an examination of a model tells before anything is compiled: the sites of each layer, what no graph shows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import Stack, tokens

from sparse_compile.compiler.examine import Examination, attention_calls, examine
from sparse_compile.compiler.torch_internals import fake_mode, is_compiled, needs_values
from sparse_compile.config import Config

CONFIG = Config(min_tokens=64)


def examined(model: nn.Module, **how: Any) -> Examination:
    call = {"hidden_states": tokens()}
    return examine(model, call, CONFIG, attention_calls(model, call), **how)


class Uncompiled(nn.Module):
    """A block that Dynamo is told to leave alone."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inner = block

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.inner(hidden_states)


class Selecting(nn.Module):
    """Adds up the tokens that are not zero, of which there are as many as the data has."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack(1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        kept = hidden_states[hidden_states.abs().sum(-1) > 0]
        return self.stack(hidden_states + kept.sum(0))


def test_an_eager_call_counts_attention_by_the_module_that_makes_it():
    assert attention_calls(Stack(2), {"hidden_states": tokens()}) == Counter({"blocks.0": 1, "blocks.1": 1})


def test_every_layer_of_a_whole_model_is_a_site_of_its_own():
    found = examined(Stack(3))
    assert [site.record.layer for site in found.sites] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(site.record.decision == "sparse" and site.key_groups == 64 for site in found.sites)
    assert [(piece.sites, piece.runs, piece.ended) for piece in found.pieces] == [(3, 1, "")]
    assert not found.hidden and not found.failure


def test_blocks_that_share_a_graph_are_told_apart_by_their_parameters():
    model = Stack(3)
    found = examined(model, parts=list(model.blocks))
    assert [site.record.layer for site in found.sites] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [(piece.sites, piece.runs) for piece in found.pieces] == [(1, 3)]
    assert not any(is_compiled(block) for block in model.blocks)


def test_attention_behind_a_graph_break_is_named():
    model = Stack(3)
    model.blocks[1] = Uncompiled(model.blocks[1])
    found = examined(model)
    assert found.hidden == {"blocks.1.inner": 1}
    assert [site.record.layer for site in found.sites] == ["blocks.0", "blocks.2"]


def test_a_graph_that_ended_early_says_why():
    class Broken(Stack):
        def forward(self, hidden_states: Tensor) -> Tensor:
            first = self.blocks[0](hidden_states)
            torch._dynamo.graph_break()
            return self.blocks[1](first)

    found = examined(Broken(2))
    assert [bool(piece.ended) for piece in found.pieces] == [True, False]
    assert "graph_break" in found.pieces[0].ended and __file__ in found.pieces[0].ended
    assert not found.hidden


def test_attention_outside_of_what_is_compiled_is_named():
    model = Stack(2)
    assert examined(model, parts=[model.blocks[0]]).hidden == {"blocks.1": 1}


def test_state_is_what_the_strategy_keeps_for_a_branch():
    site = examined(Stack(1)).sites[0]
    heads, size, clusters = 2, 16, 32 + 64
    assert site.state_bytes == heads * size * clusters * 4 + 4  # centroids in float32, and whether they are ready


def test_fake_tensors_are_enough():
    with fake_mode():
        found = examined(Stack(2))
    assert [site.record.decision for site in found.sites] == ["sparse", "sparse"]


def test_a_model_that_reads_values_shows_its_graph_under_fullgraph():
    with fake_mode():
        model, call = Selecting(), {"hidden_states": tokens()}
        with pytest.raises(RuntimeError) as stopped:
            attention_calls(model, call)
        found = examine(model, call, CONFIG, Counter(), fullgraph=True)
    assert needs_values(stopped.value)
    assert [site.record.layer for site in found.sites] == ["stack.blocks.0"]
    assert not found.failure


def test_a_call_that_fails_is_told_and_keeps_what_was_seen():
    class Failing(Stack):
        def forward(self, hidden_states: Tensor) -> Tensor:
            out = super().forward(hidden_states)
            torch.compiler.is_compiling()
            return self.missing(out)

    model = Failing(1)
    found = examine(model, {"hidden_states": tokens()}, CONFIG, Counter())
    assert "missing" in found.failure
