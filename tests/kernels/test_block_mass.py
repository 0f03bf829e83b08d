from __future__ import annotations

import math

import pytest
import torch
from kernel_oracles import DTYPES, IMPLEMENTATIONS, OPS, assert_same_bits, labels_of, random_plan, random_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_compile import ops
from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.block_mass import reference
from sparse_compile.plan import Groups

each_kernel = pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
SCALE = 0.25
LARGEST = 512  # no group of these tests has more tokens


def random_inputs(queries, keys, *, size=16, heads=(2, 2), batch=1, gain=2.0, dtype=torch.float32, seed=0):
    q = gain * random_tensor(batch, heads[0], queries, size, seed=seed)
    return q.to(dtype), random_tensor(batch, heads[1], keys, size, seed=seed + 1, dtype=dtype)


def blocks(q, k, q_video, q_block, *, k_video=None, k_block=None, q_valid=None, k_valid=None):
    """Both sides as the op cuts them; tokens stay in place where there is no mask."""
    k_video = q_video if k_video is None else k_video
    cut = OPS.token_blocks(q, k, q_valid, k_valid, q_video, k_video, q_block, k_block or q_block, "cpu")
    q_order, q_offsets, _, k_order, k_offsets, _ = cut
    query = Groups(None if q_valid is None else q_order, q_offsets)
    return query, Groups(None if k_valid is None else k_order, k_offsets)


def ragged(**options):
    """The usual case: video and text, neither of whole blocks."""
    q, k = random_inputs(223, 223, **options)
    return q, k, blocks(q, k, [0, 210], 32)


def dense_lse(q, k, *, kernel="cpu"):
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    OPS.attention_with_lse(q, k, k, None, None, lse, False, SCALE, True, kernel)
    return lse


def search(q, k, lse, sides, *, ready=1, row_stride=1, fresh=False, kernel="cpu"):
    """The op, with poisoned memory and a copy of ``lse``: mass, spread and the new log-sum-exp."""
    lse, flag = lse.clone(), torch.tensor([ready], dtype=torch.int32)
    with nan_filled_empty():
        found = OPS.block_mass(q, k, lse, flag, *sides[0], *sides[1], LARGEST, SCALE, row_stride, fresh, kernel)
    return *found, lse


def groups_of(side, tokens):
    in_place = torch.arange(tokens).expand(*side.offsets.shape[:2], tokens)
    return labels_of(in_place if side.order is None else side.order, side.offsets)


def exact(q, k, sides, lse=None):
    """Mass by the explicit softmax in float64, with the given or the true log-sum-exp, which comes second."""
    query, key = (groups_of(side, x.shape[2]) for side, x in zip(sides, (q, k), strict=True))
    count = [side.offsets.shape[2] - 1 for side in sides]
    shared = q.shape[1] // k.shape[1]
    padding = (key == count[1] - 1).repeat_interleave(shared, 1).unsqueeze(2)
    scores = q.double() @ k.double().repeat_interleave(shared, 1).transpose(-1, -2) * SCALE
    scores = scores.masked_fill(padding, -math.inf)
    lse = scores.logsumexp(-1) if lse is None else lse.double()
    terms = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    by_query, by_key = (torch.nn.functional.one_hot(x, n).double() for x, n in zip((query, key), count, strict=True))
    mass = by_query.transpose(-1, -2) @ terms @ by_key.repeat_interleave(shared, 1)
    mass[..., -1, :] = 0
    return mass, lse


def assert_mass(mass, expected):
    assert mass.dtype is torch.float32 and torch.isfinite(mass).all() and (mass >= 0).all()
    assert ((mass.double() - expected).abs() / expected.clamp(min=1e-3)).max() <= 1e-4


def assert_rows_sum_to_sizes(mass, query):
    sizes = query.offsets.diff()[..., :-1]
    assert ((mass.double().sum(-1)[..., :-1] / sizes.clamp(min=1)) - (sizes > 0).double()).abs().max() <= 1e-5
    assert (mass[..., -1, :] == 0).all() and (mass[..., -1] == 0).all()


