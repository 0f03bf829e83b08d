"""Cutting and joining parts of an axis, and the roles that names give them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_compile.passes.graph_facts import length_of, static_length
from sparse_compile.passes.token_parts import part, take, tidy, total
from sparse_compile.passes.token_roles import role_of_name


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
        ("vis", "video"),
        ("aud_rope", "audio"),
        ("previous", "unknown"),
        ("extra", "unknown"),
        ("freqs_cos", "vector"),
    ],
)
def test_the_first_word_that_fits_tells_the_role_and_short_words_stand_alone(name: str, role: str) -> None:
    assert role_of_name(name) == role
