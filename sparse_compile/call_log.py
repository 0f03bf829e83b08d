"""The call log: one row per sparse call, written on the device and read by the host when a report is asked for.

A log is float32 [1 + ROWS, 3]. Row 0 holds the number of rows ever written; the others are a ring of
(density, kept mass or NaN, non-finite tokens).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.plan import TensorSpec

ROWS = 512
COLUMNS = 3


class CallRow(NamedTuple):
    """What one sparse call left on the device."""

    density: float
    kept_mass: float | None
    non_finite: int


def log_spec(device: torch.device) -> TensorSpec:
    """The shape, dtype and device of an empty (all zero) log."""
    return TensorSpec((1 + ROWS, COLUMNS), torch.float32, device)


def append_row(log: Tensor, density: Tensor, kept_mass: Tensor | None, non_finite: Tensor | None) -> None:
    """Write the next row of ``log`` in place, without reading anything on the host.

    Each value is averaged (densities, masses) or summed (non-finite tokens) over all its elements.
    """
    nan = log.new_full((), float("nan"))
    zero = log.new_zeros(())
    row = torch.stack(
        [
            density.mean().float(),
            nan if kept_mass is None else kept_mass.mean().float(),
            zero if non_finite is None else non_finite.sum().float(),
        ]
    )
    written = log[0, 0]
    at = (torch.remainder(written, ROWS) + 1).long().view(1)
    log.index_copy_(0, at, row.unsqueeze(0))
    written.add_(1)


def read_rows(log: Tensor) -> tuple[int, list[CallRow]]:
    """Number of rows ever written, and the newest of them (at most ROWS), oldest first."""
    values = log.tolist()
    written = int(values[0][0])
    rows = []
    for index in range(max(0, written - ROWS), written):
        density, mass, non_finite = values[1 + index % ROWS]
        rows.append(CallRow(density, None if mass != mass else mass, int(non_finite)))
    return written, rows