def assert_lse(lse, expected):
    assert lse.dtype is torch.float32
    assert ((lse.double() - expected).abs() / (expected.abs() / 50).clamp(min=1)).max() <= 1e-4


def assert_exact(mass, lse, q, k, sides):
    expected, exact_lse = exact(q, k, sides)
    assert_mass(mass, expected)
    assert_rows_sum_to_sizes(mass, sides[0])
    assert_lse(lse, exact_lse)


def uniform_noise(shape, width, seed=9):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5) * 2 * width


@each_kernel
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("tokens", "video", "block"), [(223, [0, 210], 32), (2125, [0, 2100], 64)])
def test_mass_is_the_block_sum_of_the_softmax(kernel, dtype, tokens, video, block):
    q, k = random_inputs(tokens, tokens, size=64, gain=3.0, heads=(1, 1), dtype=dtype)
    sides = blocks(q, k, video, block)
    lse = dense_lse(q, k, kernel=kernel)
    mass, spread, kept = search(q, k, lse, sides, fresh=True, kernel=kernel)
    assert_exact(mass, lse, q, k, sides)
    assert (spread == 0).all() and torch.equal(kept, lse)


LAYOUTS = {
    "no-text": (100, [0, 100], 32),
    "text-first": (100, [13, 100], 32),
    "text-last": (100, [0, 87], 32),
    "text-on-both-sides": (100, [7, 87], 16),
    "text-of-whole-blocks": (96, [0, 64], 32),
    "shorter-than-a-block": (11, [0, 11], 64),
    "one-token": (1, [0, 1], 4),
    "all-text": (40, [], 16),
}


@each_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("ready", [0, 1])
def test_every_layout_of_text_and_video(kernel, layout, heads, ready):
    tokens, video, block = LAYOUTS[layout]
    q, k = random_inputs(tokens, tokens, heads=(heads, heads))
    sides = blocks(q, k, video, block)
    mass, _, lse = search(q, k, dense_lse(q, k), sides, ready=ready, kernel=kernel)
    assert_exact(mass, lse, q, k, sides)


@each_kernel
@each_dtype
@pytest.mark.parametrize("fresh", [True, False])
def test_ragged_groups_in_any_order_with_shared_key_heads(kernel, dtype, fresh):
    q, k = random_inputs(150, 203, heads=(4, 2), batch=2, dtype=dtype)
    plan = random_plan(2, 4, 2, 150, 203, 6, 9)
    sides = plan.query_side, plan.key_side
    mass, spread, lse = search(q, k, exact(q, k, sides)[1].float(), sides, fresh=fresh, kernel=kernel)
    assert_exact(mass, lse, q, k, sides)
    assert (spread < 1e-5).all()


@each_kernel
@pytest.mark.parametrize("bits", [[3] * 8, [3, 0, -2, 5, 1, -4, 2, 7]], ids=["everywhere", "by-group"])
def test_a_shift_of_whole_groups_scales_their_mass_alike_and_is_refreshed_away(kernel, bits):
    q, k, sides = ragged()
    lse = dense_lse(q, k)
    shift = torch.tensor(bits).repeat_interleave(sides[0].offsets[0, 0].diff()[:-1])
    plain, _, _ = search(q, k, lse, sides, kernel=kernel)
    mass, spread, refreshed = search(q, k, lse + shift * math.log(2), sides, kernel=kernel)
    assert torch.allclose(mass[..., :-1, :] * 2.0 ** torch.tensor(bits).unsqueeze(1), plain[..., :-1, :], rtol=1e-5)
    assert (spread < 1e-5).all(), "a shift of a whole group is not a spread"
    assert_lse(refreshed, exact(q, k, sides)[1])


@each_kernel
def test_shared_key_heads_equal_repeated_ones_and_batches_equal_their_items(kernel):
    q, k = random_inputs(150, 223, heads=(4, 2), batch=2)
    lse = dense_lse(q, k) + uniform_noise((2, 4, 150), 0.5)

    def found(q, k, lse):
        sides = blocks(q, k, [0, 140], 16, k_video=[3, 223], k_block=64)
        return search(q, k, lse, sides, kernel=kernel)

    whole = found(q, k, lse)
    assert_mass(whole[0], exact(q, k, blocks(q, k, [0, 140], 16, k_video=[3, 223], k_block=64), lse)[0])
    assert_same_bits(found(q, k.repeat_interleave(2, 1), lse), whole)
    for b in range(2):
        assert_same_bits(found(q[b : b + 1], k[b : b + 1], lse[b : b + 1]), (x[b : b + 1] for x in whole))


