"""Helpers to judge a kernel: error budgets from float64, poisoned memory, inputs with a known answer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def assert_within_error_budget(actual: Tensor, low: Tensor, exact: Tensor, name: str) -> None:
    """Fail if ``actual`` is over twice as far from ``exact`` as a plain computation of the same dtype is.

    Args:
        actual: the output under test.
        low: a plain reference, computed in the dtype of ``actual``.
        exact: the same in float64.
        name: what the message calls it.
    """
    assert torch.isfinite(actual).all(), f"{name}: non-finite output"
    error = (actual.double() - exact).abs().max()
    step = torch.finfo(actual.dtype).eps * exact.abs().max()
    budget = 2 * ((low.double() - exact).abs().max() + step)
    assert error <= budget, f"{name}: error {error:.2e} over budget {budget:.2e}"


@contextlib.contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Make freshly allocated floating-point memory hold NaN, so that an output nobody wrote shows up.

    Covers `torch.empty`, `torch.empty_like` and `Tensor.new_empty`; integers get a large value.
    """
    with (
        mock.patch("torch.empty", _poisoned(torch.empty)),
        mock.patch("torch.empty_like", _poisoned(torch.empty_like)),
        mock.patch("torch.Tensor.new_empty", _poisoned(Tensor.new_empty)),
    ):
        yield


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype.is_floating_point:
            tensor.fill_(math.nan)
        elif tensor.dtype is not torch.bool:
            tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return allocate_poisoned


def planted_attention(
    batch: int = 1,
    heads: int = 2,
    tokens: int = 1024,
    size: int = 64,
    *,
    centres: int = 60,
    noise: float = 0.3,
    sharpness: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make q, k and v of one sequence whose attention mass lies in clusters.

    Queries and keys are drawn around the same random centres of norm sqrt(size), in random order, so that a
    query attends mostly to the keys of its own centre: logits there are about sqrt(size) * sharpness.

    Args:
        batch: B.
        heads: H.
        tokens: S.
        size: D.
        centres: how many centres a head has.
        noise: spread around a centre, as a share of its norm.
        sharpness: factor on the queries.
        dtype: dtype of the result.
        seed: seed of a generator of its own; torch's global one is left alone.

    Returns:
        q, k, v, each [B, H, S, D].
    """
    generator = torch.Generator().manual_seed(seed)
    points: Tensor = torch.randn(batch, heads, centres, size, generator=generator)
    points *= math.sqrt(size) / torch.linalg.vector_norm(points, dim=-1, keepdim=True)

    def around_points() -> Tensor:
        chosen = torch.randint(centres, (batch, heads, tokens, 1), generator=generator)
        spread = torch.randn(batch, heads, tokens, size, generator=generator)
        return torch.gather(points, 2, chosen.expand(-1, -1, -1, size)) + noise * spread

    q, k = around_points() * sharpness, around_points()
    v = torch.randn(batch, heads, tokens, size, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)
