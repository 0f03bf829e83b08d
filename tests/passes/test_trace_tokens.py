"""The walk along a token axis: one row a rule, on graphs small enough to see what is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dynamo_capture import capture_model, classified
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from sparse_compile.passes import trace_tokens as walking
from sparse_compile.passes.graph_facts import hint, length_of, sizes, static_length
from sparse_compile.passes.token_parts import Note, Part, part, take, tidy, total
from sparse_compile.passes.token_roles import role_of_name, role_of_part
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


def patches(latents: Tensor) -> Tensor:
    """Latents as tokens [B, F * H * W, C]."""
    return latents.flatten(2).transpose(1, 2)


def joined(hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    return torch.cat([encoder_hidden_states, hidden_states], dim=1)


def first_frame_modulated(hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
    """HunyuanVideo's token replacement: cut the first frame off, treat it apart, put it back."""
    x = joined(hidden_states, encoder_hidden_states)
    text, video = x[:, :7], x[:, 7:]
    video = torch.cat([video[:, :60] * 2, video[:, 60:] * 3], dim=1)
    return torch.cat([text, video], dim=1)


def rotated_in_place(hidden_states: Tensor, **_: Any) -> Tensor:
    out = torch.empty_like(hidden_states)
    out[..., 0::2] = hidden_states[..., 0::2] * 2
    out[..., 1::2] = hidden_states[..., 1::2] * 3
    return out


