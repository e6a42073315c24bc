"""The benchmark of dispatch and combine: correctness first, then times, bytes and what they are measured against.

Runs on the ranks it is given (torchrun, srun) or starts its own on this host. It uses the public API only. What is
counted and how is in bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from moe_efa import _C, env, libfabric, reference
from moe_efa._version import __version__
from moe_efa.config import ExpertParallelConfig
from moe_efa.errors import ConfigError, TransportError
from moe_efa.expert_parallel import ExpertParallel
from moe_efa.handle import DispatchResult

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_UNIT_ROUNDOFF = {"bf16": 2.0**-8, "fp32": 2.0**-24}
_GRACE_S = 5.0  # for ranks to end by themselves after an interrupt
_JOIN_TIMEOUT = datetime.timedelta(minutes=5)
_INTERRUPTED = 130  # exit status after Ctrl-C, as shells report it


class CheckError(AssertionError):
    """A result is wrong: nothing is timed."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured.

    Attributes:
        ranks: processes to start; ignored under torchrun and srun, which decide.
        node_size: ranks per node; None finds it from the hosts under torchrun and srun, and makes two nodes alone.
        transport, provider: as in :class:`moe_efa.ExpertParallelConfig`.
        tokens: per rank, T.
        hidden: elements per token, H.
        topk: selections per token, K.
        experts: of the whole group, E.
        dtype: "bf16" or "fp32".
        iters, warmup: timed and untimed rounds.
        seed: of tokens and routing.
        baseline: measure torch.distributed (gloo) and the memory-copy floor too.
    """

    ranks: int = 4
    node_size: int | None = None
    transport: str = "auto"
    provider: str | None = None
    tokens: int = 1024
    hidden: int = 2048
    topk: int = 8
    experts: int = 32
    dtype: str = "bf16"
    iters: int = 10
    warmup: int = 2
    seed: int = 0
    baseline: bool = True

    def __post_init__(self) -> None:
        for name in ("ranks", "tokens", "hidden", "topk", "experts", "iters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.warmup < 0:
            raise ConfigError(f"--warmup must not be negative: {self.warmup}")
        self.expert_parallel().check_num_ranks(self.ranks)

    def expert_parallel(self, **changes: Any) -> ExpertParallelConfig:
        """The configuration of the measured group."""
        fields: dict[str, Any] = {
            "num_experts": self.experts,
            "hidden_size": self.hidden,
            "top_k": self.topk,
            "max_tokens_per_rank": self.tokens,
            "node_size": self.node_size,
            "transport": self.transport,
            "provider": self.provider,
        }
        return ExpertParallelConfig(**(fields | changes))


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark to a parser."""
    default = BenchConfig()
    job = parser.add_argument_group("ranks")
    job.add_argument("--ranks", type=int, help=f"ranks to start on this host (default {default.ranks})")
    job.add_argument("--node-size", type=int, help="ranks per node (default: two nodes alone, else by host)")
    job.add_argument("--transport", default="auto", choices=("auto", "libfabric", "shm"), help="what joins nodes")
    job.add_argument("--provider", help="libfabric provider, such as efa or tcp (default: the best present)")
    shape = parser.add_argument_group("shape")
    for name, meaning in (
        ("tokens", "tokens per rank, T"),
        ("hidden", "elements per token, H"),
        ("topk", "experts per token, K"),
        ("experts", "experts of all ranks, E"),
    ):
        value = getattr(default, name)
        shape.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{meaning} (default {value})")
    shape.add_argument("--dtype", default=default.dtype, choices=tuple(DTYPES))
    timing = parser.add_argument_group("measurement")
    timing.add_argument("--iters", type=int, default=default.iters, metavar="N", help=f"(default {default.iters})")
    timing.add_argument("--warmup", type=int, default=default.warmup, metavar="N", help=f"(default {default.warmup})")
    timing.add_argument("--seed", type=int, default=default.seed, metavar="N")
    timing.add_argument("--no-baseline", action="store_true", help="skip torch.distributed and the copy floor")
    timing.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON too; without FILE or with -: to stdout",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The benchmark as a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="bench_dispatch_combine", description="Dispatch and combine between ranks.")
    add_arguments(parser)
    return run_command(parser.parse_args(argv))


