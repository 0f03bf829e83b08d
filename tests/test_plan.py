from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.plan import Plan, pack_bits, unpack_bits


def offsets(*sizes: list[int]) -> Tensor:
    """Group bounds [1, H, G + 1] of the group sizes of each head."""
    heads = [torch.tensor([0, *size]).cumsum(0) for size in sizes]
    return torch.stack(heads).to(torch.int32).unsqueeze(0)


def plan(q_sizes: list[list[int]], k_sizes: list[list[int]], kept: list[list[list[int]]]) -> Plan:
    keep = pack_bits(torch.tensor([kept], dtype=torch.bool))
    return Plan(None, offsets(*q_sizes), None, offsets(*k_sizes), keep)


@pytest.mark.parametrize("groups", [1, 2, 31, 32, 33, 64, 65, 1002])
def test_bits_survive_packing(groups: int) -> None:
    kept = torch.rand(2, 3, 4, groups, generator=torch.Generator().manual_seed(groups)) < 0.5
    packed = pack_bits(kept)
    assert packed.dtype is torch.int32
    assert tuple(packed.shape) == (2, 3, 4, -(-groups // 32))
    assert torch.equal(unpack_bits(packed, groups), kept)


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_bit_j_of_word_i_is_group_32_i_plus_j(bits: list[bool]) -> None:
    words = pack_bits(torch.tensor(bits)).tolist()
    for group, bit in enumerate(bits):
        assert (words[group // 32] >> (group % 32)) & 1 == bit
    assert all(not (words[-1] >> at) & 1 for at in range(len(bits) % 32 or 32, 32))


def test_the_highest_bit_makes_a_word_negative() -> None:
    bits = torch.zeros(32, dtype=torch.bool)
    bits[31] = True
    assert pack_bits(bits).tolist() == [-(2**31)]


def test_key_groups_count_the_padding_group() -> None:
    assert plan([[3, 0]], [[2, 4, 0]], [[[1, 0, 0], [0, 0, 0]]]).key_groups == 3


def test_kept_is_the_bitmap() -> None:
    kept = [[[1, 0, 0], [0, 1, 0]]]
    assert plan([[3, 0]], [[2, 4, 0]], kept).kept().long().tolist() == [kept]


def test_density_counts_pairs_and_leaves_padding_out() -> None:
    # rows of 3 and 5 queries keep 2 and 6 of 6 keys; a padding row and 4 padding keys do not count
    whole = plan([[3, 5, 7]], [[2, 4, 4]], [[[1, 0, 0], [1, 1, 0], [1, 1, 0]]])
    assert whole.density().tolist() == [[pytest.approx((3 * 2 + 5 * 6) / (8 * 6))]]


def test_each_head_has_its_density() -> None:
    both = plan([[4, 0], [4, 0]], [[2, 2, 0], [1, 3, 0]], [[[1, 0, 0], [0, 0, 0]]] * 2)
    assert both.density().tolist() == [[0.5, 0.25]]


def test_query_heads_share_the_groups_of_their_key_head() -> None:
    rows = [[1, 0, 0], [0, 0, 0]]
    grouped = plan([[4, 0]] * 4, [[2, 2, 0], [1, 3, 0]], [rows] * 4)
    assert grouped.density().tolist() == [[0.5, 0.5, 0.25, 0.25]]


def test_nothing_to_attend_to_counts_as_dense() -> None:
    assert plan([[0, 4]], [[0, 0, 4]], [[[0, 0, 0], [0, 0, 0]]]).density().tolist() == [[1.0]]


def test_an_empty_bitmap_has_density_zero() -> None:
    assert plan([[4, 0]], [[2, 2, 0]], [[[0, 0, 0], [0, 0, 0]]]).density().tolist() == [[0.0]]


def test_density_is_exact_for_long_videos() -> None:
    tokens = 2**17
    long = plan([[tokens, 0]], [[tokens - 1, 1, 0]], [[[1, 0, 0], [0, 0, 0]]])
    assert long.density().item() == pytest.approx(1 - 2**-17, abs=1e-7)


@given(st.data())
def test_density_equals_a_count_of_token_pairs(data: st.DataObject) -> None:
    sizes = st.lists(st.integers(0, 5), min_size=2, max_size=5)
    q_sizes, k_sizes = data.draw(sizes), data.draw(sizes)
    row = st.lists(st.booleans(), min_size=len(k_sizes), max_size=len(k_sizes))
    kept = [[*data.draw(row)[:-1], False] for _ in q_sizes]
    attended = sum(
        q * k for q, bits in zip(q_sizes[:-1], kept, strict=False) for k, bit in zip(k_sizes, bits, strict=True) if bit
    )
    valid = sum(q_sizes[:-1]) * sum(k_sizes[:-1])
    density = plan([q_sizes], [k_sizes], [[[int(bit) for bit in bits] for bits in kept]]).density().item()
    assert density == pytest.approx(attended / valid if valid else 1.0)
