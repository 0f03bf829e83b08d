"""On a device: nothing between q, k, v and the output waits for the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import sparse_compile.ops  # noqa: F401 - registers the ops
from sparse_compile.call_log import log_spec

OPS = torch.ops.sparse_compile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


DEVICE = "cuda"
SPAN, SCALE, KERNEL = [0, 280], 0.125, "reference"


class Site:
    """q, k and v of joint tokens with padding, and the state of both methods."""

    def __init__(self) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.q, self.k, self.v = (torch.randn(1, 2, 300, 64, device=DEVICE, generator=generator) for _ in range(3))
        self.valid = torch.arange(300, device=DEVICE)[None] < 290
        self.centroids = [torch.zeros(1, 2, count, 64, device=DEVICE) for count in (8, 24)]
        self.ready = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.keep = torch.zeros(1, 2, 21, 1, dtype=torch.int32, device=DEVICE)
        self.lse, self.offset = torch.zeros(1, 2, 300, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
        spec = log_spec(torch.device(DEVICE), 2)
        self.log = torch.zeros(spec.shape, dtype=spec.dtype, device=DEVICE)

    def attend(self, plan: tuple[torch.Tensor, ...], paired: bool, recall: torch.Tensor | None = None) -> torch.Tensor:
        """Pooled keys, probe rows, attention."""
        mass = OPS.kept_mass(self.q, self.k, self.valid, SPAN, *plan, SCALE, 64, 0, KERNEL)
        if paired:
            mass = OPS.paired_kept_mass(mass, recall, self.offset, KERNEL)
        pooled = OPS.pooled_keys(self.k, self.v, plan[2], plan[3], SPAN, True, KERNEL)
        operands = (self.q, self.k, self.v)
        out: torch.Tensor = OPS.block_sparse_attention(
            *operands, *plan, *pooled, mass, None, self.log, SCALE, True, KERNEL
        )[0]
        return out

    def svg2(self, restart: bool) -> torch.Tensor:
        """The ops of SVG2's search or sparse call."""
        clusters = OPS.kmeans(
            self.q, self.k, self.valid, self.valid, SPAN, SPAN, *self.centroids, self.ready, restart, 2, 0, KERNEL
        )
        q_order, q_offsets, q_means, k_order, k_offsets, k_means, _ = clusters
        settings = (SCALE, 0.9, 0.1, None, "mass", True, 0, KERNEL)
        keep = OPS.plan_top_p(q_means, k_means, q_offsets, k_offsets, self.ready, *settings)
        return self.attend((q_order, q_offsets, k_order, k_offsets, keep), paired=False)

    def adaspa(self, phase: str) -> torch.Tensor:
        """The ops of AdaSpa's search, refining or sparse call."""
        q_order, q_offsets, q_video, k_order, k_offsets, k_video = OPS.token_blocks(
            self.q, self.k, self.valid, self.valid, SPAN, SPAN, 16, 16, KERNEL
        )
        groups = (q_order, q_offsets, k_order, k_offsets)
        if phase == "sparse":
            sides = (q_offsets, q_video, k_offsets, k_video)
            kept = OPS.kept_blocks(self.keep, self.ready, *sides, True, KERNEL)
            return self.attend((*groups, kept), paired=True)
        if phase == "search":
            out: torch.Tensor = OPS.attention_with_lse(
                self.q, self.k, self.v, self.valid, self.valid, self.lse, True, SCALE, True, KERNEL
            )
        mass, _ = OPS.block_mass(self.q, self.k, self.lse, self.ready, *groups, 16, SCALE, 1, phase == "search", KERNEL)
        settings = (0.75, "paper", "mass", True, 0, KERNEL)
        recall, _ = OPS.plan_top_k(mass, q_offsets, q_video, k_offsets, k_video, self.keep, self.ready, *settings)
        return out if phase == "search" else self.attend((*groups, self.keep), paired=True, recall=recall)


def without_waiting(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run once to set up libraries, then with every synchronisation an error."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("restart", [True, False])
def test_a_site_of_svg2_never_waits_for_the_device(restart: bool) -> None:
    site = Site()
    assert torch.isfinite(without_waiting(lambda: site.svg2(restart))).all()


@pytest.mark.parametrize("phase", ["search", "sparse", "refine"])
def test_a_site_of_adaspa_never_waits_for_the_device(phase: str) -> None:
    site = Site()
    assert torch.isfinite(without_waiting(lambda: site.adaspa(phase))).all()
