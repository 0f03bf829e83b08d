"""The Triton kernels of pooled keys against the reference and float64 (docs/correction.md)."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_oracles import DTYPES, assert_same_bits, labels_of, random_plan, random_tensor

from sparse_compile.error_budget import assert_within_error_budget, nan_filled_empty
from sparse_compile.kernels.launching import INTERPRETER
from sparse_compile.kernels.pooled_keys import reference, triton_launch
from sparse_compile.kernels.pooled_keys.configs import (
    CouplingConfig,
    MeansConfig,
    coupling_candidates,
    means_candidates,
)

GROUPS = 7
TINY = {"means_config": MeansConfig(16, 1, 1), "coupling_config": CouplingConfig(16, 16, 1, 1)}
"""Many blocks of rows, chunks of positions and pieces of the matrix even where there are few of each."""


@pytest.fixture
def random_keys(device):
    """Makes keys, values, and the order and bounds of random groups, the last of them padding."""

    def make(tokens=203, size=24, value_size=40, batch=2, heads=2, dtype=torch.float32):
        plan = random_plan(batch, heads, heads, 1, tokens, k_groups=GROUPS)
        k = random_tensor(batch, heads, tokens, size, seed=1, dtype=dtype)
        v = random_tensor(batch, heads, tokens, value_size, seed=2, dtype=dtype)
        return tuple(x.to(device) for x in (k, v, plan.k_order, plan.k_offsets))

    return make


def bounds(device, *of_head):
    """int32 [1, H, G + 1] from the bounds of each head."""
    return torch.tensor([of_head], dtype=torch.int32).to(device)


def pool(k, v, order, offsets, video=None, coupled=True, **configs):
    with nan_filled_empty():
        video = [0, k.shape[2]] if video is None else video
        return triton_launch.pooled_keys(k, v, order, offsets, video, coupled, **configs)


def assert_right(k, v, order, offsets, video=None, coupling_budget=None, **configs):
    """Means, sizes and coupling within the budget of plain torch; where it says -inf or 0 for want of keys, exactly."""
    video = [0, k.shape[2]] if video is None else video
    pooled = pool(k, v, order, offsets, video, **configs)
    low = reference.pooled_keys(k, v, order, offsets, video, True)
    exact = reference.pooled_keys(k.double(), v.double(), order, offsets, video, True)
    none = low[2] == -math.inf
    assert torch.equal(pooled[2] == -math.inf, none)
    assert (pooled[0][none] == 0).all() and (pooled[1][none] == 0).all()
    for name, one, other, right in zip(("mean_k", "mean_v", "log_size", "coupling"), pooled, low, exact, strict=True):
        assert one.dtype is torch.float32 and one.shape == right.shape, name
        if name == "log_size":
            one, other, right = (x.masked_fill(none, 0) for x in (one, other, right))
        if name != "coupling":
            assert (one.double() - right.double()).abs().max() <= 2e-6 * max(1.0, float(right.abs().max())), name
        elif coupling_budget is None:
            assert_within_error_budget(one, other, right.double(), name)
        else:
            assert (one.double() - right.double()).abs().max() <= coupling_budget
    return pooled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 203])
def test_means_sizes_and_coupling_match_float64(random_keys, dtype, tokens):
    assert_right(*random_keys(tokens, dtype=dtype), [0, tokens // 3, tokens // 2, tokens - 1])


@pytest.mark.parametrize(("size", "value_size"), [(40, 72), (8, 16), (64, 24)])
def test_any_sizes_of_keys_and_values_in_blocks_of_any_size(random_keys, size, value_size):
    args = random_keys(90, size, value_size, batch=1)
    assert_right(*args)
    assert_right(*args, **TINY)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "value_size"), [(128, 128), (192, 256), (256, 72)])
@pytest.mark.parametrize("which", range(3))
def test_each_configuration_that_a_tuner_may_take_is_right(random_keys, size, value_size, which):
    args = random_keys(150, size, value_size, batch=1, heads=1, dtype=torch.float16)
    largest = max(size, value_size)
    means = means_candidates(INTERPRETER, torch.float16, largest)
    couplings = coupling_candidates(INTERPRETER, torch.float16, largest)
    assert_right(*args, means_config=means[which % len(means)], coupling_config=couplings[which % len(couplings)])


def test_without_an_order_tokens_lie_in_place(random_keys, device):
    k, v, _, offsets = random_keys()
    identity = torch.arange(203, dtype=torch.int32, device=device).expand(2, 2, 203)
    assert_right(k, v, None, offsets)
    assert_same_bits(pool(k, v, None, offsets), pool(k, v, identity, offsets))


def test_an_uncoupled_call_gives_the_same_means_and_no_matrix(random_keys):
    args = random_keys()
    coupled, plain = pool(*args), pool(*args, coupled=False)
    assert plain[3].shape == (2, 2, 0, 0)
    assert_same_bits(plain[:3], coupled[:3])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_padding_touches_nothing_whatever_it_holds(random_keys, device, poison):
    k, v, order, offsets = random_keys(batch=1)
    clean = pool(k, v, order, offsets)
    padding = (labels_of(order.cpu(), offsets.cpu()) == GROUPS - 1).to(device)
    assert padding.any()
    k[padding], v[padding] = poison, poison
    pooled = pool(k, v, order, offsets)
    assert_same_bits(pooled, clean)
    assert all(x.isfinite().all() for x in (pooled[0], pooled[1], pooled[3]))


def test_empty_groups_have_no_size_and_groups_of_one_key_are_that_key(random_keys, device):
    k, v, _, _ = random_keys(11, batch=1)
    offsets = bounds(device, [0, 0, 1, 1, 10, 11, 11, 11], [0, 11, 11, 11, 11, 11, 11, 11])
    mean_k, mean_v, log_size, _ = assert_right(k, v, None, offsets)
    for group, token in ((1, 0), (4, 10)):
        assert torch.equal(mean_k[0, 0, group], k[0, 0, token]) and torch.equal(mean_v[0, 0, group], v[0, 0, token])
        assert log_size[0, 0, group] == 0
    assert log_size[0, 1, 0].item() == pytest.approx(math.log(11), rel=2e-7)


def test_all_padding_and_no_tokens_at_all_leave_nothing(random_keys, device):
    k, v, order, _ = random_keys(20, batch=1)
    nothing = bounds(device, [0, 0, 20], [0, 0, 20])
    for pooled in (
        assert_right(k, v, order, nothing),
        pool(k[:, :, :0], v[:, :, :0], None, torch.zeros_like(nothing)),
    ):
        assert (pooled[0] == 0).all() and (pooled[1] == 0).all() and (pooled[3] == 0).all()
        assert (pooled[2] == -math.inf).all()


def test_text_keys_enter_no_coupling(random_keys, device):
    k, v, _, _ = random_keys(120, batch=1)
    offsets = bounds(device, *[[0, 20, 50, 90, 120, 120]] * 2)
    video = [0, 50, 90, 120]
    before = assert_right(k, v, None, offsets, video)
    k[:, :, 50:90] += 3
    v[:, :, 60] = math.nan
    after = pool(k, v, None, offsets, video)
    assert torch.equal(before[3], after[3])
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("video", [[], [0, 0], [110, 120]])
def test_without_visual_keys_there_is_no_coupling(random_keys, device, video):
    k, v, _, _ = random_keys(120, batch=1)
    offsets = bounds(device, *[[0, 20, 50, 110, 120]] * 2)  # the last ten are padding
    assert (pool(k, v, None, offsets, video)[3] == 0).all()


@pytest.mark.parametrize("which", ["key", "value"])
def test_a_constant_on_all_keys_or_values_leaves_the_coupling(random_keys, which):
    k, v, order, offsets = random_keys(batch=1)
    before = pool(k, v, order, offsets)[3]
    moved = (k + 64, v) if which == "key" else (k, v + 64)
    after = pool(*moved, order, offsets)[3]
    assert before.abs().max() > 0.1
    assert (after - before).abs().max() <= 1e-5  # adding 64 rounds a float32 by 4e-6


def test_small_deviations_from_large_means_keep_their_digits(random_keys):
    k, v, order, offsets = random_keys(batch=1)
    k, v = 100 + 0.01 * k, 100 + 0.01 * v
    coupling = pool(k, v, order, offsets)[3]
    exact = reference.pooled_keys(k.double(), v.double(), order, offsets, [0, 203], True)[3]
    assert (coupling - exact).norm() <= 2e-4 * exact.norm()


def test_the_mean_of_many_keys_keeps_its_digits(device):
    k = (0.1 + 0.001 * random_tensor(1, 1, 20_000, 2)).to(device)
    pooled = pool(k, -k, None, bounds(device, [0, 20_000, 20_000]), means_config=MeansConfig(512, 4, 1), coupled=False)
    exact = k.double().mean(2)
    assert (pooled[0][:, :, 0] - exact).abs().max() <= 3e-8
    assert (pooled[1][:, :, 0] + exact).abs().max() <= 3e-8


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_valid_key_or_value_that_is_not_finite_shows_in_its_group_and_in_the_coupling(random_keys, which, value):
    k, v, order, offsets = random_keys(batch=1)
    clean = pool(k, v, order, offsets)
    token = int(order[0, 1, offsets[0, 1, 2]])  # the first key of group 2
    (k if which == "key" else v)[0, 1, token, 5] = value
    pooled = pool(k, v, order, offsets)
    spoiled = [torch.zeros_like(x, dtype=torch.bool) for x in clean]
    if which == "key":
        spoiled[0][0, 1, 2, 5] = True
        spoiled[3][0, 1, 5, :] = True
    else:
        spoiled[1][0, 1, 2, 5] = True
        spoiled[3][0, 1, :, 5] = True
    for x, before, bad in zip(pooled, clean, spoiled, strict=True):
        assert torch.equal(~x.isfinite() & before.isfinite(), bad)
        assert torch.equal(x[~bad], before[~bad])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_batches_and_repeats_change_no_bit(random_keys, dtype):
    k, v, order, offsets = random_keys(101, 16, 8, dtype=dtype)
    pooled = pool(k, v, order, offsets)

    def strided(x):
        wide = x.transpose(1, 2).contiguous().repeat(1, 1, 1, 2)
        return wide[..., : x.shape[-1]].transpose(1, 2)

    def last_dimension_first(x):
        return x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)

    for layout in (strided, last_dimension_first):
        assert_same_bits(pool(layout(k), layout(v), order, offsets), pooled)
    assert_same_bits(pool(k, v, order, offsets), pooled)
    for b in range(2):
        item = [x[b : b + 1] for x in (k, v, order, offsets)]
        assert_same_bits(pool(*item), [x[b : b + 1] for x in pooled])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_real_size(dtype, size, in_place):
    tokens, heads = 32_760, 12
    plan = random_plan(1, heads, heads, 1, tokens, k_groups=501)
    k, v = (random_tensor(1, heads, tokens, size, seed=seed, dtype=dtype).cuda() for seed in (1, 2))
    order = None if in_place else plan.k_order.cuda()
    video = [0, tokens - 226]
    # A matrix unit cuts off where a float32 sum rounds. Products in tf32 alone, in NumPy, are off by 5e-6.
    pooled = assert_right(k, v, order, plan.k_offsets.cuda(), video, coupling_budget=1e-6)
    assert_same_bits(pool(k, v, order, plan.k_offsets.cuda(), video), pooled)
