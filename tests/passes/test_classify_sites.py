"""The verdict on every attention: each role, and each reason with its near miss."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_blocks import (
    BATCH,
    TEXT,
    TOKENS,
    WIDTH,
    Block,
    Joint,
    Patched,
    PatchedBoth,
    RefinedModel,
    SelfAttention,
    only,
    reason_of,
    site_of,
    text,
    video,
)
from dynamo_capture import SMALL, capture_model, classified, row
from torch import Tensor, fx, nn

from sparse_compile.config import Config
from sparse_compile.passes.classify_sites import NO_TEXT_NOTE, classify_sites
from sparse_compile.passes.match_attention import match_attention
from sparse_compile.sites import Decision, MaskForm, Reason, Site
from sparse_compile.testing import capture

# ---------------------------------------------------------------------- roles


def test_video_among_itself_is_sparse() -> None:
    site = site_of(SelfAttention(), video())
    assert (site.role, str(site.layout), site.mask_form) == ("self", "video:96", MaskForm.NONE)
    assert site.sparse


def test_joint_attention_is_sparse_and_its_parts_are_in_order() -> None:
    site = site_of(Joint(), video(), text())
    assert (site.role, str(site.layout), str(site.key_layout)) == (
        "joint",
        "video:96+text:10",
        "video:96+text:10",
    )
    assert site.sparse


def test_register_tokens_beside_the_video_make_it_joint() -> None:
    class Registers(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_tokens = nn.Parameter(torch.randn(1, 4, WIDTH))

        def forward(self, hidden_states: Tensor) -> Tensor:
            x = torch.cat([self.register_tokens.expand(BATCH, -1, -1), hidden_states], dim=1)
            return super().forward(x, x)

    site = site_of(Registers(), video())
    assert (site.role, str(site.layout)) == ("joint", "learned:4+video:96")
    assert site.sparse


@pytest.mark.parametrize(
    ("names", "role", "reason"),
    [
        (("hidden_states", "encoder_hidden_states"), "cross", Reason.CROSS_ATTENTION),
        (("audio", "hidden_states"), "audio-cross", Reason.CROSS_ATTENTION),
        (("encoder_hidden_states", "encoder_hidden_states"), "text-self", Reason.TEXT_ONLY),
        (("audio", "audio"), "audio-self", Reason.AUDIO_ONLY),
        (("image_embeds", "image_embeds"), "image-self", Reason.IMAGE_ONLY),
        (("sound", "sound"), "audio-self", Reason.AUDIO_ONLY),
        (("und_seq", "und_seq"), "text-self", Reason.TEXT_ONLY),
        (("tokens", "tokens"), "unknown-self", Reason.UNKNOWN_TOKENS),
        (("generated", "generated"), "unknown-self", Reason.UNKNOWN_TOKENS),
        (("tokens", "others"), "unknown-self", Reason.UNKNOWN_TOKENS),
        (("tokens", "encoder_hidden_states"), "unknown-cross", Reason.CROSS_ATTENTION),
        (("hidden_states", "hidden_states"), "self", None),
        (("control", "control"), "self", None),
        (("gen_seq", "gen_seq"), "self", None),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_the_names_of_the_inputs_tell_the_role(names: tuple[str, str], role: str, reason: Reason | None) -> None:
    class Named(Block):
        def forward(self, **kwargs: Tensor) -> Tensor:
            return super().forward(*(kwargs[name] for name in names))

    site = site_of(Named(), **{name: torch.randn(BATCH, TOKENS, WIDTH) for name in names})
    assert site.decision is not None
    assert (site.role, site.decision.reason) == (role, reason)


def test_text_as_long_as_the_video_is_still_cross_attention() -> None:
    class Cross(Block):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states, encoder_hidden_states)

    assert reason_of(Cross(), video(), text(TOKENS)) is Reason.CROSS_ATTENTION


def test_a_refiner_is_text_whatever_its_input_is_called() -> None:
    assert reason_of(RefinedModel(), video()) is Reason.TEXT_ONLY


# ---------------------------------------------------------------------- each reason, and its near miss


def test_reordered_video_tokens_stay_dense_and_reordered_text_does_not_matter() -> None:
    class Gathered(Joint):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, video_too: bool) -> Tensor:
            order = torch.arange(TEXT - 1, -1, -1)
            if video_too:
                hidden_states = hidden_states[:, torch.arange(TOKENS - 1, -1, -1)]
            return super().forward(hidden_states, encoder_hidden_states[:, order])

    assert reason_of(Gathered(), video(), text(), True) is Reason.TOKEN_ORDER
    assert reason_of(Gathered(), video(), text(), False) is None


def test_tokens_of_text_and_video_that_cannot_be_told_apart_stay_dense() -> None:
    class Shuffled(Block):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            x = torch.cat([hidden_states, encoder_hidden_states], dim=1).roll(3, 1)
            return super().forward(x, x)

    assert reason_of(Shuffled(), video(), text()) is Reason.TOKEN_ORDER


@pytest.mark.parametrize(("frames_in_batch", "reason"), [(True, Reason.FACTORISED), (False, None)])
def test_frames_in_the_batch_stay_dense(frames_in_batch: bool, reason: Reason | None) -> None:
    class Spatial(Block):
        def forward(self, latents: Tensor) -> Tensor:
            x = latents.permute(0, 2, 3, 4, 1)
            x = x.flatten(0, 1).flatten(1, 2) if frames_in_batch else x.flatten(1, 3)
            return super().forward(x, x)

    assert reason_of(Spatial(), torch.randn(2, WIDTH, 3, 8, 8)) is reason


def test_tokens_in_front_of_the_batch_are_no_factorised_attention() -> None:
    class TokensFirst(Block):
        def forward(self, hidden_states: Tensor) -> Tensor:
            x = hidden_states.transpose(0, 1)
            return super().forward(x, x)

    assert reason_of(TokensFirst(), video().transpose(0, 1).contiguous()) is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"is_causal": True}, Reason.CAUSAL),
        ({"dropout_p": 0.1}, Reason.DROPOUT),
        ({"is_causal": False, "dropout_p": 0.0, "scale": 0.3}, None),
    ],
)
def test_causal_attention_and_dropout_stay_dense(settings: dict[str, Any], reason: Reason | None) -> None:
    assert reason_of(SelfAttention(), video(), **settings) is reason


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [(torch.float64, Reason.DTYPE), (torch.float16, None), (torch.bfloat16, None), (torch.float32, None)],
)
def test_a_dtype_without_kernels_stays_dense(dtype: torch.dtype, reason: Reason | None) -> None:
    assert reason_of(SelfAttention(dtype=dtype), video()) is reason


@pytest.mark.parametrize(("dim", "reason"), [(12, Reason.HEAD_DIM), (264, Reason.HEAD_DIM), (24, None), (256, None)])
def test_a_head_size_without_kernels_stays_dense(dim: int, reason: Reason | None) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(WIDTH, dim)

        def forward(self, hidden_states: Tensor) -> Tensor:
            q = self.to_q(hidden_states)[:, None]
            return F.scaled_dot_product_attention(q, q, q)

    assert reason_of(Wide(), video()) is reason


def test_a_value_size_of_its_own_stays_dense() -> None:
    class Narrow(Block):
        def forward(self, hidden_states: Tensor) -> Tensor:
            q = self.split(self.to_q(hidden_states), 2)
            return F.scaled_dot_product_attention(q, q, q[..., :8])

    assert reason_of(Narrow(), video()) is Reason.HEAD_DIM


@pytest.mark.parametrize(
    ("heads", "key_heads", "grouped", "reason"),
    [(4, 2, True, None), (4, 1, False, Reason.GQA), (4, 4, False, None)],
    ids=["grouped", "broadcast without being asked to", "equal"],
)
def test_grouped_heads_are_sparse_and_broadcast_heads_dense(
    heads: int, key_heads: int, grouped: bool, reason: Reason | None
) -> None:
    block = SelfAttention(heads=heads, key_heads=key_heads)
    assert reason_of(block, video(), enable_gqa=grouped) is reason


@pytest.mark.parametrize("dims", [3, 5])
def test_other_ranks_stay_dense(dims: int) -> None:
    class Flat(Block):
        def forward(self, hidden_states: Tensor) -> Tensor:
            q = self.to_q(hidden_states)
            q = q if dims == 3 else q[:, None, None]
            return F.scaled_dot_product_attention(q, q, q)

    assert reason_of(Flat(), video()) is Reason.RANK


def test_a_device_without_kernels_stays_dense() -> None:
    assert reason_of(SelfAttention().to("meta"), video().to("meta")) is Reason.DEVICE


def test_an_attention_without_a_parameter_stays_dense() -> None:
    def bare(hidden_states: Tensor) -> Tensor:
        q = hidden_states[:, None]
        return F.scaled_dot_product_attention(q, q, q)

    assert reason_of(bare, video()) is Reason.NO_PARAMETER


def test_an_attention_in_a_sub_graph_stays_dense() -> None:
    captured = capture(SelfAttention(), video())[0]
    inner = captured.graph_module
    (site,) = match_attention(_holding(inner), captured.inputs)
    assert site.nested
    (decided,) = classify_sites([site], SMALL, captured.inputs, lambda site: None)
    assert decided.decision == Decision(Reason.NESTED)


def _holding(inner: fx.GraphModule) -> fx.GraphModule:
    """A graph that calls another."""
    root = nn.Module()
    root.add_module("inner", inner)
    graph = fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize(("least", "reason"), [(96, None), (97, Reason.TOO_SHORT), (None, None)])
def test_only_video_tokens_count_towards_the_least_length(least: int | None, reason: Reason | None) -> None:
    assert reason_of(Joint(), video(), text(), config=Config(min_tokens=least)) is reason


@pytest.mark.parametrize("refusal", [None, Reason.TOO_SHORT, Reason.HEAD_DIM])
def test_the_strategy_has_a_say(refusal: Reason | None) -> None:
    site = only(capture(SelfAttention(), video())[0], refusal=refusal)
    assert site.decision is not None
    assert site.decision.reason is refusal


def test_the_strategy_sees_the_completed_site_and_is_not_asked_about_refused_ones() -> None:
    seen: list[Site] = []
    for block, args in ((SelfAttention(), (video(),)), (SelfAttention(dtype=torch.float64), (video(),))):
        captured = capture(block, *args)[0]
        sites = match_attention(captured.graph_module, captured.inputs)
        classify_sites(sites, SMALL, captured.inputs, lambda site: seen.append(site))
    assert [str(site.layout) for site in seen] == ["video:96"]


def test_the_dense_method_needs_no_other_reason() -> None:
    config = Config(method="dense", min_tokens=64)
    assert reason_of(SelfAttention(), video(), config=config) is Reason.DENSE_METHOD
    assert reason_of(SelfAttention(dtype=torch.float64), video(), config=config) is Reason.DENSE_METHOD


# ---------------------------------------------------------------------- symbolic borders


def test_a_border_is_known_from_either_side() -> None:
    site = site_of(Patched(), torch.randn(2, WIDTH, 3, 8, 8), text(), dynamic=True)
    assert site.layout is not None
    assert [part.size is None for part in site.layout.parts] == [True, False]
    assert site.sparse


def test_a_border_between_two_unknown_lengths_stays_dense() -> None:
    latents, caption = torch.randn(2, WIDTH, 3, 8, 8), torch.randn(2, WIDTH, 5, 3)
    site = site_of(PatchedBoth(), latents, caption, dynamic=True)
    assert site.decision is not None
    assert str(site.layout) == "video:192+text:15"
    assert site.decision.reason is Reason.DYNAMIC_SPLIT
    assert site_of(PatchedBoth(), latents, caption, dynamic=False).sparse


# ---------------------------------------------------------------------- what the user says


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({"text_tokens": 10}, "video:86+text:10"),
        ({"text_tokens": 10, "text_position": "last"}, "video:86+text:10"),
        ({"text_tokens": 10, "text_position": "first"}, "text:10+video:86"),
        ({"text_tokens": 0}, "video:96"),
        ({"text_tokens": TOKENS}, "video:96"),
        ({}, "video:96"),
    ],
)
def test_the_options_split_a_packed_stream(options: dict[str, Any], layout: str) -> None:
    site = site_of(SelfAttention(), video(), config=Config(min_tokens=64, **options))
    assert str(site.layout) == str(site.key_layout) == layout
    assert site.role == ("joint" if "text" in layout else "self")
    assert site.sparse


def test_the_options_tell_what_unknown_tokens_are() -> None:
    def forward(tokens: Tensor) -> Tensor:
        return block(tokens)

    block = SelfAttention()
    assert reason_of(forward, video()) is Reason.UNKNOWN_TOKENS
    site = site_of(forward, video(), config=Config(min_tokens=64, text_tokens=10))
    assert (str(site.layout), site.sparse) == ("video:86+text:10", True)


def test_the_options_do_not_overrule_the_graph() -> None:
    config = Config(min_tokens=64, text_tokens=3)
    assert str(site_of(Joint(), video(), text(), config=config).layout) == "video:96+text:10"
    (whole,) = capture_model("wan_t2v")
    assert str(classified(whole, config)[0].layout) == "video:480"


def test_a_packed_stream_without_text_beside_it_is_noted() -> None:
    site = site_of(SelfAttention(), video())
    (whole,) = capture_model("ltx")
    assert site.decision is not None
    assert site.decision.note == NO_TEXT_NOTE
    assert [s.decision.note for s in classified(whole) if s.decision] == [""] * 4


# ---------------------------------------------------------------------- failures


def test_an_analysis_that_fails_leaves_its_site_dense_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sparse_compile.passes import classify_sites as module

    def broken(*_: Any) -> MaskForm:
        raise ValueError("a mask from another world")

    captured = capture(SelfAttention(), video())[0]
    monkeypatch.setattr(module, "mask_form", broken)
    with caplog.at_level(logging.ERROR, logger=module.__name__):
        site = only(captured)
    assert site.decision is not None
    assert site.decision.reason is Reason.ANALYSIS_FAILED
    assert site.decision.note == "ValueError: a mask from another world"
    assert "stays dense" in caplog.text


def test_a_failing_site_does_not_touch_its_neighbours() -> None:
    (captured,) = capture_model("ltx")
    sites = match_attention(captured.graph_module, captured.inputs)
    seen: list[Site] = []

    def refuse_once(site: Site) -> Reason | None:
        seen.append(site)
        if len(seen) == 1:
            raise RuntimeError
        return None

    reasons = [s.decision.reason for s in classify_sites(sites, SMALL, captured.inputs, refuse_once) if s.decision]
    assert reasons == [Reason.ANALYSIS_FAILED, Reason.CROSS_ATTENTION, None, Reason.CROSS_ATTENTION]


def test_a_site_that_was_decided_before_stays_so() -> None:
    captured = capture(SelfAttention(), video())[0]
    sites = [s.decided(Reason.GRADIENTS) for s in match_attention(captured.graph_module, captured.inputs)]
    assert classify_sites(sites, SMALL, captured.inputs, lambda site: None) == sites


def test_classifying_adds_no_guard() -> None:
    (captured,) = capture_model("hunyuan_video", dynamic=True)
    sites = match_attention(captured.graph_module, captured.inputs)
    shape_env = sites[0].query.meta["example_value"].fake_mode.shape_env
    before = len(shape_env.guards)
    assert all(row(site) for site in classified(captured))
    assert len(shape_env.guards) == before
