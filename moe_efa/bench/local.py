"""Starts the ranks of a benchmark on this host, or joins those that a launcher started, and brings back the results."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from moe_efa.bench.check import CheckError
from moe_efa.bench.mpi_job import MpiError
from moe_efa.errors import ConfigError, TransportError

Job = Callable[[Any], Iterator[dict[str, Any]]]
"""Collective over the default group; yields results, the same on every rank."""

INTERRUPTED = 130  # exit status after Ctrl-C, as shells report it
_GRACE_S = 5.0  # for ranks to end by themselves after an interrupt
_JOIN_TIMEOUT = datetime.timedelta(minutes=5)
_LAST_WORDS = datetime.timedelta(seconds=20)
_ON_EVERY_RANK = (CheckError, ConfigError, MpiError)


def run_on_ranks(job: Job, argument: Any, *, ranks: int) -> tuple[int, list[dict[str, Any]]]:
    """Start ``ranks`` processes, run the job on them and wait.

    Returns:
        Exit status (0; 1 after a failure that was printed; 130 after Ctrl-C) and the results until then.
    """
    # Ranks are forked from a clean server that has imported torch once.
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "moe_efa.bench"])
    with tempfile.TemporaryDirectory(prefix="moe_efa_bench_") as folder:
        status = _start(job, argument, ranks, folder)
        results = Path(folder) / "results"
        lines = results.read_text().splitlines() if results.exists() else []
        return status, [json.loads(line) for line in lines]


def _start(job: Job, argument: Any, ranks: int, folder: str) -> int:
    start: Any = start_processes  # not typed in every torch
    context = start(_local_rank, (ranks, folder, job, argument), nprocs=ranks, join=False, start_method="forkserver")
    assert context is not None
    try:
        while not context.join(grace_period=_GRACE_S):
            pass
    except KeyboardInterrupt:
        _end(context.processes)
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ProcessExitedException as error:
        _end(context.processes)
        if error.signal_name is not None:
            print(f"error: rank {error.error_index} was ended by {error.signal_name}", file=sys.stderr)
        return error.exit_code if error.exit_code > 0 else 1
    return 0


def _end(processes: Sequence[Any]) -> None:
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _local_rank(rank: int, ranks: int, folder: str, job: Job, argument: Any) -> None:
    def keep(result: dict[str, Any]) -> None:
        with open(Path(folder) / "results", "a") as results:
            results.write(json.dumps(result) + "\n")

    status = join_ranks(rank, ranks, f"file://{folder}/store", job, argument, keep)
    if status != 0:
        sys.exit(status)


def join_ranks(
    rank: int,
    ranks: int,
    init_method: str,
    job: Job,
    argument: Any,
    keep: Callable[[dict[str, Any]], None],
) -> int:
    """One rank, from the rendezvous to the end; ``keep`` gets the results on rank 0. Returns the exit status."""
    try:
        dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=ranks, timeout=_JOIN_TIMEOUT)
        try:
            for result in job(argument):
                if rank == 0:
                    keep(result)
        except _ON_EVERY_RANK as error:
            # One line says enough; the others wait for it, since the first that leaves ends them all.
            if rank == 0:
                print_error(error, rank)
            with contextlib.suppress(RuntimeError):
                dist.monitored_barrier(timeout=_LAST_WORDS)
            return 1
        finally:
            gc.collect()
            dist.destroy_process_group()
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ConfigError, TransportError) as error:
        print_error(error, rank)
        return 1
    return 0


def print_error(error: Exception, rank: int | None = None) -> None:
    """One line on stderr."""
    where = "" if rank is None else f" on rank {rank}"
    print(f"error{where}: {error}", file=sys.stderr, flush=True)
