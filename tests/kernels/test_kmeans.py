from __future__ import annotations

import math

import pytest
import torch
from kernel_oracles import (
    DTYPES,
    IMPLEMENTATIONS,
    cluster,
    inertia,
    labels_of,
    random_tensor,
    squared_distances,
)

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.kmeans import clustering, cpu, reference
from sparse_compile.kernels.kmeans.counter_hash import hash_counters

STEPS = [pytest.param(cpu, id="cpu"), pytest.param(reference, id="reference")]


def everything(x):
    return torch.ones(x.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 8), (63, 40), (65, 64), (1000, 128)])
@pytest.mark.parametrize("offset", [0.0, 6.0, 16.0])
def test_every_token_gets_a_nearest_centroid(steps, dtype, tokens, size, offset):
    x = (random_tensor(tokens, size) + offset).to(dtype)
    centroids = random_tensor(40, size, seed=1) + offset
    labels = steps.assign(x, centroids, everything(x))
    assert labels.dtype == torch.int32
    rounded = centroids.to(dtype)
    distances = squared_distances(x, rounded)
    regret = distances.gather(1, labels.long().unsqueeze(1)).squeeze(1) - distances.amin(1)
    norms = x.double().square().sum(1) + rounded.double().square().sum(1).max()
    assert (regret <= 1e-5 * norms).all()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 65, 1000, 9000])
def test_centroids_are_the_means_of_their_tokens(steps, dtype, tokens):
    x = (random_tensor(tokens, 40) + 3).to(dtype)
    labels = torch.randint(10, (tokens,), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    included = labels != 4  # nobody is left in cluster 4
    previous = random_tensor(11, 40, seed=2)
    means = steps.update(x, labels, included, previous)
    assert means.dtype == torch.float32
    for j in range(11):
        members = x.double()[included & (labels == j)]
        expected = members.mean(0) if len(members) else previous[j].double()
        assert ((means[j].double() - expected).abs() <= 2e-6 * x.double().abs().max()).all()


@pytest.mark.parametrize("steps", STEPS)
def test_ten_thousand_equal_tokens_have_themselves_as_mean(steps):
    x = torch.full((10_000, 8), 0.1)
    means = steps.update(x, torch.zeros(10_000, dtype=torch.int32), everything(x), torch.zeros(2, 8))
    assert torch.equal(means[0], x[0])


@pytest.mark.parametrize("steps", STEPS)
def test_ties_go_to_the_lowest_label(steps):
    centroids = random_tensor(70, 16)
    centroids[33] = centroids[5]
    centroids[69] = centroids[5]
    x = centroids[[5, 33, 69]] + 1e-3
    assert steps.assign(x, centroids, everything(x)).tolist() == [5, 5, 5]


@pytest.mark.parametrize("steps", STEPS)
def test_a_centroid_whose_norm_overflows_is_never_nearest(steps):
    x, centroids = random_tensor(50, 16), random_tensor(6, 16, seed=1)
    labels = steps.assign(x, centroids, everything(x))
    centroids = torch.cat([centroids, torch.full((1, 16), 1e30), torch.full((1, 16), math.inf)])
    assert torch.equal(steps.assign(x, centroids, everything(x)), labels)


@pytest.mark.parametrize("steps", STEPS)
def test_float64_inputs_are_computed_in_float64(steps):
    x, centroids = random_tensor(200, 16).double() + 1e4, random_tensor(9, 16, seed=1).double() + 1e4
    labels = steps.assign(x, centroids, everything(x))
    assert torch.equal(labels.long(), squared_distances(x, centroids).argmin(1))
    means = steps.update(x, labels, everything(x), centroids)
    assert means.dtype == torch.float64
    assert torch.allclose(means[labels[0]], x[labels == labels[0]].mean(0), rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_implementations_agree(dtype):
    q, k = random_tensor(2, 4, 300, 32, dtype=dtype), random_tensor(2, 2, 500, 32, seed=1, dtype=dtype)
    one, other = (cluster(q, k, iterations=3, kernel=kernel) for kernel in IMPLEMENTATIONS)
    assert torch.allclose(one.q_means, other.q_means, atol=1e-5)
    assert torch.equal(one.k_order, other.k_order)


def test_stopping_at_a_fixed_point_changes_no_bit(monkeypatch):
    q = random_tensor(1, 2, 300, 16)
    stopped = cluster(q, q, iterations=200)
    monkeypatch.setattr(cpu, "STOPS_AT_FIXED_POINT", False)
    ran_on = cluster(q, q, iterations=200)
    assert all(torch.equal(a, b) for a, b in zip(stopped.outputs, ran_on.outputs, strict=True))


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 63, 65, 1000])
def test_returned_means_belong_to_the_returned_labels(kernel, tokens):
    q, k = random_tensor(1, 2, tokens, 24), random_tensor(1, 2, tokens, 24, seed=1)
    with nan_filled_empty():
        got = cluster(q, k, 8, 16, kernel=kernel, iterations=4)
    labels = labels_of(got.k_order, got.k_offsets)
    for h in range(2):
        for j in labels[0, h].unique().tolist():
            mean = k[0, h][labels[0, h] == j].double().mean(0)
            assert torch.allclose(got.k_means[0, h, j].double(), mean, atol=1e-6)
    assert torch.equal(got.k_centroids, got.k_means)
    assert got.ready.item() == 1


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_centroids_of_16_bit_models_are_the_rounded_means(kernel):
    q = random_tensor(1, 1, 100, 16, dtype=torch.bfloat16)
    got = cluster(q, q, kernel=kernel)
    assert got.q_centroids.dtype == torch.bfloat16
    assert torch.equal(got.q_centroids, got.q_means.bfloat16())


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_a_warm_start_leaves_ready_alone_and_works_from_lost_state(kernel):
    q = random_tensor(1, 2, 100, 16)
    state = cluster(q, q, kernel=kernel)
    lost = cluster(q, q, kernel=kernel)
    for tensor in (lost.q_centroids, lost.k_centroids, lost.ready):
        tensor.zero_()
    got = cluster(q, q, state=lost, iterations=2, kernel=kernel)
    assert got.ready.item() == 0
    assert torch.isfinite(got.q_means).all() and torch.isfinite(got.q_centroids).all()
    assert (got.q_offsets[..., -1] == 100).all()
    assert cluster(q, q, state=state, iterations=2, kernel=kernel).ready.item() == 1


