from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from kernel_oracles import (
    OPS,
    Clustered,
    assert_same_bits,
    inertia,
    labels_of,
    random_tensor,
    squared_distances,
)
from torch import Tensor

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.kmeans.configs import Assign, Update
from sparse_compile.kernels.kmeans.triton_launch import cluster_both
from sparse_compile.kernels.permutation.triton_launch import sort_both

TILES = {"assign": Assign(32, 16, 4, 1), "update": Update(8, 4, 1), "sorted_at_once": 64}
"""Small, so that a short sequence takes several of each."""


def run(q, k, q_clusters=3, k_clusters=5, *, state=None, kernel="triton", restart=None, **options):
    """The kmeans op on copies of the state; options are those of the op by name, or else of `cluster_both`."""
    if state is None:
        q_centroids = q.new_zeros((*q.shape[:2], q_clusters, q.shape[3]))
        k_centroids = k.new_zeros((*k.shape[:2], k_clusters, k.shape[3]))
        ready = torch.zeros(1, dtype=torch.int32, device=q.device)
    else:
        q_centroids, k_centroids, ready = (x.clone() for x in (state.q_centroids, state.k_centroids, state.ready))
    arguments = {
        "q_valid": None,
        "k_valid": None,
        "q_video": [0, q.shape[2]],
        "k_video": [0, k.shape[2]],
        "q_centroids": q_centroids,
        "k_centroids": k_centroids,
        "ready": ready,
        "restart": state is None if restart is None else restart,
        "iterations": 2,
        "seed": 0,
    }
    special = {name: options.pop(name) for name in list(options) if name not in arguments}
    values = (arguments | options).values()
    returned = cluster_both(q, k, *values, **special) if special else OPS.kmeans(q, k, *values, kernel)
    return Clustered(*returned, q_centroids, k_centroids, ready)


class Centroids(NamedTuple):
    """A state to start from."""

    q_centroids: Tensor
    k_centroids: Tensor
    ready: Tensor


def separated(batch, heads, tokens, size, clusters, device, *, seed=0, dtype=torch.float32):
    """Tokens near one of ``clusters`` far points, in turn, and points to start from: rounding decides no label."""
    points = random_tensor(batch, heads, clusters, size, seed=seed) * 8
    noise = 0.25 * random_tensor(batch, heads, tokens, size, seed=seed + 1)
    near = points[:, :, torch.arange(tokens) % clusters] + noise
    return near.to(dtype).to(device), (points + 0.5).to(dtype).to(device)


def warm(q_centroids, k_centroids):
    return Centroids(q_centroids, k_centroids, torch.ones(1, dtype=torch.int32, device=q_centroids.device))


def assert_is_a_clustering(got, q, k):
    """Orders are permutations, and the means are those of the tokens of each group."""
    for side, x in (("q", q), ("k", k)):
        order, offsets, means = (getattr(got, f"{side}_{name}") for name in ("order", "offsets", "means"))
        assert torch.equal(order.sort(-1).values, torch.arange(x.shape[2], device=x.device).expand_as(order).int())
        assert (offsets[..., 0] == 0).all() and (offsets[..., -1] == x.shape[2]).all()
        assert_means_belong(x.cpu(), labels_of(order.cpu(), offsets.cpu()), means.cpu())


def assert_means_belong(x, labels, means):
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            own = x[b, h].double()
            for j in labels[b, h].unique().tolist():
                if j < means.shape[2]:
                    error = (means[b, h, j].double() - own[labels[b, h] == j].mean(0)).abs().max()
                    assert error <= 2e-6 * own.abs().max()


