"""The call log: one row per sparse call, written on the device and read by the host when a report is asked for.

A log is float32 [1 + ROWS + H, 6]. Row 0 holds the number of rows ever written. The next ROWS are a ring with one row a
call: density, kept mass, non-finite tokens, the mass that the plan kept when it was made, and the shares of the queries
that the floor and the ceiling of a recall target hold; NaN where a call does not know. The last H rows hold density and
kept mass of each query head in the newest call; a log without them (H = 0) tells of whole calls alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.plan import TensorSpec

ROWS = 512
COLUMNS = 6
KEPT_MASS, PLANNED_MASS = 1, 3
"""Columns of a row."""


class CallRow(NamedTuple):
    """What one sparse call left on the device."""

    density: float
    kept_mass: float | None
    non_finite: int
    planned_mass: float | None = None
    """Kept mass of the plan when it was made; None where each call makes its own."""
    at_floor: float | None = None
    at_ceiling: float | None = None


class HeadFigures(NamedTuple):
    """What the newest sparse call did in one query head, mean over the batch."""

    density: float
    kept_mass: float | None


def log_spec(device: torch.device, heads: int | torch.SymInt) -> TensorSpec:
    """The shape, dtype and device of an empty (all zero) log of a site with this many query heads."""
    return TensorSpec((1 + ROWS + heads, COLUMNS), torch.float32, device)


def append_row(
    log: Tensor,
    density: Tensor,
    kept_mass: Tensor | None,
    non_finite: Tensor | None,
    planned_mass: Tensor | None = None,
    at_bounds: Tensor | None = None,
) -> None:
    """Write the next row of ``log`` and the rows of the heads in place, without reading anything on the host.

    Args:
        log: what `log_spec` describes.
        density: [B, H]; of any shape where the log has no rows of heads.
        kept_mass: the same; NaN where it could not be measured, which no mean counts; None: not measured.
        non_finite: counts, to be summed.
        planned_mass: as ``kept_mass``, when the plan was made; None where each call makes its own. Heads whose mass
            could not be measured now do not count, so that both means are over the same ones.
        at_bounds: [B, H, 2], shares of the queries at the floor and at the ceiling; None without such bounds.
    """
    density = density.float()
    mass = torch.full_like(density, float("nan")) if kept_mass is None else kept_mass.float()
    tokens = log.new_zeros(()) if non_finite is None else non_finite.sum().float()
    unknown = torch.full_like(tokens, float("nan"))
    planned = (
        unknown if planned_mass is None else planned_mass.float().masked_fill(mass.isnan(), float("nan")).nanmean()
    )
    held = (unknown, unknown) if at_bounds is None else at_bounds.float().flatten(0, -2).mean(0).unbind(0)
    written = log[0, 0]
    at = (torch.remainder(written, ROWS) + 1).long().view(1)
    log.index_copy_(0, at, torch.stack([density.mean(), mass.nanmean(), tokens, planned, *held]).unsqueeze(0))
    heads = log[1 + ROWS :]
    if heads.shape[0]:
        heads[:, 0] = density.mean(0)
        heads[:, 1] = mass.nanmean(0)
    written.add_(1)


def carry_over(old: Tensor, new: Tensor) -> None:
    """Copy the rows of calls into an empty log, which may lie elsewhere and have other heads."""
    new[: 1 + ROWS] = old[: 1 + ROWS]
    if new.shape == old.shape:
        new[1 + ROWS :] = old[1 + ROWS :]


def newest_row(log: Tensor, written: int) -> Tensor:
    """The row of the newest call as a view, float32 [COLUMNS], where ``written`` rows were ever written: at least 1."""
    return log[1 + (written - 1) % ROWS]


def read_rows(log: Tensor) -> tuple[int, list[CallRow]]:
    """Number of rows ever written, and the newest of them (at most ROWS), oldest first."""
    values = log.tolist()
    written = int(values[0][0])
    rows = []
    for index in range(max(0, written - ROWS), written):
        density, mass, non_finite, *others = values[1 + index % ROWS]
        rows.append(CallRow(density, _known(mass), int(non_finite), *map(_known, others)))
    return written, rows


def read_heads(log: Tensor) -> list[HeadFigures]:
    """The heads of the newest call; none where no call has written them since the log was made."""
    heads = [HeadFigures(density, _known(mass)) for density, mass, *_ in log[1 + ROWS :].tolist()]
    return heads if any(head.density for head in heads) else []


def _known(value: float) -> float | None:
    return None if value != value else value
