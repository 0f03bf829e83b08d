"""The walk along a token axis: one row a rule, on graphs small enough to see what is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from dynamo_capture import capture_model, classified
from torch import Tensor, fx
from torch.nn.utils.rnn import pad_sequence

from sparse_compile.passes import trace_tokens as walking
from sparse_compile.passes.graph_facts import hint, sizes, static_length
from sparse_compile.passes.token_parts import Note, Part, part
from sparse_compile.passes.token_roles import role_of_part
from sparse_compile.passes.trace_tokens import layout_of, trace_tokens
from sparse_compile.sites import GraphInput
from sparse_compile.testing import Captured, capture

Function = Callable[..., Tensor]

LATENTS, TOKENS, TEXT = (2, 4, 3, 6, 10), (2, 180, 16), (2, 7, 16)


def inputs(**more: Tensor) -> dict[str, Tensor]:
    """Video latents [B, C, F, H, W], the same number of packed tokens, and text."""
    return {
        "latents": torch.randn(LATENTS),
        "hidden_states": torch.randn(TOKENS),
        "encoder_hidden_states": torch.randn(TEXT),
        **more,
    }


def graph_of(function: Function, dynamic: bool | None = None, **more: Tensor) -> tuple[Captured, fx.Node]:
    """The graph of ``function(**inputs)`` and the node of its result."""

    def copied(**kwargs: Tensor) -> Tensor:
        return function(**kwargs).clone()  # a view of an input would be made outside of the graph

    captured = capture(copied, dynamic=dynamic, **inputs(**more))[0]
    (output,) = captured.graph_module.graph.find_nodes(op="output")
    result = output.args[0][0]
    assert isinstance(result, fx.Node)
    return captured, result


def trace(function: Function, dim: int = 1, dynamic: bool | None = None, **more: Tensor) -> str:
    captured, node = graph_of(function, dynamic, **more)
    return describe(trace_tokens(node, dim, captured.inputs, {}), captured)


def describe(parts: list[Part], captured: Captured) -> str:
    return " ".join(_describe(p, captured) for p in parts)


def _describe(p: Part, captured: Captured) -> str:
    grid = "x".join(map(str, p.factors)) if len(p.factors) > 1 else ""
    note = f"!{p.note}" if p.note else ""
    return f"{role_of_part(p, captured.inputs)}:{p.length}" + (f"[{grid}]" if grid else "") + note


class Given(NamedTuple):
    """The inputs of a rule."""

    latents: Tensor
    video: Tensor
    text: Tensor


def patches(latents: Tensor) -> Tensor:
    """Latents as tokens [B, F * H * W, C]."""
    return latents.flatten(2).transpose(1, 2)


def joined(hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    return torch.cat([encoder_hidden_states, hidden_states], dim=1)


def first_frame_modulated(i: Given) -> Tensor:
    """HunyuanVideo's token replacement: cut the first frame off, treat it apart, put it back."""
    x = joined(i.video, i.text)
    text, video = x[:, :7], x[:, 7:]
    video = torch.cat([video[:, :60] * 2, video[:, 60:] * 3], dim=1)
    return torch.cat([text, video], dim=1)


def rotated_in_place(i: Given) -> Tensor:
    out = torch.empty_like(i.video)
    out[..., 0::2] = i.video[..., 0::2] * 2
    out[..., 1::2] = i.video[..., 1::2] * 3
    return out


def scattered(i: Given) -> Tensor:
    out = i.video.new_zeros(2, 187, 16)
    out[:, torch.arange(180) + 7] = i.video
    out[:, torch.arange(7)] = i.text
    return out