@pytest.mark.parametrize(
    ("dtype", "tokens", "size"),
    [
        pytest.param(torch.float32, (65, 130), 32, id="float32"),
        pytest.param(torch.float16, (33, 70), 40, id="float16-odd-size"),
        pytest.param(torch.bfloat16, (40, 64), 32, id="bfloat16"),
    ],
)
def test_separated_clusters_are_those_of_the_reference(device, dtype, tokens, size):
    q, q_points = separated(1, 2, tokens[0], size, 4, device, dtype=dtype)
    k, k_points = separated(1, 1, tokens[1], size, 17, device, seed=7, dtype=dtype)
    state = warm(q_points, k_points)
    with nan_filled_empty():
        got = run(q, k, state=state)
    expected = run(q, k, state=state, kernel="reference")
    for name in ("q_order", "q_offsets", "k_order", "k_offsets", "non_finite", "ready"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name in ("q_means", "k_means", "q_centroids", "k_centroids"):
        one, other = getattr(got, name), getattr(expected, name)
        assert one.dtype == other.dtype and one.shape == other.shape and one.is_contiguous()
        step = torch.finfo(one.dtype).eps  # another order of summation may round a mean the other way
        assert torch.allclose(one.float(), other.float(), rtol=step, atol=2e-6 * float(k.abs().max())), name
    assert torch.equal(got.k_centroids, got.k_means.to(dtype))


@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float32), (200, torch.float32), (33, torch.float16)])
def test_random_tokens_are_clustered_as_well_as_by_the_reference(device, tokens, dtype):
    q = random_tensor(1, 1, tokens, 24, dtype=dtype).to(device)
    k = (random_tensor(1, 1, tokens + 30, 24, seed=1) + 3).to(dtype).to(device)
    got = run(q, k, 3, 17, **TILES)
    expected = run(q, k, 3, 17, kernel="reference")
    assert_is_a_clustering(got, q, k)
    mine, its = (
        inertia(k[0, 0], labels_of(c.k_order.cpu(), c.k_offsets.cpu())[0, 0].to(device), c.k_means[0, 0])
        for c in (got, expected)
    )
    assert mine <= its * 1.02 + 1e-6


@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.float32, 0.0), (torch.float32, 16.0), (torch.float16, 16.0), (torch.bfloat16, 0.0)]
)
def test_every_token_gets_a_nearest_centroid(device, dtype, offset):
    x = (random_tensor(1, 1, 100, 40) + offset).to(dtype).to(device)
    centroids = (random_tensor(1, 1, 20, 40, seed=1) + offset).to(dtype).to(device)
    got = run(x[:, :, :1], x, state=warm(centroids[:, :, :1], centroids), iterations=1)
    labels = labels_of(got.k_order.cpu(), got.k_offsets.cpu())[0, 0].to(device)
    distances = squared_distances(x[0, 0], centroids[0, 0])
    regret = distances.gather(1, labels.unsqueeze(1)).squeeze(1) - distances.amin(1)
    norms = x[0, 0].double().square().sum(1) + centroids.double().square().sum(-1).max()
    assert (regret <= 1e-5 * norms).all()


@pytest.mark.parametrize("tiles", [{}, TILES], ids=["best tiles", "small tiles"])
def test_ties_go_to_the_lowest_label(device, tiles):
    x = random_tensor(1, 1, 60, 16).to(device)
    state = warm(x[:, :, :1].clone(), x[:, :, :40].clone())
    for later in (5, 17, 39):  # in the same step and in others
        state.k_centroids[0, 0, later] = state.k_centroids[0, 0, 2]
    got = run(x, x, state=state, iterations=1, **tiles)
    sizes = got.k_offsets[0, 0].diff()
    assert sizes[2] > 0 and sizes[[5, 17, 39]].sum() == 0
    assert torch.equal(got.k_means[0, 0, 39], state.k_centroids[0, 0, 39]), "an empty cluster keeps its centroid"


@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
def test_a_centroid_whose_norm_overflows_is_never_nearest(device, value):
    x = random_tensor(1, 1, 50, 16).to(device)
    state = warm(x[:, :, :1].clone(), x[:, :, :5].clone())
    for odd in (0, 4):
        state.k_centroids[0, 0, odd] = value
    sizes = run(x, x, state=state, iterations=1).k_offsets[0, 0].diff()
    assert sizes[0] == sizes[4] == 0 and sizes[:5].sum() == 50


def test_the_start_is_the_sample_of_the_reference(device):
    q, k = random_tensor(2, 3, 90, 16).to(device), random_tensor(2, 1, 40, 16, seed=1).to(device)
    valid = (torch.arange(90, device=device) % 7 > 0).expand(2, -1).clone()
    valid[1, 4:] = False  # fewer tokens than clusters
    q[0, 1, 8] = math.nan
    options = {"q_valid": valid, "q_video": [0, 30, 35, 80], "iterations": 1, "seed": 2**40 + 5}
    got, expected = (run(q, k, 7, 5, kernel=kernel, **options) for kernel in ("triton", "reference"))
    for name in ("q_means", "k_means"):
        assert torch.allclose(getattr(got, name), getattr(expected, name), atol=1e-5), name
    assert torch.equal(got.q_offsets, expected.q_offsets) and torch.equal(got.k_order, expected.k_order)


