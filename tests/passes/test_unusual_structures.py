"""Attention in structures that no family shows alone: windows, histories, references, caches, packed projections."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_blocks import BATCH, TOKENS, WIDTH, Block, SelfAttention, reason_of, site_of, text, video
from torch import Tensor, nn

import sparse_compile
from sparse_compile.sites import Reason
from sparse_compile.testing import capture, find

HISTORY = 40

# ---------------------------------------------------------------------- refiners


class VideoRefiner(SelfAttention):
    """A second stage that refines video, told what to show by text."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states + encoder_hidden_states.mean(1, keepdim=True))


class RefiningModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = VideoRefiner()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.block(hidden_states, encoder_hidden_states)


def test_a_refiner_with_text_beside_it_refines_video() -> None:
    site = site_of(RefiningModel(), video(), text())
    assert "VideoRefiner" in dict(site.modules).values()
    assert (site.role, str(site.layout), site.sparse) == ("self", "video:96", True)


# ---------------------------------------------------------------------- keys that hold more than the queries


class WithHistory(Block):
    """The frames before are keys of the new ones, and are not computed again."""

    def forward(self, hidden_states: Tensor, history: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states, torch.cat([history, hidden_states], dim=1), attn_mask=mask)


class WithCache(Block):
    """Keys of an earlier call, with text among them, come as an input."""

    def forward(self, hidden_states: Tensor, cached_key: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k = self.split(self.to_q(hidden_states), 2), self.split(hidden_states, 2)
        k = torch.cat([cached_key.unflatten(2, (2, -1)).transpose(1, 2), k], dim=2)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)


class WithTextKeys(Block):
    """Video attends to text and video, text is not among the queries."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states, torch.cat([encoder_hidden_states, hidden_states], dim=1), attn_mask=mask)


class TextReadsAll(Block):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return super().forward(encoder_hidden_states, torch.cat([encoder_hidden_states, hidden_states], dim=1))


class AmongShuffledKeys(Block):
    """Which of the keys are video cannot be told."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states, torch.cat([encoder_hidden_states, hidden_states], dim=1).roll(3, 1))


EXTRA = [
    pytest.param(WithHistory, "control:40+video:96", id="history"),
    pytest.param(WithCache, "unknown:40+video:96", id="cache"),
    pytest.param(WithTextKeys, "text:40+video:96", id="text"),
]


@pytest.mark.parametrize(("block", "keys"), EXTRA)
def test_video_that_attends_to_itself_and_to_more_is_sparse(block: type[Block], keys: str) -> None:
    site = site_of(block(), video(), text(HISTORY))
    assert (site.role, str(site.layout), str(site.key_layout)) == ("self+extra", "video:96", keys)
    assert site.sparse


@pytest.mark.parametrize(
    ("block", "reason"), [(TextReadsAll, Reason.EXTRA_KEYS), (AmongShuffledKeys, Reason.TOKEN_ORDER)]
)
def test_text_among_more_and_video_among_keys_of_unknown_order_stay_dense(block: type[Block], reason: Reason) -> None:
    assert reason_of(block(), video(), text()) is reason


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "padded keys"])
@pytest.mark.parametrize("method", ["svg2", "adaspa"])
@pytest.mark.parametrize(("block", "keys"), EXTRA)
def test_more_keys_than_queries_equal_eager_if_nothing_is_skipped(
    block: type[Block], keys: str, method: str, masked: bool
) -> None:
    padding = torch.ones(BATCH, 1, 1, HISTORY + TOKENS, dtype=torch.bool)
    padding[1, ..., 5:HISTORY] = False
    mask = padding if masked else None
    assert _error(block(), method, video(), text(HISTORY), mask, everything=True) <= 1e-5


class ShownMask(SelfAttention):
    """A mask of keys, expanded to all heads and queries."""

    def forward(self, hidden_states: Tensor, valid: Tensor) -> Tensor:
        return super().forward(hidden_states, valid[:, None, None].expand(-1, 2, hidden_states.shape[1], -1))


@pytest.mark.parametrize("method", ["svg2", "adaspa"])
def test_a_mask_that_is_shown_to_all_queries_equals_eager_if_nothing_is_skipped(method: str) -> None:
    valid = torch.arange(TOKENS).expand(BATCH, -1) < torch.tensor([[TOKENS], [50]])
    assert _error(ShownMask(), method, video(), valid, everything=True) <= 1e-5


@pytest.mark.parametrize("method", ["svg2", "adaspa"])
def test_skipped_keys_beside_a_history_show(method: str) -> None:
    assert _error(WithHistory(), method, video(), text(HISTORY), everything=False) > 1e-3


BUDGETS = {
    ("svg2", True): {"top_p": 1.0, "q_clusters": 4, "k_clusters": 8},
    ("svg2", False): {"density": 0.3, "q_clusters": 4, "k_clusters": 8, "correction": "none"},
    ("adaspa", True): {"sparsity": 0.0, "block_size": 16},
    ("adaspa", False): {"sparsity": 0.7, "block_size": 16, "correction": "none"},
}


