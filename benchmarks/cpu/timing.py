"""Time on a CPU that others use too, also of the parts of a call."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from benchmarks.gpu.timing import Call, Pace

Result = TypeVar("Result")
Clock = Callable[[], float]


def clock_of(threads: int) -> Clock:
    """Seconds that this process computed where it has one thread: others take none of them. Else those on the wall."""
    return time.process_time if threads == 1 else time.perf_counter


class CpuTimer:
    """Measures calls by a clock; a `benchmarks.gpu.timing.Timer`."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def warm_up(self, call: Call) -> Pace:
        """Run a call until what it needs is compiled; how long it takes then."""
        call.before()
        call.run()
        return Pace(self.measure(call), 0.0)

    def measure(self, call: Call, head_start: float = 0.0) -> float:
        """Milliseconds of one run."""
        call.before()
        start = self.clock()
        call.run()
        return 1e3 * (self.clock() - start)


class Stages:
    """How long each stage of a call took, run after run."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._times: dict[str, list[float]] = {}

    def run(self, name: str, stage: Callable[[], Result]) -> Result:
        """Run and time a stage."""
        start = self._clock()
        result = stage()
        self._times.setdefault(name, []).append(1e3 * (self._clock() - start))
        return result

    def medians(self, runs: int) -> dict[str, float]:
        """Milliseconds of each stage in the last so many runs; those before them warmed up."""
        return {name: statistics.median(times[-runs:]) for name, times in self._times.items()}


@contextlib.contextmanager
def threads_at_work(count: int) -> Iterator[None]:
    """Inside, torch computes with so many threads; nothing that was compiled for another number is kept."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.set_num_threads(before)
