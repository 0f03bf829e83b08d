"""The Triton kernels of block masses against the reference in float64 (docs/adaspa.md, sections 4 and 8)."""

from __future__ import annotations

import math
import os

import pytest
import torch
from kernel_oracles import DTYPES, OPS, assert_same_bits, random_plan, random_tensor
from kernels.test_block_mass import (
    LAYOUTS,
    SCALE,
    assert_rows_sum_to_sizes,
    blocks,
    exact,
    random_inputs,
    uniform_noise,
)

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.block_mass import reference, triton_launch
from sparse_compile.kernels.block_mass.configs import Config, candidates, shared_memory
from sparse_compile.kernels.launching import ARCHITECTURES, INTERPRETER, device_of
from sparse_compile.plan import Groups

WIDE = Config(256, 256, 4, 1) if os.environ.get("TRITON_INTERPRET") == "1" else Config(64, 64, 4, 1)
"""Few programs, so that the interpreter is quick; a GPU has not the registers for such tiles."""
TINY = Config(16, 32, 4, 1)
"""Tiles shorter than a group, which then comes in pieces."""
PASSES = {"fresh": (True, 1, 0.0), "kept": (False, 1, 0.5), "spread": (False, 1, 3.0), "not-ready": (False, 0, 0.5)}
each_pass = pytest.mark.parametrize(("fresh", "ready", "noise"), PASSES.values(), ids=PASSES)
kept_or_not_ready = pytest.mark.parametrize("ready", [0, 1])
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "minus-inf": -math.inf}


@pytest.fixture
def search(device):
    """Runs the kernels on tensors of the CPU: mass, spread and the new log-sum-exp, on the CPU again."""

    def run(q, k, lse, sides, *, ready=1, fresh=False, row_stride=1, largest=32, config=WIDE):
        q, k, lse = (x.clone(memory_format=torch.preserve_format).to(device) for x in (q, k, lse))
        flag = torch.tensor([ready], dtype=torch.int32, device=device)
        sides = [Groups(*(None if x is None else x.to(device) for x in side)) for side in sides]
        with nan_filled_empty():
            mass, spread = triton_launch.block_mass(
                q, k, lse, flag, *sides, largest, SCALE, row_stride, fresh, config=config
            )
        return mass.cpu(), spread.cpu(), lse.cpu()

    return run


@pytest.fixture
def assert_right(search):
    """Holds the kernels to the reference in float64; what is not finite must be the same."""

    def check(q, k, lse, sides, *, ready=1, fresh=False, row_stride=1, tolerance=2e-5, **options):
        found = search(q, k, lse, sides, ready=ready, fresh=fresh, row_stride=row_stride, **options)
        kept, flag = lse.clone(), torch.tensor([ready])
        mass, spread = reference.block_mass(q.double(), k.double(), kept, flag, *sides, SCALE, row_stride, fresh)
        assert all(x.dtype is torch.float32 and x.is_contiguous() for x in found[:2])
        assert found[0].shape == mass.shape and torch.isfinite(found[0]).all()
        assert ((found[0] - mass).abs() <= tolerance * mass + 1e-9).all()
        for name, actual, expected in (("spread", found[1], spread), ("lse", found[2], kept)):
            finite = torch.isfinite(expected)
            assert torch.equal(actual[~finite].nan_to_num(7.0), expected[~finite].nan_to_num(7.0)), name
            assert ((actual - expected)[finite].abs() <= tolerance * expected[finite].abs().clamp(min=1)).all(), name
        return found

    return check


def drifted(q, k, sides, noise):
    """The log-sum-exp of q and k, with noise."""
    lse = exact(q, k, sides)[1].float()
    return lse + uniform_noise(lse.shape, noise)


def ragged(**options):
    """Video and text, neither of whole blocks, and fewer queries than keys."""
    q, k = random_inputs(85, 101, **options)
    return q, k, blocks(q, k, [0, 80], 32, k_video=[9, 101])


