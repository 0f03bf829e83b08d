"""What each call of each layer cost and kept: the host's history joined with the device's log.

The host logs (step, branch, phase) of every call; the device logs (density, kept mass, non-finite). They are joined
here, when somebody asks, which is the only time the host reads the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from sparse_compile.call_log import CallRow, read_rows

if TYPE_CHECKING:
    from sparse_compile.runtime.state import Call, Layer


@dataclass(frozen=True)
class CallReport:
    """One call of one attention, or of a whole layer where it was dense."""

    layer: str
    ordinal: int | None
    """Which attention of the layer ran sparsely; None: the call was dense, as a search may be."""
    generation: int
    step: int
    branch: str
    phase: str
    density: float
    """1.0 where the call was dense."""
    kept_mass: float | None
    """None where it was not measured."""
    non_finite: int
    planned_mass: float | None = None
    """Kept mass of the plan when it was made; None where each call makes its own."""
    at_floor: float | None = None
    """Share of the queries that the floor of a recall target holds up; None without a target."""
    at_ceiling: float | None = None
    """The same of its ceiling, which holds down."""

    @property
    def sparse(self) -> bool:
        """Whether it attended sparsely."""
        return self.ordinal is not None


class _Log(NamedTuple):
    """What one attention left on the device: rows ever written, and the newest of them."""

    ordinal: int
    written: int
    rows: list[CallRow]

    def row(self, number: int) -> CallRow | None:
        """The row of this number; None where the ring has lost it, or not yet got it."""
        place = number - (self.written - len(self.rows))
        return self.rows[place] if 0 <= place < len(self.rows) else None


def calls_of(layers: Iterable[tuple[str, Layer]]) -> list[CallReport]:
    """Every call that the layers can look back on: by layer, oldest first, less those whose rows the ring has lost.

    Args:
        layers: with the names that the report gives them, in its order.
    """
    return list(_calls_of(layers))


def _calls_of(layers: Iterable[tuple[str, Layer]]) -> Iterator[CallReport]:
    for name, layer in layers:
        logs = {
            branch: [_Log(ordinal, *read_rows(log)) for ordinal, log in state.logs.items()]
            for branch, state in layer.branches.items()
        }
        for call in layer.history:
            if call.row is None:
                yield _report(name, call, None, CallRow(1.0, None, 0))
                continue
            for log in logs.get(call.branch, []):
                if (row := log.row(call.row)) is not None:
                    yield _report(name, call, log.ordinal, row)


def _report(layer: str, call: Call, ordinal: int | None, row: CallRow) -> CallReport:
    return CallReport(
        layer=layer,
        ordinal=ordinal,
        generation=call.generation,
        step=call.step,
        branch=str(call.branch),
        phase=str(call.phase),
        density=row.density,
        kept_mass=row.kept_mass,
        non_finite=row.non_finite,
        planned_mass=row.planned_mass,
        at_floor=row.at_floor,
        at_ceiling=row.at_ceiling,
    )
