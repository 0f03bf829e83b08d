"""Memory may run out at any allocation: what the state says then is true, and the next call is right."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from gpu_sites import Site
from torch import Tensor

ALLOCATORS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "zeros"),
    (torch, "full"),
    (Tensor, "new_empty"),
    (Tensor, "new_zeros"),
    (Tensor, "new_full"),
]


@contextlib.contextmanager
def memory_for(allocations: int) -> Iterator[None]:
    """So many tensors can be made; with the next one memory runs out."""
    left = itertools.count(allocations, -1)

    def limited(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            if next(left) <= 0:
                raise torch.OutOfMemoryError("out of memory, by the test")
            return allocate(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for owner, name in ALLOCATORS:
            stack.enter_context(mock.patch.object(owner, name, limited(getattr(owner, name))))
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("method", "step"), [("svg2", 16), ("adaspa", 12)])
def test_a_search_that_runs_out_of_memory_leaves_the_state_unready(device: str, method: str, step: int) -> None:
    expected, site = Site(device, "triton"), Site(device, "triton")
    clean = expected.call(method, "search")
    failures = 0
    for allocations in range(0, 1000, step):
        site.ready.zero_()
        try:
            with memory_for(allocations):
                found = site.call(method, "search")
        except torch.OutOfMemoryError:
            failures += 1
            continue
        break
    assert failures > 1, "the search allocates"
    assert torch.equal(found, clean) and int(site.ready) == 1


def test_the_first_search_is_unready_until_it_is_whole(device: str) -> None:
    """k-means alone: nothing of a failing call is in the state."""
    site = Site(device, "triton")
    before = site.snapshot()
    for allocations in range(0, 1000, 7):
        try:
            with memory_for(allocations):
                site.svg2(True)
        except torch.OutOfMemoryError:
            if int(site.ready):  # k-means is done, and what comes after it failed
                return
            for tensor, saved in zip(site.state(), before, strict=True):
                assert torch.equal(tensor, saved)
            continue
        break
    raise AssertionError("the call never ran out of memory behind k-means")
