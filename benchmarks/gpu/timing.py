"""Time calls against each other: in one process, in turns, with medians and ranges."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

FEWEST_ROUNDS = 5
"""Also of calls that take longer than the seconds given to them."""
FLUSH_BYTES = 256 * 2**20
"""Written before each timed call: more than the L2 cache of any GPU."""
CYCLES_PER_MILLISECOND = 2_000_000
LONGEST_HEAD_START = 20.0


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Call:
    """Something to time: ``run``, and what has to be done before each run, untimed."""

    run: Callable[[], Any]
    before: Callable[[], Any] = _nothing


class Pace(NamedTuple):
    """What a warm-up tells, in milliseconds: how long the call takes, and how long the host is busy with it."""

    milliseconds: float
    host: float


class Sample(NamedTuple):
    """Milliseconds of one call over several runs: the median, and what 10 and 90 per cent of the runs stay below."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, times: list[float]) -> Sample:
        """The sample of these times, one or more."""
        ordered = sorted(times)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


class Timer(Protocol):
    """Measures one call. Tests have one of their own."""

    def warm_up(self, call: Call) -> Pace:
        """Run a call until everything it needs is compiled and loaded."""

    def measure(self, call: Call, head_start: float = 0.0) -> float:
        """Milliseconds of one run.

        Args:
            call: what to run.
            head_start: milliseconds that the host may run ahead of the device, so that launches are not what is timed.
        """


class HostTimer:
    """By the clock of the host, for tensors on the CPU."""

    def warm_up(self, call: Call) -> Pace:
        """See `Timer`."""
        self.measure(call)
        taken = self.measure(call)
        return Pace(taken, taken)

    def measure(self, call: Call, head_start: float = 0.0) -> float:
        """See `Timer`."""
        call.before()
        start = time.perf_counter()
        call.run()
        return 1e3 * (time.perf_counter() - start)


class CudaTimer:
    """By CUDA events, with cold caches.

    Before a run the device waits for ``head_start`` milliseconds and overwrites its L2 cache; meanwhile the host queues
    the call. So the time is that of the device, as in a model whose host runs ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def warm_up(self, call: Call) -> Pace:
        """See `Timer`."""
        self.measure(call)
        call.before()
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        call.run()
        host = 1e3 * (time.perf_counter() - start)
        torch.cuda.synchronize(self._device)
        return Pace(self.measure(call, min(host, LONGEST_HEAD_START)), host)

    def measure(self, call: Call, head_start: float = 0.0) -> float:
        """See `Timer`."""
        call.before()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if head_start > 0:
            torch.cuda._sleep(int(head_start * CYCLES_PER_MILLISECOND))
        self._flush.zero_()
        start.record()
        call.run()
        stop.record()
        torch.cuda.synchronize(self._device)
        return float(start.elapsed_time(stop))


def timer_for(device: torch.device) -> Timer:
    """Events on a CUDA device, the host's clock elsewhere."""
    return CudaTimer(device) if device.type == "cuda" else HostTimer()


def interleaved(calls: Mapping[str, Call], timer: Timer, seconds: float, repeats: int) -> dict[str, Sample]:
    """Time calls in turns: A B C, then B C A, and so on, so that all see the same clocks and temperatures.

    Args:
        calls: by name.
        timer: what measures one of them.
        seconds: about as long as all rounds may take.
        repeats: rounds where there is time for them; never fewer than `FEWEST_ROUNDS` or as asked.
    """
    names = list(calls)
    paces = {name: timer.warm_up(call) for name, call in calls.items()}
    a_round = max(1e-6, sum(pace.milliseconds for pace in paces.values()))
    rounds = min(repeats, max(FEWEST_ROUNDS, int(1e3 * seconds / a_round)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            head_start = min(1.5 * paces[name].host, LONGEST_HEAD_START)
            times[name].append(timer.measure(calls[name], head_start))
    return {name: Sample.of(values) for name, values in times.items()}


def peak_extra_bytes(call: Call, device: torch.device) -> int | None:
    """The most device memory that a call holds beyond what was held before, its results included; None on a CPU."""
    if device.type != "cuda":
        return None
    call.before()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call.run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