@each_kernel
@each_dtype
def test_strides_and_repeats_change_no_bit(kernel, dtype):
    q, k, sides = ragged(heads=(4, 2), dtype=dtype)
    lse = dense_lse(q, k) + uniform_noise((1, 4, 223), 0.5)
    found = search(q, k, lse, sides, kernel=kernel)
    assert_same_bits(search(q, k, lse, sides, kernel=kernel), found)

    kept, flag = torch.stack((lse, lse), -1)[..., 0], torch.ones(1, dtype=torch.int32)
    strided = q.mT.contiguous().mT, k.transpose(1, 2).contiguous().transpose(1, 2)
    again = OPS.block_mass(*strided, kept, flag, *sides[0], *sides[1], LARGEST, SCALE, 1, False, kernel)
    assert_same_bits((*again, kept), found)


@each_kernel
@pytest.mark.parametrize("ready", [0, 1])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_padding_equals_trimmed_keys_and_dead_blocks_take_no_mass(kernel, ready, garbage):
    q, k = random_inputs(223, 223, heads=(4, 2))
    short = k[:, :, :100].clone()
    lse = dense_lse(q, short) + uniform_noise((1, 4, 223), 0.3)
    trimmed = search(q, short, lse, blocks(q, short, [0, 210], 32, k_video=[0, 100]), ready=ready, kernel=kernel)
    k[:, :, 100:] = garbage
    k_valid = torch.arange(223).lt(100).unsqueeze(0)
    mass, spread, new = search(q, k, lse, blocks(q, k, [0, 210], 32, k_valid=k_valid), ready=ready, kernel=kernel)
    assert torch.allclose(mass[..., :4], trimmed[0][..., :4], rtol=1e-5, atol=1e-8)
    assert (mass[..., 4:] == 0).all()
    assert torch.allclose(spread, trimmed[1]) and torch.allclose(new, trimmed[2], atol=1e-5)


@each_kernel
@each_dtype
def test_a_kept_log_sum_exp_is_used_and_refreshed(kernel, dtype):
    q, k, sides = ragged(dtype=dtype)
    kept = dense_lse(q, k) + uniform_noise((1, 2, 223), 0.5)
    mass, spread, lse = search(q, k, kept, sides, kernel=kernel)
    assert_mass(mass, exact(q, k, sides, kept)[0])
    assert_lse(lse, exact(q, k, sides)[1])
    assert torch.allclose(spread, torch.full_like(spread, 0.5 / 3**0.5), rtol=0.15)


@each_kernel
def test_the_spread_is_the_mean_deviation_within_a_group(kernel):
    q, k = random_inputs(100, 100, heads=(1, 1))
    plan = random_plan(1, 1, 1, 100, 100, 5, 4)
    sides = plan.query_side, plan.key_side
    noise = uniform_noise((1, 1, 100), 0.4)
    _, spread, _ = search(q, k, exact(q, k, sides)[1].float() - noise, sides, kernel=kernel)
    deviations = [noise[groups_of(sides[0], 100) == group].std(correction=0) for group in range(4)]
    assert spread.item() == pytest.approx(sum(deviations).item() / 4, rel=1e-4)


@each_kernel
@pytest.mark.parametrize("cause", ["noise", "another-prompt"])
def test_a_log_sum_exp_that_moved_within_groups_is_made_anew_in_that_head_alone(kernel, cause):
    q, k, sides = ragged(gain=4.0)
    kept = dense_lse(q, k)
    clean = search(q, k, kept, sides, kernel=kernel)
    other = kept + uniform_noise(kept.shape, 3.0)
    if cause == "another-prompt":
        other = dense_lse(*random_inputs(223, 223, gain=4.0, seed=7))
    kept[:, 1] = other[:, 1]
    mass, spread, lse = search(q, k, kept, sides, kernel=kernel)
    assert_exact(mass, lse, q, k, sides)
    assert reference.MOST_SPREAD < spread[0, 1] < 10 and spread[0, 0] < 1e-5
    assert_same_bits((mass[:, 0], lse[:, 0]), (clean[0][:, 0], clean[2][:, 0]))