@each_pass
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mass_of_ragged_groups_matches_float64(assert_right, dtype, fresh, ready, noise):
    q, k, sides = ragged(dtype=dtype)
    kept = drifted(q, k, sides, noise)
    mass, spread, lse = assert_right(q, k, kept, sides, fresh=fresh, ready=ready)
    if fresh:
        assert_rows_sum_to_sizes(mass, sides[0])
        assert (spread == 0).all() and torch.equal(lse, kept)
    elif noise == 3.0:
        assert (spread > reference.MOST_SPREAD).all() and torch.isfinite(spread).all()


@pytest.mark.parametrize("size", [8, 40, 72])
@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_head_sizes_that_are_no_power_of_two(assert_right, size, noise):
    q, k, sides = ragged(size=size, gain=1.0)
    assert_right(q, k, drifted(q, k, sides, noise), sides)


@each_pass
def test_random_groups_in_any_order_with_shared_key_heads_and_two_items(search, assert_right, fresh, ready, noise):
    q, k = random_inputs(50, 63, heads=(4, 2), batch=2)
    plan = random_plan(2, 4, 2, 50, 63, 4, 5)
    sides = plan.query_side, plan.key_side
    lse = drifted(q, k, sides, noise)
    whole = assert_right(q, k, lse, sides, fresh=fresh, ready=ready)
    for item in range(2):
        one = slice(item, item + 1)
        own = [Groups(side.order[one], side.offsets[one]) for side in sides]
        assert_same_bits(search(q[one], k[one], lse[one], own, fresh=fresh, ready=ready), (x[one] for x in whole))


@pytest.mark.parametrize("layout", LAYOUTS)
@kept_or_not_ready
def test_every_layout_of_text_and_video(assert_right, layout, ready):
    tokens, video, block = LAYOUTS[layout]
    q, k = random_inputs(tokens, tokens, heads=(1, 1))
    sides = blocks(q, k, video, block)
    assert_right(q, k, drifted(q, k, sides, 0.5), sides, ready=ready, largest=block)


@pytest.mark.parametrize("block", [16, 20, 64, 200])
@pytest.mark.parametrize(("config", "fresh"), [(WIDE, True), (TINY, False), (Config(64, 32, 4, 1), False)])
def test_blocks_of_any_size_whole_or_in_pieces(assert_right, block, config, fresh):
    q, k = random_inputs(90, 70, heads=(1, 1))
    sides = blocks(q, k, [0, 90], block, k_video=[0, 70])
    assert_right(q, k, drifted(q, k, sides, 0.4), sides, fresh=fresh, largest=block, config=config)


@pytest.mark.parametrize("config", [WIDE, pytest.param(TINY, marks=pytest.mark.slow)])
def test_a_bound_far_above_the_largest_group_changes_nothing(search, assert_right, config):
    q, k, sides = ragged(heads=(1, 1))
    kept = drifted(q, k, sides, 0.5)
    loose = assert_right(q, k, kept, sides, largest=128, config=config)
    tight = search(q, k, kept, sides, largest=32, config=config)
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(loose, tight, strict=True))


@pytest.mark.parametrize("stride", [2, 8, 1000])
@each_pass
def test_every_so_manyth_row_stands_for_its_group(assert_right, stride, fresh, ready, noise):
    q, k, sides = ragged(heads=(1, 1))
    kept = drifted(q, k, sides, noise)
    _, _, lse = assert_right(
        q, k, kept, sides, fresh=fresh, ready=ready, row_stride=stride, config=Config(16, 256, 4, 1)
    )
    if not fresh and ready and noise < 1:
        looked_at = torch.tensor([(i % 32 if i < 80 else i - 80) % stride == 0 for i in range(85)])
        assert torch.equal(lse[..., ~looked_at], kept[..., ~looked_at])
        assert (lse[..., looked_at] != kept[..., looked_at]).all()