def attention(i: Given) -> Tensor:
    q = joined(i.video, i.text).unflatten(2, (2, 8)).transpose(1, 2)
    k = i.video.unflatten(2, (2, 8)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


def rotated_as_complex(i: Given) -> Tensor:
    turned = torch.view_as_complex(i.video.unflatten(2, (8, 2)))
    return torch.view_as_real(turned).flatten(2)


Rule = Callable[[Given], Tensor]
WEIGHT = torch.randn(16, 16)

RULES: list[tuple[str, Rule, int, str]] = [
    ("input", lambda i: i.video + 0, 1, "video:180"),
    ("flatten", lambda i: patches(i.latents), 1, "video:180[3x6x10]"),
    ("flatten in steps", lambda i: i.latents.flatten(3).flatten(2), 2, "video:180[3x6x10]"),
    ("view", lambda i: i.latents.view(2, 4, 3, 60), 3, "video:60[6x10]"),
    ("unflatten", lambda i: patches(i.latents).unflatten(1, (3, 60)), 2, "video:60[6x10]"),
    ("unflatten, outer axis", lambda i: patches(i.latents).unflatten(1, (3, 60)), 1, "video:3"),
    ("unflatten that cuts a factor", lambda i: patches(i.latents).unflatten(1, (9, 20)), 1, "video:9"),
    ("size 1", lambda i: i.video.unsqueeze(1), 1, "learned:1"),
    ("behind size 1", lambda i: i.video.unsqueeze(1), 2, "video:180"),
    ("squeeze", lambda i: i.video[:, None].squeeze(1), 1, "video:180"),
    ("many to many", lambda i: i.video.reshape(2, 192, 15), 1, "video:192!interleaved"),
    ("permute", lambda i: i.latents.permute(0, 3, 4, 1, 2), 1, "video:6"),
    ("permute by list", lambda i: torch.permute(i.latents, [0, -1, 1, 2, 3]), 1, "video:10"),
    ("movedim", lambda i: i.latents.movedim(1, -1), 1, "video:3"),
    ("mT", lambda i: i.video.mT, 2, "video:180"),
    ("mT, leading axis", lambda i: i.video.mT.unsqueeze(0), 1, "video:2"),
    ("cat", lambda i: joined(i.video, i.text), 1, "text:7 video:180"),
    ("cat on another axis", lambda i: torch.cat([i.video, i.video], -1), 1, "video:180"),
    ("cat of nothing", lambda i: torch.cat([i.video[:, :0], i.video], 1), 1, "video:180"),
    ("stack", lambda i: torch.stack([i.video, i.video], -1), 1, "video:180"),
    ("stack along", lambda i: torch.stack([i.video, i.video], 1), 1, "video:2!interleaved"),
    ("chunk of channels", lambda i: i.video.chunk(2, dim=-1)[1], 1, "video:180"),
    (
        "split",
        lambda i: joined(i.video, i.text).split([7, 180], 1)[1],
        1,
        "video:180",
    ),
    ("unbind", lambda i: i.video.unflatten(2, (2, 8)).unbind(2)[0], 1, "video:180"),
    ("select", lambda i: i.latents.select(1, 0), 1, "video:3"),
    ("narrow", lambda i: i.video.narrow(1, 60, 60), 1, "video:60"),
    (
        "slice over a border",
        lambda i: joined(i.video, i.text)[:, 5:-100],
        1,
        "text:2 video:80",
    ),
    ("slice with a step", lambda i: i.video[:, ::2], 1, "video:90!thinned"),
    ("index with an int and ...", lambda i: i.latents[:, 0, ..., None], 3, "video:10"),
    ("rejoined cuts", first_frame_modulated, 1, "text:7 video:180"),
    ("linear", lambda i: F.linear(i.video, WEIGHT), 1, "video:180"),
    ("linear, channels", lambda i: F.linear(i.video, WEIGHT), 2, "learned:16"),
    ("norm and activation", lambda i: F.silu(F.layer_norm(i.video, (16,))), 1, "video:180"),
    (
        "conv",
        lambda i: F.conv3d(i.latents, torch.ones(5, 4, 1, 2, 2), stride=(1, 2, 2)).flatten(2),
        2,
        "video:45[3x3x5]",
    ),
    ("conv, channels", lambda i: F.conv3d(i.latents, torch.ones(5, 4, 1, 1, 1)), 1, "learned:5"),
    ("matmul, rows", lambda i: i.video @ i.text.mT, 1, "video:180"),
    ("matmul, columns", lambda i: i.video @ i.text.mT, 2, "text:7"),
    (
        "einsum that permutes",
        lambda i: torch.einsum("bcfhw -> bfhwc", i.latents).flatten(1, 3),
        1,
        "video:180[3x6x10]",
    ),
    ("einsum of two, left", lambda i: torch.einsum("bsc,btc->bst", i.video, i.text), 1, "video:180"),
    ("einsum of two, right", lambda i: torch.einsum("bsc,btc->bst", i.video, i.text), 2, "text:7"),
    ("einsum with an ellipsis", lambda i: torch.einsum("...sc->...cs", i.video), 2, "video:180!unknown operation"),
    ("pad_sequence, alike", lambda i: pad_sequence(list(i.video), batch_first=True), 1, "video:180"),
    ("pad_sequence, tokens first", lambda i: pad_sequence([i.text[0]]), 0, "text:7"),
    ("pad_sequence, unlike", lambda i: pad_sequence([i.video[0], i.text[0]], True), 1, "mixed:180!gathered"),
    ("mean over channels", lambda i: i.video.mean(-1), 1, "video:180"),
    ("mean over the axis", lambda i: i.video.mean(1, keepdim=True), 1, "video:1!unknown operation"),
    ("expand", lambda i: i.video[:, None].expand(2, 5, 180, 16), 1, "learned:5!generated"),
    ("repeat of one", lambda i: i.video[:, None].repeat(1, 5, 1, 1), 1, "learned:5!generated"),
    ("repeat", lambda i: i.text.repeat(1, 2, 1), 1, "text:7 text:7"),
    ("pad", lambda i: F.pad(i.video, (0, 0, 2, 3)), 1, "learned:2!generated video:180 learned:3!generated"),
    ("attention", attention, 1, "text:7 video:180"),
    ("rotary as complex", rotated_as_complex, 1, "video:180"),
    ("rotary in place", rotated_in_place, 1, "video:180"),
    ("gather", lambda i: i.video[:, torch.arange(179, -1, -1)], 1, "video:180!gathered"),
    ("gather behind the axis", lambda i: i.video[:, :, torch.arange(8)], 1, "video:180"),
    ("index_select", lambda i: i.video.index_select(1, torch.arange(180)), 1, "video:180!gathered"),
    ("roll", lambda i: i.video.roll(3, 1), 1, "video:180!gathered"),
    ("indexed writes", scattered, 1, "mixed:187!gathered"),
    ("constant", lambda i: torch.zeros(2, 9) + i.video.sum(), 1, "learned:9!generated"),
    ("unknown operation, same size", lambda i: torch.special.erf(i.video), 1, "video:180"),
    ("unknown operation, other size", lambda i: F.avg_pool1d(i.video.mT, 2), 2, "video:90!unknown operation"),
    (
        "what cannot be followed, with positions",
        lambda i: F.avg_pool1d(i.video.mT, 2) * torch.ones(90),
        2,
        "video:90!unknown operation",
    ),
    ("elementwise with a weight", lambda i: torch.ones(1, 180, 16) + i.video, 1, "video:180"),
]


@pytest.mark.parametrize(("function", "dim", "expected"), [row[1:] for row in RULES], ids=[row[0] for row in RULES])
def test_each_rule_of_the_walk_gives_the_parts_one_expects(function: Rule, dim: int, expected: str) -> None:
    def forward(latents: Tensor, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return function(Given(latents, hidden_states, encoder_hidden_states))

    assert trace(forward, dim) == expected


def test_a_context_joined_on_the_channels_does_not_hide_the_video() -> None:
    def forward(hidden_states: Tensor, context: Tensor, **_: Tensor) -> Tensor:
        return torch.cat([context, hidden_states], dim=-1)

    assert trace(forward, context=torch.randn(TOKENS)) == "video:180"


def test_a_rotary_table_in_front_does_not_hide_the_video() -> None:
    def rotate(hidden_states: Tensor, rotary_emb: Tensor, **_: Tensor) -> Tensor:
        return rotary_emb * hidden_states

    assert trace(rotate, rotary_emb=torch.randn(180, 16)) == "video:180"


def test_a_modulating_vector_is_dropped_from_a_gathered_part() -> None:
    def modulate(hidden_states: Tensor, timestep: Tensor, **_: Tensor) -> Tensor:
        return (hidden_states * timestep[:, None, None]).roll(1, 1)

    assert trace(modulate, timestep=torch.ones(2)) == "video:180!gathered"


def test_weights_leave_no_origin() -> None:
    class Positions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden_states_table = torch.nn.Parameter(torch.randn(1, 5, 16))

        def forward(self, encoder_hidden_states: Tensor, **_: Tensor) -> Tensor:
            table = self.hidden_states_table.expand(2, -1, -1)
            return torch.cat([table, encoder_hidden_states], dim=1)

    assert trace(Positions()) == "learned:5 text:7"


@pytest.mark.parametrize(
    ("sizes_", "roles"),
    [
        (((2, 4, 3, 6, 10), (2, 7, 16), (2,)), ["video", "text", "vector"]),
        (((2, 180, 16), (2, 7, 16), (2,)), ["unknown", "text", "vector"]),
        (((2, 180, 16), (2, 7, 16), (1, 180, 1, 8)), ["unknown", "text", "vector"]),
        (((2, 4, 1, 6, 10), (2, 7, 16), (2,)), ["video", "text", "vector"]),
    ],
    ids=["latents", "packed", "packed, beside rotary angles", "one frame"],
)
def test_positional_inputs_get_their_role_from_their_rank(
    sizes_: tuple[tuple[int, ...], ...], roles: list[str]
) -> None:
    def forward(*args: Tensor) -> tuple[Tensor, ...]:
        return tuple(a + 1 for a in args)

    captured = capture(forward, *(torch.randn(s) for s in sizes_))[0]
    placeholders = captured.graph_module.graph.find_nodes(op="placeholder")
    assert ["args" in captured.inputs[node].name for node in placeholders] == [True] * 3
    parts = [trace_tokens(node, -1, captured.inputs, {})[0] for node in placeholders]
    assert [role_of_part(p, captured.inputs) for p in parts] == roles


def test_a_value_from_before_a_graph_break_has_no_role() -> None:
    graph = fx.Graph()
    node = graph.placeholder("l_stack0_")
    node.meta["example_value"] = torch.randn(2, 180, 16)
    (found,) = trace_tokens(node, 1, {node: GraphInput("l_stack0_")}, {})
    assert role_of_part(found, {node: GraphInput("l_stack0_")}) == "unknown"


def test_a_graph_deeper_than_the_stack_is_walked_to_its_end() -> None:
    graph = fx.Graph()
    first = node = graph.placeholder("hidden_states")
    node.meta["example_value"] = value = torch.randn(2, 180, 16)
    for _ in range(3000):
        node = graph.call_function(torch.neg, (node,))
        node.meta["example_value"] = value
    (found,) = trace_tokens(node, 1, {first: GraphInput("hidden_states")}, {})
    assert found.origins == {first}


def test_parts_that_do_not_add_up_become_one_opaque_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(walking.RULES, "neg", lambda walk, node, dim: [part(static_length(1))])
    assert trace(lambda hidden_states, **_: hidden_states.neg()) == "video:180!unknown operation"


# ---------------------------------------------------------------------- sizes


def test_static_sizes_are_numbers() -> None:
    captured, node = graph_of(
        lambda hidden_states, encoder_hidden_states, **_: joined(hidden_states, encoder_hidden_states)[:, 3:]
    )
    layout = layout_of(node, captured.inputs, {})
    assert [(p.role, p.length, p.size) for p in layout.parts] == [("text", 4, 4), ("video", 180, 180)]


def test_a_symbolic_size_is_that_of_an_input() -> None:
    captured, node = graph_of(
        lambda hidden_states, encoder_hidden_states, **_: joined(hidden_states, encoder_hidden_states),
        dynamic=True,
    )
    placeholders = {known.name: placeholder for placeholder, known in captured.inputs.items()}
    layout = layout_of(node, captured.inputs, {})
    assert [p.size for p in layout.parts] == [
        (placeholders["encoder_hidden_states"], 1),
        (placeholders["hidden_states"], 1),
    ]


def test_a_product_of_symbolic_sizes_is_unknown() -> None:
    captured, node = graph_of(lambda latents, **_: patches(latents), dynamic=True)
    (video,) = layout_of(node, captured.inputs, {}).parts
    assert (video.length, video.size, video.grid) == (180, None, (3, 6, 10))


def test_a_fixed_bound_that_meets_a_symbolic_border_by_chance_gives_no_size() -> None:
    def seven_from(hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Tensor) -> Tensor:
        return joined(hidden_states, encoder_hidden_states)[:, 7:] * 2

    def padded(hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Tensor) -> Tensor:
        return F.pad(seven_from(hidden_states, encoder_hidden_states), (0, 0, 1, 0))

    captured, node = graph_of(padded, dynamic=True)
    padding, video = layout_of(node, captured.inputs, {}).parts
    assert (padding.size, video.length, video.size) == (1, 180, None)


def test_a_symbolic_border_that_the_graph_spells_out_keeps_its_size() -> None:
    def split_at_the_text(hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Tensor) -> Tensor:
        x = joined(hidden_states, encoder_hidden_states)
        length = encoder_hidden_states.shape[1]
        return torch.cat([x[:, length:], x[:, :length]], dim=1)

    captured, node = graph_of(split_at_the_text, dynamic=True)
    layout = layout_of(node, captured.inputs, {})
    names = [captured.inputs[p.size[0]].name for p in layout.parts if isinstance(p.size, tuple)]
    assert names == ["hidden_states", "encoder_hidden_states"]


def test_reading_symbolic_sizes_adds_no_guard() -> None:
    captured, node = graph_of(
        lambda hidden_states, encoder_hidden_states, **_: joined(hidden_states, encoder_hidden_states).flatten(1),
        dynamic=True,
    )
    shape_env = node.meta["example_value"].shape[1].node.shape_env
    before = len(shape_env.guards)
    layout_of(node, captured.inputs, {})
    trace_tokens(node, 1, captured.inputs, {})
    assert len(shape_env.guards) == before


@pytest.mark.parametrize("name", ["wan_t2v", "hunyuan_video"])
def test_under_dynamic_sizes_every_part_is_a_number_an_inputs_size_or_unknown(name: str) -> None:
    (captured,) = capture_model(name, dynamic=True)
    for site in classified(captured):
        assert site.layout is not None
        for p in site.layout.parts:
            if isinstance(p.size, tuple):
                node, dim = p.size
                assert node in captured.inputs
                assert sizes(node)[dim] == p.length
            elif isinstance(p.size, int):
                assert p.size == p.length
            else:
                assert p.role == "video"


def test_sizes_that_depend_on_data_get_numbers_that_tell_them_apart() -> None:
    def chosen(hidden_states: Tensor, mask: Tensor, **_: Tensor) -> Tensor:
        return torch.cat([hidden_states[0][mask], hidden_states[1][~mask]])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        captured, node = graph_of(chosen, mask=torch.arange(180) % 3 == 0)
    first, second = trace_tokens(node, 0, captured.inputs, {})
    assert first.length != second.length
    assert min(first.length, second.length) >= 997
    assert first.note is second.note is Note.GATHERED
    assert hint(node.meta["example_value"].shape[0]) == first.length + second.length
