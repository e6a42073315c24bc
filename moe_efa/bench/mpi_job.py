"""The MPI_Alltoallv baseline as the benchmark sees it: started once by mpirun, then asked for a round at a time.

Its ranks wait in read() between two rounds and use no CPU; so do the benchmark's own ranks while a round of MPI runs.
Commands and answers are lines of JSON over a Unix socket. Only rank 0 of the benchmark talks to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_efa.bench.options import BenchConfig
from moe_efa.bench.timing import PHASES

_NAMES = ("mpirun", "mpirun.openmpi")
_START_S = 120.0
_ANSWER_S = 280.0  # less than the others wait in a barrier
_END_S = 10.0


class MpiError(RuntimeError):
    """The MPI version cannot run here, or stopped; the text says why."""


def find_mpirun() -> list[str]:
    """How Open MPI's mpirun is called here: the one beside this interpreter, or that of the path.

    Raises:
        MpiError: naming what is missing.
    """
    cure = "pip install 'moe_efa[mpi]'"
    if importlib.util.find_spec("mpi4py") is None:
        raise MpiError(f"mpi4py is not installed: {cure}")
    candidates = [[str(program)] for name in _NAMES if (program := _find(name)) is not None]
    # What the wheel's mpirun calls; an mpich that is installed later puts its own mpirun in that place.
    wrapped = Path(sys.executable).parent / "ompirun_wrapper"
    if wrapped.exists():
        candidates.append(["env", f"OPAL_PREFIX={wrapped.parent.parent}", str(wrapped)])
    for command in candidates:
        if _is_open_mpi(command):
            return command
    other = f" ({candidates[0][-1]} belongs to another MPI)" if candidates else ""
    raise MpiError(f"Open MPI's mpirun is not found{other}: {cure}")


def _find(name: str) -> str | None:
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def _is_open_mpi(command: list[str]) -> bool:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "Open MPI" in done.stdout


@dataclasses.dataclass(frozen=True)
class MpiNetwork:
    """Nodes that are network namespaces of this host: by node, its address and its namespace."""

    addresses: Sequence[str]
    namespaces: Sequence[str]
    ranks_per_node: int
    interface: str

    def arguments(self, folder: Path) -> list[str]:
        """For mpirun, which runs in the first: TCP between nodes, and daemons started by a script in ``folder``."""
        agent = folder / "agent"
        cases = [f"{address}) name={name};;" for address, name in zip(self.addresses, self.namespaces, strict=True)]
        # Called as ssh would be: HOST COMMAND... A name of its own keeps Open MPI from taking it for this host.
        lines = ["#!/bin/sh", 'host=$1; shift; case "$host" in', *cases, "*) exit 1;;", "esac"]
        named = 'echo "$0" >/proc/sys/kernel/hostname; exec sh -c "$*"'
        lines.append(f'exec ip netns exec "$name" unshare --uts sh -c \'{named}\' "$name" "$@"')
        agent.write_text("\n".join(lines) + "\n")
        agent.chmod(0o700)
        hosts = ",".join(f"{address}:{self.ranks_per_node}" for address in self.addresses)
        interface = ["--mca", "btl_tcp_if_include", self.interface, "--prtemca", "prte_if_include", self.interface]
        return ["--host", hosts, "--prtemca", "plm_ssh_agent", str(agent), *interface]


def mpirun_arguments(ranks: int, cores: int, *, transports: str = "self,sm") -> list[str]:
    """The settings: shared memory and nothing else, no binding, and waiting ranks that yield where they share cores."""
    arguments = ["-n", str(ranks), "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    arguments += ["--mca", "pml", "ob1", "--mca", "btl", transports]
    if ranks > cores:
        arguments += ["--mca", "mpi_yield_when_idle", "1"]
    # glibc keeps freed memory instead of returning it: a new result costs no page faults, as with reused buffers.
    arguments += ["-x", "MALLOC_MMAP_MAX_=0", "-x", f"MALLOC_TRIM_THRESHOLD_={1 << 40}", "-x", "MPI4PY_MPIABI=openmpi"]
    return arguments


class MpiJob:
    """The running MPI ranks. Use as a context manager, in one process.

    Args:
        config: its ranks and mpi_args count; shapes come with :meth:`prepare`.
        threads: of torch in each MPI rank.
        network: of the nodes, if they are not all this host.

    Raises:
        MpiError: if they do not come up.
    """

    def __init__(self, config: BenchConfig, *, threads: int, network: MpiNetwork | None = None) -> None:
        mpirun = find_mpirun()
        self._folder = Path(tempfile.mkdtemp(prefix="moe_efa_mpi_"))
        self._connections: list[Any] = []
        self._process: subprocess.Popen[bytes] | None = None
        transports = "self,sm" if network is None else "self,sm,tcp"
        self.settings = mpirun_arguments(config.ranks, len(os.sched_getaffinity(0)), transports=transports)
        self.settings += [*(network.arguments(self._folder) if network else ()), *config.mpi_args]
        as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        program = [sys.executable, "-m", "moe_efa.bench.mpi_version", str(self._folder / "socket"), str(threads)]
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(self._folder / "socket"))
                listener.listen(config.ranks)
                listener.settimeout(1.0)
                with open(self._folder / "output", "wb") as output:
                    self._process = subprocess.Popen(
                        [*mpirun, *as_root, *self.settings, *program],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                self._accept(listener, config.ranks)
        except BaseException:
            self.close()
            raise

    def _accept(self, listener: socket.socket, ranks: int) -> None:
        assert self._process is not None
        facts: dict[int, dict[str, Any]] = {}
        for _ in range(round(_START_S)):
            with contextlib.suppress(TimeoutError):
                while len(facts) < ranks:
                    connection, _ = listener.accept()
                    connection.settimeout(_ANSWER_S)
                    stream = connection.makefile("rw")
                    self._connections.append(stream)
                    hello = self._read(stream)
                    facts[hello["rank"]] = hello
            if len(facts) == ranks:
                self.facts: dict[str, Any] = facts[0]
                return
            if self._process.poll() is not None:
                raise MpiError(f"mpirun ended with status {self._process.returncode}: {self._tail()}")
        raise MpiError(f"{len(facts)} of {ranks} MPI ranks came up within {_START_S:.0f} s: {self._tail()}")

    def prepare(self, config: BenchConfig, *, node_size: int, folder: Path) -> list[str]:
        """Make every MPI rank hold the inputs of the shape, run a round, and leave its sums in ``folder``.

        Returns:
            The digest of each rank's dispatched rows. Sums are in ``sums<rank>.pt``.
        """
        answers = self._ask(
            {"do": "prepare", "config": dataclasses.asdict(config), "node_size": node_size, "folder": str(folder)}
        )
        return [answer["digest"] for answer in answers]

    def round(self) -> dict[str, float]:
        """One round: seconds of the slowest rank, by phase."""
        answers = self._ask({"do": "round"})
        return {phase: max(answer[phase] for answer in answers) for phase in PHASES}

    def _ask(self, command: dict[str, Any]) -> list[dict[str, Any]]:
        """Answers in rank order."""
        for stream in self._connections:
            try:
                stream.write(json.dumps(command) + "\n")
                stream.flush()
            except OSError as error:
                raise MpiError(f"a rank of the MPI version is gone ({error}): {self._tail()}") from None
        answers = [self._read(stream) for stream in self._connections]
        return sorted(answers, key=lambda answer: answer["rank"])

    def _read(self, stream: Any) -> dict[str, Any]:
        try:
            line = stream.readline()
        except OSError as error:
            raise MpiError(f"a rank of the MPI version does not answer ({error}): {self._tail()}") from None
        if not line:
            raise MpiError(f"a rank of the MPI version ended: {self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _tail(self) -> str:
        """The end of what mpirun and its ranks printed."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=2)  # the reason follows the end of a rank
        with contextlib.suppress(OSError):
            lines = (self._folder / "output").read_text(errors="replace").split("\n")
            return " | ".join([line.strip() for line in lines if line.strip(" -")][-4:]) or "it printed nothing"
        return "it printed nothing"

    def close(self) -> None:
        """End the ranks: they leave when their socket closes."""
        for stream in self._connections:
            with contextlib.suppress(OSError):
                stream.close()
        self._connections = []
        if self._process is not None:
            for end in (self._process.poll, self._process.terminate, self._process.kill):
                end()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=_END_S)
                    break
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> MpiJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
