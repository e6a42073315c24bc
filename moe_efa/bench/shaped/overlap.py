"""How much of the communication hides behind the experts: ``ep.moe`` in waves, alone, and with something to do."""

from __future__ import annotations

import inspect
import itertools
import time
from typing import Any

import torch
from torch import Tensor

from moe_efa.bench.inputs import Inputs
from moe_efa.bench.timing import Timer, Timing, gather
from moe_efa.expert_parallel import ExpertParallel


def has_waves() -> bool:
    """Whether ``ep.moe`` takes ``waves``."""
    return "waves" in inspect.signature(ExpertParallel.moe).parameters


class TimedWait:
    """Stands in for experts: waits for a time in proportion to the rows, without using a core."""

    def __init__(self) -> None:
        self.seconds_per_row = 0.0
        self.rows: list[int] = []  # of every call

    def __call__(self, rows: Tensor, offsets: Tensor) -> Tensor:
        self.rows.append(len(rows))
        self.wait(len(rows))
        return rows

    def wait(self, rows: int) -> None:
        if self.seconds_per_row > 0 and rows > 0:
            time.sleep(self.seconds_per_row * rows)


class SwiGLU:
    """Real experts, one after another, as a rank without a fast kernel computes them."""

    def __init__(self, num_experts: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self._up = torch.randn(num_experts, hidden, 2 * inner, generator=generator).mul_(hidden**-0.5).to(dtype)
        self._down = torch.randn(num_experts, inner, hidden, generator=generator).mul_(inner**-0.5).to(dtype)

    def __call__(self, rows: Tensor, offsets: Tensor) -> Tensor:
        out = torch.empty_like(rows)
        edges = offsets.tolist()
        for expert, (start, stop) in enumerate(itertools.pairwise(edges)):
            gate, up = (rows[start:stop] @ self._up[expert]).chunk(2, dim=-1)
            torch.mm(torch.nn.functional.silu(gate) * up, self._down[expert], out=out[start:stop])
        return out


def overlap_of(comm_s: float, compute_s: float, together_s: float) -> float:
    """1 when the shorter of the two is hidden altogether, 0 when they run one after the other.

    >>> overlap_of(4.0, 2.0, 4.0), overlap_of(4.0, 2.0, 6.0)
    (1.0, 0.0)
    """
    return (comm_s + compute_s - together_s) / min(comm_s, compute_s)


class Overlap:
    """Measures at the rate that the links have; collective.

    The wait lasts as long as the communication alone took in the untimed rounds, on every rank; the experts' inner
    size is chosen once so that they take about as long, within what fits.
    """

    def __init__(self, ep: ExpertParallel, inputs: Inputs, timer: Timer, *, waves: int) -> None:
        self._ep, self._inputs, self._timer, self._waves = ep, inputs, timer, waves

    def measure(self, *, warmup: int, iters: int) -> dict[str, Any]:
        """Seconds at p50 of the slowest rank, and the overlap, for the wait and for real experts."""
        wait = TimedWait()
        alone = self._timer.repeat(lambda: self._moe("comm", wait), warmup=warmup, iters=iters)["comm"].p50_s
        calls = wait.rows[-(len(wait.rows) // (warmup + iters)) :]
        received = sum(calls)
        wait.seconds_per_row = alone / received if received else 0.0

        def with_wait() -> None:
            with self._timer.step("compute"):
                for rows in calls:
                    wait.wait(rows)
            quiet, wait.seconds_per_row = wait.seconds_per_row, 0.0
            self._moe("comm", wait)
            wait.seconds_per_row = quiet
            self._moe("together", wait)

        waited = self._timer.repeat(with_wait, warmup=warmup, iters=iters)
        experts, inner, in_one = self._experts_lasting(alone)

        def with_experts() -> None:
            with self._timer.step("compute"):
                experts(*in_one)
            self._moe("comm", TimedWait())
            self._moe("together", experts)

        computed = self._timer.repeat(with_experts, warmup=warmup, iters=iters)
        return {
            "available": True,
            "waves": self._waves,
            "expert_calls": len(calls),
            "wait": _summary(waited),
            "experts": {**_summary(computed), "inner": inner},
        }

    def _moe(self, name: str, experts: Any) -> None:
        arguments: dict[str, Any] = {"waves": self._waves}
        with self._timer.step(name):
            out = self._ep.moe(*self._inputs, experts, **arguments)
        del out

    def _experts_lasting(self, seconds: float) -> tuple[SwiGLU, int, tuple[Tensor, Tensor]]:
        """Experts that take about that long on the slowest rank, their inner size, and a round's rows and offsets."""
        d = self._ep.dispatch(*self._inputs)
        self._ep.combine(d.x, d.handle)
        rows, least = (d.x, d.offsets), 8
        trial = SwiGLU(self._ep.num_local_experts, d.x.shape[1], least, d.x.dtype)
        trial(*rows)
        begin = time.perf_counter()
        trial(*rows)
        slowest = max(gather(self._timer.group, time.perf_counter() - begin))
        inner = max(least, min(1024, int(least * seconds / slowest) // 8 * 8))
        return SwiGLU(self._ep.num_local_experts, d.x.shape[1], inner, d.x.dtype), inner, rows


def _summary(timings: dict[str, Timing]) -> dict[str, float]:
    comm, compute, together = (timings[name].p50_s for name in ("comm", "compute", "together"))
    return {
        "comm_us": 1e6 * comm,
        "compute_us": 1e6 * compute,
        "together_us": 1e6 * together,
        "overlap": overlap_of(comm, compute, together),
    }