@pytest.mark.parametrize("restart", [True, False])
def test_text_and_padding_are_groups_of_their_own_and_touch_nothing_else(device, restart):
    x, points = separated(2, 1, 120, 16, 3, device)
    valid = torch.ones(1, 120, dtype=torch.bool, device=device)
    valid[0, 50:60] = False
    valid[0, 110:] = False
    spans = [0, 80, 90, 100]
    options = {"q_valid": valid, "k_valid": valid, "q_video": spans, "k_video": spans, "restart": restart}
    state = warm(points, points)
    other = x.clone()
    other[:, :, 50:60] = math.nan
    other[:, :, 110:] = math.inf
    other[:, :, 80:90] = -7
    first, second = (run(tokens, tokens, state=state, **options) for tokens in (x, other))
    assert_same_bits(first.outputs, second.outputs)
    labels = labels_of(first.q_order.cpu(), first.q_offsets.cpu())
    assert (labels[..., 50:60] == 4).all() and (labels[..., 110:] == 4).all()
    assert (labels[..., 80:90] == 3).all() and (labels[..., 100:110] == 3).all()
    assert (labels[..., :50] < 3).all()
    if not restart:
        expected = run(x, x, kernel="reference", state=state, **options)
        assert torch.equal(first.q_order, expected.q_order) and torch.equal(first.k_offsets, expected.k_offsets)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e30])
def test_tokens_that_are_not_finite_get_label_0_and_enter_no_mean(device, value):
    x, points = separated(1, 2, 90, 16, 3, device)
    x[0, 0, 20, 3] = value
    x[0, 0, 80] = value
    x[0, 1, 89] = value  # text
    valid = torch.ones(1, 90, dtype=torch.bool, device=device)
    valid[0, 80] = False
    options = {"k_valid": valid, "q_video": [0, 88], "state": warm(points, points)}
    got, expected = (run(x, x, kernel=kernel, **options) for kernel in ("triton", "reference"))
    assert got.non_finite.dtype == torch.int32
    assert got.non_finite.tolist() == expected.non_finite.tolist() == [5]
    assert torch.equal(got.q_order, expected.q_order) and torch.equal(got.k_offsets, expected.k_offsets)
    assert labels_of(got.q_order.cpu(), got.q_offsets.cpu())[0, 0, 20] == 0
    assert torch.allclose(got.q_means, expected.q_means, atol=1e-5)
    again = run(x, x, iterations=1)  # the sample avoids them
    assert torch.isfinite(again.q_centroids).all() and torch.isfinite(again.k_centroids).all()


@pytest.mark.parametrize(
    ("spans", "valid", "groups"),
    [
        pytest.param([], None, (0, 50, 0), id="no-video"),
        pytest.param([10, 10], None, (0, 50, 0), id="zero-length-video"),
        pytest.param([0, 50], False, (0, 0, 50), id="nothing-valid"),
        pytest.param([-3, 20, 30, 99], None, (40, 10, 0), id="video-beyond-the-tokens"),
    ],
)
def test_empty_classes_are_legal(device, spans, valid, groups):
    x = random_tensor(2, 1, 50, 8).to(device)
    mask = None if valid is None else torch.zeros(1, 50, dtype=torch.bool, device=device)
    got = run(x, x, 3, 3, q_valid=mask, k_valid=mask, q_video=spans, k_video=spans, iterations=1)
    sizes = got.q_offsets[0, 0].diff()
    assert (sizes[:3].sum().item(), sizes[3].item(), sizes[4].item()) == groups
    assert torch.isfinite(got.q_means).all() and torch.isfinite(got.k_centroids).all()


def test_no_tokens_leave_centroids_of_zero(device):
    x = random_tensor(1, 2, 0, 16).to(device)
    got = run(x, x, 3, 4)
    assert got.q_means.abs().sum() == 0 and got.k_offsets.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_tokens_all_get_label_0_and_are_their_mean(device, dtype):
    x = torch.full((1, 1, 130, 16), 0.1, dtype=dtype, device=device)
    got = run(x[:, :, :1], x, 1, 4)
    assert got.k_offsets[0, 0].diff()[0] == 130
    assert torch.equal(got.k_means[0, 0, 0], x[0, 0, 0].float())


