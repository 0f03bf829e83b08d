"""Prompts of length zero, everything masked, grouped heads, several batch items: through the whole pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_models import EAGER, Stack, tokens

import sparse_compile

OPTIONS = {**EAGER, "dense_steps": 0, "min_tokens": 64, "top_p": 1.0}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield


class Joint(nn.Module):
    """Video and text in one sequence, with a key-padding mask and fewer key heads than query heads."""

    def __init__(self, heads: int = 4, key_heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q = nn.Linear(32, heads * 16)
        self.to_k, self.to_v = nn.Linear(32, key_heads * 16), nn.Linear(32, key_heads * 16)
        self.eval().requires_grad_(False)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        q, k, v = (p(x).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        if mask is not None:
            mask = mask[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def two_steps(model: nn.Module, *inputs: Tensor, **options: object) -> Tensor:
    """A search and a sparse call; the second one's output."""
    call = torch.compile(model, backend="sparse_attn", options={**OPTIONS, **options}, fullgraph=True)
    with sparse_compile.denoising(model, steps=2) as clock:
        for _ in range(2):
            out = call(*inputs)
            clock.step()
    report = sparse_compile.explain(model)
    assert [site.decision for site in report.sites] == ["sparse"], report
    assert [step.phase for step in report.generations[0].steps] == ["search", "sparse"]
    return out


@pytest.mark.parametrize("words", [0, 1, 9])
def test_text_of_any_length_beside_the_video(words: int) -> None:
    model, video, text = Joint(), tokens(100), tokens(words, seed=1)
    torch.testing.assert_close(two_steps(model, video, text), model(video, text), rtol=1e-4, atol=1e-5)


def test_padding_takes_no_mass_and_its_values_do_not_matter() -> None:
    model, video, text = Joint(), tokens(100, batch=2), tokens(9, batch=2, seed=1)
    mask = torch.ones(2, 109, dtype=torch.bool)
    mask[0, 104:] = False
    mask[1, 50:70] = False
    out = two_steps(model, video, text, mask)
    torch.testing.assert_close(out, model(video, text, mask), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    outputs = []
    for value in (0.0, float("nan")):
        torch.compiler.reset()
        poisoned = text.clone()
        poisoned[0, 4:] = value
        outputs.append(two_steps(model, video, poisoned, mask, top_p=0.5)[0, :, :104])
    assert torch.equal(*outputs)


def test_an_item_with_every_key_masked_gives_zeros() -> None:
    model, video, text = Joint(), tokens(100, batch=2), tokens(9, batch=2, seed=1)
    mask = torch.ones(2, 109, dtype=torch.bool)
    mask[1] = False
    out = two_steps(model, video, text, mask)
    assert not out[1].any()
    torch.testing.assert_close(out[0], model(video, text, mask)[0], rtol=1e-4, atol=1e-5)


def test_a_batch_equals_its_items_bit_for_bit() -> None:
    model = Stack(1)
    x = tokens(200, batch=3)
    together = two_steps(model, x, top_p=0.5)
    for item in range(3):
        torch.compiler.reset()
        alone = two_steps(model, x[item : item + 1], top_p=0.5)
        assert (together[item] - alone[0]).abs().max() <= 1e-6  # the projections are one matrix product for the batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model, x = Stack(1).to(dtype), tokens(128).to(dtype)
    out, want = two_steps(model, x), model(x)
    assert out.dtype is dtype
    assert (out - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_nearing_the_recompile_limit_is_a_warning_in_the_report() -> None:
    model = Stack(1)
    call = torch.compile(model, backend="sparse_attn", options=OPTIONS, dynamic=False)
    limit = mock.patch("sparse_compile.compiler.torch_internals.RECOMPILE_LIMIT", 8)
    with limit, torch._dynamo.config.patch(recompile_limit=8):
        for count in range(64, 70):
            call(tokens(count))
    assert any("at the limit it runs eagerly" in warning for warning in sparse_compile.explain(model).warnings)