@each_kernel
@pytest.mark.parametrize("row", [slice(None), 40])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e4, -1e4, 3e38, 70.0])
@pytest.mark.parametrize("ready", [0, 1])
def test_a_log_sum_exp_that_does_not_fit_at_all_is_made_anew(kernel, row, value, ready):
    q, k, sides = ragged()
    kept = exact(q, k, sides)[1].float()
    kept[0, 1, row] = value
    mass, spread, lse = search(q, k, kept, sides, ready=ready, kernel=kernel)
    assert_exact(mass, lse, q, k, sides)
    assert spread[0, 1] == math.inf
    assert spread[0, 0] < 1e-5 if ready else spread[0, 0] == math.inf


@each_kernel
@each_dtype
def test_a_nan_row_counts_as_nothing_and_heals(kernel, dtype):
    q, k, sides = ragged(dtype=dtype)
    kept = dense_lse(q, k)
    spoiled = q.clone()
    spoiled[0, 0, 40] = math.nan
    expected, exact_lse = exact(spoiled, k, sides)
    others = ~exact_lse.isnan()
    for fresh, start in ((False, kept), (True, dense_lse(spoiled, k, kernel=kernel))):
        mass, spread, lse = search(spoiled, k, start, sides, fresh=fresh, kernel=kernel)
        assert_mass(mass, expected)
        assert (spread < 1e-5).all()
        assert lse[~others].isnan().all()
        assert_lse(lse[others], exact_lse[others])
    _, spread, lse = search(spoiled, k, lse, sides, kernel=kernel)
    assert (spread < 1e-5).all(), "such a row does not make a head invalid"
    mass, _, lse = search(q, k, lse, sides, kernel=kernel)
    assert_exact(mass, lse, q, k, sides)


@each_kernel
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_key_that_is_not_finite_counts_as_nothing_and_makes_no_head_invalid_for_ever(kernel, value):
    q, k, sides = ragged()
    kept = dense_lse(q, k)
    spoiled = k.clone()
    spoiled[0, 0, 40, 3] = value
    for some_mass in (True, False):
        mass, spread, kept = search(q, spoiled, kept, sides, kernel=kernel)
        assert (mass.sum(-1) < 33).all() and torch.isfinite(spread).all(), "not even the block of that key is large"
        assert not some_mass or (mass[:, :, :-1].sum(-1) > 0).all()
    gives_nan = torch.ones(223, dtype=torch.bool) if math.isnan(value) else q[0, 0, :, 3] > 0
    assert torch.equal(torch.isfinite(kept[0, 0]), ~gives_nan)
    mass, _, lse = search(q, k, kept, sides, kernel=kernel)
    assert_exact(mass, lse, q, k, sides)


@each_kernel
@pytest.mark.parametrize("ready", [0, 1])
def test_without_a_valid_key_there_is_no_mass_and_the_head_heals(kernel, ready):
    q, k = random_inputs(100, 100, batch=2)
    sides = blocks(q, k, [0, 90], 32, k_valid=torch.tensor([[False] * 100, [True] * 100]))
    kept = dense_lse(q, k)
    mass, spread, lse = search(q, k, kept, sides, ready=ready, kernel=kernel)
    assert (mass[0] == 0).all() and (lse[0] == -math.inf).all()
    assert_mass(mass[1], exact(q, k, sides)[0][1])
    _, spread, lse = search(q, k, lse, sides, kernel=kernel)
    assert (spread < 1e-5).all(), "such rows do not make a head invalid"
    all_valid = blocks(q, k, [0, 90], 32)
    mass, _, lse = search(q, k, lse, all_valid, kernel=kernel)
    assert_exact(mass, lse, q, k, all_valid)


