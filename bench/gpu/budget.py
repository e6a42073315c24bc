"""Sections as processes, each with a limit, all within one budget: what does not fit is cut and named."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PARENT = "GPU_CHECK_PARENT"  # in the environment of a job: the process that started it


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command that may take `limit_s`; under `least_s` it is not worth starting."""

    name: str
    command: Sequence[str]
    limit_s: float
    least_s: float = 5.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job.

    Attributes:
        status: "done", "failed" (its exit status is not 0), "cut" (it ran out of time), "left out", or
            "not ended" while the others are under way.
        detail: why, for people.
    """

    name: str
    status: str
    seconds: float
    detail: str = ""


class Budget:
    """Seconds that are left of a whole."""

    def __init__(self, total_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + total_s

    def left_s(self) -> float:
        """Never negative."""
        return max(0.0, self._end - self._clock())

    def limit_of(self, job: Job) -> float | None:
        """How long a job may run now; None where it is not worth starting."""
        left = self.left_s()
        return None if left < job.least_s else min(job.limit_s, left)

    def run(self, job: Job, *, log: Path) -> Outcome:
        """Runs a job to its end or its limit; its output goes to stdout and to `log`."""
        limit = self.limit_of(job)
        if limit is None:
            return Outcome(
                name=job.name, status="left out", seconds=0.0, detail=f"{self.left_s():.0f} s were left of the budget"
            )
        start = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            job.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, PARENT: str(os.getpid())},
            start_new_session=True,  # so that what it starts ends with it
        )
        tail: deque[str] = deque(maxlen=3)
        reader = threading.Thread(target=_pass_on, args=(process, log, tail), daemon=True)
        reader.start()
        timed_out = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out = True
        _end(process)  # also what a finished job has left running
        reader.join(10.0)  # something that left the session may hold the pipe
        seconds = time.monotonic() - start
        if timed_out:
            return Outcome(name=job.name, status="cut", seconds=seconds, detail=f"it had {limit:.0f} s")
        if process.returncode != 0:
            detail = f"exit status {process.returncode}: {' | '.join(tail)}"
            return Outcome(name=job.name, status="failed", seconds=seconds, detail=detail)
        return Outcome(name=job.name, status="done", seconds=seconds)

    def run_together(self, jobs: Sequence[Job], *, log_of: Callable[[Job], Path]) -> list[Outcome]:
        """Jobs side by side, for what is not timed."""
        outcomes: dict[str, Outcome] = {}

        def run(job: Job) -> None:
            outcomes[job.name] = self.run(job, log=log_of(job))

        threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [outcomes[job.name] for job in jobs]


def _pass_on(process: subprocess.Popen[str], log: Path, tail: deque[str]) -> None:
    """Output to stdout and to a file, line by line; the last lines are kept."""
    assert process.stdout is not None
    with log.open("w") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            print(line, end="", flush=True)
            tail.append(line.strip())


def _end(process: subprocess.Popen[str]) -> None:
    """Ends what is left of a job's processes."""
    for number, pause_s in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pause_s)


def end_with_parent() -> None:
    """In a job: its session ends when the check that started it is gone, killed perhaps, so that nothing is left on a
    GPU. Does nothing in other processes.
    """
    parent = os.environ.pop(PARENT, None)  # not for what the job starts
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
