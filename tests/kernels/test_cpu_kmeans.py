"""k-means and the label sort in C++: every level of instructions, odd sizes, threads, memory used before, odd views."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpp_levels import each_level
from kernel_oracles import DTYPES, assert_same_bits, cluster, random_tensor, squared_distances
from odd_views import VIEWS

from sparse_compile.error_budget import nan_filled_empty
from sparse_compile.kernels.cpp.build import using
from sparse_compile.kernels.kmeans import cpu, reference
from sparse_compile.kernels.permutation.cpu import sort_labels
from sparse_compile.kernels.permutation.reference import sort_labels as stable_sort

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
SIZES = [(1, 8, 1), (63, 40, 16), (65, 64, 17), (257, 7, 33), (120, 256, 107), (1000, 128, 70)]
"""Tokens, components, clusters."""
each_size = pytest.mark.parametrize(("tokens", "size", "clusters"), SIZES)


def everything(x):
    return torch.ones(x.shape[:-1], dtype=torch.bool)


def assert_nearest(x, centroids, labels):
    rounded = centroids.to(x.dtype)
    distances = squared_distances(x, rounded)
    regret = distances.gather(1, labels.long().unsqueeze(1)).squeeze(1) - distances.amin(1)
    norms = x.double().square().sum(1) + rounded.double().square().sum(1).max()
    assert (regret <= 1e-5 * norms).all()


@each_level
@each_dtype
@each_size
def test_every_level_finds_a_nearest_centroid(level, dtype, tokens, size, clusters):
    x = (random_tensor(tokens, size) + 3).to(dtype)
    centroids = random_tensor(clusters, size, seed=1) + 3
    with using(level), nan_filled_empty():
        assert_nearest(x, centroids, cpu.assign(x, centroids, everything(x)))


@each_level
@each_dtype
@pytest.mark.parametrize("clusters", [5, 31, 32, 33, 200])
def test_of_equal_centroids_the_first_is_taken_wherever_the_others_lie(level, dtype, clusters):
    x = random_tensor(90, 24, dtype=dtype)
    with using(level):
        assert (cpu.assign(x, random_tensor(1, 24).expand(clusters, -1), everything(x)) == 0).all()
        for first in (1, clusters // 2, clusters - 1):
            centroids = 100 + random_tensor(clusters, 24, seed=2)
            centroids[first:] = 0
            assert (cpu.assign(x, centroids, everything(x)) == first).all()


@each_level
@each_dtype
@each_size
def test_every_level_gives_the_means_of_the_reference(level, dtype, tokens, size, clusters):
    x = (random_tensor(tokens, size) + 3).to(dtype)
    labels = torch.randint(clusters, (tokens,), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    included = labels != clusters // 2
    previous = random_tensor(clusters, size, seed=2)
    with using(level), nan_filled_empty():
        means = cpu.update(x, labels, included, previous)
    assert torch.allclose(means, reference.update(x, labels, included, previous), rtol=2e-7, atol=0)
    assert torch.equal(means[clusters // 2], previous[clusters // 2]), "nobody is left there"


@each_level
@each_dtype
@pytest.mark.parametrize("size", [1, 7, 16, 40, 64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_every_level_sees_what_cannot_be_counted(level, dtype, size, value):
    x = random_tensor(1, 2, 1100, size, dtype=dtype)
    x[0, 0, 20, 0] = x[0, 0, 1099, size // 2] = x[0, 1, 1024, size - 1] = value
    with using(level), nan_filled_empty():
        found = cpu.countable(x)
    assert torch.equal(found, reference.countable(x))
    assert not found[0, 0, [20, 1099]].any() and not found[0, 1, 1024]


@each_level
@each_dtype
def test_tokens_that_do_not_count_leave_their_neighbours_alone(level, dtype):
    x, centroids = random_tensor(301, 40, dtype=dtype), random_tensor(37, 40, seed=1)
    included = everything(x)
    included[::3] = False
    with using(level):
        labels = cpu.assign(x, centroids, included)
        means = cpu.update(x, labels, included, centroids)
        for value in (math.nan, math.inf):
            x[::3] = value
            assert_same_bits([cpu.assign(x, centroids, included)], [labels])
            assert_same_bits([cpu.update(x, labels, included, centroids)], [means])
    assert (labels[::3] == 0).all() and labels.unique().numel() > 10


@each_dtype
def test_all_heads_at_once_are_solved_as_one_after_the_other(dtype):
    x, centroids = random_tensor(2, 3, 300, 24, dtype=dtype), random_tensor(2, 3, 19, 24, seed=1)
    included = random_tensor(2, 3, 300, seed=2) > -1
    labels = cpu.assign(x, centroids, included)
    means = cpu.update(x, labels, included, centroids)
    for b in range(2):
        for h in range(3):
            own = cpu.assign(x[b, h], centroids[b, h], included[b, h])
            assert torch.equal(own, labels[b, h])
            assert torch.equal(cpu.update(x[b, h], own, included[b, h], centroids[b, h]), means[b, h])


@each_dtype
def test_threads_repeats_and_batches_change_no_bit(dtype, two_threads):
    q, k = random_tensor(2, 3, 700, 40, dtype=dtype), random_tensor(2, 3, 900, 40, seed=1, dtype=dtype)

    def solve(*sides):
        got = cluster(*sides, 20, 45, iterations=5)
        return [*got.outputs[:6], got.q_centroids, got.k_centroids]

    first = solve(q, k)
    assert_same_bits(solve(q, k), first)
    torch.set_num_threads(1)
    assert_same_bits(solve(q, k), first)
    assert_same_bits(solve(q[1:], k[1:]), [x[1:] for x in first])


def test_memory_kept_from_a_call_of_nan_touches_no_later_one():
    x, centroids = random_tensor(130, 40), random_tensor(21, 40, seed=1)
    expected = cpu.assign(x, centroids, everything(x))
    large = torch.full((1, 4, 500, 128), math.nan)
    cpu.assign(large, torch.full((1, 4, 300, 128), math.nan), everything(large))
    assert torch.equal(cpu.assign(x, centroids, everything(x)), expected)


def test_calls_of_two_python_threads_do_not_meet():
    cases = [(random_tensor(1, 2, 200 + 90 * n, 40, seed=n), random_tensor(1, 2, 30, 40, seed=2)) for n in (0, 1)]
    expected = [cpu.assign(x, centroids, everything(x)) for x, centroids in cases]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(cpu.assign, *cases[n % 2], everything(cases[n % 2][0])) for n in range(60)]
        for n, run in enumerate(runs):
            assert torch.equal(run.result(), expected[n % 2])


@pytest.mark.parametrize("view", VIEWS)
@each_dtype
def test_views_change_no_bit(dtype, view):
    x = random_tensor(2, 2, 131, 40, dtype=dtype)
    assert_same_bits(cluster(VIEWS[view](x), VIEWS[view](x)).outputs, cluster(x, x).outputs)


def test_a_batch_stride_of_zero():
    x = random_tensor(1, 2, 131, 40)
    got = cluster(x.expand(3, -1, -1, -1), x.expand(3, -1, -1, -1))
    alone = cluster(x, x)
    for repeated, one in zip(got.outputs[:6], alone.outputs[:6], strict=True):
        assert torch.equal(repeated, one.expand_as(repeated))


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens):
    x, centroids = random_tensor(1, 2, tokens, 8), random_tensor(1, 2, 5, 8, seed=1)
    labels = cpu.assign(x, centroids, everything(x))
    assert labels.shape == (1, 2, tokens)
    means = cpu.update(x, labels, everything(x), centroids)
    moved = torch.zeros(1, 2, 5, dtype=torch.bool).scatter(2, labels.long(), True)
    assert torch.equal(means[~moved], centroids[~moved]) and torch.equal(means[moved], x.flatten(0, 2))


@pytest.mark.parametrize("shape", [(0, 2, 10, 8), (1, 0, 10, 8), (2, 2, 0, 8)])
def test_without_tokens_or_heads_there_is_nothing_to_cluster(shape):
    x = random_tensor(*shape)
    assert_same_bits(cluster(x, x, kernel="cpu").outputs, cluster(x, x, kernel="reference").outputs)


def test_float64_goes_the_way_of_the_reference():
    x = random_tensor(2, 2, 90, 16).double()
    assert_same_bits(cluster(x, x, kernel="cpu").outputs, cluster(x, x, kernel="reference").outputs)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_outside_the_clusters_are_refused(label):
    x, labels = random_tensor(10, 8), torch.zeros(10, dtype=torch.int32)
    labels[7] = label
    with pytest.raises(RuntimeError, match="labels must lie between 0 and"):
        cpu.update(x, labels, everything(x), random_tensor(3, 8))
    with pytest.raises(RuntimeError, match=f"labels must lie between 0 and 3; got {label}"):
        sort_labels(labels.view(1, 1, -1), 4)


@each_level
@pytest.mark.parametrize("tokens", [0, 1, 63, 1000])
@pytest.mark.parametrize("groups", [1, 7, 1002])
def test_labels_are_sorted_as_by_the_reference(level, tokens, groups):
    labels = torch.randint(groups, (2, tokens, 3), generator=torch.Generator().manual_seed(tokens), dtype=torch.int32)
    with using(level), nan_filled_empty():
        assert_same_bits(sort_labels(labels.transpose(1, 2), groups), stable_sort(labels.transpose(1, 2), groups))