@each_kernel
@pytest.mark.parametrize("ready", [0, 1])
def test_padding_queries_have_no_mass_and_keep_their_log_sum_exp(kernel, ready):
    q, k = random_inputs(100, 100)
    sides = blocks(q, k, [0, 90], 32, q_valid=torch.arange(100).lt(70).unsqueeze(0))
    kept = dense_lse(q, k)
    kept[..., 70:] = 123.0
    q[..., 70:, :] = math.nan
    mass, _, lse = search(q, k, kept, sides, ready=ready, kernel=kernel)
    assert (lse[..., 70:] == 123).all()
    assert_lse(lse[..., :70], exact(q, k, sides)[1][..., :70])
    assert_rows_sum_to_sizes(mass, sides[0])


@each_kernel
@pytest.mark.parametrize("stride", [1, 4, 1000])
@pytest.mark.parametrize("ready", [0, 1])
def test_every_so_manyth_row_stands_for_its_group(kernel, stride, ready):
    q, k, sides = ragged()
    exact_lse = exact(q, k, sides)[1]
    kept = (exact_lse + 1).float()
    looked_at = torch.tensor([(i % 32 if i < 210 else i - 210) % stride == 0 for i in range(223)])
    mass, _, lse = search(q, k, kept, sides, row_stride=stride, ready=ready, kernel=kernel)
    used = torch.where(looked_at, kept if ready else exact_lse, math.inf)
    sizes = sides[0].offsets.diff()
    looks = (sizes / stride).ceil().clamp(min=1)
    assert_mass(mass, exact(q, k, sides, used)[0] * (sizes / looks).unsqueeze(-1))
    assert_lse(lse[..., looked_at], exact_lse[..., looked_at])
    if ready:
        assert torch.equal(lse[..., ~looked_at], kept[..., ~looked_at])
    else:
        assert_lse(lse, exact_lse)


@each_kernel
@each_dtype
@pytest.mark.parametrize("ready", [0, 1])
def test_extreme_logits(kernel, dtype, ready):
    q, k, sides = ragged(gain=200.0, dtype=dtype)
    exact_lse = exact(q, k, sides)[1]
    mass, _, lse = search(q, k, exact_lse.float(), sides, ready=ready, kernel=kernel)
    assert_lse(lse, exact_lse)
    assert (mass.sum(-1) / sides[0].offsets.diff() - 1)[..., :-1].abs().max() <= 1e-4 * exact_lse.max() / 50


@pytest.mark.parametrize("ready", [0, 1])
def test_the_size_of_the_references_pieces_changes_rounding_alone(ready, monkeypatch):
    q, k, sides = ragged()
    kept = dense_lse(q, k) + uniform_noise((1, 2, 223), 0.5)
    whole = search(q, k, kept, sides, ready=ready, kernel="reference")
    for name, value in {"SCORES_AT_ONCE": 1, "FEWEST_ROWS": 21}.items():
        monkeypatch.setattr(reference, name, value)
    for one, other in zip(search(q, k, kept, sides, ready=ready, kernel="reference"), whole, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def op_args(kernel, fresh, orders):
    q, k = random_inputs(60, 70, heads=(4, 2), batch=2)
    plan = random_plan(2, 4, 2, 60, 70)
    query, key = (side if orders else side._replace(order=None) for side in (plan.query_side, plan.key_side))
    ready = torch.ones(1, dtype=torch.int32)
    return (q, k, dense_lse(q, k), ready, *query, *key, LARGEST, SCALE, 2, fresh, kernel)


each_call = pytest.mark.parametrize(("fresh", "orders"), [(True, True), (False, True), (False, False)])


@each_kernel
@each_call
def test_opcheck(kernel, fresh, orders):
    results = torch.library.opcheck(OPS.block_mass.default, op_args(kernel, fresh, orders))
    assert set(results.values()) == {"SUCCESS"}, results


@each_call
def test_the_reference_reads_no_value_on_the_host(fresh, orders):
    args = op_args("reference", fresh, orders)
    with FakeTensorMode() as mode:
        fakes = tuple(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args)
        results = ops.blocks._block_mass(*fakes), OPS.block_mass(*fakes)
    for result in results:
        for one, other in zip(result, OPS.block_mass(*args), strict=True):
            assert one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype
