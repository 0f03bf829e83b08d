from __future__ import annotations

import math

import pytest
import torch
from kernel_oracles import DTYPES, IMPLEMENTATIONS, OPS, assert_same_bits, labels_of, random_plan, random_tensor

from sparse_compile.error_budget import nan_filled_empty

GROUPS = 7
each_kernel = pytest.mark.parametrize("kernel", IMPLEMENTATIONS)


def random_keys(tokens=203, size=24, value_size=40, batch=2, heads=2, dtype=torch.float32):
    """Keys, values, and the order and bounds of random groups."""
    plan = random_plan(batch, heads, heads, 1, tokens, k_groups=GROUPS)
    k = random_tensor(batch, heads, tokens, size, seed=1, dtype=dtype)
    v = random_tensor(batch, heads, tokens, value_size, seed=2, dtype=dtype)
    return k, v, plan.k_order, plan.k_offsets


def pool(k, v, order, offsets, kernel, video=None, coupled=True):
    with nan_filled_empty():
        return OPS.pooled_keys(k, v, order, offsets, [0, k.shape[2]] if video is None else video, coupled, kernel)


def exact_pool(k, v, order, offsets, video):
    """The definitions in float64, one group and one head at a time."""
    labels, groups = labels_of(order, offsets), offsets.shape[2] - 1
    visual = torch.zeros(k.shape[2], dtype=torch.bool)
    for start, stop in zip(video[::2], video[1::2], strict=True):
        visual[start:stop] = True
    mean_k, mean_v = k.new_zeros(*k.shape[:2], groups, k.shape[3]), v.new_zeros(*v.shape[:2], groups, v.shape[3])
    mean_k, mean_v = mean_k.double(), mean_v.double()
    log_size = torch.full(mean_k.shape[:3], -math.inf, dtype=torch.float64)
    coupling = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=torch.float64)
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            number = 0
            for group in range(groups - 1):
                members = labels[b, h] == group
                if not members.any():
                    continue
                mean_k[b, h, group] = k[b, h, members].double().mean(0)
                mean_v[b, h, group] = v[b, h, members].double().mean(0)
                log_size[b, h, group] = math.log(members.sum())
                members &= visual
                deviation_k = k[b, h, members].double() - mean_k[b, h, group]
                coupling[b, h] += deviation_k.t() @ (v[b, h, members].double() - mean_v[b, h, group])
                number += int(members.sum())
            coupling[b, h] /= max(1, number)
    return mean_k, mean_v, log_size, coupling


def largest_error(actual, exact):
    same = (actual.double() == exact) | (actual.isinf() & exact.isinf())
    return torch.where(same, 0, actual.double() - exact).abs().max()


