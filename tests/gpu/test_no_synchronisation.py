"""On a device: nothing between q, k, v and the output waits for the host."""

from __future__ import annotations

import pytest
import torch

import sparse_compile.ops  # noqa: F401 - registers the ops
from sparse_compile.call_log import log_spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def one_site(restart: bool) -> torch.Tensor:
    """The four ops of an SVG2 site, on joint tokens with padding."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 64, device=device, generator=generator) for _ in range(3))
    valid = torch.arange(300, device=device)[None] < 290
    q_centroids, k_centroids = (torch.zeros(1, 2, count, 64, device=device) for count in (8, 24))
    ready = torch.zeros(1, dtype=torch.int32, device=device)
    spec = log_spec(device, 2)
    log = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
    ops = torch.ops.sparse_compile
    span = [0, 280]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        q_order, q_offsets, q_means, k_order, k_offsets, k_means, bad = ops.kmeans(
            q, k, valid, valid, span, span, q_centroids, k_centroids, ready, restart, 2, 0, "reference"
        )
        keep = ops.plan_top_p(
            q_means, k_means, q_offsets, k_offsets, ready, 0.125, 0.9, 0.1, None, "mass", True, 0, "reference"
        )
        pooled = ops.pooled_keys(k, v, k_order, k_offsets, span, True, "reference")
        plan = (q_order, q_offsets, k_order, k_offsets, keep)
        out, _ = ops.block_sparse_attention(q, k, v, *plan, *pooled, None, bad, log, 0.125, True, "reference")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return out


@pytest.mark.parametrize("restart", [True, False])
def test_a_site_never_waits_for_the_device(restart: bool) -> None:
    one_site(restart)  # the first call may set up libraries
    assert torch.isfinite(one_site(restart)).all()