def test_a_log_sum_exp_is_made_anew_in_the_heads_alone_where_it_moved_too_much(search, assert_right):
    q, k, sides = ragged(heads=(4, 2), gain=3.0)
    kept = drifted(q, k, sides, 0.4)
    clean = search(q, k, kept, sides)
    spoiled = kept.clone()
    spoiled[:, 1] += uniform_noise(kept[:, 1].shape, 3.0)
    spoiled[:, 2, 40] += 70.0
    mass, spread, lse = assert_right(q, k, spoiled, sides)
    assert (spread[:, [0, 3]] < 0.5).all() and 0.5 < spread[0, 1] < 10 and spread[0, 2] == math.inf
    assert_rows_sum_to_sizes(mass[:, 1:3], Groups(None, sides[0].offsets[:, 1:3]))
    keeps = [0, 3]
    assert_same_bits((mass[:, keeps], spread[:, keeps], lse[:, keeps]), (x[:, keeps] for x in clean))


@pytest.mark.parametrize("limit", [0.99, 1.01])
def test_the_limit_of_the_spread_is_that_of_the_reference(assert_right, limit):
    q, k = random_inputs(64, 64, heads=(1, 1))
    sides = blocks(q, k, [0, 64], 32)
    shift = torch.tensor([1.0, -1.0]).repeat(32) * reference.MOST_SPREAD * limit
    spread = assert_right(q, k, drifted(q, k, sides, 0.0) + shift, sides)[1]
    assert spread.item() == pytest.approx(reference.MOST_SPREAD * limit, rel=1e-4)


@pytest.mark.parametrize("value", [*NOT_FINITE.values(), 1e4, -1e4, 3e38, -3e38, 70.0, -70.0])
@pytest.mark.parametrize("row", [slice(None), 40])
def test_a_log_sum_exp_that_does_not_fit_at_all_is_made_anew(assert_right, value, row):
    q, k, sides = ragged()
    kept = drifted(q, k, sides, 0.0)
    kept[0, 1, row] = value
    mass, spread, _ = assert_right(q, k, kept, sides)
    assert spread[0, 1] == math.inf and spread[0, 0] < 1e-5
    assert_rows_sum_to_sizes(mass, sides[0])


