"""A fixture for tests that compile: nothing compiled before, nothing remembered, no gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparse_compile.runtime.registry import REGISTRY


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    for clock in REGISTRY.clocks():
        REGISTRY.detach(clock)
    REGISTRY.reset()
