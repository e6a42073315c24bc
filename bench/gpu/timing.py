"""Microseconds of work on a GPU: medians of CUDA events, the L2 flushed before each run; and a stand-in for that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far
MOST_SLEEP_CYCLES = 20_000_000


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Microseconds over the runs."""

    us: float  # the median
    us_p20: float
    us_p80: float
    runs: int

    @staticmethod
    def of(samples_us: list[float]) -> Timing:
        """From single runs."""
        ordered = sorted(samples_us)
        last = len(ordered) - 1
        return Timing(
            us=statistics.median(ordered),
            us_p20=ordered[round(0.2 * last)],
            us_p80=ordered[round(0.8 * last)],
            runs=len(ordered),
        )


class Timer(Protocol):
    """Times a call; `prepare` runs before each one and is not counted."""

    def __call__(self, call: Callable[[], object], *, prepare: Callable[[], object] | None = None) -> Timing:
        """The call has run at least once when this returns."""


class CudaTimer:
    """Events around the call on the current stream. What comes before, the flush of the L2 and a pause, keeps the GPU
    busy while the host queues the call, so that the time between the events is the GPU's alone.

    Args:
        budget_s: runs are repeated for about this long, but at least `least_runs` times and at most `most_runs`.
    """

    def __init__(self, *, budget_s: float = 0.25, least_runs: int = 7, most_runs: int = 40) -> None:
        self._budget_s, self._least_runs, self._most_runs = budget_s, least_runs, most_runs
        self._flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
        self._cycles_per_us = self._measure_clock()

    def __call__(self, call: Callable[[], object], *, prepare: Callable[[], object] | None = None) -> Timing:
        """See :class:`Timer`."""
        took_us = queueing_us = 0.0
        for _ in range(3):  # warms up, and learns how long the host takes to queue it
            if prepare is not None:
                prepare()
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            queueing_us = 1e6 * (time.perf_counter() - start)
            torch.cuda.synchronize()
            took_us = 1e6 * (time.perf_counter() - start)
        sleep = min(MOST_SLEEP_CYCLES, int(self._cycles_per_us * (2 * queueing_us + 20)))
        one_s = 1e-6 * (took_us + 2 * queueing_us + 400)
        runs = max(self._least_runs, min(self._most_runs, int(self._budget_s / one_s)))
        pairs = []
        for _ in range(runs):
            if prepare is not None:
                prepare()
            self._flush.sum()  # read: lines that were written would go back to memory beside the call
            torch.cuda._sleep(sleep)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return Timing.of([1e3 * begin.elapsed_time(end) for begin, end in pairs])

    @staticmethod
    def _measure_clock() -> float:
        """Cycles of torch.cuda._sleep in a microsecond, of a GPU that has left its idle clocks."""
        cycles, found = 20_000_000, [0.0]
        while len(found) < 3 or (abs(found[-1] / found[-2] - 1) > 0.02 and len(found) < 20):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(4):
                torch.cuda._sleep(cycles)
            begin.record()
            torch.cuda._sleep(cycles)
            end.record()
            torch.cuda.synchronize()
            found.append(cycles / (1e3 * begin.elapsed_time(end)))
        return found[-1]


class FakeTimer:
    """For dry runs: runs the call once and reports numbers that mean nothing, the same in every run."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, call: Callable[[], object], *, prepare: Callable[[], object] | None = None) -> Timing:
        """See :class:`Timer`."""
        if prepare is not None:
            prepare()
        call()
        self._calls += 1
        return Timing.of([10.0 + self._calls % 7, 11.0 + self._calls % 7, 12.0 + self._calls % 7])
