"""The mass of pairs of groups for CPU tensors: what is multiplied is C++ (cpu.cpp), what is decided is here.

Host reads are free here: a head whose kept log-sum-exp fits, or is fresh, takes one product of its queries and keys,
and padding is in none.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.block_mass import reference
from sparse_compile.kernels.block_mass.reference import LARGEST_EXPONENT, MOST_SPREAD
from sparse_compile.kernels.cpp.build import library
from sparse_compile.kernels.cpp.operands import dense_rows
from sparse_compile.kernels.permutation.group_of_position import group_at_position
from sparse_compile.plan import Groups


class Rows(NamedTuple):
    """What is known of every query row before anything is multiplied, each [B, H, Sq]: by token."""

    group: Tensor
    looked_at: Tensor
    padding: Tensor


class Passes(NamedTuple):
    """The C++ passes over these queries and keys."""

    q: Tensor
    k: Tensor
    query: Groups
    key: Groups
    scale: float
    row_stride: int

    def measure(self, lse: Tensor, heads: Tensor | None, mass: Tensor, ratios: Tensor | None) -> None:
        """Set the mass of the heads bool [B, H] (None: all) by ``lse``, and what it sums to in the rows looked at.

        Shapes: lse float32 [B, H, Sq]; mass float32 [B, H, Gq, Gk], padding is left alone; ratios float64 [B, H, Sq],
            not below 2**LARGEST_EXPONENT where a score is NaN or inf.
        """
        args = self.q, self.k, *self.query, *self.key, lse, heads, self.scale, self.row_stride, mass, ratios
        library().block_mass(*args)

    def renew(self, lse: Tensor, chosen: Tensor) -> None:
        """Set ``lse`` to the natural log-sum-exp over all valid keys where ``chosen`` [B, H, Sq]; -inf without any."""
        library().log_sum_exp(self.q, self.k, *self.key, chosen, self.scale, lse)


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    ready: Tensor,
    query: Groups,
    key: Groups,
    scale: float,
    row_stride: int,
    fresh: bool,
) -> tuple[Tensor, Tensor]:
    """As `reference.block_mass`, which takes float64; a head whose log-sum-exp fits takes one pass over its scores."""
    if q.dtype is torch.float64:
        return reference.block_mass(q, k, lse, ready, query, key, scale, row_stride, fresh)
    query, key = _dense(query), _dense(key)
    mass = torch.zeros((*q.shape[:2], query.offsets.shape[2] - 1, key.offsets.shape[2] - 1), dtype=torch.float32)
    spread = torch.zeros(q.shape[:2], dtype=torch.float32)
    passes = Passes(dense_rows(q), dense_rows(k), query, key, scale, row_stride)
    if fresh:
        passes.measure(lse.contiguous(), None, mass, None)
        return mass, spread
    rows = _rows(query, q.shape[2], row_stride)
    new = lse.clone(memory_format=torch.contiguous_format)
    spread.fill_(math.inf)
    if ready.item():
        spread.copy_(_search(passes, rows, new, mass))
    renewed = ~(spread <= MOST_SPREAD)
    if renewed.any():
        passes.renew(new, renewed.unsqueeze(-1) & ~rows.padding)
        passes.measure(new, renewed, mass, None)
    lse.copy_(new)
    return mass, spread


def _search(passes: Passes, rows: Rows, lse: Tensor, mass: Tensor) -> Tensor:
    """Set the mass by a kept ``lse``, and bring that up to date in the rows looked at; the spread [B, H]."""
    ratios = torch.zeros(lse.shape, dtype=torch.float64)
    passes.measure(lse, None, mass, ratios)
    sound = (ratios > 2**-LARGEST_EXPONENT) & (ratios < 2**LARGEST_EXPONENT)
    counted, doubtful = rows.looked_at & sound, rows.looked_at & ~sound
    moved = torch.where(counted, ratios, 1).log()
    spread = _spread(moved, counted, rows.group, passes.query.offsets.diff())
    lse += moved
    if doubtful.any():
        passes.renew(lse, doubtful)
        # Rows without a key and rows of NaN cannot be measured, now or ever: only their own dense value tells.
        spread.masked_fill_((doubtful & torch.isfinite(lse)).any(-1), math.inf)
    return spread


def _rows(query: Groups, tokens: int, row_stride: int) -> Rows:
    group = group_at_position(query.offsets, tokens).to(torch.int64)
    place = torch.arange(tokens) - query.offsets.gather(2, group)
    if query.order is not None:
        order = query.order.to(torch.int64)
        group, place = (torch.empty_like(x).scatter_(2, order, x) for x in (group, place))
    padding = group == query.offsets.shape[2] - 2
    return Rows(group, (place % row_stride == 0) & ~padding, padding)


def _spread(moved: Tensor, counted: Tensor, group: Tensor, sizes: Tensor) -> Tensor:
    """Mean over the groups with tokens of the standard deviation of ``moved`` over their counted rows: [B, H].

    Shapes: moved float64 (0 where it does not count), counted bool and group int64 [B, H, Sq]; sizes [B, H, Gq].
    """
    total = moved.new_zeros(sizes.shape)
    count = total.scatter_add(2, group, counted.to(moved.dtype)).clamp_(min=1)

    def mean(values: Tensor) -> Tensor:
        return total.scatter_add(2, group, values) / count

    distance = torch.where(counted, moved - mean(moved).gather(2, group), 0)
    deviation = mean(distance.square()).sqrt()[..., :-1]
    return deviation.sum(-1) / (sizes[..., :-1] > 0).sum(-1).clamp(min=1)


def _dense(side: Groups) -> Groups:
    return Groups(None if side.order is None else side.order.contiguous(), side.offsets.contiguous())
