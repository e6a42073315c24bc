"""Runs a function on several ranks: real processes with a gloo group, on this machine.

Processes are forked from a clean server that has imported torch once, so a rank costs milliseconds. Whatever happens,
no process outlives :func:`spawn`.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import importlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Collection, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moe_efa import env

_GRACE_S = 3.0  # for the other ranks after a first failure, so that their own errors can be shown


class RankError(RuntimeError):
    """The first failure of a rank in :func:`spawn`; the exception it raised, if it can be pickled, is the cause."""

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class _Outcome(NamedTuple):
    """What a rank sends back: a result, or the text of an error and, if possible, the exception."""

    result: Any
    error: str | None
    exception: BaseException | None
    at: float = 0.0  # of the error, by the host's monotonic clock, before this rank's end could fail others


def spawn(
    fn: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout: float = 120.0,
    may_die: Collection[int] = (),
    environment: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> list[Any]:
    """Call ``fn(rank, group, *args)`` on ``num_ranks`` processes and return their results in rank order.

    Args:
        fn: a function that can be pickled (defined at module level). ``group`` is a gloo process group of all ranks;
            it is destroyed when ``fn`` returns, so ``fn`` must not keep it.
        num_ranks: number of processes. torch runs single-threaded in each.
        timeout: seconds for everything; then every rank's stacks are shown and the processes are killed.
        may_die: ranks whose process may end without a result, which is then None.
        environment: variables that the ranks get; they have those of the server otherwise, not the caller's.
        fresh: start processes anew, with the environment as it is now, which takes each of them seconds of imports.

    Raises:
        RankError: for the first failure in time, with the rank and its traceback.
        TimeoutError: with the stacks of the ranks that had not finished.
    """
    context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
    # Only torch: the server's sys.path begins with the working directory, a rank's is that of the caller.
    context.set_forkserver_preload(["torch", "torch.distributed"])
    deadline = time.monotonic() + timeout
    payload = _pack(fn, args, environment or {})
    with tempfile.TemporaryDirectory(prefix="moe_efa_spawn_") as folder:
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
            return _collect(processes, pipes, deadline, timeout, set(may_die), Path(folder))
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
                process.close()
            for pipe in pipes:
                pipe.close()


def _collect(
    processes: list[BaseProcess],
    pipes: list[Connection],
    deadline: float,
    timeout: float,
    may_die: set[int],
    folder: Path,
) -> list[Any]:
    results: list[Any] = [None] * len(processes)
    failures: list[tuple[int, _Outcome]] = []
    waiting = dict(enumerate(pipes))
    while waiting:
        limit = deadline - time.monotonic()
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout=max(0.0, limit))
        if not ready:
            break
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                outcome = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                processes[rank].join(timeout=5.0)
                if rank in may_die:
                    continue
                text = f"ended without a result, exit code {processes[rank].exitcode}"
                outcome = _Outcome(None, text, None, time.monotonic())
            if outcome.error is None:
                results[rank] = outcome.result
            else:
                if not failures:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
                failures.append((rank, outcome))
    failures.sort(key=lambda failure: failure[1].at)
    if failures:
        raise _rank_error(failures, sorted(waiting)) from failures[0][1].exception
    if waiting:
        stacks = _dump_stacks(processes, sorted(waiting), folder)
        raise TimeoutError(f"ranks {sorted(waiting)} did not finish within {timeout:g} s\n{stacks}")
    for rank, process in enumerate(processes):
        process.join(timeout=max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            raise TimeoutError(f"rank {rank} returned a result but did not exit within {timeout:g} s")
        if process.exitcode != 0 and rank not in may_die:
            raise RankError(f"rank {rank} returned a result, then exited with code {process.exitcode}", rank=rank)
    return results


def _rank_error(failures: list[tuple[int, _Outcome]], unfinished: list[int]) -> RankError:
    rank, outcome = failures[0]
    lines = [f"rank {rank} failed first:", str(outcome.error)]
    for other, other_outcome in failures[1:]:
        lines.append(f"rank {other} then failed: {str(other_outcome.error).strip().splitlines()[-1]}")
    if unfinished:
        lines.append(f"ranks {unfinished} had not finished {_GRACE_S:g} s later")
    return RankError("\n".join(lines), rank=rank)


def _dump_stacks(processes: list[BaseProcess], ranks: list[int], folder: Path) -> str:
    for rank in ranks:
        pid = processes[rank].pid
        if pid is not None and processes[rank].is_alive() and _stack_path(folder, rank).exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    dumps = []
    for rank in ranks:
        path = _stack_path(folder, rank)
        dumps.append(f"rank {rank}:\n{path.read_text() if path.exists() else '  not started'}")
    return "\n".join(dumps)


def _stack_path(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"stacks{rank}.txt"


def _run_rank(payload: bytes, rank: int, num_ranks: int, folder: str, timeout: float, pipe: Connection) -> None:
    """The body of a rank's process."""
    with open(_stack_path(folder, rank), "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        torch.set_num_threads(1)
        try:
            outcome = _Outcome(_call(payload, rank, num_ranks, folder, timeout), None, None)
            message = pickle.dumps(outcome)
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            _clear_frames(error)  # they may hold the group
            message = _pickle_failure(text, error)
        gc.collect()
        with contextlib.suppress(BrokenPipeError):
            pipe.send_bytes(message)
        pipe.close()
        faulthandler.unregister(signal.SIGUSR1)


def _pack(fn: Callable[..., Any], args: tuple[Any, ...], environment: Mapping[str, str]) -> bytes:
    """For _call. Pickled by value: torch's reducers for multiprocessing need the sender alive."""
    module_file = getattr(sys.modules[fn.__module__], "__file__", None)
    return pickle.dumps((dict(environment), fn.__module__, module_file, pickle.dumps((fn, args))))


_failed_at = 0.0  # of this rank


def _call(payload: bytes, rank: int, num_ranks: int, folder: str, timeout: float) -> Any:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        environment, module_name, module_file, pickled = pickle.loads(payload)
        env.override(environment)
        _import(module_name, module_file)
        fn, args = pickle.loads(pickled)
        return fn(rank, dist.group.WORLD, *args)
    except BaseException:
        global _failed_at
        _failed_at = time.monotonic()
        raise
    finally:
        dist.destroy_process_group()


def _import(name: str, file: str | None) -> None:
    """Import the module of the function, from its file if its name alone does not lead there (pytest's importlib)."""
    try:
        importlib.import_module(name)
    except ImportError:
        spec = None if file is None else importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise
        parts = name.split(".")
        for parent in (".".join(parts[:n]) for n in range(1, len(parts))):  # unpickling imports them by name
            sys.modules.setdefault(parent, types.ModuleType(parent))
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def _pickle_failure(text: str, error: BaseException) -> bytes:
    try:
        message = pickle.dumps(_Outcome(None, text, error, _failed_at))
        pickle.loads(message)  # exceptions with keyword arguments pickle but often do not load
    except Exception:
        message = pickle.dumps(_Outcome(None, text, None, _failed_at))
    return message


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
