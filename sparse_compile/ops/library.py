"""Where ops are registered, and what they have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_compile.errors import SparseAttentionError

LIBRARY = torch.library.Library("sparse_compile", "DEF")
"""Keeps the registrations alive."""

KERNELS = ("triton", "cpu", "reference")


def register(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op by its schema, with one body for every device and a fake that gives shapes alone.

    Args:
        schema: name, arguments and results; what is written is marked as ``Tensor(a!)``.
        body: plain torch, or a dispatch to the kernels by the last argument.
        fake: reads no values; gives shape, strides and dtype of what ``body`` returns.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, _undisturbed(body), "CompositeExplicitAutograd")  # opaque to Inductor: nothing is decomposed
    torch.library.register_fake(f"sparse_compile::{name}", fake, lib=LIBRARY)


def _undisturbed(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body as it is without autocast and without gradients: it chooses its own precisions, and has no gradient.

    (Who asks for one gets torch's warning.) Where the caller has neither, as under ``no_grad``, nothing is entered.
    """

    @functools.wraps(body)
    def run(first: Tensor, *others: Any) -> Any:
        device = first.device.type
        if not (torch.is_grad_enabled() or torch.is_autocast_enabled(device)):
            return body(first, *others)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return body(first, *others)

    return run


def implementation(kernel: str) -> str:
    """The implementation that the last argument of an op names.

    Raises:
        SparseAttentionError: there is none of this name.
    """
    if kernel not in KERNELS:
        raise SparseAttentionError(
            f"kernel must be one of {', '.join(KERNELS)}", kernel, "Use the option kernel='auto'."
        )
    return kernel
