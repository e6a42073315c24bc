"""Runs a function on several ranks of which some may be killed, stopped or idle, and tells how each of them ended."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from moe_efa.testing.spawn import _call, _clear_frames, _pack


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        result: what the function returned; None if it did not.
        error: traceback of what the function raised, else None.
        exit_code: of the process; None if it was still there at the end and had to be killed.
        returned_at, exited_at: ``time.monotonic()`` when the result came and when the process was gone, else None.
    """

    result: Any = None
    error: str | None = None
    exit_code: int | None = None
    returned_at: float | None = None
    exited_at: float | None = None


def run_ranks(
    fn: Callable[..., Any], num_ranks: int, *args: Any, lingering: Collection[int] = (), timeout: float = 60.0
) -> list[Outcome]:
    """Call ``fn(rank, group, *args)`` on ``num_ranks`` processes and return how they ended, in rank order.

    Unlike :func:`moe_efa.testing.spawn` it judges nothing: ranks may raise or die. It ends when every rank is gone, or
    after ``timeout`` seconds; then what is left is killed.

    Args:
        fn: as for :func:`moe_efa.testing.spawn`; ``group`` is destroyed when it returns.
        lingering: ranks that nobody waits for: they are killed once the others are gone.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", _call.__module__])
    payload = _pack(fn, args, {})
    with tempfile.TemporaryDirectory(prefix="moe_efa_ranks_") as folder:
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        try:
            for rank in range(num_ranks):
                receiver, sender = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(
                    target=_run_rank, args=(payload, rank, num_ranks, folder, timeout, sender), name=f"rank{rank}"
                )
                process.start()
                sender.close()
                processes.append(process)
                pipes.append(receiver)
            return _collect(processes, pipes, set(lingering), time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
                process.close()
            for pipe in pipes:
                pipe.close()


def _collect(
    processes: list[BaseProcess], pipes: list[Connection], lingering: set[int], deadline: float
) -> list[Outcome]:
    found: list[dict[str, Any]] = [{} for _ in processes]
    talking, running = dict(enumerate(pipes)), dict(enumerate(processes))
    while running.keys() - lingering and time.monotonic() < deadline:
        sources: list[Any] = [*talking.values(), *(process.sentinel for process in running.values())]
        ready = multiprocessing.connection.wait(sources, timeout=max(0.0, deadline - time.monotonic()))
        for rank in [rank for rank, pipe in talking.items() if pipe in ready]:
            with contextlib.suppress(EOFError):
                found[rank]["result"], found[rank]["error"] = pickle.loads(talking[rank].recv_bytes())
                found[rank]["returned_at"] = time.monotonic()
            del talking[rank]
        for rank in [rank for rank, process in running.items() if process.sentinel in ready]:
            running.pop(rank).join()
            found[rank] |= {"exit_code": processes[rank].exitcode, "exited_at": time.monotonic()}
    return [Outcome(**facts) for facts in found]


def _run_rank(payload: bytes, rank: int, num_ranks: int, folder: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    result, text = None, None
    try:
        result = _call(payload, rank, num_ranks, folder, timeout)
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        _clear_frames(error)  # they may hold the group
    gc.collect()
    with contextlib.suppress(BrokenPipeError):
        pipe.send_bytes(pickle.dumps((result, text)))
    pipe.close()