@pytest.mark.parametrize("kind", NOT_FINITE)
@pytest.mark.parametrize("where", ["query", "key", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_whose_log_sum_exp_cannot_be_finite_say_nothing_and_heal(assert_right, kind, where, dtype):
    """As decided by the kept pass alone: the largest score and a trace of NaN stand for the dense log-sum-exp."""
    q, k, sides = ragged(dtype=dtype)
    spoiled_q, spoiled_k = q.clone(), k.clone()
    if where != "key":
        spoiled_q[0, 0, 40, 3] = NOT_FINITE[kind]
    if where != "query":
        spoiled_k[0, 0, 50, 3] = NOT_FINITE[kind]
        spoiled_k[0, 1, 50] = math.nan
    lse = drifted(q, k, sides, 0.4)
    for _ in range(2):
        _, spread, lse = assert_right(spoiled_q, spoiled_k, lse, sides)
        assert torch.isfinite(spread).all(), "such a row makes no head unusable"
    assert not torch.isfinite(lse[0, 0]).all()
    mass, _, lse = assert_right(q, k, lse, sides)
    assert torch.isfinite(lse).all()
    assert_rows_sum_to_sizes(mass, sides[0])


def test_a_row_whose_every_score_is_minus_infinity_says_nothing(assert_right):
    q, k, sides = ragged(heads=(1, 1))
    kept = drifted(q, k, sides, 0.3)
    q[..., 40, 3], k[..., 3] = -math.inf, k[..., 3].abs() + 0.1
    kept = torch.where(torch.arange(85) == 40, kept, drifted(q, k, sides, 0.3))
    _, spread, lse = assert_right(q, k, kept, sides)
    assert lse[0, 0, 40] == -math.inf and torch.isfinite(spread).all()


@kept_or_not_ready
def test_scores_of_great_size_lose_no_more_than_rounding(assert_right, ready):
    q, k, sides = ragged(gain=200.0)
    assert_right(q, k, exact(q, k, sides)[1].float(), sides, ready=ready, tolerance=5e-4)


@kept_or_not_ready
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_padding_is_never_read_and_keeps_its_log_sum_exp(assert_right, ready, garbage):
    q, k = random_inputs(85, 101, heads=(4, 2), batch=2)
    q_valid, k_valid = torch.arange(85) < torch.tensor([[70], [85]]), torch.arange(101) < torch.tensor([[60], [90]])
    sides = blocks(q, k, [0, 80], 32, k_video=[9, 101], q_valid=q_valid, k_valid=k_valid)
    kept = drifted(q, k, sides, 0.4)
    kept[0, :, 70:] = garbage
    q[0, :, 70:], k[0, :, 60:], k[1, :, 90:] = garbage, garbage, garbage
    mass, _, lse = assert_right(q, k, kept, sides, ready=ready)
    assert torch.isfinite(lse[0, :, :70]).all() and torch.isfinite(lse[1]).all()
    assert_same_bits([lse[0, :, 70:].nan_to_num(9.0)], [kept[0, :, 70:].nan_to_num(9.0)])
    assert (mass[..., -1, :] == 0).all() and (mass[..., -1] == 0).all() and (mass[0, :, :, 3:] == 0).all()


@kept_or_not_ready
def test_without_a_valid_key_there_is_no_mass_and_the_head_heals(assert_right, ready):
    q, k = random_inputs(60, 60, batch=2)
    sides = blocks(q, k, [0, 50], 32, k_valid=torch.tensor([[False] * 60, [True] * 60]))
    mass, _, lse = assert_right(q, k, drifted(q, k, blocks(q, k, [0, 50], 32), 0.3), sides, ready=ready)
    assert (mass[0] == 0).all() and (lse[0] == -math.inf).all()
    _, spread, lse = assert_right(q, k, lse, sides)
    assert (spread < 1e-5).all()
    assert_right(q, k, lse, blocks(q, k, [0, 50], 32))


def only_padding(tokens):
    return Groups(None, torch.tensor([0, tokens], dtype=torch.int32).expand(1, 2, 2))


@pytest.mark.parametrize("fresh", [True, False])
def test_sides_of_nothing_but_padding(search, fresh):
    q, k, sides = ragged()
    kept = drifted(q, k, sides, 0.3)
    mass, spread, lse = search(q, k, kept, (only_padding(85), sides[1]), fresh=fresh)
    assert mass.shape == (1, 2, 1, 5) and (mass == 0).all() and (spread == 0).all() and torch.equal(lse, kept)
    mass, spread, lse = search(q, k, kept, (sides[0], only_padding(101)), fresh=fresh)
    assert mass.shape == (1, 2, 5, 1) and (mass == 0).all() and (spread == 0).all()
    assert torch.equal(lse, kept) if fresh else (lse == -math.inf).all()


@pytest.mark.parametrize(("queries", "keys"), [(0, 20), (20, 0), (0, 0), (1, 1)])
def test_no_tokens_and_single_ones(search, queries, keys):
    q, k = random_inputs(queries, keys)
    sides = blocks(q, k, [0, queries], 16, k_video=[0, keys])
    mass, _, lse = search(q, k, torch.zeros(1, 2, queries), sides, ready=0, largest=16)
    assert mass.shape == (1, 2, *(side.offsets.shape[2] - 1 for side in sides))
    assert mass.sum() == (2 if queries * keys else 0)
    assert torch.isfinite(lse).all() if keys else (lse == -math.inf).all()


def with_other_strides(x):
    """As diffusers hands its tensors over: the heads of a token side by side."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@each_pass
def test_strides_and_repeats_change_no_bit(search, fresh, ready, noise):
    q, k = random_inputs(50, 63, heads=(4, 2), batch=2)
    plan = random_plan(2, 4, 2, 50, 63, 4, 5)
    sides = plan.query_side, plan.key_side
    lse = drifted(q, k, sides, noise)
    found = search(q, k, lse, sides, fresh=fresh, ready=ready)
    assert_same_bits(search(q, k, lse, sides, fresh=fresh, ready=ready), found)
    strided = [Groups(*(with_other_strides(x) for x in side)) for side in sides]
    moved = with_other_strides(q), k.mT.contiguous().mT, with_other_strides(lse)
    assert_same_bits(search(*moved, strided, fresh=fresh, ready=ready), found)


@pytest.mark.parametrize("config", [Config(32, 64, 4, 1), pytest.param(TINY, marks=pytest.mark.slow)])
def test_the_size_of_the_tiles_changes_rounding_alone(search, assert_right, config):
    q, k, sides = ragged()
    kept = drifted(q, k, sides, 0.4)
    kept[:, 1] += uniform_noise(kept[:, 1].shape, 3.0)
    pairs = zip(assert_right(q, k, kept, sides, config=config), search(q, k, kept, sides), strict=True)
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in pairs)


def test_the_op_runs_the_kernels_with_their_first_configuration(search, device):
    q, k, sides = ragged(heads=(1, 1))
    kept = drifted(q, k, sides, 0.4)
    lse, flag = kept.clone().to(device), torch.ones(1, dtype=torch.int32, device=device)
    tensors = [None if x is None else x.to(device) for side in sides for x in side]
    with nan_filled_empty():
        found = OPS.block_mass(q.to(device), k.to(device), lse, flag, *tensors, 32, SCALE, 1, False, "triton")
    assert_same_bits([x.cpu() for x in (*found, lse)], search(q, k, kept, sides, config=None))


@pytest.mark.parametrize("device", [*ARCHITECTURES.values(), INTERPRETER], ids=lambda device: device.architecture)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 64, 128, 256])
def test_each_device_has_configurations_that_fit_it(device, dtype, size):
    found = candidates(device, dtype, size)
    assert 1 <= len(found) <= 6 and len(set(found)) == len(found)
    for config in found:
        assert shared_memory(config, size, dtype.itemsize) <= device.shared_memory
        assert all(n & (n - 1) == 0 for n in (config.block_m, config.block_n, config.warps))


def case_of_real_size(tokens, device, dtype, noise):
    """q, k, their log-sum-exp, noise for it, and blocks of 64 of which the last is shorter."""
    q = 2 * random_tensor(1, 8, tokens, 128, dtype=dtype).to(device)
    k = random_tensor(1, 8, tokens, 128, seed=1, dtype=dtype).to(device)
    bounds = (torch.arange(tokens // 64 + 3, dtype=torch.int32, device=device) * 64).clamp(max=tokens)
    heads = [((q[:, h].float() @ k[:, h].float().mT).double() * 128**-0.5).logsumexp(-1) for h in range(8)]
    lse = torch.stack(heads, 1).float()
    shift = noise * (torch.rand(lse.shape, generator=torch.Generator().manual_seed(0)) - 0.5).to(device)
    return q, k, lse, shift, Groups(None, bounds.expand(1, 8, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("noise", "row_stride"), [(0.5, 1), (6.0, 1), (0.5, 4)])
def test_masses_of_real_size_match_float64_on_a_gpu(dtype, noise, row_stride, tokens=20400, device="cuda"):
    q, k, lse, shift, side = case_of_real_size(tokens, device, dtype, noise)
    kept, flag, scale = lse + shift, torch.ones(1, dtype=torch.int32, device=device), 128**-0.5
    for config in candidates(device_of(q), dtype, 128):
        new, twin = kept.clone(), kept.clone()
        mass, spread = triton_launch.block_mass(q, k, new, flag, side, side, 64, scale, row_stride, False, config)
        again = triton_launch.block_mass(q, k, twin, flag, side, side, 64, scale, row_stride, False, config)
        assert_same_bits((mass, spread, new), (*again, twin))
        deviations = [part[..., ::row_stride].std(-1, correction=0) for part in shift.split(64, -1)]
        assert torch.allclose(spread, torch.stack(deviations).mean(0), rtol=1e-3)
        used = lse if noise > 1 else kept
        for head, group in ((0, 0), (3, 1), (7, tokens // 64 - 1)):
            at = group * 64 + torch.arange(0, 64, row_stride, device=device)
            scores = q[0, head, at].double() @ k[0, head].double().mT * scale
            terms = (scores - used[0, head, at].double()[:, None]).exp().sum(0)
            sums = torch.nn.functional.pad(terms, (0, -tokens % 64)).view(-1, 64).sum(1) * row_stride
            assert torch.allclose(mass[0, head, group, :-1].double(), sums, rtol=1e-4, atol=1e-7)
            assert (new[0, head, at] - lse[0, head, at]).abs().max() <= 1e-4