def run_command(options: argparse.Namespace) -> int:
    """Run with parsed options: 0, 1 after a failure that was printed, 130 after Ctrl-C."""
    try:
        launch = env.launch()
        names = ("transport", "provider", "tokens", "hidden", "topk", "experts", "dtype", "iters", "warmup", "seed")
        ranks = launch.num_ranks if launch else BenchConfig.ranks if options.ranks is None else options.ranks
        if launch and options.ranks not in (None, ranks):
            raise ConfigError(f"--ranks {options.ranks}, but the launcher started {ranks}")
        node_size = options.node_size
        if launch is None and node_size is None:
            node_size = ranks // 2 if ranks % 2 == 0 else 1
        config = BenchConfig(
            ranks=ranks,
            node_size=node_size,
            baseline=not options.no_baseline,
            **{name: getattr(options, name) for name in names},
        )
        if options.json not in (None, "-") and not Path(options.json).absolute().parent.is_dir():
            raise ConfigError(f"--json: there is no folder {Path(options.json).absolute().parent}")
        if launch is None:
            check_transport(config)
            return _run_local(config, options.json)
    except ConfigError as error:
        _print_error(error)
        return 1
    return _run_rank(launch.rank, config, options.json, init_method=launch.init_method)


def check_transport(config: BenchConfig) -> None:
    """Raise ConfigError, saying what to install, if the nodes on this host could not be joined."""
    if config.node_size is None or config.node_size >= config.ranks or config.transport == "shm":
        return
    info = _C.build_info(**libfabric.search_path())
    if info["libfabric_found"]:
        return
    if not info["libfabric_built"]:
        cure = "build moe_efa with the libfabric headers (Debian: apt-get install libfabric-dev)"
    else:
        cure = "install it (Debian: apt-get install libfabric1; EFA hosts: the AWS EFA installer; pip install mpich)"
    raise ConfigError(
        f"{config.ranks} ranks in nodes of {config.node_size} need libfabric between the nodes, and there is none "
        f"({info['libfabric_error'] or 'not found'}): {cure}, or use --transport shm"
    )


def _run_local(config: BenchConfig, json_target: str | None) -> int:
    """Start the ranks as processes of this host and wait for them."""
    # Ranks are forked from a clean server that has imported torch once.
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "moe_efa.bench"])
    with tempfile.TemporaryDirectory(prefix="moe_efa_bench_") as folder:
        start: Any = start_processes  # not typed in every torch
        context = start(
            _run_local_rank,
            (config, json_target, f"file://{folder}/store"),
            nprocs=config.ranks,
            join=False,
            start_method="forkserver",
        )
        assert context is not None
        try:
            while not context.join(grace_period=_GRACE_S):
                pass
        except KeyboardInterrupt:
            _end(context.processes)
            print("interrupted", file=sys.stderr)
            return _INTERRUPTED
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


def _run_local_rank(rank: int, config: BenchConfig, json_target: str | None, init_method: str) -> None:
    status = _run_rank(rank, config, json_target, init_method=init_method)
    if status != 0:
        sys.exit(status)


def _run_rank(rank: int, config: BenchConfig, json_target: str | None, *, init_method: str) -> int:
    """One rank, from the rendezvous to the report; returns its exit status."""
    try:
        dist.init_process_group(
            "gloo", init_method=init_method, rank=rank, world_size=config.ranks, timeout=_JOIN_TIMEOUT
        )
        try:
            result = measure(config)
            if rank == 0:
                report(result, json_target)
        finally:
            gc.collect()
            dist.destroy_process_group()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (CheckError, ConfigError, TransportError) as error:
        # Every rank has an error of its own after these; one line says enough.
        if rank == 0 or not isinstance(error, ConfigError):
            _print_error(error, rank)
        return 1
    return 0


def _print_error(error: Exception, rank: int | None = None) -> None:
    where = "" if rank is None else f" on rank {rank}"
    print(f"error{where}: {error}", file=sys.stderr, flush=True)


# --- the exchange to compare with