@pytest.mark.parametrize("steps", STEPS)
def test_the_sample_takes_one_token_of_each_stratum(steps):
    x = torch.arange(103.0).unsqueeze(1).expand(-1, 4)
    included = torch.ones(103, dtype=torch.bool)
    included[10:13] = False  # 100 tokens remain
    sample = steps.stratified_sample(x, included, 10, 7, "key", 0)[:, 0].long()
    place = included.long().cumsum(0)[sample] - 1
    assert included[sample].all()
    assert (place // 10).tolist() == list(range(10))
    other = steps.stratified_sample(x, included, 10, 8, "key", 0)[:, 0].long()
    assert not torch.equal(sample, other), "another seed, another sample"


def test_the_sample_differs_by_role_and_head_but_not_by_batch_item():
    x = random_tensor(1, 1, 1000, 8).expand(2, 2, -1, -1)
    got = cluster(x, x, 16, 16, iterations=1)
    assert not torch.equal(got.q_order[0, 0], got.q_order[0, 1])
    assert not torch.equal(got.q_order[0, 0], got.k_order[0, 0])
    assert torch.equal(got.q_order[0], got.q_order[1])


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_padding_and_text_values_never_influence_the_clusters(kernel):
    x = random_tensor(1, 2, 120, 16)
    valid = torch.ones(1, 120, dtype=torch.bool)
    valid[0, 50:60] = False
    valid[0, 110:] = False
    spans = [0, 80, 90, 100]
    first = cluster(x, x, q_valid=valid, k_valid=valid, q_video=spans, k_video=spans, kernel=kernel)
    other = x.clone()
    other[:, :, 50:60] = math.nan
    other[:, :, 110:] = math.inf
    other[:, :, 80:90] = -7
    second = cluster(other, other, q_valid=valid, k_valid=valid, q_video=spans, k_video=spans, kernel=kernel)
    assert all(torch.equal(a, b) for a, b in zip(first.outputs, second.outputs, strict=True))
    labels = labels_of(first.q_order, first.q_offsets)
    assert (labels[..., 50:60] == 9).all() and (labels[..., 110:] == 9).all()
    assert (labels[..., 80:90] == 8).all() and (labels[..., 100:110] == 8).all()
    assert (labels[..., :50] < 8).all()


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_tokens_that_are_not_finite_get_label_0_and_touch_nothing_else(kernel, value):
    x = random_tensor(1, 2, 200, 16)
    x[0, 0, 20, 3] = value
    x[0, 0, 190] = value
    got = cluster(x, x, kernel=kernel, iterations=4)
    assert got.non_finite.tolist() == [4]
    labels = labels_of(got.k_order, got.k_offsets)
    assert labels[0, 0, 20] == labels[0, 0, 190] == 0
    members = labels[0, 0] == 0
    members[[20, 190]] = False
    if members.any():
        expected = x[0, 0][members].double().mean(0)
        assert torch.allclose(got.k_means[0, 0, 0].double(), expected, atol=1e-6)
    assert torch.isfinite(got.q_centroids).all() and torch.isfinite(got.k_centroids).all()
    clean = cluster(random_tensor(1, 2, 200, 16), random_tensor(1, 2, 200, 16), kernel=kernel, iterations=4)
    assert torch.equal(got.k_order[0, 1], clean.k_order[0, 1]), "the other head is untouched"


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("spans", "valid", "groups"),
    [
        pytest.param([], None, (0, 50, 0), id="no-video"),
        pytest.param([10, 10], None, (0, 50, 0), id="zero-length-video"),
        pytest.param([0, 50], None, (50, 0, 0), id="no-text"),
        pytest.param([0, 50], False, (0, 0, 50), id="nothing-valid"),
        pytest.param([0, 20], False, (0, 0, 50), id="nothing-valid-with-text"),
    ],
)
def test_empty_classes_are_legal(kernel, spans, valid, groups):
    x = random_tensor(2, 1, 50, 8)
    mask = None if valid is None else torch.zeros(1, 50, dtype=torch.bool)
    got = cluster(x, x, 4, 4, q_valid=mask, k_valid=mask, q_video=spans, k_video=spans, kernel=kernel, iterations=2)
    sizes = got.q_offsets[0, 0].diff()
    assert (sizes[:4].sum().item(), sizes[4].item(), sizes[5].item()) == groups
    assert torch.isfinite(got.q_means).all() and torch.isfinite(got.k_centroids).all()


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_more_clusters_than_tokens_leave_the_rest_empty(kernel):
    x = random_tensor(1, 1, 5, 8)
    got = cluster(x, x, 12, 12, kernel=kernel, iterations=3)
    sizes = got.q_offsets[0, 0].diff()[:12]
    assert sizes.sum() == 5 and sizes.max() == 1
    labels = labels_of(got.q_order, got.q_offsets)[0, 0]
    assert inertia(x[0, 0], labels, got.q_means[0, 0]) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_huge_norms_stay_finite(kernel, dtype):
    x = (random_tensor(1, 1, 200, 32) * 1e4).clamp(-6e4, 6e4).to(dtype)
    got = cluster(x, x, kernel=kernel)
    assert got.non_finite.item() == 0
    assert torch.isfinite(got.q_means).all() and torch.isfinite(got.q_centroids).all()
    assert (got.q_offsets[0, 0].diff()[:8] > 0).sum() > 1


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_equal_tokens_all_get_label_0(kernel, value):
    x = torch.full((1, 1, 130, 16), value)
    got = cluster(x, x, kernel=kernel)
    assert got.k_offsets[0, 0].diff()[0] == 130
    assert torch.equal(got.k_means[0, 0, 0], x[0, 0, 0])


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_duplicate_centroids_leave_the_later_one_empty(kernel):
    x = random_tensor(1, 1, 100, 8)
    state = cluster(x, x, kernel=kernel)
    state.q_centroids[0, 0, 6] = state.q_centroids[0, 0, 2]
    got = cluster(x, x, state=state, iterations=1, kernel=kernel)
    assert got.q_offsets[0, 0].diff()[6] == 0
    assert torch.equal(got.q_means[0, 0, 6], state.q_centroids[0, 0, 6])


def test_hash_is_spread_evenly_and_depends_on_the_order_of_its_counters():
    i = torch.arange(4096)
    values = hash_counters(5, 1, i, device=torch.device("cpu"))
    assert values.min() >= 0 and values.max() < 2**32
    assert len(values.unique()) > 4090
    histogram = (values >> 28).bincount(minlength=16)
    assert histogram.min() > 180 and histogram.max() < 340
    assert not torch.equal(values, hash_counters(5, 2, i, device=torch.device("cpu")))
    assert not torch.equal(hash_counters(5, i, 1, device=torch.device("cpu")), values)
    assert not torch.equal(values, hash_counters(2**40 + 5, 1, i, device=torch.device("cpu")))
    assert torch.equal(values, hash_counters(5, 1, i, device=torch.device("cpu")))


def test_lloyd_asks_for_at_least_one_iteration():
    x = random_tensor(4, 8)
    with pytest.raises(AssertionError, match="at least one iteration"):
        clustering.lloyd(x, everything(x), x[:2], 0, reference)