def _error(model: nn.Module, method: str, *args: Tensor | None, everything: bool) -> float:
    """The greatest difference from eager over two steps, of which the last is sparse."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    options = {"method": method, "lowering": "eager", "min_tokens": 1, "dense_steps": 0, "dense_layers": 0}
    run = torch.compile(
        model, backend="sparse_attn", options={**options, **BUDGETS[method, everything]}, fullgraph=True
    )
    with torch.no_grad(), sparse_compile.denoising(model, steps=2) as clock:
        wanted = model(*args)
        errors = []
        for _ in range(2):
            errors.append(float((run(*args) - wanted).abs().max() / wanted.abs().max()))
            clock.step()
    assert sparse_compile.explain(model).generations[-1].steps[-1].phase == "sparse"
    return max(errors)


# ---------------------------------------------------------------------- structures of one axis


class Windowed(Block):
    """Windows of the grid in the batch, as in Swin; ``shift`` moves them by half of one."""

    def __init__(self, window: int, shift: int = 0) -> None:
        super().__init__()
        self.window, self.shift = window, shift

    def forward(self, latents: Tensor) -> Tensor:
        x = latents.permute(0, 2, 3, 4, 1)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (2, 3))
        x = x.unflatten(2, (-1, self.window)).unflatten(4, (-1, self.window))
        x = x.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 5).flatten(0, 2)
        return super().forward(x, x)


@pytest.mark.parametrize(
    ("window", "shift", "reason"),
    [(4, 0, Reason.FACTORISED), (4, 2, Reason.TOKEN_ORDER), (8, 0, None)],
    ids=["windows", "shifted windows", "one window"],
)
def test_windows_in_the_batch_are_as_short_as_they_are(window: int, shift: int, reason: Reason | None) -> None:
    latents = torch.randn(BATCH, WIDTH, 4, 8, 8)
    assert reason_of(Windowed(window, shift), latents) is reason


class HistoryInFront(Block):
    """Earlier frames are queries too."""

    def forward(self, hidden_states: Tensor, history: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = torch.cat([history, hidden_states, encoder_hidden_states], dim=1)
        return super().forward(x, x)


def test_a_history_in_front_is_clustered_with_the_video() -> None:
    site = site_of(HistoryInFront(), video(), text(HISTORY), text())
    assert (site.role, str(site.layout), site.sparse) == ("joint", "control:40+video:96+text:10", True)
    assert site.layout is not None
    assert site.layout.video_tokens == HISTORY + TOKENS


class Fused(nn.Module):
    """One linear layer for all three projections; ``interleaved`` keeps q, k and v of a head together."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.to_qkv, self.interleaved = nn.Linear(WIDTH, 3 * WIDTH), interleaved

    def forward(self, hidden_states: Tensor) -> Tensor:
        qkv = self.to_qkv(hidden_states)
        if self.interleaved:
            q, k, v = qkv.unflatten(2, (2, 3, -1)).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("interleaved", [False, True])
def test_one_projection_for_q_k_and_v_is_no_hindrance(interleaved: bool) -> None:
    site = site_of(Fused(interleaved), video())
    assert (site.role, str(site.layout), site.name, site.sparse) == ("self", "video:96", "to_qkv.weight", True)


class InPlaceRotary(Block):
    """Rotated halves are written into an empty tensor."""

    def split(self, x: Tensor, heads: int) -> Tensor:
        x, out = super().split(x, heads), torch.empty_like(super().split(x, heads))
        out[..., 0::2], out[..., 1::2] = -x[..., 1::2], x[..., 0::2]
        return out

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states, hidden_states)


def test_rotary_positions_written_in_place_are_followed() -> None:
    assert str(site_of(InPlaceRotary(), video()).layout) == "video:96"


def test_rotary_positions_written_in_place_equal_eager() -> None:
    assert _error(InPlaceRotary(), "svg2", video(), everything=True) <= 1e-5


class Grouped(SelfAttention):
    def __init__(self) -> None:
        super().__init__(heads=4, key_heads=2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states, enable_gqa=True)


@pytest.mark.parametrize("method", ["svg2", "adaspa"])
def test_fewer_key_heads_than_query_heads_equal_eager(method: str) -> None:
    assert _error(Grouped(), method, video(), everything=True) <= 1e-5


# ---------------------------------------------------------------------- attention that is no call of SDPA


class HandWritten(SelfAttention):
    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k = self.split(self.to_q(hidden_states), 2), self.split(hidden_states, 2)
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ k


def test_attention_written_by_hand_is_not_found_and_the_report_says_what_is() -> None:
    model = HandWritten().requires_grad_(False)
    assert find(capture(model, video())[0]) == []
    run: Callable[[Tensor], Tensor] = torch.compile(model, backend="sparse_attn", options={"lowering": "eager"})
    assert "no attention was compiled yet" in str(sparse_compile.explain(model))
    with torch.no_grad():
        run(video())
    report = str(sparse_compile.explain(model))
    assert "no scaled_dot_product_attention in what was compiled" in report
