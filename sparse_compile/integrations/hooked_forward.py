"""Where the forward of a module lies once diffusers or accelerate have put hooks around it.

diffusers' offloading, casting and caches keep it in the function references of the module's hook registry, accelerate's
offloading in the module; both put in its place a function that calls the hook, the former forward, and the hook again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def forward_slots(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Each object and attribute that may hold the forward: the module first, then what its hooks call."""
    yield module, "forward"
    if "_old_forward" in vars(module):
        yield module, "_old_forward"
    registry = getattr(module, "_diffusers_hook", None)
    for reference in getattr(registry, "_fn_refs", ()):
        for name in ("forward", "original_forward"):
            if getattr(reference, name, None) is not None:
                yield reference, name
