from __future__ import annotations

import pytest
import torch
from kernel_oracles import DTYPES, assert_same_bits, random_tensor

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.permutation import reference
from sparse_compile.kernels.permutation.triton_launch import gather_rows, sort_labels


def random_labels(*shape, groups, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(groups, shape, generator=generator, dtype=torch.int32).to(device)


def assert_sorts_like_the_reference(labels, groups, **options):
    with nan_filled_empty():
        got = sort_labels(labels, groups, **options)
    assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in got)
    assert_same_bits(got, reference.sort_labels(labels, groups))


@pytest.mark.parametrize(
    ("tokens", "groups"), [(0, 3), (1, 1), (1, 40), (15, 7), (17, 1), (63, 15), (64, 16), (65, 40), (130, 7)]
)
def test_the_order_is_that_of_a_stable_sort(device, tokens, groups):
    labels = random_labels(2, 2, tokens, groups=groups, device=device)
    assert_sorts_like_the_reference(labels, groups, block=16)


@pytest.mark.parametrize("tokens", [1024, 1025])
def test_blocks_of_the_real_size_sort_alike(device, tokens):
    assert_sorts_like_the_reference(random_labels(1, 2, tokens, groups=302, device=device), 302)


def test_more_blocks_than_are_summed_at_once_sort_alike(device):
    assert_sorts_like_the_reference(random_labels(1, 1, 1100, groups=5, device=device), 5, block=16)


@pytest.mark.parametrize("label", [0, 69])
def test_a_single_group_holds_all_tokens_in_their_order(device, label):
    labels = torch.full((1, 1, 130), label, dtype=torch.int32, device=device)
    assert_sorts_like_the_reference(labels, 70, block=32)
    assert torch.equal(sort_labels(labels, 70, block=32)[0][0, 0], torch.arange(130, device=device, dtype=torch.int32))


def test_strided_labels_sort_like_contiguous_ones(device):
    labels = random_labels(2, 70, 3, groups=5, device=device).transpose(1, 2)
    assert_sorts_like_the_reference(labels, 5, block=32)


def test_many_groups_are_counted_and_still_more_are_sorted_by_torch(device):
    assert_sorts_like_the_reference(random_labels(1, 1, 300, groups=4095, device=device), 4095)
    assert_sorts_like_the_reference(random_labels(1, 2, 300, groups=9000, device=device), 9000)


def test_sorting_twice_gives_the_same_bits(device):
    labels = random_labels(1, 2, 500, groups=9, device=device)
    assert_same_bits(sort_labels(labels, 9), sort_labels(labels, 9))


def gathered(x, order):
    return x.gather(2, order.long().unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))


def assert_gathers(k, v, order, **options):
    with nan_filled_empty():
        got = gather_rows(k, v, order, **options)
    assert all(tensor.is_contiguous() for tensor in got)
    assert_same_bits(got, (gathered(k, order), gathered(v, order)))


@pytest.mark.parametrize(
    ("dtype", "size", "value_size"),
    [(DTYPES[0], 40, 72), (DTYPES[1], 32, 32), (DTYPES[1], 40, 72), (DTYPES[2], 64, 8)],
)
def test_rows_are_copied_bit_for_bit_in_the_order_given(device, dtype, size, value_size):
    tokens = 70
    k = random_tensor(2, 3, tokens, size, dtype=dtype).to(device)
    v = random_tensor(2, tokens, 3, value_size, seed=1, dtype=dtype).to(device).transpose(1, 2)
    k[0, 0, 3] = float("inf")
    order = sort_labels(random_labels(2, 3, tokens, groups=6, device=device), 6)[0]
    assert_gathers(k, v, order, rows=16)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_few_rows_are_copied_too(device, tokens):
    k, v = (random_tensor(1, 2, tokens, 16, seed=seed).to(device) for seed in range(2))
    assert_gathers(k, v, sort_labels(random_labels(1, 2, tokens, groups=3, device=device), 3)[0])


@pytest.mark.parametrize("case", ["slice of heads", "odd rows", "gaps between elements", "one batch item, stride 0"])
def test_any_strides_are_right(device, case):
    x = random_tensor(1, 4, 50, 48).to(device)
    k = {
        "slice of heads": x[:, 1:3],
        "odd rows": random_tensor(1, 2, 50, 41).to(device)[..., 1:41],
        "gaps between elements": x[:, :2, :, ::2],
        "one batch item, stride 0": x[:, :2].as_strided((1, 2, 50, 48), (0, 50 * 48, 48, 1)),
    }[case]
    v = random_tensor(1, 2, 50, 24, seed=1).to(device)
    assert_gathers(k, v, sort_labels(random_labels(1, 2, 50, groups=9, device=device), 9)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [302, 1002, 4095])
def test_a_whole_model_s_labels_sort_alike(device, groups):
    assert_sorts_like_the_reference(random_labels(1, 40, 75_600, groups=groups, device=device), groups)


@pytest.mark.gpu
def test_a_whole_model_s_rows_are_copied(device):
    k, v = (torch.randn(1, 32_760, 12, 128, device=device).bfloat16().transpose(1, 2) for _ in range(2))
    assert_gathers(k, v, sort_labels(random_labels(1, 12, 32_760, groups=1002, device=device), 1002)[0])


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements_are_copied(device):
    x = torch.randn(1, 2, 9_000_000, 128, device=device, dtype=torch.float16)  # 2.3e9 elements
    order = torch.arange(8_999_999, -1, -1, device=device, dtype=torch.int32).expand(1, 2, -1)
    k, _ = gather_rows(x, x[..., :8], order)
    assert torch.equal(k[0, 1, :1000], x[0, 1, -1000:].flip(0))
    assert torch.equal(k[0, 1, -1000:], x[0, 1, :1000].flip(0))
