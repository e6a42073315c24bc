"""Time of the slowest rank, step by step, with a barrier before each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_efa.bench.exchange import Exchange
from moe_efa.bench.inputs import Inputs
from moe_efa.bench.progress import Progress

PHASES = ("dispatch", "combine", "both")


def gather(group: dist.ProcessGroup, value: Any) -> list[Any]:
    """The value of every rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of the slowest rank over the iterations."""

    p50_s: float
    p95_s: float
    max_s: float

    @staticmethod
    def of(slowest: Tensor) -> Timing:
        """From [iterations] seconds."""
        ordered = slowest.double().sort().values
        return Timing(p50_s=float(ordered.quantile(0.5)), p95_s=float(ordered.quantile(0.95)), max_s=float(ordered[-1]))

    def as_us(self) -> dict[str, float]:
        """p50_us, p95_us, max_us."""
        return {name.replace("_s", "_us"): 1e6 * value for name, value in asdict(self).items()}


@dataclass
class Timer:
    """Times named steps between barriers and keeps, for every iteration, the slowest rank.

    On a GPU a step ends when what it queued has run.
    """

    group: dist.ProcessGroup
    progress: Progress
    device: str = "cpu"
    seconds: dict[str, list[float]] = field(default_factory=dict)
    on: bool = True

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._wait()
        dist.barrier(self.group)
        begin = time.perf_counter()
        yield
        self._wait()
        self.record(name, time.perf_counter() - begin)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def steps_of(self, who: str) -> Callable[[str], contextlib.AbstractContextManager[None]]:
        """:meth:`step` for the phases of a party: names are "who phase"."""
        return lambda phase: self.step(f"{who} {phase}")

    def record(self, name: str, seconds: float) -> None:
        """A step that was timed elsewhere; every rank records it, 0.0 where it was not."""
        if self.on:
            self.seconds.setdefault(name, []).append(seconds)

    def repeat(self, body: Callable[[], None], *, warmup: int, iters: int) -> dict[str, Timing]:
        """Run the body, which calls :meth:`step`, and return the timings. Collective."""
        self.seconds = {}
        for i in range(warmup + iters):
            self.on = i >= warmup
            body()
            self.progress.advance()
        everyone = gather(self.group, self.seconds)
        return {
            name: Timing.of(torch.tensor([seconds[name] for seconds in everyone], dtype=torch.float64).amax(0))
            for name in self.seconds
        }


def timed_round(
    exchange: Exchange, inputs: Inputs, step: Callable[[str], contextlib.AbstractContextManager[None]]
) -> None:
    """Dispatch and combine together, then each by itself; ``step`` times what runs in it, by phase.

    An untimed round goes first: what others left behind in caches and in the allocator is not counted.
    """
    rows, handle = exchange.dispatch(inputs)
    out = exchange.combine(rows, handle)
    del rows, handle, out
    with step("both"):
        rows, handle = exchange.dispatch(inputs)
        out = exchange.combine(rows, handle)
    del rows, handle, out  # not timed
    with step("dispatch"):
        rows, handle = exchange.dispatch(inputs)
    with step("combine"):
        out = exchange.combine(rows, handle)
    del rows, handle, out


def phases_of(timings: dict[str, Timing], who: str) -> dict[str, Timing]:
    """The three timings that :func:`timed_round` left under the names "who phase"."""
    return {phase: timings[f"{who} {phase}"] for phase in PHASES}