class TorchExchange:
    """The same exchange as users write it with torch.distributed: one row per (token, expert).

    Rows are sorted by expert, counts and then rows go through ``all_to_all_single``, and the receiver brings them into
    expert-major order; the way back is the reverse, with an fp32 weighted sum over [T, K, H] at the end.
    """

    def __init__(self, num_ranks: int, num_experts: int) -> None:
        self._num_ranks = num_ranks
        self._num_experts = num_experts

    def dispatch(self, x: Tensor, topk_idx: Tensor) -> tuple[Tensor, _TorchHandle]:
        """x [T, H], topk_idx [T, K] without -1 -> rows [rows, H] in the order of ``ExpertParallel.dispatch``."""
        experts_per_rank = self._num_experts // self._num_ranks
        flat = topk_idx.flatten()
        order = flat.argsort(stable=True)
        send_counts = flat.bincount(minlength=self._num_experts)
        recv_counts = torch.empty_like(send_counts)
        dist.all_to_all_single(recv_counts, send_counts)
        send_splits = send_counts.view(self._num_ranks, experts_per_rank).sum(1).tolist()
        recv_splits = recv_counts.view(self._num_ranks, experts_per_rank).sum(1).tolist()
        received = x.new_empty(sum(recv_splits), x.shape[1])
        dist.all_to_all_single(received, x[order // topk_idx.shape[1]], recv_splits, send_splits)
        expert_of_row = torch.arange(experts_per_rank).repeat(self._num_ranks).repeat_interleave(recv_counts)
        arrival = expert_of_row.argsort(stable=True)
        return received[arrival], _TorchHandle(order, arrival, send_splits, recv_splits)

    def combine(self, y: Tensor, topk_weights: Tensor, handle: _TorchHandle) -> Tensor:
        """y [rows, H], topk_weights [T, K] fp32 -> [T, H] in y's dtype."""
        in_arrival_order = torch.empty_like(y)
        in_arrival_order[handle.arrival] = y
        sorted_rows = y.new_empty(topk_weights.numel(), y.shape[1])
        dist.all_to_all_single(sorted_rows, in_arrival_order, handle.send_splits, handle.recv_splits)
        rows = torch.empty_like(sorted_rows)
        rows[handle.order] = sorted_rows
        terms = rows.view(*topk_weights.shape, -1).float() * topk_weights[:, :, None]
        return terms.sum(1).to(y.dtype)


class _TorchHandle(NamedTuple):
    order: Tensor
    arrival: Tensor
    send_splits: list[int]
    recv_splits: list[int]


# --- inputs and checks


class Inputs(NamedTuple):
    """One rank's tokens: x [T, H], topk_idx [T, K] without -1 and without equal ids in a row, topk_weights [T, K]."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


def make_inputs(rank: int, *, tokens: int, hidden: int, topk: int, experts: int, dtype: str, seed: int) -> Inputs:
    """Seeded tokens of a rank; every token selects different experts, all equally likely."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + rank)
    x = torch.randn(tokens, hidden, generator=generator).to(DTYPES[dtype])
    topk_idx = torch.rand(tokens, experts, generator=generator).topk(topk, dim=1).indices
    return Inputs(x, topk_idx, torch.rand(tokens, topk, generator=generator) + 0.05)


def _expert_factors(num_experts: int) -> Tensor:
    """What expert e multiplies its rows with in the checks: different for every expert, exact in bf16."""
    return 1.0 + (torch.arange(num_experts) % 64) / 64.0


def _apply_experts(d: DispatchResult, first_expert: int, num_experts: int) -> Tensor:
    own = _expert_factors(num_experts)[first_expert : first_expert + len(d.tokens_per_expert)]
    return d.x * own.repeat_interleave(d.tokens_per_expert)[:, None].to(d.x.dtype)


def check_small(config: BenchConfig, group: dist.ProcessGroup) -> str:
    """A small round compared bit by bit with ``moe_efa.reference``. Collective.

    Returns:
        What was compared.

    Raises:
        CheckError: on every rank.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    shape = {
        "tokens": 24,
        "hidden": 40,
        "topk": min(config.topk, 4),
        "experts": max(num_ranks, math.ceil(8 / num_ranks) * num_ranks),
    }
    everyone = [make_inputs(r, dtype=config.dtype, seed=config.seed, **shape) for r in range(num_ranks)]
    mine = everyone[rank]
    arguments: dict[str, Any] = config.expert_parallel(
        num_experts=shape["experts"],
        hidden_size=shape["hidden"],
        top_k=shape["topk"],
        max_tokens_per_rank=shape["tokens"],
        chunk_rows=8,
    ).as_dict()
    with ExpertParallel(group, **arguments) as ep:
        d = ep.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
        y = _apply_experts(d, rank * ep.num_local_experts, shape["experts"])
        out = ep.combine(y, d.handle)
        node_size = ep.node_size
    plan = reference.make_plan([inputs.topk_idx for inputs in everyone], num_experts=shape["experts"])
    expected = reference.dispatch([inputs.x for inputs in everyone], [inputs.topk_weights for inputs in everyone], plan)
    factors = _expert_factors(shape["experts"]).to(DTYPES[config.dtype])
    expert_rows = [
        rows.x * factors[[row.expert_idx for row in plan_rows if row is not None]][:, None]
        for rows, plan_rows in zip(expected, plan.rows, strict=True)
    ]
    sums = reference.combine(expert_rows, plan, weights=[rows.weights for rows in expected], node_size=node_size)
    problems = [
        f"{name} differs from the reference"
        for name, actual, wanted in (
            ("dispatched rows", d.x, expected[rank].x),
            ("dispatched weights", d.weights, expected[rank].weights),
            ("combined rows", out, sums[rank]),
        )
        if not _equal_bits(actual, wanted)
    ]
    _raise_together(group, problems, "small shape")
    return "T={tokens} H={hidden} K={topk} E={experts}".format(**shape) + ", bit by bit against moe_efa.reference"


def check_full(config: BenchConfig, group: dist.ProcessGroup, ep: ExpertParallel, mine: Inputs) -> float:
    """A round of the measured shape compared with its dense fp32 meaning, element by element. Collective.

    Expert e multiplies by a factor of its own, so ``out[t] = x[t] * sum over k of w[t, k] * factor[topk_idx[t, k]]``:
    all terms of a sum have one sign, and the roundings on the way (expert, rank, node, output) bound the relative
    error.

    Returns:
        The largest error of any rank, as a fraction of the bound.

    Raises:
        CheckError: on every rank.
    """
    d = ep.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
    out = ep.combine(_apply_experts(d, ep.rank * ep.num_local_experts, config.experts), d.handle)
    factor = (mine.topk_weights.double() * _expert_factors(config.experts)[mine.topk_idx].double()).sum(1)
    expected = mine.x.double() * factor[:, None]
    relative_bound = (1 + _UNIT_ROUNDOFF[config.dtype]) ** 4 - 1 + (config.topk + 4) * 2.0**-23
    error = (out.double() - expected).abs() / (relative_bound * expected.abs() + 1e-30)
    worst_of_row = error.nan_to_num(nan=math.inf).amax(1)
    problems = []
    if bool((worst_of_row > 1).any()):
        bad = (worst_of_row > 1).nonzero()[:, 0]
        problems.append(
            f"{len(bad)} of {len(out)} combined rows are off by more than the format's rounding, first row "
            f"{int(bad[0])} by {float(worst_of_row[bad[0]]):.3g} times the bound"
        )
    _raise_together(group, problems, "measured shape")
    return max(_gather(group, float(worst_of_row.max())))


def check_torch(group: dist.ProcessGroup, ep: ExpertParallel, mine: Inputs, exchange: TorchExchange) -> None:
    """Both exchanges must bring the same rows in the same order, and sums that agree. Collective; CheckError if not."""
    d = ep.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
    rows, handle = exchange.dispatch(mine.x, mine.topk_idx)
    problems = [] if _equal_bits(rows, d.x) else ["torch.distributed brought other rows"]
    if not problems:
        out, torch_out = ep.combine(d.x, d.handle).double(), exchange.combine(rows, mine.topk_weights, handle).double()
        bound = 8 * torch.finfo(mine.x.dtype).eps * torch_out.abs() + 1e-30
        if bool(((out - torch_out).abs() > bound).any()):
            problems.append("torch.distributed and moe_efa combined to different sums")
    _raise_together(group, problems, "torch.distributed")


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _raise_together(group: dist.ProcessGroup, problems: list[str], what: str) -> None:
    for rank, others in enumerate(_gather(group, problems)):
        if others:
            raise CheckError(f"wrong result, {what}, rank {rank}: {'; '.join(others)}")


def _gather(group: dist.ProcessGroup, value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


# --- the copy floor


class RowCounts(NamedTuple):
    """Rows that one rank writes in one round, by what writes them."""

    packed: int
    pulled: int
    published: int
    forwarded: int
    reduced: int

    @property
    def total(self) -> int:
        return sum(self)


def count_rows(topk_idx: Sequence[Tensor], *, rank: int, node_size: int, num_experts: int) -> RowCounts:
    """Rows that ``rank`` must write in one round, from the selections of all ranks.

    Packed: one per (own token, node). Pulled: one per (token, own expert). Published: one per token that has an own
    expert. Forwarded: one per token, of the sources on this rank's rail, that has an expert on this node. Reduced: one
    per own token.

    Two ranks, each a node of its own, each with two experts and two tokens:

    >>> idx = [torch.tensor([[0, 1], [1, 2]]), torch.tensor([[2, 3], [0, 3]])]
    >>> count_rows(idx, rank=0, node_size=1, num_experts=4)
    RowCounts(packed=3, pulled=4, published=3, forwarded=3, reduced=2)
    """
    experts_per_rank = num_experts // len(topk_idx)
    owners = [selection // experts_per_rank for selection in topk_idx]
    node, rail = rank // node_size, rank % node_size
    packed = _count_distinct(owners[rank] // node_size)
    pulled = sum(int((owner == rank).sum()) for owner in owners)
    published = sum(int((owner == rank).any(1).sum()) for owner in owners)
    forwarded = sum(int((owner // node_size == node).any(1).sum()) for owner in owners[rail::node_size])
    return RowCounts(packed, pulled, published, forwarded, len(topk_idx[rank]))


def _count_distinct(values: Tensor) -> int:
    """Distinct values of every row, added over the rows."""
    ordered = values.sort(1).values
    return len(values) + int((ordered[:, 1:] != ordered[:, :-1]).sum())


class CopyFloor:
    """Copies as many rows as a round writes on this rank, each once, between buffers that were touched before."""

    def __init__(self, rows: RowCounts, hidden: int, dtype: torch.dtype) -> None:
        self._rows = rows
        self._sources = [torch.ones(count, hidden, dtype=dtype) for count in rows]
        self._targets = [torch.zeros(count, hidden, dtype=dtype) for count in rows]
        self.nbytes = sum(source.nbytes for source in self._sources)

    def copy(self) -> None:
        for target, source in zip(self._targets, self._sources, strict=True):
            target.copy_(source)


# --- timing


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


@dataclass
class Timer:
    """Times named steps between barriers and keeps, for every iteration, the slowest rank."""

    group: dist.ProcessGroup
    progress: Progress
    seconds: dict[str, list[float]] = field(default_factory=dict)
    on: bool = True

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        dist.barrier(self.group)
        begin = time.perf_counter()
        yield
        elapsed = time.perf_counter() - begin
        if self.on:
            self.seconds.setdefault(name, []).append(elapsed)

    def repeat(self, body: Callable[[], None], *, warmup: int, iters: int) -> dict[str, Timing]:
        """Run the body, which calls :meth:`step`, and return the timings. Collective."""
        self.seconds = {}
        for i in range(warmup + iters):
            self.on = i >= warmup
            body()
            self.progress.advance()
        everyone = _gather(self.group, self.seconds)
        return {
            name: Timing.of(torch.tensor([seconds[name] for seconds in everyone], dtype=torch.float64).amax(0))
            for name in self.seconds
        }


class Progress:
    """A bar on a terminal's stderr, a line per quarter in a log; silent on ranks other than 0."""

    def __init__(self, total: int, *, visible: bool) -> None:
        self._total, self._done, self._visible = total, 0, visible
        self._terminal = visible and sys.stderr.isatty()
        self._stage = ""

    def stage(self, name: str) -> None:
        """Say what follows."""
        self._stage = name
        self._show(force=True)

    def advance(self) -> None:
        self._done += 1
        self._show(force=False)

    def close(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _show(self, *, force: bool) -> None:
        if not self._visible:
            return
        percent = 100 * self._done // max(1, self._total)
        if self._terminal:
            bar = "#" * (percent // 5)
            print(f"\r\x1b[K[{bar:<20}] {percent:3d} % {self._stage}", end="", file=sys.stderr, flush=True)
        elif force:
            print(f"{percent:3d} % {self._stage}", file=sys.stderr, flush=True)


# --- the measurement


def measure(config: BenchConfig) -> dict[str, Any]:
    """Check, then time. Collective over the default process group; every rank gets the result.

    Raises:
        CheckError, ConfigError, TransportError: on every rank.
    """
    group = dist.group.WORLD
    assert group is not None
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    hosts = _gather(group, platform.node())
    threads = env.num_threads(hosts.count(hosts[rank]))
    torch.set_num_threads(threads)
    rounds = config.warmup + config.iters
    progress = Progress(rounds * (2 if config.baseline else 1), visible=rank == 0)
    timer = Timer(group, progress)

    progress.stage("checking a small shape")
    small = check_small(config, group)
    mine = make_inputs(
        rank,
        tokens=config.tokens,
        hidden=config.hidden,
        topk=config.topk,
        experts=config.experts,
        dtype=config.dtype,
        seed=config.seed,
    )
    exchange = TorchExchange(num_ranks, config.experts)

    def torch_round() -> None:
        # An untimed round first: what the others left behind in caches and in the allocator is not counted.
        rows, handle = exchange.dispatch(mine.x, mine.topk_idx)
        exchange.combine(rows, mine.topk_weights, handle)
        del rows, handle
        with timer.step("torch both"):
            rows, handle = exchange.dispatch(mine.x, mine.topk_idx)
            exchange.combine(rows, mine.topk_weights, handle)
        del rows, handle
        with timer.step("torch dispatch"):
            rows, handle = exchange.dispatch(mine.x, mine.topk_idx)
        with timer.step("torch combine"):
            exchange.combine(rows, mine.topk_weights, handle)

    torch_timings: dict[str, dict[str, Timing]] = {}
    if config.baseline:
        progress.stage("torch.distributed, before moe_efa has any thread")
        alone = timer.repeat(torch_round, warmup=config.warmup, iters=config.iters)
        torch_timings["before"] = _select(alone, "torch")

    arguments: dict[str, Any] = config.expert_parallel().as_dict()
    with ExpertParallel(group, **arguments) as ep:
        progress.stage("checking the measured shape")
        error_of_bound = check_full(config, group, ep, mine)
        if config.baseline:
            check_torch(group, ep, mine, exchange)

        def our_round() -> None:
            d = ep.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
            ep.combine(d.x, d.handle)
            del d
            with timer.step("moe_efa both"):
                d = ep.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
                ep.combine(d.x, d.handle)
            del d
            with timer.step("moe_efa dispatch"):
                d = ep.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
            with timer.step("moe_efa combine"):
                ep.combine(d.x, d.handle)

        rows = count_rows(_gather(group, mine.topk_idx), rank=rank, node_size=ep.node_size, num_experts=config.experts)
        copies = CopyFloor(rows, config.hidden, DTYPES[config.dtype]) if config.baseline else None

        def whole_round() -> None:
            # In turn, so that whatever else the host does meets all of them alike.
            our_round()
            if copies is not None:
                torch_round()
                copies.copy()
                with timer.step("copy"):
                    copies.copy()

        progress.stage("moe_efa" if copies is None else "moe_efa, torch.distributed and the copy floor in turn")
        before = ep.stats()
        timings = timer.repeat(whole_round, warmup=config.warmup, iters=config.iters)
        after = ep.stats()
        info, node_size = ep.info(), ep.node_size
    ours = _select(timings, "moe_efa")
    floor = timings.get("copy")
    if config.baseline:
        torch_timings["after"] = _select(timings, "torch")
    progress.close()

    wire = _wire(group, before, after)
    all_rows = _gather(group, rows)
    row_bytes = config.hidden * DTYPES[config.dtype].itemsize
    # The faster of torch's two runs, phase by phase.
    phases = ("dispatch", "combine", "both") if torch_timings else ()
    best = {phase: min(torch_timings, key=lambda when: torch_timings[when][phase].p50_s) for phase in phases}
    return {
        "benchmark": "dispatch_combine",
        "conditions": {
            "version": __version__,
            "ranks": num_ranks,
            "nodes": num_ranks // node_size,
            "node_size": node_size,
            "hosts": len(set(hosts)),
            "transport": str(info["transport"]),
            "tokens": config.tokens,
            "hidden": config.hidden,
            "topk": config.topk,
            "experts": config.experts,
            "dtype": config.dtype,
            "iterations": config.iters,
            "warmup": config.warmup,
            "seed": config.seed,
            "chunk_rows": info["chunk_rows"],
            "slots": info["slots"],
            "registered_bytes": info["registered_bytes"],
            "cores": len(os.sched_getaffinity(0)),
            "threads_per_rank": info["num_threads"],
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
        "checks": {"small": small, "full_error_of_bound": error_of_bound, "torch_equal": config.baseline or None},
        "moe_efa": {name: _timing_dict(timing) for name, timing in ours.items()},
        "rates": _rates(ours, all_rows, wire, row_bytes),
        "wire": wire,
        "torch": {
            "best": best,
            **{when: {k: _timing_dict(v) for k, v in timings.items()} for when, timings in torch_timings.items()},
        }
        if best
        else None,
        "copy_floor": None
        if floor is None
        else {
            **_timing_dict(floor),
            "bytes_per_rank": max(row.total for row in all_rows) * row_bytes,
            "rows": {name: max(row._asdict()[name] for row in all_rows) for name in RowCounts._fields},
        },
        "ratios": _ratios(ours, {phase: torch_timings[when][phase] for phase, when in best.items()} or None, floor),
    }


def _select(timings: dict[str, Timing], who: str) -> dict[str, Timing]:
    return {name: timings[f"{who} {name}"] for name in ("dispatch", "combine", "both")}


def _wire(group: dist.ProcessGroup, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Bytes per round of all ranks together, by phase."""
    wire: dict[str, Any] = {}
    for name in ("dispatch", "combine"):
        calls = after[name]["calls"] - before[name]["calls"]
        bytes_and_floor = [(after[name][key] - before[name][key]) / calls for key in ("wire_bytes", "wire_floor_bytes")]
        sent, floor = (sum(column) for column in zip(*_gather(group, bytes_and_floor), strict=True))
        wire[name] = {"bytes": sent, "floor_bytes": floor, "ratio": sent / floor if floor else None}
    sent, floor = (sum(wire[name][key] for name in ("dispatch", "combine")) for key in ("bytes", "floor_bytes"))
    rounds = after["rounds"] - before["rounds"]
    writes = sum(_gather(group, (after["writes"] - before["writes"]) / rounds))
    return {"bytes": sent, "floor_bytes": floor, "ratio": sent / floor if floor else None, "writes": writes, **wire}


def _rates(
    ours: dict[str, Timing], all_rows: Sequence[RowCounts], wire: dict[str, Any], row_bytes: int
) -> dict[str, Any]:
    """GB/s per rank (mean over ranks) at the median time."""
    num_ranks = len(all_rows)
    logical = sum(rows.pulled for rows in all_rows) * row_bytes / num_ranks
    rates = {}
    for name, timing in ours.items():
        phases = ("dispatch", "combine") if name == "both" else (name,)
        wire_bytes = sum(wire[phase]["bytes"] for phase in phases) / num_ranks
        rates[name] = {
            "logical_gb_per_s": len(phases) * logical / timing.p50_s / 1e9,
            "wire_gb_per_s": wire_bytes / timing.p50_s / 1e9,
        }
    return rates


def _ratios(
    ours: dict[str, Timing], torch_best: dict[str, Timing] | None, floor: Timing | None
) -> dict[str, float | None]:
    return {
        "torch_over_moe_efa": torch_best["both"].p50_s / ours["both"].p50_s if torch_best else None,
        "torch_over_moe_efa_dispatch": torch_best["dispatch"].p50_s / ours["dispatch"].p50_s if torch_best else None,
        "torch_over_moe_efa_combine": torch_best["combine"].p50_s / ours["combine"].p50_s if torch_best else None,
        "moe_efa_over_copy_floor": ours["both"].p50_s / floor.p50_s if floor else None,
    }


def _timing_dict(timing: Timing) -> dict[str, float]:
    return {name.replace("_s", "_us"): 1e6 * value for name, value in asdict(timing).items()}


# --- the report


def report(result: dict[str, Any], json_target: str | None) -> None:
    """Print the table, and write JSON where it was asked for."""
    print(format_table(result), file=sys.stderr if json_target == "-" else sys.stdout, flush=True)
    if json_target is None:
        return
    text = json.dumps(result, indent=2)
    if json_target == "-":
        print(text, flush=True)
    else:
        Path(json_target).write_text(text + "\n")


def format_table(result: dict[str, Any]) -> str:
    """The result for people."""
    c, wire, ratios, checks = (result[key] for key in ("conditions", "wire", "ratios", "checks"))
    facts = [
        ("ranks", f"{c['ranks']} in {c['nodes']} nodes of {c['node_size']}, on {c['hosts']} host(s)"),
        ("between nodes", c["transport"] if c["nodes"] > 1 else "nothing (one node)"),
        ("shape", f"T={c['tokens']} per rank, H={c['hidden']}, K={c['topk']}, E={c['experts']}, {c['dtype']}"),
        ("rings", f"{c['slots']} slots of {c['chunk_rows']} rows, {c['registered_bytes'] / 2**20:.0f} MiB per rank"),
        ("host", f"{c['cores']} cores ({c['machine']}), {c['threads_per_rank']} kernel thread(s) per rank"),
        ("torch", f"{c['torch']}, {c['torch_threads']} thread(s) per rank"),
        ("iterations", f"{c['iterations']} after {c['warmup']} for warming up, seed {c['seed']}"),
        ("checked", checks["small"]),
        ("", f"measured shape against fp32: largest error {checks['full_error_of_bound']:.2f} of the rounding bound"),
    ]
    if checks["torch_equal"]:
        facts.append(("", "torch.distributed: equal rows bit by bit, equal sums within rounding"))
    lines = [f"moe_efa {c['version']}: dispatch and combine"]
    lines += [f"  {name:<14}{text}" for name, text in facts]
    lines += [
        "counted         time of the slowest rank per iteration, barrier before each untimed; no expert compute",
        "                GB/s per rank at p50: rows = rows received x H x element; wire = bytes sent to other nodes",
        "",
        f"  {'':<34}{'p50':>11}{'p95':>11}{'max':>11}{'rows GB/s':>11}{'wire GB/s':>11}",
    ]
    for name in ("dispatch", "combine", "both"):
        rates = result["rates"][name]
        tail = f"{rates['logical_gb_per_s']:>11.2f}{rates['wire_gb_per_s']:>11.2f}"
        lines.append(_row(f"moe_efa {name}", result["moe_efa"][name]) + tail)
    if result["torch"]:
        for when, meaning in (("before", "no moe_efa yet"), ("after", "in turn")):
            for name in ("dispatch", "combine", "both"):
                lines.append(_row(f"torch {name} ({meaning})", result["torch"][when][name]))
    floor = result["copy_floor"]
    if floor:
        lines.append(_row(f"copy floor ({floor['bytes_per_rank'] / 1e6:.0f} MB per rank)", floor))
    lines += ["", f"  {'bytes per round, all ranks':<34}{'sent':>11}{'floor':>11}{'ratio':>11}"]
    for name in ("dispatch", "combine", "both"):
        numbers = wire if name == "both" else wire[name]
        ratio = "-" if numbers["ratio"] is None else f"{numbers['ratio']:.4f}"
        label = f"wire {name}"
        sent, least = numbers["bytes"] / 1e6, numbers["floor_bytes"] / 1e6
        lines.append(f"  {label:<34}{sent:>8.2f} MB{least:>8.2f} MB{ratio:>11}")
    if result["torch"]:
        lines += [
            "",
            f"  torch.distributed / moe_efa   {ratios['torch_over_moe_efa']:.2f}"
            f"   (dispatch {ratios['torch_over_moe_efa_dispatch']:.2f},"
            f" combine {ratios['torch_over_moe_efa_combine']:.2f}; each against the faster of torch's two runs)",
            f"  moe_efa / copy floor          {ratios['moe_efa_over_copy_floor']:.2f}",
        ]
    return "\n".join(lines)


def _row(label: str, timing: dict[str, float]) -> str:
    cells = "".join(f"{_duration(timing[key]):>11}" for key in ("p50_us", "p95_us", "max_us"))
    return f"  {label:<34}{cells}"


def _duration(microseconds: float) -> str:
    return f"{microseconds:.1f} us" if microseconds < 1000 else f"{microseconds / 1000:.2f} ms"