def test_huge_norms_stay_finite(device):
    x = (random_tensor(1, 1, 100, 32) * 1e4).clamp(-6e4, 6e4).half().to(device)
    got = run(x, x)
    assert got.non_finite.item() == 0
    assert torch.isfinite(got.q_means).all() and torch.isfinite(got.q_centroids).all()
    assert (got.q_offsets[0, 0].diff()[:3] > 0).sum() > 1


def test_a_warm_start_leaves_ready_alone_and_works_from_lost_state(device):
    x = random_tensor(1, 1, 60, 16).to(device)
    state = run(x, x)
    assert state.ready.item() == 1
    assert run(x, x, state=state).ready.item() == 1
    for tensor in (state.q_centroids, state.k_centroids, state.ready):
        tensor.zero_()
    lost = run(x, x, state=state)
    assert lost.ready.item() == 0
    assert torch.isfinite(lost.q_centroids).all() and (lost.q_offsets[..., -1] == 60).all()


def test_a_problem_at_rest_is_left_alone_and_no_bit_changes(device):
    q, q_points = separated(1, 2, 40, 16, 2, device)  # at rest after two iterations
    k = random_tensor(1, 1, 90, 16).to(device)
    state = warm(q_points, k[:, :, :4])
    resting, running = (run(q, k, state=state, iterations=5, rests=rests) for rests in (True, False))
    assert_same_bits(resting.outputs, running.outputs)
    assert not torch.equal(run(q, k, state=state, iterations=3).k_means, running.k_means), "k went on moving"


def test_a_problem_at_rest_takes_no_further_time(device, monkeypatch):
    x, points = separated(1, 1, 20, 16, 2, device)
    seen = []

    def spoiled(labels, *others):
        """Spoil the labels after the second sort: whoever labels or sorts once more, shows it."""
        sort_both(labels, *others)
        seen.append(labels)
        if len(seen) == 2:
            labels.fill_(0)

    monkeypatch.setattr("sparse_compile.kernels.kmeans.triton_launch.sort_both", spoiled)
    got = run(x, x, state=warm(points, points), iterations=3)
    assert got.q_offsets[0, 0].tolist() == [0, 10, 20, 20, 20] and not seen[-1].any()


def test_a_batch_equals_its_items_and_a_repeat_its_first_run(device):
    q, k = random_tensor(2, 1, 70, 16).to(device), random_tensor(2, 1, 50, 16, seed=1).to(device)
    valid = torch.ones(2, 50, dtype=torch.bool, device=device)
    valid[1, 40:] = False
    both, again = (run(q, k, 2, 2, k_valid=valid, **TILES) for _ in range(2))
    assert_same_bits(both.outputs, again.outputs)
    for b in range(2):
        item = slice(b, b + 1)
        one = run(q[item], k[item], 2, 2, k_valid=valid[item], **TILES)
        for name in ("q_order", "q_offsets", "q_means", "k_order", "k_offsets", "k_means", "q_centroids"):
            assert torch.equal(getattr(both, name)[item], getattr(one, name)), name


@pytest.mark.parametrize("case", ["transposed", "odd rows", "gaps between elements", "one batch item, stride 0"])
def test_any_strides_give_the_bits_of_contiguous_tensors(device, case):
    x = random_tensor(1, 2, 50, 48).to(device)
    q = {
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "odd rows": random_tensor(1, 2, 50, 41).to(device)[..., 1:],
        "gaps between elements": x[..., ::2],
        "one batch item, stride 0": x.as_strided((1, 2, 50, 48), (0, 50 * 48, 48, 1)),
    }[case]
    strided, plain = (run(tokens, tokens[:, 1:], 2, 2, iterations=1) for tokens in (q, q.contiguous()))
    assert_same_bits(strided.outputs, plain.outputs)


