"""The baseline with MPI_Alltoallv: what every rank runs under mpirun. The benchmark starts it (mpi_job.py).

The same algorithm as "torch lean", over mpi4py. It waits for commands in read(), so that it uses no CPU between rounds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_efa.bench.check import digest_of
from moe_efa.bench.inputs import Inputs, make_inputs
from moe_efa.bench.lean import LeanExchange
from moe_efa.bench.options import BenchConfig
from moe_efa.bench.routing import RoutingConfig
from moe_efa.bench.timing import timed_round


class _Mpi:
    """What of MPI is used here."""

    def __init__(self) -> None:
        import mpi4py

        mpi4py.rc.threads = False  # one thread calls MPI: no locks
        from mpi4py import MPI

        self._mpi = MPI
        self.world = MPI.COMM_WORLD
        self.rank, self.num_ranks = self.world.Get_rank(), self.world.Get_size()
        self._types: dict[int, Any] = {}

    def all_to_all(
        self, received: Tensor, sent: Tensor, recv_splits: Sequence[int], send_splits: Sequence[int]
    ) -> None:
        """MPI_Alltoallv of whole rows, counted in rows so that counts stay small."""
        row_bytes = sent.element_size() * sent.shape[1:].numel()
        if row_bytes not in self._types:
            self._types[row_bytes] = self._mpi.BYTE.Create_contiguous(row_bytes).Commit()
        row = self._types[row_bytes]
        self.world.Alltoallv([_bytes(sent), (send_splits, None), row], [_bytes(received), (recv_splits, None), row])

    def steps_into(self, seconds: dict[str, float]) -> Callable[[str], contextlib.AbstractContextManager[None]]:
        """Times what runs in a step, after a barrier that is not timed."""

        @contextlib.contextmanager
        def step(name: str) -> Iterator[None]:
            self.world.Barrier()
            begin = time.perf_counter()
            yield
            seconds[name] = time.perf_counter() - begin

        return step

    def facts(self) -> dict[str, Any]:
        """What the report says about this MPI."""
        return {
            "library": self._mpi.Get_library_version().split(",")[0].strip("\x00 \n"),
            "single_copy": self._can_read_neighbour(),
        }

    def _can_read_neighbour(self) -> bool:
        """Whether the kernel lets a rank read another's memory, which Open MPI's single copy (CMA) needs."""

        class _Piece(ctypes.Structure):
            _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

        here, there = (ctypes.create_string_buffer(8) for _ in range(2))
        everyone = self.world.allgather((os.getpid(), ctypes.addressof(there)))
        pid, address = everyone[(self.rank + 1) % self.num_ranks]
        local, remote = _Piece(ctypes.addressof(here), 8), _Piece(address, 8)
        read = ctypes.CDLL(None).process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        return all(self.world.allgather(read == 8))


def _bytes(rows: Tensor) -> Any:
    return rows.view(torch.uint8).numpy() if rows.numel() else bytearray()


def _config(values: dict[str, Any]) -> BenchConfig:
    """The inverse of dataclasses.asdict and JSON."""
    routing = RoutingConfig(**values["routing"])
    return BenchConfig(**(values | {"routing": routing, "mpi_args": tuple(values["mpi_args"])}))


def main() -> None:
    """Serve until the socket closes."""
    path, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    mpi = _Mpi()
    inputs: Inputs | None = None
    exchange: LeanExchange | None = None
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        stream = connection.makefile("rw")

        def answer(**facts: Any) -> None:
            stream.write(json.dumps({"rank": mpi.rank, **facts}) + "\n")
            stream.flush()

        answer(**mpi.facts())
        for line in stream:
            command = json.loads(line)
            if command["do"] == "prepare":
                config = _config(command["config"])
                inputs = make_inputs(config, mpi.rank, node_size=command["node_size"])
                exchange = LeanExchange(mpi.num_ranks, config.experts, mpi.all_to_all, reuse_results=False)
                rows, handle = exchange.dispatch(inputs)
                torch.save(exchange.combine(rows, handle), Path(command["folder"]) / f"sums{mpi.rank}.pt")
                answer(digest=digest_of(rows))
                del rows, handle
            else:
                assert exchange is not None and inputs is not None
                seconds: dict[str, float] = {}
                timed_round(exchange, inputs, mpi.steps_into(seconds))
                answer(**seconds)


if __name__ == "__main__":
    main()
