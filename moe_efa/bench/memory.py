"""What a benchmark needs in memory, added up before anything is allocated."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from moe_efa.bench.copy_floor import most_rows, row_widths
from moe_efa.bench.options import DTYPES, BenchConfig
from moe_efa.errors import ConfigError
from moe_efa.plan import plan_memory

_PROCESS_BYTES = 200 << 20  # an interpreter with torch, beyond what processes share
_MPI_PROCESS_BYTES = 350 << 20  # shares nothing


class Estimate(NamedTuple):
    """Bytes on one host at the peak: ``fixed`` for processes, inputs and rings, ``work`` for the party that needs most
    while it runs, ``kept`` for buffers that the baselines keep."""

    fixed: int
    work: int
    kept: int

    @property
    def total(self) -> int:
        return sum(self)


def estimate(config: BenchConfig, *, ranks_on_host: int, node_size: int) -> Estimate:
    """The peak on a host, for rows spread over the ranks as the mean is."""
    plan = plan_memory(config.ranks, config.expert_parallel(node_size=node_size))
    token_bytes = config.tokens * config.row_bytes
    rows = config.topk * token_bytes  # of the experts of a rank
    sent = min(config.topk, config.ranks) * token_bytes
    fp32 = 4 // DTYPES[config.dtype].itemsize
    # moe_efa's rows, the experts' results and their factors; the dense result and its errors in float64.
    work = 3 * rows + 4 * config.tokens * config.hidden * 8
    fixed, kept = _PROCESS_BYTES + plan.registered_bytes + 2 * token_bytes, 0
    if config.baseline:
        # torch per-expert: the caller's rows, three copies of them on the way back, two in fp32.
        work = max(work, (4 + 2 * fp32) * rows)
        kept += rows + 4 * sent  # torch lean
        kept += 2 * most_rows(config, node_size=node_size).bytes_of(row_widths(config))  # the copy floor
    if config.mpi:
        fixed += _MPI_PROCESS_BYTES
        kept += 2 * rows + 5 * sent
    return Estimate(ranks_on_host * fixed, ranks_on_host * work, ranks_on_host * kept)


def check_memory(config: BenchConfig, *, ranks_on_host: int, node_size: int) -> None:
    """Raise ConfigError, saying what would fit, if the host has less memory than the benchmark needs."""
    need = estimate(config, ranks_on_host=ranks_on_host, node_size=node_size)
    available = available_bytes()
    if available is None or need.total <= available:
        return
    shape = f"T={config.tokens}, H={config.hidden}, K={config.topk}, {config.dtype}"
    cure = f"fewer --tokens (about {max(1, config.tokens * available // need.total // 2)} fit)"
    if ranks_on_host > 1:
        cure += ", fewer --ranks"
    if config.baseline:
        alone = BenchConfig(**(vars(config) | {"baseline": False, "mpi": False}))
        least = estimate(alone, ranks_on_host=ranks_on_host, node_size=node_size).total
        cure += f", or --no-baseline, which needs {_gib(least)}"
    raise ConfigError(
        f"{ranks_on_host} ranks of {shape} need about {_gib(need.total)} on this host ({_gib(need.fixed)} processes, "
        f"inputs and rings, {_gib(need.work)} working memory, {_gib(need.kept)} buffers of the baselines), and "
        f"{_gib(available)} are available: {cure}"
    )


def available_bytes() -> int | None:
    """Memory that can still be used on this host and in its container; None if nothing tells."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        found.append(max(0, limit - int(Path("/sys/fs/cgroup/memory.current").read_text())))
    return min(found, default=None)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