@pytest.mark.parametrize("restart", [True, False])
def test_a_strided_state_is_read_and_written_in_place(device, restart):
    x = random_tensor(1, 2, 40, 16).to(device)
    whole = random_tensor(1, 2, 3, 2, 16, seed=1).to(device)
    own = whole[..., 1, :]
    state = warm(x[:, :, :2], own)
    got = run(x, x, state=state, restart=restart)
    rest = whole[..., 0, :].clone()
    cluster_both(x, x, None, None, [0, 40], [0, 40], state.q_centroids.clone(), own, state.ready, restart, 2, 0)
    assert torch.equal(own, got.k_centroids) and torch.equal(whole[..., 0, :], rest)


def test_running_out_of_memory_leaves_the_state_as_it_was(device, monkeypatch):
    x = random_tensor(1, 1, 40, 16).to(device)
    state = run(x, x)
    centroids, ready = state.q_centroids.clone(), torch.zeros(1, dtype=torch.int32, device=device)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("sparse_compile.kernels.kmeans.triton_launch.one_of_each_stratum_of_heads", full)
    with pytest.raises(torch.OutOfMemoryError):
        cluster_both(x, x, None, None, [0, 40], [0, 40], centroids, state.k_centroids, ready, True, 2, 0)
    assert torch.equal(centroids, state.q_centroids) and ready.item() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_of_a_real_model_get_nearest_centroids_and_their_means(device, dtype):
    generator = torch.Generator(device).manual_seed(0)
    q, k = (
        torch.randn(1, 24_000, 8, 128, device=device, generator=generator).to(dtype).transpose(1, 2) for _ in range(2)
    )
    first = run(q, k, 300, 1000, iterations=2, q_video=[0, 23_000])
    got = run(q, k, state=first, iterations=1, q_video=[0, 23_000])
    assert_same_bits(got.outputs, run(q, k, state=first, iterations=1, q_video=[0, 23_000]).outputs)
    position = torch.arange(24_000, device=device, dtype=torch.int32)
    for x, order, offsets, means, centroids in (
        (q, got.q_order, got.q_offsets, got.q_means, first.q_centroids),
        (k, got.k_order, got.k_offsets, got.k_means, first.k_centroids),
    ):
        clusters = means.shape[2]
        for h in (0, 7):
            group = torch.searchsorted(offsets[0, h, 1:].contiguous(), position, right=True)
            labels = torch.empty_like(group).scatter_(0, order[0, h].long(), group)
            own, here = x[0, h].double(), centroids[0, h].double()
            video = labels < clusters
            scores = here.square().sum(1) - 2 * own @ here.T
            regret = scores.gather(1, labels.clamp(max=clusters - 1).unsqueeze(1)).squeeze(1) - scores.amin(1)
            assert (regret[video] <= 1e-5 * (own.square().sum(1) + here.square().sum(1).max())[video]).all()
            sums = torch.zeros(clusters + 2, 128, dtype=torch.float64, device=device).index_add_(0, labels, own)
            counts = labels.bincount(minlength=clusters + 2)
            exact = sums / counts.clamp(min=1).unsqueeze(1)
            error = (means[0, h].double() - exact[:clusters])[counts[:clusters] > 0].abs().max()
            assert error <= 2e-6 * own.abs().max()


@pytest.mark.gpu
def test_a_search_of_fifty_iterations_is_as_good_as_the_reference(device):
    x, _ = separated(1, 8, 20_000, 128, 400, device, dtype=torch.bfloat16)
    got, expected = (run(x, x, 100, 300, iterations=50, kernel=kernel) for kernel in ("triton", "reference"))
    mine, its = (labels_of(c.k_order.cpu(), c.k_offsets.cpu()).to(device) for c in (got, expected))
    for h in range(8):
        best = inertia(x[0, h], its[0, h], expected.k_means[0, h])
        assert inertia(x[0, h], mine[0, h], got.k_means[0, h]) <= 1.05 * best


@pytest.mark.gpu
def test_more_groups_than_are_counted_are_clustered_too(device):
    x, points = separated(1, 2, 20_000, 64, 5000, device)
    state = warm(points[:, :, :9], points)
    got, expected = (run(x, x, state=state, iterations=1, kernel=kernel) for kernel in ("triton", "reference"))
    assert torch.equal(got.k_order, expected.k_order) and torch.equal(got.k_offsets, expected.k_offsets)
    assert torch.allclose(got.k_means, expected.k_means, atol=1e-5)