def scattered(hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
    out = hidden_states.new_zeros(2, 187, 16)
    out[:, torch.arange(180) + 7] = hidden_states
    out[:, torch.arange(7)] = encoder_hidden_states
    return out


def attention(hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
    q = joined(hidden_states, encoder_hidden_states).unflatten(2, (2, 8)).transpose(1, 2)
    k = hidden_states.unflatten(2, (2, 8)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


WEIGHT = torch.randn(16, 16)

RULES: list[tuple[str, Function, int, str]] = [
    ("input", lambda hidden_states, **_: hidden_states + 0, 1, "video:180"),
    ("flatten", lambda latents, **_: patches(latents), 1, "video:180[3x6x10]"),
    ("flatten in steps", lambda latents, **_: latents.flatten(3).flatten(2), 2, "video:180[3x6x10]"),
    ("view", lambda latents, **_: latents.view(2, 4, 3, 60), 3, "video:60[6x10]"),
    ("unflatten", lambda latents, **_: patches(latents).unflatten(1, (3, 60)), 2, "video:60[6x10]"),
    ("unflatten, outer axis", lambda latents, **_: patches(latents).unflatten(1, (3, 60)), 1, "video:3"),
    ("unflatten that cuts a factor", lambda latents, **_: patches(latents).unflatten(1, (9, 20)), 1, "video:9"),
    ("size 1", lambda hidden_states, **_: hidden_states.unsqueeze(1), 1, "learned:1"),
    ("behind size 1", lambda hidden_states, **_: hidden_states.unsqueeze(1), 2, "video:180"),
    ("squeeze", lambda hidden_states, **_: hidden_states[:, None].squeeze(1), 1, "video:180"),
    ("many to many", lambda hidden_states, **_: hidden_states.reshape(2, 192, 15), 1, "video:192!interleaved"),
    ("permute", lambda latents, **_: latents.permute(0, 3, 4, 1, 2), 1, "video:6"),
    ("permute by list", lambda latents, **_: torch.permute(latents, [0, -1, 1, 2, 3]), 1, "video:10"),
    ("movedim", lambda latents, **_: latents.movedim(1, -1), 1, "video:3"),
    ("mT", lambda hidden_states, **_: hidden_states.mT, 2, "video:180"),
    ("mT, leading axis", lambda hidden_states, **_: hidden_states.mT.unsqueeze(0), 1, "video:2"),
    ("cat", lambda encoder_hidden_states, hidden_states, **_: joined(hidden_states, encoder_hidden_states), 1, "text:7 video:180"),
    ("cat on another axis", lambda hidden_states, **_: torch.cat([hidden_states, hidden_states], -1), 1, "video:180"),
    ("cat of nothing", lambda hidden_states, **_: torch.cat([hidden_states[:, :0], hidden_states], 1), 1, "video:180"),
    ("stack", lambda hidden_states, **_: torch.stack([hidden_states, hidden_states], -1), 1, "video:180"),
    ("stack along", lambda hidden_states, **_: torch.stack([hidden_states, hidden_states], 1), 1, "video:2!interleaved"),
    ("chunk of channels", lambda hidden_states, **_: hidden_states.chunk(2, dim=-1)[1], 1, "video:180"),
    (
        "split",
        lambda hidden_states, encoder_hidden_states, **_: joined(hidden_states, encoder_hidden_states).split([7, 180], 1)[1],
        1,
        "video:180",
    ),
    ("unbind", lambda hidden_states, **_: hidden_states.unflatten(2, (2, 8)).unbind(2)[0], 1, "video:180"),
    ("select", lambda latents, **_: latents.select(1, 0), 1, "video:3"),
    ("narrow", lambda hidden_states, **_: hidden_states.narrow(1, 60, 60), 1, "video:60"),
    (
        "slice over a border",
        lambda hidden_states, encoder_hidden_states, **_: joined(hidden_states, encoder_hidden_states)[:, 5:-100],
        1,
        "text:2 video:80",
    ),
    ("slice with a step", lambda hidden_states, **_: hidden_states[:, ::2], 1, "video:90!thinned"),
    ("index with an int and ...", lambda latents, **_: latents[:, 0, ..., None], 3, "video:10"),
    ("rejoined cuts", first_frame_modulated, 1, "text:7 video:180"),
    ("linear", lambda hidden_states, **_: F.linear(hidden_states, WEIGHT), 1, "video:180"),
    ("linear, channels", lambda hidden_states, **_: F.linear(hidden_states, WEIGHT), 2, "learned:16"),
    ("norm and activation", lambda hidden_states, **_: F.silu(F.layer_norm(hidden_states, (16,))), 1, "video:180"),
    ("conv", lambda latents, **_: F.conv3d(latents, torch.ones(5, 4, 1, 2, 2), stride=(1, 2, 2)).flatten(2), 2, "video:45[3x3x5]"),
    ("conv, channels", lambda latents, **_: F.conv3d(latents, torch.ones(5, 4, 1, 1, 1)), 1, "learned:5"),
    ("matmul, rows", lambda hidden_states, encoder_hidden_states, **_: hidden_states @ encoder_hidden_states.mT, 1, "video:180"),
    ("matmul, columns", lambda hidden_states, encoder_hidden_states, **_: hidden_states @ encoder_hidden_states.mT, 2, "text:7"),
    ("mean over channels", lambda hidden_states, **_: hidden_states.mean(-1), 1, "video:180"),
    ("mean over the axis", lambda hidden_states, **_: hidden_states.mean(1, keepdim=True), 1, "video:1!unknown operation"),
    ("expand", lambda hidden_states, **_: hidden_states[:, None].expand(2, 5, 180, 16), 1, "learned:5!generated"),
    ("repeat of one", lambda hidden_states, **_: hidden_states[:, None].repeat(1, 5, 1, 1), 1, "learned:5!generated"),
    ("repeat", lambda encoder_hidden_states, **_: encoder_hidden_states.repeat(1, 2, 1), 1, "text:7 text:7"),
    ("pad", lambda hidden_states, **_: F.pad(hidden_states, (0, 0, 2, 3)), 1, "learned:2!generated video:180 learned:3!generated"),
    ("attention", attention, 1, "text:7 video:180"),
    ("rotary as complex", lambda hidden_states, **_: torch.view_as_real(torch.view_as_complex(hidden_states.unflatten(2, (8, 2)))).flatten(2), 1, "video:180"),
    ("rotary in place", rotated_in_place, 1, "video:180"),
    ("gather", lambda hidden_states, **_: hidden_states[:, torch.arange(179, -1, -1)], 1, "video:180!gathered"),
    ("gather behind the axis", lambda hidden_states, **_: hidden_states[:, :, torch.arange(8)], 1, "video:180"),
    ("index_select", lambda hidden_states, **_: hidden_states.index_select(1, torch.arange(180)), 1, "video:180!gathered"),
    ("roll", lambda hidden_states, **_: hidden_states.roll(3, 1), 1, "video:180!gathered"),
    ("indexed writes", scattered, 1, "mixed:187!gathered"),
    ("constant", lambda hidden_states, **_: torch.zeros(2, 9) + hidden_states.sum(), 1, "learned:9!generated"),
    ("unknown operation, same size", lambda hidden_states, **_: torch.special.erf(hidden_states), 1, "video:180"),
    ("unknown operation, other size", lambda hidden_states, **_: F.avg_pool1d(hidden_states.mT, 2), 2, "video:90!unknown operation"),
    ("elementwise with a weight", lambda hidden_states, **_: torch.ones(1, 180, 16) + hidden_states, 1, "video:180"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "dim", "expected"), [row[1:] for row in RULES], ids=[row[0] for row in RULES])
def test_each_rule_of_the_walk_gives_the_parts_one_expects(function: Function, dim: int, expected: str) -> None:
    assert trace(function, dim) == expected


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
    ],
    ids=["latents", "packed"],
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


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("encoder_hidden_states", "text"),
        ("encoder_hidden_states_image", "image"),
        ("control_hidden_states", "control"),
        ("audio_hidden_states", "audio"),
        ("img_ids", "vector"),
        ("single_hidden_states", "video"),
        ("x", "video"),
        ("extra", "unknown"),
        ("freqs_cos", "vector"),
    ],
)
def test_the_first_word_that_fits_tells_the_role_and_short_words_stand_alone(name: str, role: str) -> None:
    assert role_of_name(name) == role


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
        lambda hidden_states, encoder_hidden_states, **_: joined(hidden_states, encoder_hidden_states), dynamic=True
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


# ---------------------------------------------------------------------- the algebra


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_cutting_an_axis_and_joining_the_pieces_gives_it_back(lengths: list[int], data: st.DataObject) -> None:
    parts = [part(static_length(n)) for n in lengths]
    size = sum(lengths)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=4)))
    bounds = [length_of(bound) for bound in [0, *cuts, size]]
    pieces = [p for i in range(len(bounds) - 1) for p in take(parts, bounds[i], bounds[i + 1])]
    assert tidy(pieces) == parts


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 45), st.integers(0, 45))
def test_a_cut_is_as_long_as_its_bounds_say(lengths: list[int], start: int, stop: int) -> None:
    size = sum(lengths)
    start, stop = min(start, size), min(stop, size)
    taken = take([part(static_length(n)) for n in lengths], length_of(start), length_of(stop))
    assert total(taken).hint == max(stop - start, 0)
