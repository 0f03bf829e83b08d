"""A timer for tests of benchmarks: it runs each call, and says that it took what the test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ScriptedTimer:
    """Runs calls and returns ``milliseconds(call)``."""

    def __init__(self, milliseconds: Callable[[Any], float] = lambda call: 1.0) -> None:
        self.milliseconds = milliseconds
        self.measured: list[Any] = []

    def warm_up(self, call: Any) -> tuple[float, float]:
        from benchmarks.gpu.timing import Pace

        call.before()
        call.run()
        return Pace(self.milliseconds(call), 0.5)

    def measure(self, call: Any, head_start: float = 0.0) -> float:
        call.before()
        call.run()
        self.measured.append(call)
        return self.milliseconds(call)