@each_kernel
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("tokens", [1, 63, 65, 1000])
def test_means_sizes_and_coupling_match_float64(kernel, dtype, tokens):
    k, v, order, offsets = random_keys(tokens, dtype=dtype)
    video = [0, tokens // 3, tokens // 2, tokens - 1]
    pooled = pool(k, v, order, offsets, kernel, video)
    exact = exact_pool(k, v, order, offsets, video)
    for actual, expected in zip(pooled, exact, strict=True):
        assert actual.dtype is torch.float32 and actual.shape == expected.shape
        assert largest_error(actual, expected) <= 1e-6


@each_kernel
def test_without_an_order_tokens_lie_in_place(kernel):
    k, v, _, offsets = random_keys()
    identity = torch.arange(203, dtype=torch.int32).expand(2, 2, 203)
    assert_same_bits(pool(k, v, None, offsets, kernel), pool(k, v, identity, offsets, kernel))


@each_kernel
def test_an_uncoupled_call_gives_the_same_means_and_no_matrix(kernel):
    args = random_keys()
    coupled, plain = pool(*args, kernel), pool(*args, kernel, coupled=False)
    assert plain[3].shape == (2, 2, 0, 0)
    assert_same_bits(plain[:3], coupled[:3])


@each_kernel
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_padding_touches_nothing_whatever_it_holds(kernel, poison):
    k, v, order, offsets = random_keys()
    clean = pool(k, v, order, offsets, kernel)
    padding = labels_of(order, offsets) == GROUPS - 1
    assert padding.any()
    k[padding], v[padding] = poison, poison
    pooled = pool(k, v, order, offsets, kernel)
    assert_same_bits(pooled, clean)
    assert all(x.isfinite().all() for x in (pooled[0], pooled[1], pooled[3]))
    assert (pooled[0][..., -1, :] == 0).all() and (pooled[1][..., -1, :] == 0).all()
    assert (pooled[2][..., -1] == -math.inf).all()


@each_kernel
def test_empty_groups_have_no_size_and_groups_of_one_key_are_that_key(kernel):
    k, v, _, _ = random_keys(11)
    offsets = torch.tensor([0, 0, 1, 1, 10, 11, 11, 11], dtype=torch.int32).expand(2, 2, 8)
    mean_k, mean_v, log_size, _ = pool(k, v, None, offsets, kernel)
    empty = [0, 2, 5, 6]
    assert (mean_k[:, :, empty] == 0).all() and (mean_v[:, :, empty] == 0).all()
    assert (log_size[:, :, empty] == -math.inf).all()
    for group, token in ((1, 0), (4, 10)):
        assert torch.equal(mean_k[:, :, group], k[:, :, token]) and torch.equal(mean_v[:, :, group], v[:, :, token])
        assert (log_size[:, :, group] == 0).all()
    assert log_size[0, 0, 3].item() == pytest.approx(math.log(9), rel=1e-7)


@each_kernel
def test_text_keys_enter_no_coupling(kernel):
    k, v, _, _ = random_keys(120)
    offsets = torch.tensor([0, 20, 50, 90, 120, 120], dtype=torch.int32).expand(2, 2, 6)
    video = [0, 50, 90, 120]
    before = pool(k, v, None, offsets, kernel, video)
    k[:, :, 50:90] += 3
    v[:, :, 60] = math.nan
    after = pool(k, v, None, offsets, kernel, video)
    assert torch.equal(before[3], after[3])
    assert not torch.equal(before[0], after[0])


@each_kernel
@pytest.mark.parametrize("video", [[], [0, 0], [110, 120]])
def test_without_visual_keys_there_is_no_coupling(kernel, video):
    k, v, _, _ = random_keys(120)
    offsets = torch.tensor([0, 20, 50, 110, 120], dtype=torch.int32).expand(2, 2, 5)  # the last ten are padding
    assert (pool(k, v, None, offsets, kernel, video)[3] == 0).all()


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_keys_within_each_group_have_exactly_no_coupling(kernel, dtype):
    _, v, order, offsets = random_keys(dtype=dtype)
    centres = random_tensor(2, 2, GROUPS, 24, dtype=dtype)
    k = centres.gather(2, labels_of(order, offsets).unsqueeze(-1).expand(-1, -1, -1, 24))
    pooled = pool(k, v, order, offsets, kernel)
    assert torch.equal(pooled[0][:, :, :-1], centres[:, :, :-1].float())
    assert (pooled[3] == 0).all()


@each_kernel
@pytest.mark.parametrize("which", ["key", "value"])
def test_a_constant_on_all_keys_or_values_leaves_the_coupling(kernel, which):
    k, v, order, offsets = random_keys()
    before = pool(k, v, order, offsets, kernel)[3]
    moved = (k + 64, v) if which == "key" else (k, v + 64)
    after = pool(*moved, order, offsets, kernel)[3]
    assert before.abs().max() > 0.1
    assert (after - before).abs().max() <= 1e-5  # adding 64 rounds a float32 by 4e-6


@each_kernel
def test_small_deviations_from_large_means_keep_their_digits(kernel):
    k, v, order, offsets = random_keys()
    k, v = 100 + 0.01 * k, 100 + 0.01 * v
    coupling = pool(k, v, order, offsets, kernel)[3]
    exact = exact_pool(k, v, order, offsets, [0, 203])[3]
    assert (coupling - exact).norm() <= 2e-4 * exact.norm()


@each_kernel
def test_the_mean_of_many_equal_keys_is_that_key(kernel):
    k = torch.full((1, 1, 100_000, 2), 0.1)
    offsets = torch.tensor([0, 100_000, 100_000], dtype=torch.int32).view(1, 1, 3)
    mean_k, mean_v, _, coupling = pool(k, 3 * k, None, offsets, kernel)
    assert torch.equal(mean_k[0, 0, 0], k[0, 0, 0]) and torch.equal(mean_v[0, 0, 0], 3 * k[0, 0, 0])
    assert (coupling == 0).all()


@each_kernel
@pytest.mark.parametrize("which", ["key", "value"])
def test_a_valid_key_or_value_that_is_not_finite_shows_in_its_group_and_in_the_coupling(kernel, which):
    k, v, order, offsets = random_keys()
    clean = pool(k, v, order, offsets, kernel)
    token = int(order[0, 1, offsets[0, 1, 2]])  # the first key of group 2
    (k if which == "key" else v)[0, 1, token, 5] = math.nan
    pooled = pool(k, v, order, offsets, kernel)
    spoiled = [torch.zeros_like(x, dtype=torch.bool) for x in clean]
    if which == "key":
        spoiled[0][0, 1, 2, 5] = True
        spoiled[3][0, 1, 5, :] = True
    else:
        spoiled[1][0, 1, 2, 5] = True
        spoiled[3][0, 1, :, 5] = True
    for x, before, bad in zip(pooled, clean, spoiled, strict=True):
        assert torch.equal(x.isnan(), bad)
        assert torch.equal(x[~bad], before[~bad])


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_batches_and_repeats_change_no_bit(kernel, dtype):
    k, v, order, offsets = random_keys(301, dtype=dtype)
    pooled = pool(k, v, order, offsets, kernel)

    def strided(x):
        wide = x.transpose(1, 2).contiguous().repeat(1, 1, 1, 2)
        return wide[..., : x.shape[-1]].transpose(1, 2)

    assert_same_bits(pool(strided(k), strided(v), order, offsets, kernel), pooled)
    assert_same_bits(pool(k, v, order, offsets, kernel), pooled)
    for b in range(2):
        item = [x[b : b + 1] for x in (k, v, order, offsets)]
        assert_same_bits(pool(*item, kernel), [x[b : b + 1] for x in pooled])
