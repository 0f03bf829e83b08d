"""The edge cases of docs/svg2.md, section 14, that a whole call shows; those of one kernel are tested there."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.nn.functional as F
from kernel_oracles import (
    IMPLEMENTATIONS,
    attend,
    call,
    cluster,
    exact_attention,
    inputs,
    make_plan,
    random_tensor,
    token_mask,
)

from sparse_compile.error_budget import planted_attention

SCALE = 0.25
each_kernel = pytest.mark.parametrize("kernel", IMPLEMENTATIONS)


@each_kernel
@pytest.mark.parametrize("tokens", [1, 2, 127, 129, 257, 1009])
def test_awkward_lengths_are_exact(kernel, tokens):
    q, k, v = inputs(tokens, tokens, 0)
    _, plan, out = call(q, k, v, kernel=kernel, plan={"top_p": 0.6}, iterations=2)
    exact, _ = exact_attention(q, k, v, token_mask(plan), SCALE)
    assert (out - exact).abs().max() <= 5e-6 * v.abs().max()


@each_kernel
def test_an_item_whose_keys_are_all_masked_gives_zeros(kernel):
    q, k, v = inputs(50, 60, 0, batch=2, key_heads=2)
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1] = False
    _, plan, out = call(q, k, v, kernel=kernel, k_valid=valid)
    assert (out[1] == 0).all() and torch.isfinite(out[0]).all() and (out[0] != 0).any()
    assert (plan.density()[1] == 1).all()


@each_kernel
def test_a_tiny_p_keeps_exactly_one_cluster_in_every_row(kernel):
    q, k, _ = inputs(150, 170, 0)
    clusters = cluster(q, k, kernel=kernel)
    kept = make_plan(clusters, SCALE, top_p=1e-6, kernel=kernel).kept()
    occupied = clusters.q_offsets.diff()[..., :-2] > 0
    assert (kept[:, :, :-2].sum(-1)[occupied] == 1).all()


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_vectors_are_ordinary_points(kernel, dtype):
    q, k, v = inputs(150, 170, 0, dtype=dtype)
    q[:, :, 20:60] = 0
    k[:, :, 10:90] = 0
    clusters, plan, out = call(q, k, v, kernel=kernel)
    assert torch.isfinite(out).all() and torch.isfinite(clusters.k_means).all()
    zeros = torch.zeros_like(q), torch.zeros_like(k)
    _, plan, out = call(*zeros, v, kernel=kernel)
    assert (plan.density() == 1).all()
    mean = v.float().mean(2, keepdim=True).expand(-1, 2, 150, -1)
    assert torch.allclose(out.float(), mean, atol=1e-6 if dtype is torch.float32 else 2e-3)


@each_kernel
def test_a_call_with_nan_leaves_the_next_call_unharmed(kernel):
    q, k, v = inputs(150, 170, 0)
    state = cluster(q, k, kernel=kernel)
    bad = k.clone()
    bad[0, 0, 3] = math.nan
    clusters, plan, out = call(q, bad, v, kernel=kernel, state=state, iterations=2)
    assert clusters.non_finite.item() == 1
    keeps = token_mask(plan)[..., 3]
    assert torch.equal(torch.isnan(out).all(-1), keeps) and torch.equal(torch.isnan(out).any(-1), keeps)
    _, _, after = call(q, k, v, kernel=kernel, state=clusters, iterations=2)
    assert torch.isfinite(after).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_implementations_agree_end_to_end(dtype):  # section 15, last row
    q, k, v = (x.to(dtype) for x in planted_attention(1, 2, 2000, 64))
    state = cluster(q, k, 16, 32)
    _, one_plan, one = call(q, k, v, kernel="cpu", state=state, iterations=2)
    _, other_plan, other = call(q, k, v, kernel="reference", state=state, iterations=2)
    assert (token_mask(one_plan) != token_mask(other_plan)).double().mean() < 1e-3
    assert (one.double() - other.double()).norm() <= 1e-2 * other.double().norm()


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_norms_do_not_overflow(kernel, dtype):
    q, k, v = inputs(150, 170, 0, dtype=dtype)
    clusters, plan, out = call(q * 1e4, k * 1e4, v, kernel=kernel)
    assert clusters.non_finite.item() == 0
    assert torch.isfinite(out).all() and torch.isfinite(clusters.k_centroids).all()
    assert 0 < plan.density().min() <= 1


@pytest.mark.slow
def test_attention_in_one_cluster_costs_no_more_than_dense():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.full((1, 1, 4096, 64), 0.3)
        v = random_tensor(1, 1, 4096, 64)
        plan = make_plan(cluster(x, x), SCALE)

        def best(function):
            function()
            times = []
            for _ in range(5):
                start = time.thread_time()
                function()
                times.append(time.thread_time() - start)
            return min(times)

        dense = best(lambda: F.scaled_dot_product_attention(x, x, v, scale=SCALE))
        assert best(lambda: attend(x, x, v, plan, SCALE)) <= 1.3 * dense
    finally:
        torch.set_num_threads(threads)
