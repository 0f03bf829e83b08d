"""On a device: nothing between q, k, v and the output waits for the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_sites import PHASES, Site

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def without_waiting(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run once to set up libraries, then with every synchronisation an error."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("phase", PHASES["svg2"])
def test_a_site_of_svg2_never_waits_for_the_device(kernel: str, phase: str) -> None:
    site = Site("cuda", kernel)
    assert torch.isfinite(without_waiting(lambda: site.call("svg2", phase))).all()


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("phase", PHASES["adaspa"])
def test_a_site_of_adaspa_never_waits_for_the_device(kernel: str, phase: str) -> None:
    site = Site("cuda", kernel)
    assert torch.isfinite(without_waiting(lambda: site.call("adaspa", phase))).all()
